// The online softmax of attention: turns the scores of one tile of positions into weights.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "calls.h"
#include "exponential.h"
#include "rows.h"

namespace moiety {
namespace {  // for attention.cpp alone: symbols stay local to it

constexpr float nothing_seen = -1e30f;  // the running maximum of a row before its first position

// The softmax of each row so far: weighted values (not yet divided), the largest score, and the sum of the weights.
struct State {
    State(float* floats, std::int64_t rows, std::int64_t width)
        : acc(floats), maximum(floats + rows * width), sum(maximum + rows), width(width) {}
    static std::int64_t floats(std::int64_t rows, std::int64_t width) { return (rows * (width + 2) + 15) / 16 * 16; }

    float *acc, *maximum, *sum;
    std::int64_t width;
};

// The entries of `bias` [N] for 16 positions, the first of which lies `distance` before the query. The last entry serves all
// larger distances. Positions after the query get entry 0, which has no effect because they are masked.
inline __m512 distance_bias(const float* bias, std::int64_t count, std::int64_t distance) {
    if (distance - 15 >= count - 1) return _mm512_set1_ps(bias[count - 1]);
    const __m512i back = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i index = _mm512_sub_epi32(_mm512_set1_epi32(static_cast<int>(distance)), back);
    index = _mm512_max_epi32(index, _mm512_setzero_si512());
    index = _mm512_min_epi32(index, _mm512_set1_epi32(static_cast<int>(count - 1)));
    return _mm512_i32gather_ps(index, bias, sizeof(float));
}

// Turns a row's scores of one tile into weights relative to the largest score so far, and rescales the earlier sums where
// that has grown. `bias` is the row's own or null; `distance` is that of the tile's first position.
inline void add_scores(const AttentionCall& call, float* score, std::uint64_t seen, State& state, std::int64_t row,
                       const float* bias, std::int64_t distance) {
    __m512 s[4];
    float largest = state.maximum[row];
    for (int i = 0; i < 4; ++i) {
        s[i] = _mm512_mul_ps(_mm512_load_ps(score + 16 * i), _mm512_set1_ps(call.scale));
        if (call.softcap) {
            const __m512 cap = _mm512_set1_ps(call.softcap);
            s[i] = _mm512_mul_ps(hyperbolic_tangent(_mm512_div_ps(s[i], cap)), cap);
        }
        if (bias) s[i] = _mm512_add_ps(s[i], distance_bias(bias, call.biases, distance - 16 * i));
        s[i] = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), static_cast<__mmask16>(seen >> (16 * i)), s[i]);
    }
    largest = std::max(largest, _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(s[0], s[1]), _mm512_max_ps(s[2], s[3]))));
    for (int i = 0; i < 4; ++i) {
        s[i] = exponential(_mm512_sub_ps(s[i], _mm512_set1_ps(largest)));
        _mm512_store_ps(score + 16 * i, s[i]);
    }
    const float added = _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(s[0], s[1]), _mm512_add_ps(s[2], s[3])));
    if (largest != state.maximum[row]) {
        const float factor = exponential(state.maximum[row] - largest);
        state.maximum[row] = largest;
        state.sum[row] *= factor;
        float* acc = state.acc + row * state.width;
        for (std::int64_t at = 0; at < state.width; at += 16)
            _mm512_store_ps(acc + at, _mm512_mul_ps(_mm512_load_ps(acc + at), _mm512_set1_ps(factor)));
    }
    state.sum[row] += added;
}

}  // namespace
}  // namespace moiety
