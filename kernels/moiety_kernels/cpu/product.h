// Matrix products x w^T for few rows: weights are read once, in their published layout, and never copied; x is packed.
//
// Every output element has one accumulator that walks D in fixed steps and is then summed by one fixed tree. Its bits
// depend neither on the tile it was computed in, nor on the other rows of the call, nor on the number of threads.
#pragma once

#include <algorithm>
#include <memory>

#include "numbers.h"

namespace moiety {

constexpr int64_t tile_rows = 6;       // of x in one register tile: 6 x 4 or 3 x 8 sums leave 8 of 32 registers
constexpr int64_t l1_floats = 6144;    // packed x that is used at once: half of a 48 KiB L1
constexpr int64_t chunk_columns = 64;  // weight rows of one work item: with D = 1024, 128 KiB of bf16 that stay in L2

// How weights of type W meet x: `length` elements per step, for which a packed row takes `floats` floats, after `head` floats
// of its own. bf16 is widened to float in registers, even elements and odd ones apart, instead of using vdpbf16ps: that
// instruction does 86 GFLOP/s on one Sapphire Rapids core where two float multiply-adds do 177.
template <class W>
struct Packing;

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
    using Row = const float*;  // too many for registers: the multiply-adds read them from L1
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

// int8 weights are stored with 128 added, since vpdpbusd multiplies unsigned by signed bytes. A row's head is what takes that
// away again, as the vector its sums start from, then the row's scale. Sums are exact.
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

template <class W>
inline int64_t steps(int64_t depth) { return (depth + Packing<W>::length - 1) / Packing<W>::length; }

// Floats that one packed row takes.
template <class W>
inline int64_t packed_row(int64_t depth) { return Packing<W>::head + steps<W>(depth) * Packing<W>::floats; }

// Calls body(first row, number of rows) for row tiles of nearly equal height: 8 rows are 4 + 4, not 6 + 2.
template <class Body>
inline void for_row_tiles(int64_t rows, Body body) {
    const int64_t tiles = (rows + tile_rows - 1) / tile_rows;
    for (int64_t t = 0; t < tiles; ++t) body(rows * t / tiles, rows * (t + 1) / tiles - rows * t / tiles);
}

// One row: `head` and the first of its steps, each `stride` floats after the one before, zeros past the row's end.
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

// Rounded to int8 by the row's largest magnitude. A row with an infinity or not a number in it gets such a scale.
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
        // Past the row's end a weight is read as 0, not as 128: x is 0 there, so that both come to the same.
        start = _mm512_dpbusd_epi32(start, _mm512_set1_epi8(static_cast<char>(128)), _mm512_load_si512(step));
    }
    _mm512_store_si512(head, _mm512_sub_epi32(_mm512_setzero_si512(), start));
    head[16] = scale;
}

// x [rows, depth] into packed tiles: [tile][heads of its rows][step][row of the tile][floats of a step].
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

// Where along D a call of `tile` begins and ends; between the parts of a deep product the sums wait in `kept`.
struct Part {
    int64_t depth;
    bool first, last;
};

// out[r * ldo + o] = x[r, :] . w[o, :] for RB packed rows and OB weight rows. While it runs, the OB weight rows from
// `next` on are fetched from memory (past the last ones a prefetch does nothing).
template <class W, int OB, int RB>
inline void tile(const float* heads, const float* x, const W* w, int64_t ldw, const W* next, Part part,
                 typename Packing<W>::Sum* kept, float* out, int64_t ldo) {
    using S = Packing<W>;
    constexpr int count = OB * RB, vectors = (count + 15) / 16;
    typename S::Sum sums[count];
#pragma GCC unroll 32
    for (int i = 0; i < count; ++i) sums[i] = part.first ? S::start(heads + i / OB * S::head) : kept[i];
    int64_t d = 0;
    for (; d + S::length <= part.depth; d += S::length, x += RB * S::floats) {
        typename S::Row rows[RB];
#pragma GCC unroll 6
        for (int r = 0; r < RB; ++r) rows[r] = S::row(x + r * S::floats);
#pragma GCC unroll 8
        for (int o = 0; o < OB; ++o) {
            const auto weights = S::read(w + o * ldw + d);
            _mm_prefetch(reinterpret_cast<const char*>(next + o * ldw + d), _MM_HINT_T0);
#pragma GCC unroll 6
            for (int r = 0; r < RB; ++r) sums[r * OB + o] = S::add(sums[r * OB + o], weights, rows[r]);
        }
    }
    if (d < part.depth) {
#pragma GCC unroll 8
        for (int o = 0; o < OB; ++o) {
            const auto weights = S::read(w + o * ldw + d, part.depth - d);
#pragma GCC unroll 6
            for (int r = 0; r < RB; ++r) sums[r * OB + o] = S::add(sums[r * OB + o], weights, S::row(x + r * S::floats));
        }
    }
    if (!part.last) {
#pragma GCC unroll 32
        for (int i = 0; i < count; ++i) kept[i] = sums[i];
        return;
    }
    alignas(64) float flat[16 * vectors];
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
        __m512 values[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) values[i] = 16 * v + i < count ? S::value(sums[16 * v + i]) : _mm512_setzero_ps();
        _mm512_store_ps(flat + 16 * v, reduce(values));
    }
#pragma GCC unroll 6
    for (int r = 0; r < RB; ++r)
#pragma GCC unroll 8
        for (int o = 0; o < OB; ++o) out[r * ldo + o] = flat[r * OB + o];
}

// All `columns` weight rows against RB packed rows, of which so many steps are taken at once that they stay in L1.
template <class W, int RB>
inline void columns_of(const float* heads, const W* w, int64_t ldw, int64_t columns, int64_t depth, float* out, int64_t ldo) {
    using S = Packing<W>;
    constexpr int OB = RB > 3 ? 4 : 8;
    constexpr int64_t steps_at_once = l1_floats / RB / S::floats, at_once = steps_at_once * S::length;
    typename S::Sum kept[RB * chunk_columns];
    const float* x = heads + RB * S::head;
    for (int64_t d = 0; d < depth; d += at_once, x += RB * S::floats * steps_at_once, w += at_once) {
        const Part part{std::min(at_once, depth - d), d == 0, d + at_once >= depth};
        int64_t o = 0;
        for (; o + OB <= columns; o += OB)
            tile<W, OB, RB>(heads, x, w + o * ldw, ldw, w + (o + OB) * ldw, part, kept + o * RB, out + o, ldo);
        for (; o < columns; ++o)
            tile<W, 1, RB>(heads, x, w + o * ldw, ldw, w + (o + 1) * ldw, part, kept + o * RB, out + o, ldo);
    }
}

// out[r * ldo + o] = x[r, :] . w[o, :] for one packed row tile of the given height, int8 products without their scales.
template <class W>
inline void product(const float* x, int64_t height, const W* w, int64_t ldw, int64_t columns, int64_t depth, float* out,
                    int64_t ldo) {
    switch (height) {
        case 1: return columns_of<W, 1>(x, w, ldw, columns, depth, out, ldo);
        case 2: return columns_of<W, 2>(x, w, ldw, columns, depth, out, ldo);
        case 3: return columns_of<W, 3>(x, w, ldw, columns, depth, out, ldo);
        case 4: return columns_of<W, 4>(x, w, ldw, columns, depth, out, ldo);
        case 5: return columns_of<W, 5>(x, w, ldw, columns, depth, out, ldo);
        case 6: return columns_of<W, 6>(x, w, ldw, columns, depth, out, ldo);
    }
}

// Room for packed rows: one per calling thread and use, kept between calls.
class Scratch {
  public:
    float* floats(int64_t count) {
        if (count > size_) {
            data_.reset(static_cast<float*>(::operator new(count * sizeof(float), std::align_val_t(64))));
            size_ = count;
        }
        return data_.get();
    }

  private:
    struct Delete {
        void operator()(float* data) const { ::operator delete(data, std::align_val_t(64)); }
    };
    std::unique_ptr<float, Delete> data_;
    int64_t size_ = 0;
};

}  // namespace moiety
