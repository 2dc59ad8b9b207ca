// Parts of dot products with one fixed order: a sum advances in steps of one vector, then one fixed tree adds its lanes. So
// the bits depend only on the two rows.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace moiety {

using bf16 = std::uint16_t;

// One step along a row, per element type: its length, and loads of that many elements or fewer.
template <class T>
struct Step;

template <>
struct Step<float> {
    static constexpr std::int64_t length = 16;
    using Vector = __m512;
    static Vector load(const float* from) { return _mm512_loadu_ps(from); }
    static Vector load(const float* from, std::int64_t count) {
        return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from);
    }
};

template <>
struct Step<bf16> {
    static constexpr std::int64_t length = 32;
    using Vector = __m512i;
    static Vector load(const bf16* from) { return _mm512_loadu_si512(from); }
    static Vector load(const bf16* from, std::int64_t count) {
        return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((1ull << count) - 1), from);
    }
};

// Lane i of the result is the sum of the lanes of sums[i]: the same tree for every i.
inline __m512 reduce(const __m512 (&sums)[16]) {
    __m512 pairs[8], quads[4], halves[2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
        pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(sums[2 * i], sums[2 * i + 1]),
                                 _mm512_unpackhi_ps(sums[2 * i], sums[2 * i + 1]));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
        quads[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
        halves[i] = _mm512_add_ps(_mm512_shuffle_f32x4(quads[2 * i], quads[2 * i + 1], 0x88),
                                  _mm512_shuffle_f32x4(quads[2 * i], quads[2 * i + 1], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(halves[0], halves[1], 0x88),
                         _mm512_shuffle_f32x4(halves[0], halves[1], 0xdd));
}

}  // namespace moiety
