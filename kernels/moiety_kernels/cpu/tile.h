// Matrix products x w^T for few rows: weights are read once, in their published layout, and never copied; x is packed.
//
// Every output element has one accumulator that walks D in fixed steps and is then summed by one fixed tree. Its bits
// depend neither on the tile it was computed in, nor on the other rows of the call, nor on the number of threads.
#pragma once

#include <algorithm>
#include <memory>

#include "numbers.h"

namespace moiety {

using std::int64_t;

constexpr int64_t tile_rows = 6;   // of x in one register tile: 6 x 4 or 3 x 8 sums leave 8 of 32 registers
constexpr int64_t l1_floats = 6144;  // packed x that is used at once: half of a 48 KiB L1
constexpr int64_t chunk_columns = 64;  // weight rows of one work item: with D = 1024, 128 KiB of bf16 that stay in L2

// How weights of type W meet x: `length` elements per step, packed x of `bytes` per step and row.
//
// bf16 is widened to float in registers, even elements and odd ones apart, instead of using vdpbf16ps: that instruction
// does 86 GFLOP/s on one Sapphire Rapids core where two float multiply-adds do 177.
template <class W>
struct Step;

template <>
struct Step<float> {
    static constexpr int64_t length = 16, floats = 16;
    struct Weights { __m512 all; };
    static Weights read(const float* from) { return {_mm512_loadu_ps(from)}; }
    static Weights read(const float* from, int64_t count) { return {load(from, count)}; }
    using Row = __m512;
    static Row row(const float* x) { return _mm512_load_ps(x); }
    static __m512 add(__m512 sum, const Weights& w, Row x) { return _mm512_fmadd_ps(w.all, x, sum); }
    static void pack(const float* from, int64_t count, float* to) { _mm512_store_ps(to, load(from, count)); }
};

template <>
struct Step<bf16> {
    static constexpr int64_t length = 32, floats = 32;
    struct Weights { __m512 even, odd; };
    static Weights split(__m512i pairs) {
        return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)),
                _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
    }
    static Weights read(const bf16* from) { return split(_mm512_loadu_si512(from)); }
    static Weights read(const bf16* from, int64_t count) {
        return split(_mm512_maskz_loadu_epi16(static_cast<__mmask32>((1ull << count) - 1), from));
    }
    using Row = const float*;  // too many for registers: the multiply-adds read them from L1
    static Row row(const float* x) { return x; }
    static __m512 add(__m512 sum, const Weights& w, Row x) {
        return _mm512_fmadd_ps(w.odd, _mm512_load_ps(x + 16), _mm512_fmadd_ps(w.even, _mm512_load_ps(x), sum));
    }
    static void pack(const bf16* from, int64_t count, float* to) {
        const Weights x = count >= length ? read(from) : read(from, count);
        _mm512_store_ps(to, x.even);
        _mm512_store_ps(to + 16, x.odd);
    }
};

template <class W>
inline int64_t steps(int64_t depth) { return (depth + Step<W>::length - 1) / Step<W>::length; }

// Floats that one packed row takes.
template <class W>
inline int64_t packed_row(int64_t depth) { return steps<W>(depth) * Step<W>::floats; }

// Calls body(first row, number of rows) for row tiles of nearly equal height: 8 rows are 4 + 4, not 6 + 2.
template <class Body>
inline void for_row_tiles(int64_t rows, Body body) {
    const int64_t tiles = (rows + tile_rows - 1) / tile_rows;
    for (int64_t t = 0; t < tiles; ++t) body(rows * t / tiles, rows * (t + 1) / tiles - rows * t / tiles);
}

// x [rows, depth] into packed tiles: [tile][step][row of the tile][floats of a step], zeros past the end of a row.
template <class W>
inline void pack(const W* x, int64_t ldx, int64_t rows, int64_t depth, float* to) {
    using S = Step<W>;
    for_row_tiles(rows, [&](int64_t begin, int64_t height) {
        float* tile = to + begin * packed_row<W>(depth);
        for (int64_t r = 0; r < height; ++r)
            for (int64_t d = 0, s = 0; d < depth; d += S::length, ++s)
                S::pack(x + (begin + r) * ldx + d, std::min(depth - d, S::length), tile + (s * height + r) * S::floats);
    });
}

// Lane i of the result is the sum of the lanes of sums[i]: the same tree for every i.
inline __m512 reduce(const __m512* sums) {
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

// Where along D a call of `tile` begins and ends; between the parts of a deep product the sums wait in `kept`.
struct Part {
    int64_t depth;
    bool first, last;
};

// out[r * ldo + o] = x[r, :] . w[o, :] for RB packed rows and OB weight rows. While it runs, the OB weight rows from
// `next` on are fetched from memory (past the last ones a prefetch does nothing).
template <class W, int OB, int RB>
inline void tile(const float* x, const W* w, int64_t ldw, const W* next, Part part, __m512* kept, float* out, int64_t ldo) {
    using S = Step<W>;
    constexpr int count = OB * RB, vectors = (count + 15) / 16;
    __m512 sums[16 * vectors];
#pragma GCC unroll 32
    for (int i = 0; i < 16 * vectors; ++i) sums[i] = part.first || i >= count ? _mm512_setzero_ps() : kept[i];
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
    for (int v = 0; v < vectors; ++v) _mm512_store_ps(flat + 16 * v, reduce(sums + 16 * v));
#pragma GCC unroll 6
    for (int r = 0; r < RB; ++r)
#pragma GCC unroll 8
        for (int o = 0; o < OB; ++o) out[r * ldo + o] = flat[r * OB + o];
}

// All `columns` weight rows against RB packed rows, of which so many steps are taken at once that they stay in L1.
template <class W, int RB>
inline void columns_of(const float* x, const W* w, int64_t ldw, int64_t columns, int64_t depth, float* out, int64_t ldo) {
    constexpr int OB = RB > 3 ? 4 : 8;
    constexpr int64_t floats = Step<W>::floats, length = Step<W>::length, at_once = l1_floats / RB / floats * length;
    __m512 kept[RB * chunk_columns];
    for (int64_t d = 0; d < depth; d += at_once, x += RB * floats * (at_once / length), w += at_once) {
        const Part part{std::min(at_once, depth - d), d == 0, d + at_once >= depth};
        int64_t o = 0;
        for (; o + OB <= columns; o += OB)
            tile<W, OB, RB>(x, w + o * ldw, ldw, w + (o + OB) * ldw, part, kept + o * RB, out + o, ldo);
        for (; o < columns; ++o)
            tile<W, 1, RB>(x, w + o * ldw, ldw, w + (o + 1) * ldw, part, kept + o * RB, out + o, ldo);
    }
}

// out[r * ldo + o] = x[r, :] . w[o, :] for one packed row tile of the given height.
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
