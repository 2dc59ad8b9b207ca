// Matrix products x w^T for few rows: weights are read once, in their published layout, and not copied; x is packed.
//
// Every output element has one vector accumulator, which advances along D in fixed steps and is then summed by one fixed
// tree. Its bits do not depend on its tile, on the other rows of the call, or on the number of threads.
#pragma once

#include <algorithm>

#include "matrices.h"

namespace moiety {

constexpr int64_t l1_floats = 6144;    // floats of packed x in use at once: half of a 48 KiB L1
constexpr int64_t bytes_per_us = 32 << 10, flops_per_us = 256 << 10;  // roughly what one core does
constexpr int64_t us_worth_thread = 80;  // least work per thread: waking it and waiting for it costs some 50
constexpr int64_t chunk_columns = 64;  // weight rows per work item: at D = 1024, 128 KiB of bf16, which stay in L2

// The range of D of one call of `tile`. Between the parts of a deep product, `kept` holds the sums.
struct Part {
    int64_t begin, end;
    bool first, last;
};

// out[r * ldo + i] = x[r, :] . w[o + i, :] for RB packed rows and OB weight rows. Meanwhile the next OB weight rows are
// prefetched (past the last rows a prefetch has no effect): for few rows in memory order, which is fastest to read; for
// more rows, where the products limit the speed, in the order in which they will be used.
template <class M, int OB, int RB>
inline void tile(const float* heads, const float* x, const M& w, int64_t o, Part part,
                 typename Packing<typename M::Format>::Sum* kept, float* out, int64_t ldo) {
    using S = Packing<typename M::Format>;
    constexpr int count = OB * RB, vectors = (count + 15) / 16;
    typename S::Sum sums[count];
#pragma GCC unroll 32
    for (int i = 0; i < count; ++i) sums[i] = part.first ? S::start(heads + i / OB * S::head) : kept[i];
    int64_t d = part.begin;
    for (; d + S::length <= part.end; d += S::length, x += RB * S::floats) {
        typename S::Row rows[RB];
#pragma GCC unroll 6
        for (int r = 0; r < RB; ++r) rows[r] = S::row(x + r * S::floats);
#pragma GCC unroll 8
        for (int i = 0; i < OB; ++i) {
            const auto weights = w.read(o + i, d);
            if constexpr (M::in_line && RB <= 2)
                w.prefetch_line(o + OB, d / S::length * OB + i);
            else
                w.prefetch(o + OB + i, d);
#pragma GCC unroll 6
            for (int r = 0; r < RB; ++r) sums[r * OB + i] = S::add(sums[r * OB + i], weights, rows[r]);
        }
    }
    if (d < part.end) {
#pragma GCC unroll 8
        for (int i = 0; i < OB; ++i) {
            const auto weights = w.read(o + i, d, part.end - d);
#pragma GCC unroll 6
            for (int r = 0; r < RB; ++r) sums[r * OB + i] = S::add(sums[r * OB + i], weights, S::row(x + r * S::floats));
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
        for (int i = 0; i < OB; ++i) out[r * ldo + i] = flat[r * OB + i];
}

// The weight rows of a tile of RB rows of x. A step of scaled weights alone takes nine registers.
template <class S, int RB>
constexpr int weight_rows() {
    if (S::length == 128) return RB > 3 ? 2 : 4;
    return RB > 3 ? 4 : 8;
}

// Multiplies weight rows [begin, begin + columns) by RB packed rows, in parts of as many steps of x as fit in L1.
template <class M, int RB>
inline void columns_of(const float* heads, const M& w, int64_t begin, int64_t columns, int64_t depth, float* out, int64_t ldo) {
    using S = Packing<typename M::Format>;
    constexpr int OB = weight_rows<S, RB>();
    constexpr int64_t steps_at_once = l1_floats / RB / S::floats, at_once = steps_at_once * S::length;
    typename S::Sum kept[RB * chunk_columns];
    const float* x = heads + RB * S::head;
    for (int64_t d = 0; d < depth; d += at_once, x += RB * S::floats * steps_at_once) {
        const Part part{d, std::min(depth, d + at_once), d == 0, d + at_once >= depth};
        int64_t o = 0;
        for (; o + OB <= columns; o += OB) tile<M, OB, RB>(heads, x, w, begin + o, part, kept + o * RB, out + o, ldo);
        for (; o < columns; ++o) tile<M, 1, RB>(heads, x, w, begin + o, part, kept + o * RB, out + o, ldo);
    }
}

// out[r * ldo + o] = x[r, :] . w[begin + o, :] for one packed row tile of this height. Products of int8 rows are not scaled.
template <class M>
inline void product(const float* x, int64_t height, const M& w, int64_t begin, int64_t columns, int64_t depth, float* out,
                    int64_t ldo) {
    switch (height) {
        case 1: return columns_of<M, 1>(x, w, begin, columns, depth, out, ldo);
        case 2: return columns_of<M, 2>(x, w, begin, columns, depth, out, ldo);
        case 3: return columns_of<M, 3>(x, w, begin, columns, depth, out, ldo);
        case 4: return columns_of<M, 4>(x, w, begin, columns, depth, out, ldo);
        case 5: return columns_of<M, 5>(x, w, begin, columns, depth, out, ldo);
        case 6: return columns_of<M, 6>(x, w, begin, columns, depth, out, ldo);
    }
}

// Returns how many threads this work is worth, at most `most`.
inline int worth_threads(int64_t bytes, int64_t flops, int64_t most) {
    const int64_t us = bytes / bytes_per_us + flops / flops_per_us;
    return static_cast<int>(std::clamp<int64_t>(us / us_worth_thread, 1, most));
}

}  // namespace moiety
