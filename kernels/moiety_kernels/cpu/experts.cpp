// Several experts' MLPs over rows sorted by expert, in one call: first all gate and up projections with the activation,
// then all down projections. A work item is a few columns of one expert. Free threads take the next item, so an uneven
// spread of rows over experts leaves no thread idle.

#include <cmath>
#include <utility>
#include <vector>

#include "product.h"

namespace moiety {
namespace {

// In the order of ACTIVATIONS in reference/expert_mlp.py.
enum Activation { silu, gelu, gelu_tanh, relu, relu2, swiglu_clamped };

struct Kind {
    int activation;
    bool gated, interleaved, limited;
    float limit, alpha;
};

// Cephes' expf: within 1 ulp, clamped to the range where the result is a normal number and does not overflow.
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

// 1 / (1 + exp(-x)); NaN stays NaN.
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
        case relu: return _mm512_max_ps(zero, x);  // for NaN, max returns its second operand
        default: {
            const __m512 positive = _mm512_max_ps(zero, x);
            return _mm512_mul_ps(positive, positive);
        }
    }
}

// `activate` of reference/expert_mlp.py for 16 columns, rounded to T wherever torch would store a tensor.
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

template <class T, class W>
struct Expert {
    Matrix<W> gate_up, down;
    const T *gate_up_bias, *down_bias;
    int64_t begin, rows;
};

// A product as torch computes it: rounded, then the bias added and rounded again. `heads` belong to the sums' row tile.
template <class T, class W>
inline __m512 finished(const float* sums, const float* heads, int64_t row, const Matrix<W>& weights, const T* bias,
                       int64_t column, int64_t count) {
    __m512 sum = _mm512_load_ps(sums);
    if constexpr (Packing<W>::head != 0)  // int8 rows
        sum = _mm512_mul_ps(_mm512_mul_ps(sum, _mm512_set1_ps(heads[row * Packing<W>::head + 16])),
                            load(weights.scale + column, count));
    sum = rounded<T>(sum);
    return bias ? rounded<T>(_mm512_add_ps(sum, load(bias + column, count))) : sum;
}

// Computes inner columns [begin, begin + count). A row's sums are [gate: 32 | up: 32], or alternate like the weights.
template <class T, class W>
void project(const Kind& kind, const Expert<T, W>& expert, const float* packed, T* inner, int64_t hidden, int64_t intermediate,
             int64_t begin, int64_t count) {
    constexpr int64_t half = chunk_columns / 2;
    for_row_tiles(expert.rows, [&](int64_t first_row, int64_t height) {
        alignas(64) float sums[tile_rows * chunk_columns];
        const float* x = packed + (expert.begin + first_row) * packed_row<W>(hidden);
        const auto multiply = [&](int64_t column, int64_t columns, float* out) {
            product(x, height, expert.gate_up, column, columns, hidden, out, chunk_columns);
        };
        if (kind.interleaved)
            multiply(2 * begin, 2 * count, sums);
        else
            multiply(begin, count, sums);
        if (kind.gated && !kind.interleaved) multiply(intermediate + begin, count, sums + half);
        for (int64_t r = 0; r < height; ++r) {
            const auto projected = [&](int64_t at, int64_t column, int64_t some) {
                return finished<T, W>(sums + r * chunk_columns + at, x, r, expert.gate_up, expert.gate_up_bias, column, some);
            };
            for (int64_t i = 0; i < count; i += 16) {
                const int64_t some = count - i;
                __m512 gate, up = _mm512_setzero_ps();
                if (kind.interleaved) {
                    const __m512 low = projected(2 * i, 2 * (begin + i), 2 * some);
                    const __m512 high = some > 8 ? projected(2 * i + 16, 2 * (begin + i) + 16, 2 * some - 16) : up;
                    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
                    gate = _mm512_permutex2var_ps(low, even, high);
                    up = _mm512_permutex2var_ps(low, _mm512_add_epi32(even, _mm512_set1_epi32(1)), high);
                } else {
                    gate = projected(i, begin + i, some);
                    if (kind.gated) up = projected(half + i, intermediate + begin + i, some);
                }
                store(inner + (expert.begin + first_row + r) * intermediate + begin + i, some, activate<T>(kind, gate, up));
            }
        }
    });
}

// Computes output columns [begin, begin + count).
template <class T, class W>
void contract(const Expert<T, W>& expert, const float* packed, T* out, int64_t hidden, int64_t intermediate, int64_t begin,
              int64_t count) {
    for_row_tiles(expert.rows, [&](int64_t first_row, int64_t height) {
        alignas(64) float sums[tile_rows * chunk_columns];
        const float* x = packed + (expert.begin + first_row) * packed_row<W>(intermediate);
        product(x, height, expert.down, begin, count, intermediate, sums, chunk_columns);
        for (int64_t r = 0; r < height; ++r)
            for (int64_t i = 0; i < count; i += 16)
                store(out + (expert.begin + first_row + r) * hidden + begin + i, count - i,
                      finished<T, W>(sums + r * chunk_columns + i, x, r, expert.down, expert.down_bias, begin + i, count - i));
    });
}

// Calls body(expert, first column, columns) for every item of every expert. The threads of the enclosing parallel region
// share the items.
template <class Experts, class Body>
void share_out(const Experts& experts, int64_t width, int64_t columns, Body body) {
    const int64_t pieces = (width + columns - 1) / columns;
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < static_cast<int64_t>(experts.size()) * pieces; ++item) {
        const int64_t begin = item % pieces * columns;
        body(experts[item / pieces], begin, std::min(columns, width - begin));
    }
}

template <class T, class W>
void experts(const T* rows, int64_t ldx, const int64_t* counts, const void* const* tensors, int64_t number, T* out,
             int64_t hidden, int64_t intermediate, int64_t gate_up_group, int64_t down_group, const Kind& kind, int threads) {
    static thread_local Scratch row_scratch, inner_scratch, packed_scratch;
    std::vector<Expert<T, W>> active;
    int64_t total = 0;
    for (int64_t e = 0; e < number; ++e, tensors += 8) {
        if (counts[e])
            active.push_back({Matrix<W>::of(tensors, hidden, gate_up_group), Matrix<W>::of(tensors + 3, intermediate, down_group),
                              static_cast<const T*>(tensors[6]), static_cast<const T*>(tensors[7]), total, counts[e]});
        total += counts[e];
    }
    const int64_t products = hidden * intermediate * (kind.gated ? 3 : 2);  // per row
    threads = worth_threads(products * static_cast<int64_t>(active.size()) * static_cast<int64_t>(sizeof(T)),
                            2 * products * total, threads);
    float* packed = row_scratch.floats(total * packed_row<W>(hidden));
    T* inner = reinterpret_cast<T*>(inner_scratch.floats(total * intermediate));
    float* packed_inner = packed_scratch.floats(total * packed_row<W>(intermediate));
    const int64_t inner_columns = kind.gated ? chunk_columns / 2 : chunk_columns;
    const int64_t size = static_cast<int64_t>(active.size());
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(dynamic, 1)
        for (int64_t e = 0; e < size; ++e) {
            const auto& [begin, count] = std::pair(active[e].begin, active[e].rows);
            pack<W>(rows + begin * ldx, ldx, count, hidden, packed + begin * packed_row<W>(hidden));
        }
        share_out(active, intermediate, inner_columns, [&](const Expert<T, W>& expert, int64_t begin, int64_t count) {
            project(kind, expert, packed, inner, hidden, intermediate, begin, count);
        });
#pragma omp for schedule(dynamic, 1)
        for (int64_t e = 0; e < size; ++e) {
            const auto& [begin, count] = std::pair(active[e].begin, active[e].rows);
            pack<W>(inner + begin * intermediate, intermediate, count, intermediate,
                    packed_inner + begin * packed_row<W>(intermediate));
        }
        share_out(active, hidden, chunk_columns, [&](const Expert<T, W>& expert, int64_t begin, int64_t count) {
            contract(expert, packed_inner, out, hidden, intermediate, begin, count);
        });
    }
}

}  // namespace
}  // namespace moiety

using moiety::bf16;
using std::int64_t;

// `tensors` holds eight pointers per expert: codes, scales and zero points of gate_up [O, D], the same of down [D, I] (null
// where there are none), then the biases [O] and [D] (or null). The groups are the numbers that Python's `layout_of` returns.
#define MOIETY_EXPERTS(name, T, W)                                                                                            \
    void name(const T* rows, int64_t ldx, const int64_t* counts, const void* const* tensors, int64_t number, T* out,          \
              int64_t hidden, int64_t intermediate, int64_t gate_up_group, int64_t down_group, int activation, int gated,     \
              int interleaved, int limited, float limit, float alpha, int threads) {                                          \
        moiety::experts<T, W>(rows, ldx, counts, tensors, number, out, hidden, intermediate, gate_up_group, down_group,       \
                              {activation, gated != 0, interleaved != 0, limited != 0, limit, alpha}, threads);               \
    }

#define MOIETY_EXPERTS_OF(suffix, W)                    \
    MOIETY_EXPERTS(moiety_experts_f32##suffix, float, W) \
    MOIETY_EXPERTS(moiety_experts_bf16##suffix, bf16, W)

extern "C" {

MOIETY_EXPERTS(moiety_experts_f32, float, float)
MOIETY_EXPERTS(moiety_experts_bf16, bf16, bf16)
MOIETY_EXPERTS(moiety_experts_bf16_pairs, bf16, moiety::Pairs)
MOIETY_EXPERTS_OF(_int8, moiety::Int8)
MOIETY_EXPERTS_OF(_int8_rows, std::uint8_t)
MOIETY_EXPERTS_OF(_int4_f16, moiety::Int4<moiety::half>)
MOIETY_EXPERTS_OF(_int4_bf16, moiety::Int4<bf16>)
MOIETY_EXPERTS_OF(_fp8, moiety::Fp8)
MOIETY_EXPERTS_OF(_mxfp4, moiety::Mxfp4)

}
