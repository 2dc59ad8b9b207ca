// What one thread of a call of paged attention does: it computes units, split by split and tile by tile.
#pragma once

#include <type_traits>

#include "attention_units.h"
#include "rows.h"
#include "scratch.h"
#include "softmax.h"

namespace moiety {
namespace {  // for attention.cpp alone: symbols stay local to it

constexpr std::int64_t columns_at_once = 64;  // columns of values: four vectors, so four rows have 16 sums in registers
constexpr int rows_worth_copying = 8;         // from so many rows on, keys and values are first converted to float32

template <class T>
class Worker {
   public:
    explicit Worker(const AttentionCall& call)
        : call_(call), width_(padded(call.value_width)), query_width_(padded(call.key_width)) {
        static thread_local Scratch queries, keys;
        queries_ = queries.at_least(rows_at_once * query_width_);
        keys_ = keys.at_least(16 * query_width_);
    }

    static std::int64_t padded(std::int64_t width) { return (width + 31) / 32 * 32; }

    // Starts work on `unit`: copies its queries as float32, columns in the order of `widen`.
    void begin(const Unit& unit) {
        for (std::int64_t row = 0; row < unit.rows(); ++row) {
            const T* query = static_cast<const T*>(call_.query) + (unit.token + row / unit.heads) * call_.query_token +
                             (unit.head + row % unit.heads) * call_.query_head;
            const Pool<T, false> source{&query, &query, call_.key_width};
            copy(source, 0, 1, queries_ + row * query_width_, query_width_, 0, call_.key_width);
        }
    }

    // Computes the rows of `unit` over the positions of one split, from a fresh state.
    void split(const Unit& unit, std::int64_t index, State& state) {
        const std::int64_t begin = std::max(index * split_positions, unit.first / tile_positions * tile_positions);
        const std::int64_t end = std::min((index + 1) * split_positions, unit.last);
        std::fill_n(state.acc, unit.rows() * width_, 0.0f);
        std::fill_n(state.maximum, unit.rows(), nothing_seen);
        std::fill_n(state.sum, unit.rows(), 0.0f);
        locate(unit, begin, places_[0]);
        for (std::int64_t at = begin, i = 0; at < end; at += tile_positions, i ^= 1) {
            // After the last tile there is nothing to prefetch, so the tile itself is given, which is in the cache.
            const bool more = at + tile_positions < unit.last;
            if (more) locate(unit, at + tile_positions, places_[i ^ 1]);
            tile(unit, at, places_[i], more ? places_[i ^ 1] : places_[i], state);
        }
    }

    // Sets each row to a state that has seen only its sink, which takes part in the softmax and has no value.
    void open(const Unit& unit, State& state) {
        std::fill_n(state.acc, unit.rows() * width_, 0.0f);
        for (std::int64_t row = 0; row < unit.rows(); ++row) {
            const float sink = call_.sinks ? call_.sinks[unit.head + row % unit.heads] : -INFINITY;
            state.maximum[row] = std::max(sink, nothing_seen);
            state.sum[row] = exponential(sink - state.maximum[row]);
        }
    }

    // Adds the partial result `part` to `total`.
    static void merge(const Unit& unit, const State& part, State& total) {
        for (std::int64_t row = 0; row < unit.rows(); ++row) {
            const float largest = std::max(total.maximum[row], part.maximum[row]);
            const float old = exponential(total.maximum[row] - largest), fresh = exponential(part.maximum[row] - largest);
            total.maximum[row] = largest;
            total.sum[row] = total.sum[row] * old + part.sum[row] * fresh;
            float* to = total.acc + row * total.width;
            const float* from = part.acc + row * total.width;
            for (std::int64_t at = 0; at < total.width; at += 16) {
                const __m512 kept = _mm512_mul_ps(_mm512_load_ps(to + at), _mm512_set1_ps(old));
                _mm512_store_ps(to + at, _mm512_fmadd_ps(_mm512_load_ps(from + at), _mm512_set1_ps(fresh), kept));
            }
        }
    }

    // Divides by the sums of the weights and writes the output.
    void close(const Unit& unit, const State& total) {
        for (std::int64_t row = 0; row < unit.rows(); ++row) {
            const std::int64_t token = unit.token + row / unit.heads, head = unit.head + row % unit.heads;
            T* to = static_cast<T*>(call_.output) + (token * call_.heads + head) * call_.value_width;
            const __m512 sum = _mm512_set1_ps(total.sum[row]);
            for (std::int64_t at = 0; at < call_.value_width; at += Step<T>::length) {
                __m512 result[2];
                for (int v = 0; v < Step<T>::length / 16; ++v)
                    result[v] = _mm512_div_ps(_mm512_load_ps(total.acc + row * width_ + at + 16 * v), sum);
                write(result, to + at, call_.value_width - at);
            }
        }
    }

   private:
    // The addresses of one tile's keys and values.
    struct Places {
        const T *key[tile_positions], *value[tile_positions];
    };

    // Finds the places of the tile at `begin`. A position outside the unit's range gets the address of its first or last
    // position: its weight is zero, and its own block may be freed.
    void locate(const Unit& unit, std::int64_t begin, Places& places) const {
        const std::int32_t* table = call_.tables + call_.sequence[unit.token] * call_.table_row;
        for (int j = 0; j < tile_positions;) {
            std::int64_t position = std::clamp(begin + j, unit.first, unit.last - 1);
            const std::int64_t index = position / call_.page, start = index * call_.page, block = table[index];
            const T* key = static_cast<const T*>(call_.keys) + block * call_.key_block + unit.group * call_.key_group;
            const T* value = static_cast<const T*>(call_.values) + block * call_.value_block + unit.group * call_.value_group;
            while (position < start + call_.page && j < tile_positions) {
                places.key[j] = key + (position - start) * call_.key_position;
                places.value[j] = value + (position - start) * call_.value_position;
                position = std::clamp(begin + ++j, unit.first, unit.last - 1);
            }
        }
    }

    // Adds one tile of positions to the state of the rows that see any of it.
    void tile(const Unit& unit, std::int64_t begin, const Places& places, const Places& next, State& state) {
        int rows = 0, from = tile_positions, to = 0;
        for (std::int64_t token = 0; token < unit.tokens; ++token) {
            const std::int64_t end = call_.length[unit.token + token];
            const std::int64_t low = std::max<std::int64_t>(call_.first_visible(end) - begin, 0);
            const std::int64_t high = std::min<std::int64_t>(end - begin, tile_positions);
            if (low >= high) continue;
            from = std::min<int>(from, low), to = std::max<int>(to, high);
            for (std::int64_t row = token * unit.heads; row < (token + 1) * unit.heads; ++row, ++rows) {
                row_[rows] = row;
                seen_[rows] = (~0ull >> (tile_positions - high)) & (~0ull << low);
                query_[rows] = queries_ + row * query_width_;
                acc_[rows] = state.acc + row * width_;
            }
        }
        const bool many = rows >= rows_worth_copying;
        with_pool(places.key, next.key, call_.key_width, [&](const auto& keys) {
            for (int key = from / 16 * 16; key < to; key += 16) {
                if (many) {
                    copy(keys, key, 16, keys_, query_width_, 0, call_.key_width);
                    scores_of_rows(query_, rows, Copy<T>{keys_, query_width_}, 0, call_.key_width, score_ + key);
                } else {
                    scores_of_rows(query_, rows, keys, key, call_.key_width, score_ + key);
                }
            }
        });
        for (int r = 0; r < rows; ++r) {
            const std::int64_t head = unit.head + row_[r] % unit.heads, token = unit.token + row_[r] / unit.heads;
            const float* const bias = call_.bias ? call_.bias + head * call_.biases : nullptr;
            add_scores(call_, score_ + r * tile_positions, seen_[r], state, row_[r], bias, call_.length[token] - 1 - begin);
        }
        with_pool(places.value, next.value, call_.value_width, [&](const auto& values) {
            constexpr int vectors = Copy<T>::vectors;
            const auto columns = [&](std::int64_t at, auto count) {
                constexpr int V = decltype(count)::value;
                if (many) {
                    copy(values, from, to - from, values_ + from * columns_at_once, columns_at_once, at, at + 16 * V);
                    weigh_rows<V>(score_, Copy<T>{values_, columns_at_once}, from, to, acc_, rows, at, 0);
                } else {
                    weigh_rows<V>(score_, values, from, to, acc_, rows, at, at);
                }
            };
            std::int64_t at = 0;
            for (; at + columns_at_once <= call_.value_width; at += columns_at_once)
                columns(at, std::integral_constant<int, columns_at_once / 16>());
            for (; at < call_.value_width; at += 16 * vectors) columns(at, std::integral_constant<int, vectors>());
        });
    }

    // Calls `function` with the pool's rows, with a faster load where the width is a multiple of one.
    template <class Function>
    static void with_pool(const T* const* row, const T* const* next, std::int64_t width, const Function& function) {
        if (width % Step<T>::length == 0) function(Pool<T, true>{row, next, width});
        else function(Pool<T, false>{row, next, width});
    }

    // Copies columns [begin, end) of `count` rows as float32.
    template <class Source>
    static void copy(const Source& rows, int first, int count, float* to, std::int64_t stride, std::int64_t begin,
                     std::int64_t end) {
        constexpr int vectors = Source::vectors;
        for (int i = 0; i < count; ++i)
            for (std::int64_t at = begin; at < end; at += 16 * vectors) {
                __m512 row[vectors];
                rows.template load<vectors>(first + i, at, row);
                for (int v = 0; v < vectors; ++v) _mm512_store_ps(to + i * stride + at - begin + 16 * v, row[v]);
            }
    }

    const AttentionCall& call_;
    const std::int64_t width_, query_width_;
    float *queries_, *keys_;
    Places places_[2];
    alignas(64) float score_[rows_at_once * tile_positions];
    alignas(64) float values_[tile_positions * columns_at_once];
    std::uint64_t seen_[rows_at_once];
    std::int64_t row_[rows_at_once];
    const float* query_[rows_at_once];
    float* acc_[rows_at_once];
};

}  // namespace
}  // namespace moiety
