// How rows of x are packed for the products of one call, per format of the weights.
#pragma once

#include <algorithm>

#include "numbers.h"

namespace moiety {

constexpr int64_t tile_rows = 6;  // rows of x in one register tile: 6 x 4 or 3 x 8 sums leave 8 of 32 registers free

// Tags for weight formats without a C++ type: bf16 multiplied in pairs, four-bit integers with scales of type S, int8 with
// unquantised rows of x, fp8 e4m3, mxfp4 (e2m1).
struct Pairs;
template <class S>
struct Int4;
struct Int8;
struct Fp8;
struct Mxfp4;

// How weights of format W are multiplied by x: in steps of `length` elements. A packed row has a head of `head` floats, then
// `floats` floats per step. bf16 is widened to float in registers, even and odd elements separately, or multiplied in Pairs
// by vdpbf16ps. That instruction does 86 GFLOP/s on one Sapphire Rapids core, where two float multiply-adds do 177; on AMD's
// cores from Zen 4 on it does twice what they do. Callers choose by CPU. Both ways have a fixed order of summation.
template <class W>
struct Packing;

// The element type of a matrix of format W.
template <class W>
struct Element {
    using type = W;
};
template <>
struct Element<Pairs> {
    using type = bf16;
};

template <>
struct Packing<float> {
    static constexpr int64_t length = 16, floats = 16, head = 0;
    using Sum = __m512;
    using Weights = __m512;
    using Row = __m512;
    static Weights read(const float* from) { return _mm512_loadu_ps(from); }
    static Weights read(const float* from, int64_t count) { return load(from, count); }
    static Row row(const float* x) { return _mm512_load_ps(x); }
    static Sum start(const float*) { return _mm512_setzero_ps(); }
    static Sum add(Sum sum, Weights w, Row x) { return _mm512_fmadd_ps(w, x, sum); }
    static __m512 value(Sum sum) { return sum; }
};

template <>
struct Packing<bf16> {
    static constexpr int64_t length = 32, floats = 32, head = 0;
    struct Weights {
        __m512 even, odd;
    };
    using Sum = __m512;
    using Row = const float*;  // too many values for registers: the multiply-adds read them from L1
    static Weights split(__m512i pairs) {
        return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)),
                _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
    }
    static Weights read(const bf16* from) { return split(_mm512_loadu_si512(from)); }
    static Weights read(const bf16* from, int64_t count) {
        return split(_mm512_maskz_loadu_epi16(static_cast<__mmask32>((1ull << count) - 1), from));
    }
    static Row row(const float* x) { return x; }
    static Sum start(const float*) { return _mm512_setzero_ps(); }
    static Sum add(Sum sum, Weights w, Row x) {
        return _mm512_fmadd_ps(w.odd, _mm512_load_ps(x + 16), _mm512_fmadd_ps(w.even, _mm512_load_ps(x), sum));
    }
    static __m512 value(Sum sum) { return sum; }
};

template <>
struct Packing<Pairs> {
    static constexpr int64_t length = 32, floats = 16, head = 0;
    using Sum = __m512;
    using Weights = __m512i;
    using Row = __m512i;
    static Weights read(const bf16* from) { return _mm512_loadu_si512(from); }
    static Weights read(const bf16* from, int64_t count) {
        return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((1ull << count) - 1), from);
    }
    static Row row(const float* x) { return _mm512_load_si512(x); }
    static Sum start(const float*) { return _mm512_setzero_ps(); }
    static Sum add(Sum sum, Weights w, Row x) {
        return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(x));
    }
    static __m512 value(Sum sum) { return sum; }
};

// int8 weights are stored with 128 added, since vpdpbusd multiplies unsigned by signed bytes. A row's head holds the vector
// that its sums start from, which cancels the 128, and then the row's scale. Sums are exact.
template <>
struct Packing<std::uint8_t> {
    static constexpr int64_t length = 64, floats = 16, head = 32;
    using Sum = __m512i;
    using Weights = __m512i;
    using Row = __m512i;
    static Weights read(const std::uint8_t* from) { return _mm512_loadu_si512(from); }
    static Weights read(const std::uint8_t* from, int64_t count) {
        return _mm512_maskz_loadu_epi8((1ull << count) - 1, from);
    }
    static Row row(const float* x) { return _mm512_load_si512(x); }
    static Sum start(const float* heads) { return _mm512_load_si512(heads); }
    static Sum add(Sum sum, Weights w, Row x) { return _mm512_dpbusd_epi32(sum, w, x); }
    static __m512 value(Sum sum) { return _mm512_cvtepi32_ps(sum); }
};

// A step of a row with scales per group of columns: eight vectors of values, and the scale of their products.
struct Scaled {
    __m512 values[8], scale;
};

struct ScaledPacking {
    static constexpr int64_t length = 128, floats = 128, head = 0;
    using Sum = __m512;
    using Row = const float*;
    static Row row(const float* x) { return x; }
    static Sum start(const float*) { return _mm512_setzero_ps(); }
    static Sum add(Sum sum, const Scaled& w, Row x) {
        __m512 even = _mm512_mul_ps(w.values[0], _mm512_load_ps(x)), odd = _mm512_mul_ps(w.values[1], _mm512_load_ps(x + 16));
#pragma GCC unroll 3
        for (int j = 2; j < 8; j += 2) {
            even = _mm512_fmadd_ps(w.values[j], _mm512_load_ps(x + 16 * j), even);
            odd = _mm512_fmadd_ps(w.values[j + 1], _mm512_load_ps(x + 16 * j + 16), odd);
        }
        return _mm512_fmadd_ps(_mm512_add_ps(even, odd), w.scale, sum);
    }
    static __m512 value(Sum sum) { return sum; }
};

template <class S>
struct Packing<Int4<S>> : ScaledPacking {
    static constexpr bool by_lane = true;
};
template <>
struct Packing<Mxfp4> : ScaledPacking {
    static constexpr bool by_lane = true;
};
template <>
struct Packing<Int8> : ScaledPacking {
    static constexpr bool by_lane = false;
};
template <>
struct Packing<Fp8> : ScaledPacking {
    static constexpr bool by_lane = false;
};

template <class W>
inline int64_t steps(int64_t depth) { return (depth + Packing<W>::length - 1) / Packing<W>::length; }

// The number of floats in one packed row.
template <class W>
inline int64_t packed_row(int64_t depth) { return Packing<W>::head + steps<W>(depth) * Packing<W>::floats; }

// Calls body(first row, number of rows) for row tiles of nearly equal height: 8 rows are 4 + 4, not 6 + 2.
template <class Body>
inline void for_row_tiles(int64_t rows, Body body) {
    const int64_t tiles = (rows + tile_rows - 1) / tile_rows;
    for (int64_t t = 0; t < tiles; ++t) body(rows * t / tiles, rows * (t + 1) / tiles - rows * t / tiles);
}

// Packs one row into its `head` and its steps, the first at `step`, `stride` floats apart, with zeros past the row's end.
inline void pack_row(const float* x, int64_t depth, float*, float* step, int64_t stride, Packing<float>) {
    for (int64_t d = 0; d < depth; d += 16, step += stride) _mm512_store_ps(step, load(x + d, depth - d));
}

inline void pack_row(const bf16* x, int64_t depth, float*, float* step, int64_t stride, Packing<bf16>) {
    using S = Packing<bf16>;
    for (int64_t d = 0; d < depth; d += S::length, step += stride) {
        const S::Weights pairs = depth - d >= S::length ? S::read(x + d) : S::read(x + d, depth - d);
        _mm512_store_ps(step, pairs.even);
        _mm512_store_ps(step + 16, pairs.odd);
    }
}

inline void pack_row(const bf16* x, int64_t depth, float*, float* step, int64_t stride, Packing<Pairs>) {
    using S = Packing<Pairs>;
    for (int64_t d = 0; d < depth; d += S::length, step += stride)
        _mm512_store_si512(step, depth - d >= S::length ? S::read(x + d) : S::read(x + d, depth - d));
}

// Rounds to int8 by the row's largest magnitude. A row with an infinity or NaN gets NaN as its scale.
template <class T>
inline void pack_row(const T* x, int64_t depth, float* head, float* step, int64_t stride, Packing<std::uint8_t>) {
    __m512 largest = _mm512_setzero_ps(), finite = largest;
    for (int64_t d = 0; d < depth; d += 16) {
        const __m512 values = load(x + d, depth - d);
        largest = _mm512_max_ps(largest, _mm512_abs_ps(values));
        finite = _mm512_fmadd_ps(values, _mm512_setzero_ps(), finite);
    }
    const float scale = _mm512_reduce_max_ps(largest) / 127 + _mm512_reduce_add_ps(finite);
    const __m512 inverse = _mm512_set1_ps(scale > 0 ? 1 / scale : 0);
    __m512i start = _mm512_setzero_si512();
    for (int64_t d = 0; d < depth; d += 64, step += stride) {
        auto* bytes = reinterpret_cast<__m128i*>(step);
        for (int64_t i = 0; i < 64; i += 16) {
            const __m512 values = d + i < depth ? load(x + d + i, depth - d - i) : _mm512_setzero_ps();
            _mm_store_si128(bytes++, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(values, inverse))));
        }
        // Past the row's end a weight is read as 0, not as 128. This makes no difference, because x is 0 there.
        start = _mm512_dpbusd_epi32(start, _mm512_set1_epi8(static_cast<char>(128)), _mm512_load_si512(step));
    }
    _mm512_store_si512(head, _mm512_sub_epi32(_mm512_setzero_si512(), start));
    head[16] = scale;
}

// Packs columns in order, or, for four-bit weights, column 8 l + j of a step in lane l of vector j, like their codes.
template <class T, class P>
inline auto pack_row(const T* x, int64_t depth, float*, float* step, int64_t stride, P) -> decltype(void(P::by_lane)) {
    const __m512i lanes = _mm512_setr_epi32(0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120);
    for (int64_t d = 0; d < depth; d += 128, step += stride) {
        alignas(64) float values[128];
        float* const to = P::by_lane ? values : step;
        for (int64_t i = 0; i < 128; i += 16)
            _mm512_store_ps(to + i, d + i < depth ? load(x + d + i, depth - d - i) : _mm512_setzero_ps());
        if constexpr (P::by_lane)
            for (int64_t j = 0; j < 8; ++j) _mm512_store_ps(step + 16 * j, _mm512_i32gather_ps(lanes, values + j, 4));
    }
}

// Packs x [rows, depth] into tiles: [tile][heads of its rows][step][row of the tile][floats of a step].
template <class W, class T>
inline void pack(const T* x, int64_t ldx, int64_t rows, int64_t depth, float* to) {
    using S = Packing<W>;
    for_row_tiles(rows, [&](int64_t begin, int64_t height) {
        float* tile = to + begin * packed_row<W>(depth);
        for (int64_t r = 0; r < height; ++r)
            pack_row(x + (begin + r) * ldx, depth, tile + r * S::head, tile + height * S::head + r * S::floats,
                     height * S::floats, S{});
    });
}

}  // namespace moiety
