// Paged attention, and the store that fills its pool.
//
// A unit of work is some query tokens of one sequence with some query heads of one key/value head. Its rows share every
// key and value that is read. Scores, softmax and sums are float32.
//
// A row's bits depend only on its own query, length and past, not on the rest of the call or the number of threads. Keys
// are taken in tiles of `tile_positions`, and partial results cover `split_positions`. Both are counted from position 0 of
// the sequence and added in that order. A position that a row does not see adds an exact zero.

#include <omp.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "attention_worker.h"
#include "numbers.h"
#include "softmax.h"

namespace moiety {
namespace {

constexpr std::int64_t work_worth_thread = 1 << 20;       // multiply-adds per thread, some 60 us: the cost of waking one
constexpr std::int64_t floats_worth_splitting = 4 << 20;  // the most floats of partial results

template <class T>
void paged_attention(const AttentionCall& call) {
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
    const int threads = static_cast<int>(std::clamp<std::int64_t>(work / work_worth_thread, 1, call.threads));
    const std::int64_t count = units.size(), part_count = parts.size();
    const std::int64_t width = Worker<T>::padded(call.value_width), floats = State::floats(rows, width);
    // With few units per thread, the threads share the splits instead. The parts are then merged in the same order.
    const bool shared = count < 4 * threads && part_count > count && part_count * floats <= floats_worth_splitting;
    static thread_local Scratch partial_results;
    float* const partial = shared && threads > 1 ? partial_results.at_least(part_count * floats) : nullptr;

#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        static thread_local Scratch scratch;
        float* const results = scratch.at_least(2 * floats);  // of a unit: its total, and one part
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
            State total(results, unit.rows(), width);
            worker.open(unit, total);
            if (!partial) worker.begin(unit);
            for (std::int64_t split = unit.splits_begin(); split < unit.splits_end(); ++split) {
                const std::int64_t index = first_part[i] + split - unit.splits_begin();
                State part(partial ? partial + index * floats : results + floats, unit.rows(), width);
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

void moiety_paged_attention(const moiety::AttentionCall& call) {
    if (call.element_bytes == sizeof(float)) moiety::paged_attention<float>(call);
    else moiety::paged_attention<moiety::bf16>(call);
}

void moiety_paged_store(const moiety::StoreCall& call) {
    for (std::int64_t t = 0; t < call.tokens; ++t) {
        char* to = call.pool + call.slots[t] / call.page * call.block + call.slots[t] % call.page * call.position;
        const char* from = call.rows + t * call.row_token;
        for (std::int64_t g = 0; g < call.groups; ++g)
            std::memcpy(to + g * call.group, from + g * call.row_group, call.bytes);
    }
}

}
