// Register tiles of matrix products: OB rows of a weight times RB rows of x, each a dot product over D.
//
// Every output element has one accumulator that walks D in steps of one vector and is then summed by one fixed tree. Its
// bits therefore depend neither on the tile it was computed in nor on the other rows of the call.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace moiety {

using bf16 = std::uint16_t;

inline float to_float(float value) { return value; }
inline float to_float(bf16 value) {
    const std::uint32_t bits = static_cast<std::uint32_t>(value) << 16;
    float out;
    __builtin_memcpy(&out, &bits, sizeof out);
    return out;
}

inline bf16 to_bf16(float value) { return static_cast<bf16>(_mm_extract_epi16((__m128i)_mm_cvtneps_pbh(_mm_set_ss(value)), 0)); }

// The value after a rounding to T, still as a float: torch rounds to the rows' dtype after every operation.
template <class T>
inline float rounded(float value);
template <>
inline float rounded<float>(float value) { return value; }
template <>
inline float rounded<bf16>(float value) { return to_float(to_bf16(value)); }

inline void store(float* to, float value) { *to = value; }
inline void store(bf16* to, float value) { *to = to_bf16(value); }

// What one step along D is, per element type: its length, a load of at most that many elements, and multiply-add.
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
    static __m512 add(__m512 sum, Vector a, Vector b) { return _mm512_fmadd_ps(a, b, sum); }
};

template <>
struct Step<bf16> {
    static constexpr std::int64_t length = 32;
    using Vector = __m512i;
    static Vector load(const bf16* from) { return _mm512_loadu_si512(from); }
    static Vector load(const bf16* from, std::int64_t count) {
        return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((1ull << count) - 1), from);
    }
    static __m512 add(__m512 sum, Vector a, Vector b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
};

// Lane i of the result is the sum of the lanes of sums[i]: the same tree for every i.
inline __m512 reduce(const __m512 (&sums)[16]) {
    __m512 pairs[8], quads[4], halves[2];
    for (int i = 0; i < 8; ++i)
        pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(sums[2 * i], sums[2 * i + 1]),
                                 _mm512_unpackhi_ps(sums[2 * i], sums[2 * i + 1]));
    for (int i = 0; i < 4; ++i) {
        const __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
        quads[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    for (int i = 0; i < 2; ++i)
        halves[i] = _mm512_add_ps(_mm512_shuffle_f32x4(quads[2 * i], quads[2 * i + 1], 0x88),
                                  _mm512_shuffle_f32x4(quads[2 * i], quads[2 * i + 1], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(halves[0], halves[1], 0x88),
                         _mm512_shuffle_f32x4(halves[0], halves[1], 0xdd));
}

// out[r * ldo + o] = x[r, :] . w[o, :] for OB x RB elements. The tile's weights lie in `w`; `next` is where the following
// tile's begin (or null): they are fetched while this one is computed.
template <class T, int OB, int RB>
inline void tile(const T* x, std::int64_t ldx, const T* w, std::int64_t ldw, const T* next, std::int64_t depth, float* out,
                 std::int64_t ldo) {
    constexpr int count = OB * RB, vectors = (count + 15) / 16 * 16;
    using S = Step<T>;
    __m512 sums[vectors];
#pragma GCC unroll 32
    for (int i = 0; i < vectors; ++i) sums[i] = _mm512_setzero_ps();
    std::int64_t d = 0;
    for (; d + S::length <= depth; d += S::length) {
        typename S::Vector rows[RB];
#pragma GCC unroll 8
        for (int r = 0; r < RB; ++r) rows[r] = S::load(x + r * ldx + d);
#pragma GCC unroll 16
        for (int o = 0; o < OB; ++o) {
            const typename S::Vector weights = S::load(w + o * ldw + d);
            if (next) _mm_prefetch(reinterpret_cast<const char*>(next + o * ldw + d), _MM_HINT_T0);
#pragma GCC unroll 8
            for (int r = 0; r < RB; ++r) sums[r * OB + o] = S::add(sums[r * OB + o], rows[r], weights);
        }
    }
    if (d < depth) {
        typename S::Vector rows[RB];
#pragma GCC unroll 8
        for (int r = 0; r < RB; ++r) rows[r] = S::load(x + r * ldx + d, depth - d);
#pragma GCC unroll 16
        for (int o = 0; o < OB; ++o) {
            const typename S::Vector weights = S::load(w + o * ldw + d, depth - d);
#pragma GCC unroll 8
            for (int r = 0; r < RB; ++r) sums[r * OB + o] = S::add(sums[r * OB + o], rows[r], weights);
        }
    }
    alignas(64) float flat[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors / 16; ++v) {
        __m512 part[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) part[i] = sums[16 * v + i];
        _mm512_store_ps(flat + 16 * v, reduce(part));
    }
    for (int r = 0; r < RB; ++r)
        for (int o = 0; o < OB; ++o) out[r * ldo + o] = flat[r * OB + o];
}

// OB weight rows times all `rows` rows of x. 24 sums of 32 registers: few loads per product, and enough of them in flight.
template <class T, int OB>
inline void strip(const T* x, std::int64_t ldx, std::int64_t rows, const T* w, std::int64_t ldw, const T* next,
                  std::int64_t depth, float* out, std::int64_t ldo) {
    std::int64_t r = 0;
    for (; r + 3 <= rows; r += 3, next = nullptr) tile<T, OB, 3>(x + r * ldx, ldx, w, ldw, next, depth, out + r * ldo, ldo);
    if (rows - r == 2) tile<T, OB, 2>(x + r * ldx, ldx, w, ldw, next, depth, out + r * ldo, ldo);
    if (rows - r == 1) tile<T, OB, 1>(x + r * ldx, ldx, w, ldw, next, depth, out + r * ldo, ldo);
}

// out[r * ldo + o] = x[r, :] . w[o, :], all rows, `width` weight rows.
template <class T>
inline void product(const T* x, std::int64_t ldx, std::int64_t rows, const T* w, std::int64_t ldw, std::int64_t width,
                    std::int64_t depth, float* out, std::int64_t ldo) {
    std::int64_t o = 0;
    for (; o + 8 <= width; o += 8) {
        const T* here = w + o * ldw;
        strip<T, 8>(x, ldx, rows, here, ldw, o + 16 <= width ? here + 8 * ldw : nullptr, depth, out + o, ldo);
    }
    for (; o < width; ++o) strip<T, 1>(x, ldx, rows, w + o * ldw, ldw, nullptr, depth, out + o, ldo);
}

}  // namespace moiety
