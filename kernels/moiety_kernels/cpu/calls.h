// The arguments of each function that Python calls. `calls.py` mirrors these structs: none has padding, so that a field that
// is added or widened on one side only changes the size, which Python compares.
#pragma once

#include <algorithm>
#include <cstdint>

namespace moiety {

// One call of paged attention. Strides are in elements; the columns of a row are contiguous.
struct AttentionCall {
    const void *query, *keys, *values;
    void* output;  // [T, H, Dv], contiguous
    const std::int32_t *tables, *sequence, *length;
    const float* sinks;   // [H], or null
    const float* bias;    // [H, biases], or null: added to a score, indexed by distance in tokens
    std::int64_t biases;
    std::int64_t query_token, query_head, key_block, key_group, key_position;  // strides
    std::int64_t value_block, value_group, value_position, table_row;          // strides
    std::int64_t tokens, heads, groups, key_width, value_width, page;
    std::int64_t window, chunk;  // in positions; 0: none
    std::int64_t element_bytes;  // 4: float32, 2: bf16
    std::int64_t threads;
    float scale, softcap;  // softcap 0: none

    // The oldest position that the token at position `end` - 1 sees.
    std::int64_t first_visible(std::int64_t end) const {
        std::int64_t first = 0;
        if (window) first = std::max(first, end - window);
        if (chunk) first = std::max(first, (end - 1) / chunk * chunk);
        return first;
    }
};

// Copies `rows` [T, G, bytes] to their slots of a pool of blocks [G, page, bytes]. Strides and widths are in bytes.
struct StoreCall {
    char* pool;
    const char* rows;
    const std::int64_t* slots;  // [T]
    std::int64_t block, group, position, row_token, row_group;  // strides
    std::int64_t tokens, groups, bytes, page;
};

// One batch of experts. `tensors` holds eight pointers per expert: codes, scales and zero points of gate_up [O, D], the same
// of down [D, I] (null where there are none), then the biases [O] and [D] (or null).
struct ExpertsCall {
    const void* rows;            // [R, D], sorted by expert; columns are contiguous
    const std::int64_t* counts;  // rows of each expert
    const void* const* tensors;
    void* out;  // [R, D], contiguous
    std::int64_t row_stride, experts, hidden, intermediate;
    std::int64_t gate_up_group, down_group;  // the numbers that Python's `layout_of` returns
    std::int64_t activation, gated, interleaved, threads;
    float limit, alpha;  // limit infinity: none
};

// y = x w^T + bias. Strides are in elements; the columns of a row are contiguous.
struct LinearCall {
    const void *x, *weight, *bias;  // [R, D], [O, D], and [O] or null
    void* out;                      // [R, O], contiguous
    std::int64_t x_stride, weight_stride, rows, depth, width, threads;
};

// RMS normalisation of rows.
struct NormCall {
    const void *x, *weight;  // [R, D] with contiguous columns, and [D]
    void* out;               // [R, D], contiguous
    std::int64_t x_stride, rows, depth, late;
    float epsilon, offset;
};

// In the order of CALLS in calls.py.
extern "C" {
[[gnu::used]] inline std::int64_t moiety_call_bytes[] = {sizeof(AttentionCall), sizeof(StoreCall), sizeof(ExpertsCall),
                                                         sizeof(LinearCall), sizeof(NormCall)};
}

}  // namespace moiety
