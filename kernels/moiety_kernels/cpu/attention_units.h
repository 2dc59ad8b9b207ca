// The division of a call of paged attention into units of work.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "calls.h"

namespace moiety {
namespace {  // for attention.cpp alone: symbols stay local to it

constexpr std::int64_t split_positions = 512;  // positions per partial result; threads share these where units are few
constexpr std::int64_t rows_at_once = 64;      // the most rows of a unit: enough arithmetic per key read in a prefill

// Some query tokens of one sequence with some query heads of one key/value head (`group`). Each pair is a row.
struct Unit {
    std::int64_t token, tokens, group, head, heads;
    std::int64_t first, last;  // its rows see positions in [first, last)

    std::int64_t rows() const { return tokens * heads; }
    std::int64_t splits_begin() const { return first / split_positions; }
    std::int64_t splits_end() const { return (last + split_positions - 1) / split_positions; }
};

// Divides a call into units, the longest first, so that the threads finish at about the same time.
std::vector<Unit> units_of(const AttentionCall& call) {
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
    std::stable_sort(units.begin(), units.end(), [](const Unit& a, const Unit& b) {
        return (a.last - a.first) * a.rows() > (b.last - b.first) * b.rows();
    });
    return units;
}

}  // namespace
}  // namespace moiety
