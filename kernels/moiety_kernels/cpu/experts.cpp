// Several experts' MLPs over rows sorted by expert, in one call: first all gate and up projections with the activation,
// then all down projections. A work item is a few columns of one expert. Free threads take the next item, so an uneven
// spread of rows over experts leaves no thread idle.

#include <cmath>
#include <utility>
#include <vector>

#include "calls.h"
#include "exponential.h"
#include "product.h"
#include "scratch.h"

namespace moiety {
namespace {

// In the order of ACTIVATIONS in reference/activation.py.
enum Activation { silu, gelu, gelu_tanh, relu, relu2, swiglu_clamped };

inline __m512 apply(int64_t activation, __m512 x) {
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

// `activate` of reference/activation.py for 16 columns, rounded to T wherever torch would store a tensor.
template <class T>
inline __m512 activate(const ExpertsCall& call, __m512 gate, __m512 up) {
    if (!call.gated) return rounded<T>(apply(call.activation, gate));
    if (call.limit < INFINITY) {
        const __m512 limit = rounded<T>(_mm512_set1_ps(call.limit)), least = rounded<T>(_mm512_set1_ps(-call.limit));
        gate = _mm512_min_ps(limit, gate);
        up = _mm512_max_ps(least, _mm512_min_ps(limit, up));
    }
    if (call.activation == swiglu_clamped) {
        const __m512 scaled = rounded<T>(_mm512_mul_ps(gate, _mm512_set1_ps(call.alpha)));
        const __m512 gated = rounded<T>(_mm512_mul_ps(gate, rounded<T>(sigmoid(scaled))));
        return rounded<T>(_mm512_mul_ps(rounded<T>(_mm512_add_ps(up, _mm512_set1_ps(1.0f))), gated));
    }
    return rounded<T>(_mm512_mul_ps(rounded<T>(apply(call.activation, gate)), up));
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
void project(const ExpertsCall& call, const Expert<T, W>& expert, const float* packed, T* inner, int64_t begin, int64_t count) {
    constexpr int64_t half = chunk_columns / 2;
    const int64_t hidden = call.hidden, intermediate = call.intermediate;
    for_row_tiles(expert.rows, [&](int64_t first_row, int64_t height) {
        alignas(64) float sums[tile_rows * chunk_columns];
        const float* x = packed + (expert.begin + first_row) * packed_row<W>(hidden);
        const auto multiply = [&](int64_t column, int64_t columns, float* out) {
            product(x, height, expert.gate_up, column, columns, hidden, out, chunk_columns);
        };
        const int64_t columns = call.interleaved ? 2 : 1;  // of weights per inner column
        multiply(columns * begin, columns * count, sums);
        if (call.gated && !call.interleaved) multiply(intermediate + begin, count, sums + half);
        for (int64_t r = 0; r < height; ++r) {
            const auto projected = [&](int64_t at, int64_t column, int64_t some) {
                return finished<T, W>(sums + r * chunk_columns + at, x, r, expert.gate_up, expert.gate_up_bias, column, some);
            };
            for (int64_t i = 0; i < count; i += 16) {
                const int64_t some = count - i;
                __m512 gate, up = _mm512_setzero_ps();
                if (call.interleaved) {
                    const __m512 low = projected(2 * i, 2 * (begin + i), 2 * some);
                    const __m512 high = some > 8 ? projected(2 * i + 16, 2 * (begin + i) + 16, 2 * some - 16) : up;
                    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
                    gate = _mm512_permutex2var_ps(low, even, high);
                    up = _mm512_permutex2var_ps(low, _mm512_add_epi32(even, _mm512_set1_epi32(1)), high);
                } else {
                    gate = projected(i, begin + i, some);
                    if (call.gated) up = projected(half + i, intermediate + begin + i, some);
                }
                store(inner + (expert.begin + first_row + r) * intermediate + begin + i, some, activate<T>(call, gate, up));
            }
        }
    });
}

// Computes output columns [begin, begin + count).
template <class T, class W>
void contract(const ExpertsCall& call, const Expert<T, W>& expert, const float* packed, int64_t begin, int64_t count) {
    T* const out = static_cast<T*>(call.out);
    const int64_t hidden = call.hidden, intermediate = call.intermediate;
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
void experts(const ExpertsCall& call) {
    static thread_local Scratch row_scratch, inner_scratch, packed_scratch;
    const T* const rows = static_cast<const T*>(call.rows);
    const int64_t ldx = call.row_stride, hidden = call.hidden, intermediate = call.intermediate;
    std::vector<Expert<T, W>> active;
    int64_t total = 0;
    const void* const* tensors = call.tensors;
    for (int64_t e = 0; e < call.experts; ++e, tensors += 8) {
        const int64_t count = call.counts[e];
        if (count)
            active.push_back({Matrix<W>::of(tensors, hidden, call.gate_up_group),
                              Matrix<W>::of(tensors + 3, intermediate, call.down_group), static_cast<const T*>(tensors[6]),
                              static_cast<const T*>(tensors[7]), total, count});
        total += count;
    }
    const int64_t products = hidden * intermediate * (call.gated ? 3 : 2);  // per row
    const int threads = worth_threads(products * static_cast<int64_t>(active.size()) * static_cast<int64_t>(sizeof(T)),
                                      2 * products * total, call.threads);
    float* packed = row_scratch.at_least(total * packed_row<W>(hidden));
    T* inner = reinterpret_cast<T*>(inner_scratch.at_least(total * intermediate));
    float* packed_inner = packed_scratch.at_least(total * packed_row<W>(intermediate));
    const int64_t inner_columns = call.gated ? chunk_columns / 2 : chunk_columns;
    const int64_t size = static_cast<int64_t>(active.size());
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(dynamic, 1)
        for (int64_t e = 0; e < size; ++e) {
            const auto& [begin, count] = std::pair(active[e].begin, active[e].rows);
            pack<W>(rows + begin * ldx, ldx, count, hidden, packed + begin * packed_row<W>(hidden));
        }
        share_out(active, intermediate, inner_columns, [&](const Expert<T, W>& expert, int64_t begin, int64_t count) {
            project(call, expert, packed, inner, begin, count);
        });
#pragma omp for schedule(dynamic, 1)
        for (int64_t e = 0; e < size; ++e) {
            const auto& [begin, count] = std::pair(active[e].begin, active[e].rows);
            pack<W>(inner + begin * intermediate, intermediate, count, intermediate,
                    packed_inner + begin * packed_row<W>(intermediate));
        }
        share_out(active, hidden, chunk_columns, [&](const Expert<T, W>& expert, int64_t begin, int64_t count) {
            contract(call, expert, packed_inner, begin, count);
        });
    }
}

}  // namespace
}  // namespace moiety

using moiety::bf16;

#define MOIETY_EXPERTS(name, T, W) \
    void name(const moiety::ExpertsCall& call) { moiety::experts<T, W>(call); }

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
