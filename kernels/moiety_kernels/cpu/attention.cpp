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
#include <vector>

#include "tile.h"

namespace moiety {
namespace {

constexpr int tile_positions = 64;             // one step of the online softmax: keys and values that stay in the L1 cache
constexpr std::int64_t split_positions = 512;  // one partial result: what threads share where units are few
constexpr std::int64_t rows_at_once = 64;      // of a unit: enough arithmetic for every key read in a prefill
constexpr std::int64_t columns_at_once = 64;   // of values: four vectors, for four rows sixteen sums in registers
constexpr int rows_worth_widening = 8;         // so many rows share one conversion of bf16 values
constexpr std::int64_t work_worth_thread = 256 << 10;      // multiply-adds, about 15 us: what waking a thread may cost
constexpr std::int64_t floats_worth_splitting = 4 << 20;   // of partial results
constexpr float nothing_seen = -1e30f;                     // the running maximum of a row before its first position

struct Call {
    const void *query, *keys, *values;
    void* output;  // [T, H, Dv], contiguous
    const std::int32_t *tables, *sequence, *length;
    const float* sinks;                       // [H], or null
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

// e^x for x <= 0, an exact 0 below -150, NaN for NaN. Within 1.1 units in the last place of a normal result: the
// argument is reduced by ln 2 in two parts, and the rest is a polynomial of degree 6.
inline __m512 exponential(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
    __m512 p = _mm512_set1_ps(1.0f / 720);
    for (const float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    return _mm512_scalef_ps(p, n);
}

inline float exponential(float x) { return _mm512_cvtss_f32(exponential(_mm512_set1_ps(x))); }

// Near 0, where 1 - e^-2x would cancel, an odd polynomial (the coefficients of Cephes' tanhf).
inline __m512 hyperbolic_tangent(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f), size = _mm512_abs_ps(x), square = _mm512_mul_ps(x, x);
    __m512 p = _mm512_set1_ps(-5.70498872745e-3f);
    for (const float c : {2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f, -3.33332819422e-1f})
        p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(c));
    const __m512 near = _mm512_fmadd_ps(_mm512_mul_ps(p, square), x, x);
    const __m512 e = exponential(_mm512_mul_ps(size, _mm512_set1_ps(-2.0f)));
    const __m512 far = _mm512_div_ps(_mm512_sub_ps(one, e), _mm512_add_ps(one, e));
    const __m512 sign = _mm512_and_ps(x, _mm512_set1_ps(-0.0f));
    const __mmask16 is_near = _mm512_cmp_ps_mask(size, _mm512_set1_ps(0.625f), _CMP_LT_OQ);
    return _mm512_mask_blend_ps(is_near, _mm512_or_ps(far, sign), near);
}

// One load of values as float32 vectors. Of bf16 these are the even and the odd columns: two shifts, no shuffle.
inline void widen(__m512 from, __m512* to) { to[0] = from; }
inline void widen(__m512i from, __m512* to) {
    to[0] = _mm512_castsi512_ps(_mm512_slli_epi32(from, 16));
    to[1] = _mm512_castsi512_ps(_mm512_and_si512(from, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}

// The way back, rounded to nearest even, for the first `count` columns.
inline void narrow(const __m512* from, float* to, std::int64_t count) {
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>(count >= 16 ? 0xffff : (1u << count) - 1), from[0]);
}
inline void narrow(const __m512* from, bf16* to, std::int64_t count) {
    const __m512i even = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(from[0]));
    const __m512i odd = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(from[1]));
    const auto mask = static_cast<__mmask32>(count >= 32 ? 0xffffffff : (1u << count) - 1);
    _mm512_mask_storeu_epi16(to, mask, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
}

template <class T>
inline typename Step<T>::Vector load(const T* from, std::int64_t left) {
    return left >= Step<T>::length ? Step<T>::load(from) : Step<T>::load(from, left);
}

// out[q * tile_positions + k] = query[q] . key[k] for Q rows and 16 / Q keys.
template <class T, int Q>
inline void scores(const T* const* query, const T* const* key, std::int64_t width, float* out) {
    constexpr int K = 16 / Q;
    __m512 sums[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) sums[i] = _mm512_setzero_ps();
    for (std::int64_t at = 0; at < width; at += Step<T>::length) {
        typename Step<T>::Vector rows[Q];
#pragma GCC unroll 4
        for (int q = 0; q < Q; ++q) rows[q] = load(query[q] + at, width - at);
#pragma GCC unroll 16
        for (int k = 0; k < K; ++k) {
            const typename Step<T>::Vector vector = load(key[k] + at, width - at);
#pragma GCC unroll 4
            for (int q = 0; q < Q; ++q) sums[q * K + k] = Step<T>::add(sums[q * K + k], rows[q], vector);
        }
    }
    alignas(64) float flat[16];
    _mm512_store_ps(flat, reduce(sums));
    for (int q = 0; q < Q; ++q) std::memcpy(out + q * tile_positions, flat + q * K, K * sizeof(float));
}

// A row's scores of one tile to weights relative to the largest so far; what was summed under an older one is scaled.
inline void soften(const Call& call, float* score, std::uint64_t seen, State& state, std::int64_t row) {
    __m512 s[4];
    float largest = state.maximum[row];
    for (int i = 0; i < 4; ++i) {
        s[i] = _mm512_mul_ps(_mm512_load_ps(score + 16 * i), _mm512_set1_ps(call.scale));
        if (call.softcap) {
            const __m512 cap = _mm512_set1_ps(call.softcap);
            s[i] = _mm512_mul_ps(hyperbolic_tangent(_mm512_div_ps(s[i], cap)), cap);
        }
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

// Where `weigh` takes its values from: the pool, or a piece of it that was widened before.
template <class T>
struct FromPool {
    const T* const* value;
    std::int64_t at, left;
    template <int V>
    void operator()(int position, __m512* to) const {
        constexpr int vectors = Step<T>::length / 16;
#pragma GCC unroll 4
        for (int v = 0; v < V; v += vectors) widen(load(value[position] + at + 16 * v, left - 16 * v), to + v);
    }
};

struct Widened {
    const float* value;
    template <int V>
    void operator()(int position, __m512* to) const {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) to[v] = _mm512_load_ps(value + position * columns_at_once + 16 * v);
    }
};

// acc[r][0 .. 16 V) += the sum over positions of weight[r * tile_positions + position] * value, for R rows.
template <int R, int V, class Source>
inline void weigh(const float* weight, const Source& source, int from, int to, float* const* acc, std::int64_t at) {
    __m512 sums[R][V];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sums[r][v] = _mm512_load_ps(acc[r] + at + 16 * v);
    for (int position = from; position < to; ++position) {
        __m512 value[V];
        source.template operator()<V>(position, value);
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

template <int V, class Source>
inline void weigh_rows(const float* weight, const Source& source, int from, int to, float* const* acc, int rows, std::int64_t at) {
    int r = 0;
    for (; r + 4 <= rows; r += 4) weigh<4, V>(weight + r * tile_positions, source, from, to, acc + r, at);
    for (; r + 2 <= rows; r += 2) weigh<2, V>(weight + r * tile_positions, source, from, to, acc + r, at);
    if (r < rows) weigh<1, V>(weight + r * tile_positions, source, from, to, acc + r, at);
}

template <class T>
class Worker {  // one thread's part of a call
   public:
    explicit Worker(const Call& call) : call_(call), width_((call.value_width + 31) / 32 * 32) {}

    static std::int64_t padded(const Call& call) { return (call.value_width + 31) / 32 * 32; }

    // The rows of `unit` over the positions of one split, from a fresh state.
    void split(const Unit& unit, std::int64_t index, State& state) {
        const std::int64_t begin = std::max(index * split_positions, unit.first / tile_positions * tile_positions);
        const std::int64_t end = std::min((index + 1) * split_positions, unit.last);
        std::fill_n(state.acc, unit.rows() * width_, 0.0f);
        std::fill_n(state.maximum, unit.rows(), nothing_seen);
        std::fill_n(state.sum, unit.rows(), 0.0f);
        locate(unit, begin, places_[0]);
        for (std::int64_t at = begin, i = 0; at < end; at += tile_positions, i ^= 1) {
            const bool more = at + tile_positions < end;
            if (more) locate(unit, at + tile_positions, places_[i ^ 1]);
            tile(unit, at, places_[i], more ? &places_[i ^ 1] : nullptr, state);
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
                narrow(result, to + at, call_.value_width - at);
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
            for (; position < start + call_.page && j < tile_positions; position = std::clamp(begin + j, unit.first, unit.last - 1)) {
                places.key[j] = key + (position - start) * call_.key_position;
                places.value[j] = value + (position - start) * call_.value_position;
                ++j;
            }
        }
    }

    void tile(const Unit& unit, std::int64_t begin, const Places& places, const Places* next, State& state) {
        int rows = 0, from = tile_positions, to = 0;
        for (std::int64_t token = 0; token < unit.tokens; ++token) {
            const std::int64_t end = call_.length[unit.token + token];
            const std::int64_t low = std::max<std::int64_t>(call_.first_visible(end) - begin, 0);
            const std::int64_t high = std::min<std::int64_t>(end - begin, tile_positions);
            if (low >= high) continue;
            from = std::min<int>(from, low), to = std::max<int>(to, high);
            const std::uint64_t seen = (~0ull >> (tile_positions - high)) & (~0ull << low);
            const T* query = static_cast<const T*>(call_.query) + (unit.token + token) * call_.query_token;
            for (std::int64_t head = 0; head < unit.heads; ++head, ++rows) {
                row_[rows] = token * unit.heads + head;
                seen_[rows] = seen;
                query_[rows] = query + (unit.head + head) * call_.query_head;
                acc_[rows] = state.acc + row_[rows] * width_;
            }
        }
        for (int key = from / 16 * 16; key < to; key += 16) {
            if (next) fetch(next->key + key, call_.key_width);
            int r = 0;
            for (; r + 4 <= rows; r += 4)
                for (int k = key; k < key + 16; k += 4)
                    scores<T, 4>(query_ + r, places.key + k, call_.key_width, score_ + r * tile_positions + k);
            for (; r + 2 <= rows; r += 2)
                for (int k = key; k < key + 16; k += 8)
                    scores<T, 2>(query_ + r, places.key + k, call_.key_width, score_ + r * tile_positions + k);
            if (r < rows) scores<T, 1>(query_ + r, places.key + key, call_.key_width, score_ + r * tile_positions + key);
        }
        for (int r = 0; r < rows; ++r) soften(call_, score_ + r * tile_positions, seen_[r], state, row_[r]);
        std::int64_t at = 0;
        for (; at + columns_at_once <= call_.value_width; at += columns_at_once) columns<4>(places, from, to, rows, at);
        for (; at < call_.value_width; at += Step<T>::length) columns<Step<T>::length / 16>(places, from, to, rows, at);
        if (next)
            for (int key = from / 16 * 16; key < to; key += 16) fetch(next->value + key, call_.value_width);
    }

    template <int V>
    void columns(const Places& places, int from, int to, int rows, std::int64_t at) {
        const FromPool<T> pool{places.value, at, call_.value_width - at};
        if (sizeof(T) == sizeof(float) || rows < rows_worth_widening)
            return weigh_rows<V>(score_, pool, from, to, acc_, rows, at);
        for (int position = from; position < to; ++position) {
            __m512 value[V];
            pool.template operator()<V>(position, value);
            for (int v = 0; v < V; ++v) _mm512_store_ps(wide_ + position * columns_at_once + 16 * v, value[v]);
        }
        weigh_rows<V>(score_, Widened{wide_}, from, to, acc_, rows, at);
    }

    static void fetch(const T* const* rows, std::int64_t width) {
        for (int i = 0; i < 16; ++i)
            for (std::int64_t at = 0; at < width; at += 64 / sizeof(T))
                _mm_prefetch(reinterpret_cast<const char*>(rows[i] + at), _MM_HINT_T0);
    }

    const Call& call_;
    const std::int64_t width_;
    Places places_[2];
    alignas(64) float score_[rows_at_once * tile_positions];
    alignas(64) float wide_[tile_positions * columns_at_once];
    std::uint64_t seen_[rows_at_once];
    std::int64_t row_[rows_at_once];
    const T* query_[rows_at_once];
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
                units.push_back({token, next - token, group, group * repeat + head, std::min(heads_at_once, repeat - head), first, last});
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
    const std::int64_t width = Worker<T>::padded(call), floats = State::floats(rows, width);
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
                worker.split(unit, parts[i].split, part);
            }
        }
#pragma omp for schedule(dynamic)
        for (std::int64_t i = 0; i < count; ++i) {
            const Unit& unit = units[i];
            State total(own, unit.rows(), width);
            worker.open(unit, total);
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

// Strides in elements. sinks may be null; window, chunk and softcap are 0 where there is none.
void moiety_paged_attention(int element_bytes, const void* query, std::int64_t query_token, std::int64_t query_head,
                            const void* keys, std::int64_t key_block, std::int64_t key_group, std::int64_t key_position,
                            const void* values, std::int64_t value_block, std::int64_t value_group,
                            std::int64_t value_position, const std::int32_t* tables, std::int64_t table_row,
                            const std::int32_t* sequence, const std::int32_t* length, const float* sinks, void* output,
                            std::int64_t tokens, std::int64_t heads, std::int64_t groups, std::int64_t key_width,
                            std::int64_t value_width, std::int64_t page, std::int64_t window, std::int64_t chunk,
                            float scale, float softcap, int threads) {
    const moiety::Call call{query,       keys,      values,       output,      tables,      sequence,
                            length,      sinks,     query_token,  query_head,  key_block,   key_group,
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
