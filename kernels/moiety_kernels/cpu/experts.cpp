// Several experts' MLPs over rows sorted by expert, in one call: first all gate and up projections with the activation,
// then all down projections. A work item is a few columns of one expert, taken by whichever thread is free, so that an
// uneven spread of rows over experts leaves no thread idle.

#include <cmath>
#include <vector>

#include "tile.h"

namespace moiety {
namespace {

// The order of moiety_kernels.reference.ACTIVATIONS.
enum Activation { silu, gelu, gelu_tanh, relu, relu2, swiglu_clamped };

struct Kind {
    int activation;
    bool gated, interleaved, limited;
    float limit, alpha;
};

// Cephes' expf: within 1 ulp between the bounds at which the result would overflow or be no normal number.
inline __m512 exponential(__m512 x) {
    x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.3365f)), _mm512_set1_ps(88.3762f));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), 0);
    x = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    x = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), x);
    __m512 y = _mm512_set1_ps(1.9875691500e-4f);
    for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        y = _mm512_fmadd_ps(y, x, _mm512_set1_ps(c));
    y = _mm512_add_ps(_mm512_fmadd_ps(y, _mm512_mul_ps(x, x), x), _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(y, n);
}

// 1 / (1 + exp(-x)); not a number stays one.
inline __m512 sigmoid(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f);
    const __m512 value = _mm512_div_ps(one, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), x))));
    return _mm512_mask_mov_ps(value, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), x);
}

inline __m512 apply(int activation, __m512 x) {
    const __m512 zero = _mm512_setzero_ps();
    switch (activation) {
        case silu: return _mm512_mul_ps(x, sigmoid(x));
        case gelu: {
            alignas(64) float values[16];
            _mm512_store_ps(values, x);
            for (float& value : values) value = value * 0.5f * (1.0f + std::erf(value * 0.70710678118654752f));
            return _mm512_load_ps(values);
        }
        case gelu_tanh: {  // 0.5 (1 + tanh(u)) is sigmoid(2u)
            const __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
            const __m512 u = _mm512_mul_ps(_mm512_fmadd_ps(cube, _mm512_set1_ps(0.044715f), x),
                                           _mm512_set1_ps(2 * 0.79788456080286536f));
            return _mm512_mul_ps(x, sigmoid(u));
        }
        case relu: return _mm512_max_ps(zero, x);  // the second operand where one is not a number
        default: {
            const __m512 positive = _mm512_max_ps(zero, x);
            return _mm512_mul_ps(positive, positive);
        }
    }
}

// reference.activate for 16 columns: a rounding to T wherever torch would store a tensor.
template <class T>
inline __m512 activate(const Kind& kind, __m512 gate, __m512 up) {
    if (!kind.gated) return rounded<T>(apply(kind.activation, gate));
    if (kind.limited) {
        const __m512 limit = rounded<T>(_mm512_set1_ps(kind.limit)), least = rounded<T>(_mm512_set1_ps(-kind.limit));
        gate = _mm512_min_ps(limit, gate);
        up = _mm512_max_ps(least, _mm512_min_ps(limit, up));
    }
    if (kind.activation == swiglu_clamped) {
        const __m512 scaled = rounded<T>(_mm512_mul_ps(gate, _mm512_set1_ps(kind.alpha)));
        const __m512 gated = rounded<T>(_mm512_mul_ps(gate, rounded<T>(sigmoid(scaled))));
        return rounded<T>(_mm512_mul_ps(rounded<T>(_mm512_add_ps(up, _mm512_set1_ps(1.0f))), gated));
    }
    return rounded<T>(_mm512_mul_ps(rounded<T>(apply(kind.activation, gate)), up));
}

// A product as torch would leave it: rounded, then the bias added and rounded again.
template <class T>
inline __m512 finished(const float* sums, const T* bias, int64_t count) {
    const __m512 sum = rounded<T>(_mm512_load_ps(sums));
    return bias ? rounded<T>(_mm512_add_ps(sum, load(bias, count))) : sum;
}

template <class T>
struct Expert {
    const T *gate_up, *down, *gate_up_bias, *down_bias;
    int64_t begin, rows;
};

// Columns of `gate_up` for the inner columns [begin, begin + count): sums are [row][gate 0.. | up 0..], or as published.
template <class T>
void project(const Kind& kind, const Expert<T>& expert, const float* packed, T* inner, int64_t hidden, int64_t intermediate,
             int64_t begin, int64_t count) {
    constexpr int64_t half = chunk_columns / 2;
    for_row_tiles(expert.rows, [&](int64_t row, int64_t height) {
        alignas(64) float sums[tile_rows * chunk_columns];
        const float* x = packed + (expert.begin + row) * packed_row<T>(hidden);
        const T *w = expert.gate_up, *bias = expert.gate_up_bias;
        if (!kind.gated)
            product(x, height, w + begin * hidden, hidden, count, hidden, sums, chunk_columns);
        else if (kind.interleaved)
            product(x, height, w + 2 * begin * hidden, hidden, 2 * count, hidden, sums, chunk_columns);
        else {
            product(x, height, w + begin * hidden, hidden, count, hidden, sums, chunk_columns);
            product(x, height, w + (intermediate + begin) * hidden, hidden, count, hidden, sums + half, chunk_columns);
        }
        for (int64_t r = 0; r < height; ++r) {
            const float* at = sums + r * chunk_columns;
            T* to = inner + (expert.begin + row + r) * intermediate + begin;
            for (int64_t i = 0; i < count; i += 16) {
                const int64_t some = count - i;
                __m512 gate, up = _mm512_setzero_ps();
                if (!kind.gated)
                    gate = finished(at + i, bias ? bias + begin + i : nullptr, some);
                else if (kind.interleaved) {
                    const T* pairs = bias ? bias + 2 * (begin + i) : nullptr;
                    const __m512 low = finished(at + 2 * i, pairs, 2 * some);
                    const __m512 high = some > 8 ? finished(at + 2 * i + 16, pairs ? pairs + 16 : nullptr, 2 * some - 16) : up;
                    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
                    gate = _mm512_permutex2var_ps(low, even, high);
                    up = _mm512_permutex2var_ps(low, _mm512_add_epi32(even, _mm512_set1_epi32(1)), high);
                } else {
                    gate = finished(at + i, bias ? bias + begin + i : nullptr, some);
                    up = finished(at + half + i, bias ? bias + intermediate + begin + i : nullptr, some);
                }
                store(to + i, some, activate<T>(kind, gate, up));
            }
        }
    });
}

template <class T>
void contract(const Expert<T>& expert, const float* packed, T* out, int64_t hidden, int64_t intermediate, int64_t begin,
              int64_t count) {
    for_row_tiles(expert.rows, [&](int64_t row, int64_t height) {
        alignas(64) float sums[tile_rows * chunk_columns];
        product(packed + (expert.begin + row) * packed_row<T>(intermediate), height, expert.down + begin * intermediate,
                intermediate, count, intermediate, sums, chunk_columns);
        for (int64_t r = 0; r < height; ++r)
            for (int64_t i = 0; i < count; i += 16)
                store(out + (expert.begin + row + r) * hidden + begin + i, count - i,
                      finished(sums + r * chunk_columns + i, expert.down_bias ? expert.down_bias + begin + i : nullptr,
                               count - i));
    });
}

// Calls body(expert, first column, columns) for every item of every expert, the items shared out among the threads of
// the enclosing parallel region.
template <class T, class Body>
void share_out(const std::vector<Expert<T>>& experts, int64_t width, int64_t columns, Body body) {
    const int64_t pieces = (width + columns - 1) / columns;
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < static_cast<int64_t>(experts.size()) * pieces; ++item) {
        const int64_t begin = item % pieces * columns;
        body(experts[item / pieces], begin, std::min(columns, width - begin));
    }
}

template <class T>
void experts(const T* rows, int64_t ldx, const int64_t* counts, const T* const* weights, int64_t number, T* out, int64_t hidden,
             int64_t intermediate, const Kind& kind, int threads) {
    static thread_local Scratch row_scratch, inner_scratch, packed_scratch;
    std::vector<Expert<T>> active;
    int64_t total = 0;
    for (int64_t e = 0; e < number; ++e) {
        const T* const* w = weights + 4 * e;
        if (counts[e]) active.push_back({w[0], w[1], w[2], w[3], total, counts[e]});
        total += counts[e];
    }
    float* packed = row_scratch.floats(total * packed_row<T>(hidden));
    T* inner = reinterpret_cast<T*>(inner_scratch.floats(total * intermediate));
    float* packed_inner = packed_scratch.floats(total * packed_row<T>(intermediate));
    const int64_t inner_columns = kind.gated ? chunk_columns / 2 : chunk_columns;
    const int64_t size = static_cast<int64_t>(active.size());
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(dynamic, 1)
        for (int64_t e = 0; e < size; ++e)
            pack(rows + active[e].begin * ldx, ldx, active[e].rows, hidden, packed + active[e].begin * packed_row<T>(hidden));
        share_out(active, intermediate, inner_columns, [&](const Expert<T>& expert, int64_t begin, int64_t count) {
            project(kind, expert, packed, inner, hidden, intermediate, begin, count);
        });
#pragma omp for schedule(dynamic, 1)
        for (int64_t e = 0; e < size; ++e)
            pack(inner + active[e].begin * intermediate, intermediate, active[e].rows, intermediate,
                 packed_inner + active[e].begin * packed_row<T>(intermediate));
        share_out(active, hidden, chunk_columns, [&](const Expert<T>& expert, int64_t begin, int64_t count) {
            contract(expert, packed_inner, out, hidden, intermediate, begin, count);
        });
    }
}

}  // namespace
}  // namespace moiety

using moiety::bf16;
using std::int64_t;

// `weights` holds gate_up [O, D], down [D, I], gate_up_bias [O] and down_bias [D] of each expert; biases may be null.
extern "C" {

void moiety_experts_f32(const float* rows, int64_t ldx, const int64_t* counts, const float* const* weights, int64_t number,
                        float* out, int64_t hidden, int64_t intermediate, int activation, int gated, int interleaved,
                        int limited, float limit, float alpha, int threads) {
    moiety::experts(rows, ldx, counts, weights, number, out, hidden, intermediate,
                    {activation, gated != 0, interleaved != 0, limited != 0, limit, alpha}, threads);
}

void moiety_experts_bf16(const bf16* rows, int64_t ldx, const int64_t* counts, const bf16* const* weights, int64_t number,
                         bf16* out, int64_t hidden, int64_t intermediate, int activation, int gated, int interleaved,
                         int limited, float limit, float alpha, int threads) {
    moiety::experts(rows, ldx, counts, weights, number, out, hidden, intermediate,
                    {activation, gated != 0, interleaved != 0, limited != 0, limit, alpha}, threads);
}

}
