// Element types, and their conversion and rounding.
#pragma once

#include "tile.h"

namespace moiety {

using std::int64_t;

inline __m512 widen(__m256i halves) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16)); }

// Rounds to nearest, ties to even. NaN stays NaN, whatever its payload.
inline __m256i narrow(__m512 values) {
    const __m512i bits = _mm512_castps_si512(values);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_blend_epi32(nan, up, _mm512_set1_epi32(0x7fc00000)), 16));
}

// A mask of the first `count` lanes.
inline __mmask16 first(std::int64_t count) { return static_cast<__mmask16>(count >= 16 ? 0xffff : (1u << count) - 1); }

struct half {
    std::uint16_t bits;
};

// Load or store 16 values of T as floats. Only the first `count` are accessed; stores round to T.
inline __m512 load(const float* from, std::int64_t count) { return _mm512_maskz_loadu_ps(first(count), from); }
inline __m512 load(const bf16* from, std::int64_t count) { return widen(_mm256_maskz_loadu_epi16(first(count), from)); }
inline __m512 load(const half* from, std::int64_t count) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(count), from));
}
inline void store(float* to, std::int64_t count, __m512 values) { _mm512_mask_storeu_ps(to, first(count), values); }
inline void store(bf16* to, std::int64_t count, __m512 values) { _mm256_mask_storeu_epi16(to, first(count), narrow(values)); }

// Rounds values to T and returns them as floats: torch rounds to the rows' dtype after every operation.
template <class T>
inline __m512 rounded(__m512 values);
template <>
inline __m512 rounded<float>(__m512 values) { return values; }
template <>
inline __m512 rounded<bf16>(__m512 values) { return widen(narrow(values)); }

}  // namespace moiety
