// RMS normalisation of rows in one call; torch takes six operations and as many tensors.

#include "calls.h"
#include "numbers.h"

namespace moiety {
namespace {

// y = weight * round(x / rms(x)), or round(weight * x / rms(x)) when `late`. `offset` is added to weight. A single vector of
// sums runs along the row, so a row's bits depend only on the row.
template <class T>
void rms_norm(const NormCall& call) {
    const T *x = static_cast<const T*>(call.x), *const weight = static_cast<const T*>(call.weight);
    T* y = static_cast<T*>(call.out);
    const int64_t depth = call.depth;
    const __m512 shift = _mm512_set1_ps(call.offset);
    for (int64_t r = 0; r < call.rows; ++r, x += call.x_stride, y += depth) {
        __m512 squares = _mm512_setzero_ps();
        for (int64_t d = 0; d < depth; d += 16) {
            const __m512 values = load(x + d, depth - d);
            squares = _mm512_fmadd_ps(values, values, squares);
        }
        const float mean = _mm512_reduce_add_ps(squares) / static_cast<float>(depth);
        const __m512 scale = _mm512_set1_ps(1.0f / __builtin_sqrtf(mean + call.epsilon));
        for (int64_t d = 0; d < depth; d += 16) {
            __m512 values = _mm512_mul_ps(load(x + d, depth - d), scale);
            if (!call.late) values = rounded<T>(values);
            store(y + d, depth - d, _mm512_mul_ps(values, _mm512_add_ps(load(weight + d, depth - d), shift)));
        }
    }
}

}  // namespace
}  // namespace moiety

extern "C" {

void moiety_rms_norm_f32(const moiety::NormCall& call) { moiety::rms_norm<float>(call); }
void moiety_rms_norm_bf16(const moiety::NormCall& call) { moiety::rms_norm<moiety::bf16>(call); }

}
