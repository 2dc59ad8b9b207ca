// Paged attention, and the store that fills its pool.
//
// A unit of work is some query tokens of one sequence with some query heads of one key/value head: its rows share every
// key and value that is read. Scores, softmax and sums are float32.
//
// A row's bits are a function of its own query, length and past, whatever else is in the call and however many threads
// run it: keys are taken in tiles of `tile_positions`, and partial results of `split_positions`, both counted from
// position 0 of the sequence and always added in that order; a position that a row does not see adds an exact zero.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <vector>

#include "exponential.h"
#include "rows.h"

namespace moiety {
namespace {

constexpr std::int64_t split_positions = 512;  // one partial result: what threads share where units are few
constexpr std::int64_t rows_at_once = 64;      // of a unit: enough arithmetic for every key read in a prefill
constexpr std::int64_t columns_at_once = 64;   // of values: four vectors, for four rows sixteen sums in registers
constexpr int rows_worth_copying = 8;          // so many rows share one conversion of keys and values to float32
constexpr std::int64_t work_worth_thread = 1 << 20;        // multiply-adds, some 60 us: what a thread that waits passively costs
constexpr std::int64_t floats_worth_splitting = 4 << 20;   // of partial results
constexpr float nothing_seen = -1e30f;                     // the running maximum of a row before its first position

struct Call {
    const void *query, *keys, *values;
    void* output;  // [T, H, Dv], contiguous
    const std::int32_t *tables, *sequence, *length;
    const float* sinks;                       // [H], or null
    const float* bias;                        // [H, biases], or null: added to a score by its distance in tokens
    std::int64_t biases;
    std::int64_t query_token, query_head;     // strides, in elements; what lies in a row lies side by side
    std::int64_t key_block, key_group, key_position, value_block, value_group, value_position, table_row;
    std::int64_t tokens, heads, groups, key_width, value_width, page;
    std::int64_t window, chunk;  // positions; 0: none
    float scale, softcap;        // softcap 0: none

    std::int64_t first_visible(std::int64_t end) const {
        std::int64_t first = 0;
        if (window) first = std::max(first, end - window);
        if (chunk) first = std::max(first, (end - 1) / chunk * chunk);
        return first;
    }
};

struct Unit {
    std::int64_t token, tokens, group, head, heads;
    std::int64_t first, last;  // what its rows see lies from first up to but not last

    std::int64_t rows() const { return tokens * heads; }
    std::int64_t splits_begin() const { return first / split_positions; }
    std::int64_t splits_end() const { return (last + split_positions - 1) / split_positions; }
};

class Buffer {  // aligned floats that grow and are kept: a warm step allocates nothing
   public:
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { std::free(floats_); }
    float* at_least(std::int64_t count) {
        if (count > count_) {
            std::free(floats_);
            count_ = (count + 1023) / 1024 * 1024;
            floats_ = static_cast<float*>(std::aligned_alloc(64, count_ * sizeof(float)));
        }
        return floats_;
    }

   private:
    float* floats_ = nullptr;
    std::int64_t count_ = 0;
};

// The softmax of each row so far: weighted values (not yet divided), the largest score, and the sum of the weights.
struct State {
    State(float* floats, std::int64_t rows, std::int64_t width)
        : acc(floats), maximum(floats + rows * width), sum(maximum + rows), width(width) {}
    static std::int64_t floats(std::int64_t rows, std::int64_t width) { return (rows * (width + 2) + 15) / 16 * 16; }

    float *acc, *maximum, *sum;
    std::int64_t width;
};

// What `bias` [N] adds to the scores of 16 positions, the first of them `distance` before the query: the last of it
// stands for all that lie further away. Positions behind the query are not seen, whatever they get.
inline __m512 by_distance(const float* bias, std::int64_t count, std::int64_t distance) {
    if (distance - 15 >= count - 1) return _mm512_set1_ps(bias[count - 1]);
    const __m512i back = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i index = _mm512_sub_epi32(_mm512_set1_epi32(static_cast<int>(distance)), back);
    index = _mm512_max_epi32(index, _mm512_setzero_si512());
    index = _mm512_min_epi32(index, _mm512_set1_epi32(static_cast<int>(count - 1)));
    return _mm512_i32gather_ps(index, bias, sizeof(float));
}

// A row's scores of one tile to weights relative to the largest so far; what was summed under an older one is scaled.
// `bias` is the row's own, or null, and `distance` that of the tile's first position.
inline void soften(const Call& call, float* score, std::uint64_t seen, State& state, std::int64_t row, const float* bias,
                   std::int64_t distance) {
    __m512 s[4];
    float largest = state.maximum[row];
    for (int i = 0; i < 4; ++i) {
        s[i] = _mm512_mul_ps(_mm512_load_ps(score + 16 * i), _mm512_set1_ps(call.scale));
        if (call.softcap) {
            const __m512 cap = _mm512_set1_ps(call.softcap);
            s[i] = _mm512_mul_ps(hyperbolic_tangent(_mm512_div_ps(s[i], cap)), cap);
        }
        if (bias) s[i] = _mm512_add_ps(s[i], by_distance(bias, call.biases, distance - 16 * i));
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

template <class T>
class Worker {  // one thread's part of a call
   public:
    explicit Worker(const Call& call)
        : call_(call), width_(padded(call.value_width)), query_width_(padded(call.key_width)) {
        static thread_local Buffer queries, keys;
        queries_ = queries.at_least(rows_at_once * query_width_);
        keys_ = keys.at_least(16 * query_width_);
    }

    static std::int64_t padded(std::int64_t width) { return (width + 31) / 32 * 32; }

    // Makes `unit` the one that is worked on: its queries as float32, columns in the order of `widen`.
    void begin(const Unit& unit) {
        for (std::int64_t row = 0; row < unit.rows(); ++row) {
            const T* query = static_cast<const T*>(call_.query) + (unit.token + row / unit.heads) * call_.query_token +
                             (unit.head + row % unit.heads) * call_.query_head;
            const Pool<T, false> source{&query, &query, call_.key_width};
            copy(source, 0, 1, queries_ + row * query_width_, query_width_, 0, call_.key_width);
        }
    }

    // The rows of `unit` over the positions of one split, from a fresh state.
    void split(const Unit& unit, std::int64_t index, State& state) {
        const std::int64_t begin = std::max(index * split_positions, unit.first / tile_positions * tile_positions);
        const std::int64_t end = std::min((index + 1) * split_positions, unit.last);
        std::fill_n(state.acc, unit.rows() * width_, 0.0f);
        std::fill_n(state.maximum, unit.rows(), nothing_seen);
        std::fill_n(state.sum, unit.rows(), 0.0f);
        locate(unit, begin, places_[0]);
        for (std::int64_t at = begin, i = 0; at < end; at += tile_positions, i ^= 1) {
            // Behind the last tile of a sequence nothing is left to fetch: its own rows are in the cache.
            const bool more = at + tile_positions < unit.last;
            if (more) locate(unit, at + tile_positions, places_[i ^ 1]);
            tile(unit, at, places_[i], more ? places_[i ^ 1] : places_[i], state);
        }
    }

    // A row that has seen nothing but its sink, which takes part in the softmax and has no value.
    void open(const Unit& unit, State& state) {
        std::fill_n(state.acc, unit.rows() * width_, 0.0f);
        for (std::int64_t row = 0; row < unit.rows(); ++row) {
            const float sink = call_.sinks ? call_.sinks[unit.head + row % unit.heads] : -INFINITY;
            state.maximum[row] = std::max(sink, nothing_seen);
            state.sum[row] = exponential(sink - state.maximum[row]);
        }
    }

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
    struct Places {
        const T *key[tile_positions], *value[tile_positions];
    };

    // Places outside of what the unit sees stand for its first and last position: their weight is zero, and their own
    // blocks may be gone.
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
            soften(call_, score_ + r * tile_positions, seen_[r], state, row_[r], bias, call_.length[token] - 1 - begin);
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

    template <class Function>
    static void with_pool(const T* const* row, const T* const* next, std::int64_t width, const Function& function) {
        if (width % Step<T>::length == 0) function(Pool<T, true>{row, next, width});
        else function(Pool<T, false>{row, next, width});
    }

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

    const Call& call_;
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

std::vector<Unit> units_of(const Call& call) {
    const std::int64_t repeat = call.heads / call.groups, heads_at_once = std::min(repeat, rows_at_once);
    const std::int64_t tokens_at_once = rows_at_once / heads_at_once;
    std::vector<Unit> units;
    for (std::int64_t token = 0, next; token < call.tokens; token = next) {
        std::int64_t first = call.length[token], last = 0;
        for (next = token; next < std::min(token + tokens_at_once, call.tokens); ++next) {
            if (call.sequence[next] != call.sequence[token]) break;
            first = std::min(first, call.first_visible(call.length[next]));
            last = std::max<std::int64_t>(last, call.length[next]);
        }
        for (std::int64_t group = 0; group < call.groups; ++group)
            for (std::int64_t head = 0; head < repeat; head += heads_at_once)
                units.push_back({token, next - token, group, group * repeat + head, std::min(heads_at_once, repeat - head),
                                 first, last});
    }
    // The longest first: what is left to the end is short.
    std::stable_sort(units.begin(), units.end(), [](const Unit& a, const Unit& b) {
        return (a.last - a.first) * a.rows() > (b.last - b.first) * b.rows();
    });
    return units;
}

template <class T>
void paged_attention(const Call& call, int threads) {
    struct Part {
        std::int64_t unit, split;
    };
    const std::vector<Unit> units = units_of(call);
    std::vector<Part> parts;
    std::vector<std::int64_t> first_part;
    std::int64_t work = 0, rows = 0;
    for (const Unit& unit : units) {
        first_part.push_back(parts.size());
        for (std::int64_t split = unit.splits_begin(); split < unit.splits_end(); ++split)
            parts.push_back({&unit - units.data(), split});
        work += (unit.last - unit.first) * unit.rows() * (call.key_width + call.value_width);
        rows = std::max(rows, unit.rows());
    }
    threads = static_cast<int>(std::clamp<std::int64_t>(work / work_worth_thread, 1, threads));
    const std::int64_t count = units.size(), part_count = parts.size();
    const std::int64_t width = Worker<T>::padded(call.value_width), floats = State::floats(rows, width);
    // Few units for the threads: these share the splits instead, and the parts are merged afterwards in the same order.
    const bool shared = count < 4 * threads && part_count > count && part_count * floats <= floats_worth_splitting;
    static thread_local Buffer partial_results;
    float* const partial = shared && threads > 1 ? partial_results.at_least(part_count * floats) : nullptr;

#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        static thread_local Buffer scratch;
        float* const own = scratch.at_least(2 * floats);
        Worker<T> worker(call);
        if (partial) {
#pragma omp for schedule(dynamic)
            for (std::int64_t i = 0; i < part_count; ++i) {
                const Unit& unit = units[parts[i].unit];
                State part(partial + i * floats, unit.rows(), width);
                worker.begin(unit);
                worker.split(unit, parts[i].split, part);
            }
        }
#pragma omp for schedule(dynamic)
        for (std::int64_t i = 0; i < count; ++i) {
            const Unit& unit = units[i];
            State total(own, unit.rows(), width);
            worker.open(unit, total);
            if (!partial) worker.begin(unit);
            for (std::int64_t split = unit.splits_begin(); split < unit.splits_end(); ++split) {
                float* const here = partial ? partial + (first_part[i] + split - unit.splits_begin()) * floats : own + floats;
                State part(here, unit.rows(), width);
                if (!partial) worker.split(unit, split, part);
                worker.merge(unit, part, total);
            }
            worker.close(unit, total);
        }
    }
}

}  // namespace
}  // namespace moiety

extern "C" {

// Strides in elements. sinks and bias may be null; window, chunk and softcap are 0 where there is none.
void moiety_paged_attention(int element_bytes, const void* query, std::int64_t query_token, std::int64_t query_head,
                            const void* keys, std::int64_t key_block, std::int64_t key_group, std::int64_t key_position,
                            const void* values, std::int64_t value_block, std::int64_t value_group,
                            std::int64_t value_position, const std::int32_t* tables, std::int64_t table_row,
                            const std::int32_t* sequence, const std::int32_t* length, const float* sinks, const float* bias,
                            std::int64_t biases, void* output, std::int64_t tokens, std::int64_t heads, std::int64_t groups, std::int64_t key_width,
                            std::int64_t value_width, std::int64_t page, std::int64_t window, std::int64_t chunk,
                            float scale, float softcap, int threads) {
    const moiety::Call call{query,       keys,      values,       output,      tables,      sequence,
                            length,      sinks,     bias,        biases,      query_token,  query_head,  key_block,   key_group,
                            key_position, value_block, value_group, value_position, table_row, tokens,
                            heads,       groups,    key_width,    value_width, page,        window,
                            chunk,       scale,     softcap};
    if (element_bytes == sizeof(float)) moiety::paged_attention<float>(call, threads);
    else moiety::paged_attention<moiety::bf16>(call, threads);
}

// Copies `rows` [T, G, bytes] to their slots of a pool of blocks [G, page, bytes]; strides and widths in bytes.
void moiety_paged_store(char* pool, std::int64_t block, std::int64_t group, std::int64_t position, const char* rows,
                        std::int64_t row_token, std::int64_t row_group, const std::int64_t* slots, std::int64_t tokens,
                        std::int64_t groups, std::int64_t bytes, std::int64_t page) {
    for (std::int64_t t = 0; t < tokens; ++t) {
        char* to = pool + slots[t] / page * block + slots[t] % page * position;
        for (std::int64_t g = 0; g < groups; ++g) std::memcpy(to + g * group, rows + t * row_token + g * row_group, bytes);
    }
}

}
