// Attention over one tile of keys and values: products of rows, and weighted sums of rows, in float32.
#pragma once

#include <algorithm>
#include <cstring>

#include "numbers.h"
#include "tile.h"

namespace moiety {

constexpr int tile_positions = 64;  // positions per step of the online softmax: their keys and values stay in L1

// Converts one load to float32 vectors. For bf16 these are the even and the odd columns, which needs no shuffle.
inline void widen(__m512 from, __m512* to) { to[0] = from; }
inline void widen(__m512i from, __m512* to) {
    to[0] = _mm512_castsi512_ps(_mm512_slli_epi32(from, 16));
    to[1] = _mm512_castsi512_ps(_mm512_and_si512(from, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}

// The inverse of `widen`, rounded, for the first `count` columns.
inline void write(const __m512* from, float* to, std::int64_t count) { store(to, count, from[0]); }
inline void write(const __m512* from, bf16* to, std::int64_t count) {
    const __m512i even = _mm512_cvtepu16_epi32(narrow(from[0])), odd = _mm512_cvtepu16_epi32(narrow(from[1]));
    const auto mask = static_cast<__mmask32>(count >= 32 ? ~0u : (1u << count) - 1);
    _mm512_mask_storeu_epi16(to, mask, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
}

// Sources of keys or values as float32: the pool itself, or an aligned copy that many rows share. Reading the pool
// prefetches the same columns of the next tile, because blocks lie apart and the CPU does not predict their addresses.
// Whole: the width is a multiple of a load.
template <class T, bool Whole>
struct Pool {
    static constexpr int vectors = Step<T>::length / 16;
    const T *const *row, *const *next;
    std::int64_t width;

    template <int V>
    void load(int i, std::int64_t at, __m512* to) const {
#pragma GCC unroll 4
        for (int v = 0; v < V; v += vectors) {
            const T* from = row[i] + at + 16 * v;
            _mm_prefetch(reinterpret_cast<const char*>(next[i] + at + 16 * v), _MM_HINT_T1);
            if constexpr (Whole) widen(Step<T>::load(from), to + v);
            else widen(Step<T>::load(from, std::min(Step<T>::length, width - at - 16 * v)), to + v);
        }
    }
};

template <class T>
struct Copy {
    static constexpr int vectors = Step<T>::length / 16;
    const float* first;
    std::int64_t stride;

    template <int V>
    void load(int i, std::int64_t at, __m512* to) const {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) to[v] = _mm512_load_ps(first + i * stride + at + 16 * v);
    }
};

// out[q * tile_positions + k] = query[q] . key k for Q rows and 16 / Q keys.
template <int Q, class Source>
[[gnu::noinline]] void scores(const float* const* query, const Source& keys, int first, std::int64_t width, float* out) {
    constexpr int K = 16 / Q, V = Source::vectors;
    __m512 sums[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) sums[i] = _mm512_setzero_ps();
    std::int64_t at = 0;
    do {
        __m512 rows[Q][V];
#pragma GCC unroll 4
        for (int q = 0; q < Q; ++q)
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) rows[q][v] = _mm512_load_ps(query[q] + at + 16 * v);
#pragma GCC unroll 16
        for (int k = 0; k < K; ++k) {
            __m512 key[V];
            keys.template load<V>(first + k, at, key);
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v)
#pragma GCC unroll 4
                for (int q = 0; q < Q; ++q) sums[q * K + k] = _mm512_fmadd_ps(rows[q][v], key[v], sums[q * K + k]);
        }
    } while ((at += 16 * V) < width);
    alignas(64) float flat[16];
    _mm512_store_ps(flat, reduce(sums));
    for (int q = 0; q < Q; ++q) std::memcpy(out + q * tile_positions, flat + q * K, K * sizeof(float));
}

// `scores` for any number of rows and 16 keys.
template <class Source>
void scores_of_rows(const float* const* query, int rows, const Source& keys, int first, std::int64_t width, float* out) {
    int r = 0;
    for (; r + 4 <= rows; r += 4)
        for (int k = 0; k < 16; k += 4) scores<4>(query + r, keys, first + k, width, out + r * tile_positions + k);
    for (; r + 2 <= rows; r += 2)
        for (int k = 0; k < 16; k += 8) scores<2>(query + r, keys, first + k, width, out + r * tile_positions + k);
    if (r < rows) scores<1>(query + r, keys, first, width, out + r * tile_positions);
}

// acc[r][at .. at + 16 V) += the sum over positions of weight[r * tile_positions + position] * value, for R rows.
template <int R, int V, class Source>
[[gnu::noinline]] void weigh(const float* weight, const Source& values, int from, int to, float* const* acc,
                             std::int64_t at, std::int64_t column) {
    __m512 sums[R][V];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sums[r][v] = _mm512_load_ps(acc[r] + at + 16 * v);
    for (int position = from; position < to; ++position) {
        __m512 value[V];
        values.template load<V>(position, column, value);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const __m512 w = _mm512_set1_ps(weight[r * tile_positions + position]);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) sums[r][v] = _mm512_fmadd_ps(w, value[v], sums[r][v]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) _mm512_store_ps(acc[r] + at + 16 * v, sums[r][v]);
}

// `weigh` for any number of rows. `at` is the column of the sums, `column` that of the source.
template <int V, class Source>
void weigh_rows(const float* weight, const Source& values, int from, int to, float* const* acc, int rows, std::int64_t at,
                std::int64_t column) {
    int r = 0;
    for (; r + 4 <= rows; r += 4) weigh<4, V>(weight + r * tile_positions, values, from, to, acc + r, at, column);
    for (; r + 2 <= rows; r += 2) weigh<2, V>(weight + r * tile_positions, values, from, to, acc + r, at, column);
    if (r < rows) weigh<1, V>(weight + r * tile_positions, values, from, to, acc + r, at, column);
}

}  // namespace moiety
