// y = x w^T + bias: for the few rows of a decode step, or for any number of rows where bits must not depend on the batch.

#include "product.h"

namespace moiety {
namespace {

constexpr int64_t rows_at_once = 192;  // packed rows at D = 1024 take 768 KiB, which leaves room in L2 for a chunk of weights

template <class W, class T>
void linear(const T* x, int64_t ldx, const T* w, int64_t ldw, const T* bias, T* y, int64_t rows, int64_t depth, int64_t width,
            int threads) {
    static thread_local Scratch scratch;
    float* packed = scratch.floats(std::min(rows, rows_at_once) * packed_row<W>(depth));
    const Matrix<W> weights{w, nullptr, ldw};
    threads = worth_threads(width * depth * sizeof(T), 2 * std::min(rows, rows_at_once) * width * depth, threads);
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
using std::int64_t;

extern "C" {

void moiety_linear_f32(const float* x, int64_t ldx, const float* w, int64_t ldw, const float* bias, float* y, int64_t rows,
                       int64_t depth, int64_t width, int threads) {
    moiety::linear<float>(x, ldx, w, ldw, bias, y, rows, depth, width, threads);
}

void moiety_linear_bf16(const bf16* x, int64_t ldx, const bf16* w, int64_t ldw, const bf16* bias, bf16* y, int64_t rows,
                        int64_t depth, int64_t width, int threads) {
    moiety::linear<bf16>(x, ldx, w, ldw, bias, y, rows, depth, width, threads);
}

void moiety_linear_bf16_pairs(const bf16* x, int64_t ldx, const bf16* w, int64_t ldw, const bf16* bias, bf16* y, int64_t rows,
                              int64_t depth, int64_t width, int threads) {
    moiety::linear<moiety::Pairs>(x, ldx, w, ldw, bias, y, rows, depth, width, threads);
}

}
