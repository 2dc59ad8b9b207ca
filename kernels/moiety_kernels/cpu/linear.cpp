// y = x w^T + bias: for the few rows of a decode step, or for any number of rows where bits must not depend on the batch.

#include "calls.h"
#include "product.h"
#include "scratch.h"

namespace moiety {
namespace {

constexpr int64_t rows_at_once = 192;  // packed rows at D = 1024 take 768 KiB, which leaves room in L2 for a chunk of weights

template <class T, class W>
void linear(const LinearCall& call) {
    const T *x = static_cast<const T*>(call.x), *const bias = static_cast<const T*>(call.bias);
    T* y = static_cast<T*>(call.out);
    const int64_t ldx = call.x_stride, rows = call.rows, depth = call.depth, width = call.width;
    static thread_local Scratch scratch;
    float* packed = scratch.at_least(std::min(rows, rows_at_once) * packed_row<W>(depth));
    const Matrix<W> weights{static_cast<const T*>(call.weight), nullptr, call.weight_stride};
    const int64_t flops = 2 * std::min(rows, rows_at_once) * width * depth;
    const int threads = worth_threads(width * depth * sizeof(T), flops, call.threads);
    const int64_t chunks = (width + chunk_columns - 1) / chunk_columns;
    for (int64_t start = 0; start < rows; start += rows_at_once, x += rows_at_once * ldx, y += rows_at_once * width) {
        const int64_t some = std::min(rows_at_once, rows - start);
        pack<W>(x, ldx, some, depth, packed);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            const int64_t begin = chunk * chunk_columns, columns = std::min(chunk_columns, width - begin);
            for_row_tiles(some, [&](int64_t row, int64_t height) {
                alignas(64) float sums[tile_rows * chunk_columns];
                product(packed + row * packed_row<W>(depth), height, weights, begin, columns, depth, sums, chunk_columns);
                for (int64_t r = 0; r < height; ++r)
                    for (int64_t o = 0; o < columns; o += 16) {
                        const int64_t count = columns - o;
                        __m512 sum = _mm512_load_ps(sums + r * chunk_columns + o);
                        if (bias) sum = _mm512_add_ps(sum, load(bias + begin + o, count));
                        store(y + (row + r) * width + begin + o, count, sum);
                    }
            });
        }
    }
}

}  // namespace
}  // namespace moiety

using moiety::bf16;

extern "C" {

void moiety_linear_f32(const moiety::LinearCall& call) { moiety::linear<float, float>(call); }
void moiety_linear_bf16(const moiety::LinearCall& call) { moiety::linear<bf16, bf16>(call); }
void moiety_linear_bf16_pairs(const moiety::LinearCall& call) { moiety::linear<bf16, moiety::Pairs>(call); }

}
