// Which panels a node reads, and which single positions where every key is scored.
#pragma once

#include "kernels/few_read_summary.hpp"

namespace paceline {

namespace {

INLINE int32_t bits_of(float value) {
    int32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
}

INLINE size_t count_from(const float* values, size_t count, int32_t low) {
    int32_t found = 0;
    for (size_t i = 0; i < count; ++i) found += bits_of(values[i]) >= low;
    return static_cast<size_t>(found);
}

// The largest bits that `wanted` of some values, none negative, reach.
static int32_t threshold(const float* values, size_t count, size_t wanted) {
    int32_t low = 0;
    for (int bit = 30; bit >= 0; --bit) {
        const int32_t next = low | int32_t{1} << bit;
        if (count_from(values, count, next) >= wanted) low = next;
    }
    return low;
}

// Lists old panels of the most worth, of equals the earlier; returns the end of the list.
static int32_t* list_best(const Place& place, const float* worth, int32_t* to) {
    const size_t count = place.old_last - place.old_first;
    if (!place.chosen) return to;
    const int32_t low = threshold(worth, count, place.chosen);
    size_t equals = place.chosen - count_from(worth, count, low + 1);
    for (size_t i = 0; i < count; ++i) {
        const int32_t bits = bits_of(worth[i]);
        const bool equal = bits == low && equals > 0;
        equals -= equal;
        if (bits > low || equal) *to++ = static_cast<int32_t>(place.old_first + i);
    }
    return to;
}

// Lists the whole panels that are read, in order.
static int32_t* list_panels(const FewReadNode& read, const Place& place,
                            const FewReadScratch& parts) {
    const bool everything = read.rule.top_k && read.read == HeadRead::chosen;
    const size_t old = place.old_last - place.old_first;
    int32_t* to = parts.panels;
    size_t panel = place.first;
    const auto list = [&](size_t end) {
        for (; panel < end; ++panel) *to++ = static_cast<int32_t>(panel);
    };
    if (!old || everything || place.chosen == old) {
        list(place.whole);
        return to;
    }
    list(place.old_first);
    if (place.chosen) {
        const size_t stride = padded(old + 2 * kPanels + kPanel);
        for (size_t query = 0; query < read.job.group; ++query)
            widen_query(read, query, parts.wide + query * 2 * summary_floats(read.job.head_dim));
        promise_all(read, place, parts, stride);
        weigh_panels(read, place, parts, stride);
        to = list_best(place, parts.worth, to);
    }
    panel = place.old_last;
    list(place.whole);
    return to;
}

// A score as a number that is not negative, in the order of scores but for the last bit.
INLINE int32_t sortable(float score) {
    uint32_t bits;
    std::memcpy(&bits, &score, sizeof(bits));
    return static_cast<int32_t>((bits >> 31 ? ~bits : bits | 0x80000000u) >> 1);
}

// Hides of old positions all but the best of each query; of equals the earlier stay.
template <int T>
static void keep_top(const Place& place, const int32_t* panels, size_t listed, size_t queries,
                     float* scores, float* sorted) {
    size_t first = 0, last = 0;
    for (size_t i = 0; i < listed; ++i) {
        const auto panel = static_cast<size_t>(panels[i]);
        first += panel < place.old_first;
        last += panel < place.old_last;
    }
    const size_t count = (last - first) * kPanel, wanted = place.chosen * kPanel;
    for (size_t t = 0; t < queries; ++t) {
        const auto at = [&](size_t i) {
            return scores + ((first + i / kPanel) * T + t) * kPanel + i % kPanel;
        };
        for (size_t i = 0; i < count; ++i) {
            const int32_t key = sortable(*at(i));
            std::memcpy(sorted + i, &key, sizeof(key));
        }
        const int32_t low = wanted ? threshold(sorted, count, wanted) : INT32_MAX;
        size_t equals = wanted ? wanted - count_from(sorted, count, low + 1) : 0;
        for (size_t i = 0; i < count; ++i) {
            const bool equal = bits_of(sorted[i]) == low && equals > 0;
            equals -= equal;
            if (bits_of(sorted[i]) <= low && !equal) *at(i) = -__builtin_inff();
        }
    }
}

}  // namespace

}  // namespace paceline
