// RMS normalisation of rows in one call; torch takes six operations and as many tensors.

#include "numbers.h"

namespace moiety {
namespace {

// y = weight * round(x / rms(x)), or round(weight * x / rms(x)) when `late`. `offset` is added to weight. A single vector of
// sums runs along the row, so a row's bits depend only on the row.
template <class T>
void rms_norm(const T* x, int64_t ldx, const T* weight, T* y, int64_t rows, int64_t depth, float epsilon, float offset,
              bool late) {
    const __m512 shift = _mm512_set1_ps(offset);
    for (int64_t r = 0; r < rows; ++r, x += ldx, y += depth) {
        __m512 squares = _mm512_setzero_ps();
        for (int64_t d = 0; d < depth; d += 16) {
            const __m512 values = load(x + d, depth - d);
            squares = _mm512_fmadd_ps(values, values, squares);
        }
        const float mean = _mm512_reduce_add_ps(squares) / static_cast<float>(depth);
        const __m512 scale = _mm512_set1_ps(1.0f / __builtin_sqrtf(mean + epsilon));
        for (int64_t d = 0; d < depth; d += 16) {
            __m512 values = _mm512_mul_ps(load(x + d, depth - d), scale);
            if (!late) values = rounded<T>(values);
            store(y + d, depth - d, _mm512_mul_ps(values, _mm512_add_ps(load(weight + d, depth - d), shift)));
        }
    }
}

}  // namespace
}  // namespace moiety

using moiety::bf16;
using std::int64_t;

extern "C" {

void moiety_rms_norm_f32(const float* x, int64_t ldx, const float* weight, float* y, int64_t rows, int64_t depth, float epsilon,
                         float offset, int late) {
    moiety::rms_norm(x, ldx, weight, y, rows, depth, epsilon, offset, late != 0);
}

void moiety_rms_norm_bf16(const bf16* x, int64_t ldx, const bf16* weight, bf16* y, int64_t rows, int64_t depth, float epsilon,
                          float offset, int late) {
    moiety::rms_norm(x, ldx, weight, y, rows, depth, epsilon, offset, late != 0);
}

}
