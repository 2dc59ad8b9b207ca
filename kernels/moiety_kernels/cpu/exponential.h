// e^x, sigmoid and tanh of float32 vectors, with error bounds.
#pragma once

#include <immintrin.h>

namespace moiety {

// e^x for x up to 200: an exact 0 below -150, infinity where a float overflows, NaN for NaN, within 0.9 units in the last
// place of a normal result. The argument is reduced by ln 2 in two parts, and the remainder goes into a minimax polynomial of
// degree 6.
inline __m512 exponential(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
    __m512 p = _mm512_set1_ps(1.3814222e-3f);
    for (const float c : {8.3688991e-3f, 4.1668404e-2f, 1.666652e-1f, 4.9999994e-1f, 1.0f, 1.0f})
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    return _mm512_scalef_ps(p, n);
}

inline float exponential(float x) { return _mm512_cvtss_f32(exponential(_mm512_set1_ps(x))); }

// 1 / (1 + e^-x), within 2.5 units in the last place of a normal result; 0 below -89, NaN for NaN.
inline __m512 sigmoid(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f);
    const __m512 opposite = _mm512_min_ps(_mm512_set1_ps(200.0f), _mm512_sub_ps(_mm512_setzero_ps(), x));
    return _mm512_div_ps(one, _mm512_add_ps(one, exponential(opposite)));
}

// tanh x within 1.5 units in the last place. Near 0, where 1 - e^-2x would cancel, the odd polynomial of Cephes' tanhf.
inline __m512 hyperbolic_tangent(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f), size = _mm512_abs_ps(x), square = _mm512_mul_ps(x, x);
    __m512 p = _mm512_set1_ps(-5.70498872745e-3f);
    for (const float c : {2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f, -3.33332819422e-1f})
        p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(c));
    const __m512 near = _mm512_fmadd_ps(_mm512_mul_ps(p, square), x, x);
    const __m512 e = exponential(_mm512_mul_ps(size, _mm512_set1_ps(-2.0f)));
    const __m512 far = _mm512_div_ps(_mm512_sub_ps(one, e), _mm512_add_ps(one, e));
    const __m512 sign = _mm512_and_ps(x, _mm512_set1_ps(-0.0f));
    const __mmask16 is_near = _mm512_cmp_ps_mask(size, _mm512_set1_ps(0.625f), _CMP_LT_OQ);
    return _mm512_mask_blend_ps(is_near, _mm512_or_ps(far, sign), near);
}

}  // namespace moiety
