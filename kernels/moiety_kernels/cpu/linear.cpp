// y = x w^T + bias, for the few rows of a decode step and, where bits must not depend on the batch, for any number.

#include <algorithm>

#include "tile.h"

namespace moiety {
namespace {

constexpr std::int64_t rows_at_once = 96, columns_at_once = 64;

template <class T>
void linear(const T* x, std::int64_t ldx, const T* w, std::int64_t ldw, const T* bias, T* y, std::int64_t rows,
            std::int64_t depth, std::int64_t width, int threads) {
    const std::int64_t pieces = (width + columns_at_once - 1) / columns_at_once;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (std::int64_t piece = 0; piece < pieces; ++piece) {
        alignas(64) float sums[rows_at_once * columns_at_once];
        const std::int64_t begin = piece * columns_at_once, columns = std::min(columns_at_once, width - begin);
        for (std::int64_t r = 0; r < rows; r += rows_at_once) {
            const std::int64_t some = std::min(rows_at_once, rows - r);
            product(x + r * ldx, ldx, some, w + begin * ldw, ldw, columns, depth, sums, columns_at_once);
            for (std::int64_t i = 0; i < some; ++i)
                for (std::int64_t o = 0; o < columns; ++o) {
                    const float sum = sums[i * columns_at_once + o];
                    store(y + (r + i) * width + begin + o, bias ? sum + to_float(bias[begin + o]) : sum);
                }
        }
    }
}

}  // namespace
}  // namespace moiety

extern "C" {

void moiety_linear_f32(const float* x, std::int64_t ldx, const float* w, std::int64_t ldw, const float* bias, float* y,
                       std::int64_t rows, std::int64_t depth, std::int64_t width, int threads) {
    moiety::linear(x, ldx, w, ldw, bias, y, rows, depth, width, threads);
}

void moiety_linear_bf16(const moiety::bf16* x, std::int64_t ldx, const moiety::bf16* w, std::int64_t ldw,
                        const moiety::bf16* bias, moiety::bf16* y, std::int64_t rows, std::int64_t depth,
                        std::int64_t width, int threads) {
    moiety::linear(x, ldx, w, ldw, bias, y, rows, depth, width, threads);
}

}
