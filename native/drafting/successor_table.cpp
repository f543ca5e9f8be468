#include "drafting/successor_table.hpp"


#include <limits>


namespace paceline {

namespace {

constexpr size_t kWays = 8;
constexpr size_t kLine = 64;  // bytes

void fetch(const void* first, size_t bytes) {
    const auto* at = static_cast<const char*>(first);
    for (size_t i = 0; i < bytes; i += kLine) __builtin_prefetch(at + i);
}

// Insertion sort: the rows are nearly in order.
void sort(Successor* first, Successor* last) {
    for (Successor* next = first; next != last; ++next) {
        const Successor one = *next;
        Successor* place = next;
        for (; place != first && one < place[-1]; --place) *place = place[-1];
        *place = one;
    }
}

size_t rows_for(size_t capacity) {
    size_t rows = kWays;
    while (rows < capacity) rows *= 2;
    return rows;
}

}  // namespace

SuccessorTable::SuccessorTable(size_t capacity, size_t k_)
    : rows(rows_for(capacity)),
      k(k_),
      ways_(rows * sizeof(Way)),
      successors_(rows * k * sizeof(Successor)) {
    clear();
}

void SuccessorTable::clear() {
    clock = 0;
    std::fill_n(ways(), rows, Way{});
    std::fill_n(successors(), rows * k, Successor{-1, 0.0f});
}

size_t SuccessorTable::first_way(uint64_t key) const {
    return (key >> 8 & (rows / kWays - 1)) * kWays;
}

// Return the row of a context, or else the one to replace.
size_t SuccessorTable::way(uint64_t key) const {
    const size_t first = first_way(key);
    const Way* ways = this->ways();
    size_t oldest = first;
    for (size_t row = first; row < first + kWays; ++row) {
        if (ways[row].key == key) return row;
        if (ways[row].written < ways[oldest].written) oldest = row;
    }
    return oldest;
}

void SuccessorTable::fetch_set(uint64_t key) const {
    fetch(ways() + first_way(key), kWays * sizeof(Way));
}

void SuccessorTable::fetch_row(uint64_t key) const {
    fetch(successors() + way(key) * k, k * sizeof(Successor));
}

SuccessorTable::Row SuccessorTable::find(uint64_t key) const {
    const size_t row = way(key);
    if (ways()[row].key != key) return {};
    return {ways()[row].count, successors() + row * k};
}

size_t SuccessorTable::claim(uint64_t key) {
    const size_t row = way(key);
    Way& here = ways()[row];
    if (here.key == key) return row;
    here.key = key;
    here.count = 0;
    return row;
}

void SuccessorTable::tick() {
    if (clock == std::numeric_limits<uint32_t>::max()) {  // after weeks of work: restart all ages
        for (size_t row = 0; row < rows; ++row) ways()[row].written = 0;
        clock = 0;
    }
    ++clock;
}

uint16_t& SuccessorTable::slot(int32_t token) {
    size_t at = (static_cast<uint32_t>(token) * 2654435769u >> 8) & (slots_.size() - 1);
    while (slots_[at] && observed_[slots_[at] - 1u].token != token)
        at = (at + 1) & (slots_.size() - 1);
    return slots_[at];
}

void SuccessorTable::set_observed(const int32_t* top, const float* p, size_t n) {
    observed_.clear();
    for (size_t i = 0; i < n; ++i) observed_.push_back({top[i], p[i]});
    sort(observed_.data(), observed_.data() + n);
    size_t slots = 64;
    while (slots < 4 * n) slots *= 2;
    slots_.assign(slots, 0);
    for (size_t i = 0; i < n; ++i) slot(observed_[i].token) = static_cast<uint16_t>(i + 1);
    merged_.resize(n + k);
}

// Move one row towards the observation. Both are merged without branches that depend on their
// values.
void SuccessorTable::move(Successor* row, uint32_t count, float keep) {
    const auto seen = static_cast<float>(count);
    const float old = std::min(keep, seen / (seen + 1.0f)), fresh = 1.0f - old;
    const size_t count_observed = observed_.size();
    Successor* merged = merged_.data();
    for (size_t i = 0; i < count_observed; ++i)
        merged[i] = {observed_[i].token, observed_[i].prob * fresh};
    size_t all = count_observed;  // behind the observed tokens, those that only the row holds
    for (size_t i = 0; count && i < k && row[i].token >= 0; ++i) {
        const size_t place = slot(row[i].token);
        const size_t at = place ? place - 1 : all;
        const float here = place ? merged[at].prob : 0.0f;
        merged[at] = {row[i].token, here + row[i].prob * old};
        all += !place;
    }
    const Successor *a = merged,
                    *b = merged + count_observed, *const middle = b, *const end = merged + all;
    if (count) sort(merged, merged + count_observed);
    sort(merged + count_observed, merged + all);
    size_t kept = 0;
    while (kept < k && (a != middle || b != end)) {
        const bool first = b == end || (a != middle && *a < *b);
        const Successor next = first ? *a : *b;
        a += first;
        b += !first;
        if (!(next.prob > 0.0f)) break;
        row[kept++] = next;
    }
    std::fill(row + kept, row + k, Successor{-1, 0.0f});
}

void SuccessorTable::observe(const uint64_t* keys, size_t contexts, const int32_t* top,
                             const float* p, size_t n, float keep) {
    for (size_t i = 0; i < contexts; ++i) if (keys[i]) fetch_set(keys[i]);
    set_observed(top, p, n);
    for (size_t i = 0; i < contexts; ++i) if (keys[i]) fetch_row(keys[i]);
    for (size_t i = 0; i < contexts; ++i) {
        if (!keys[i]) continue;
        const size_t row = claim(keys[i]);
        Way& here = ways()[row];
        move(successors() + row * k, here.count, keep);
        tick();
        here.written = clock;
        if (here.count < std::numeric_limits<uint32_t>::max()) ++here.count;
    }
}

}  // namespace paceline
