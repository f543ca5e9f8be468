#include "drafting/suffix_array.hpp"

namespace paceline {

namespace {

using Ints = std::vector<int32_t>;

// One level of induced sorting. A suffix is "small" when it lies before the one that starts a token
// later, otherwise "large"; a "valley" is a small one behind a large one.
class Sorter {
public:
    Sorter(const Ints& text, int32_t alphabet)
        : text_(text),
          size_(static_cast<int32_t>(text.size())),
          ends_(static_cast<size_t>(alphabet)),
          small_(text.size()) {
        for (const int32_t value : text_) ++ends_[value];
        for (size_t i = 1; i < ends_.size(); ++i) ends_[i] += ends_[i - 1];
        for (int32_t i = size_ - 2; i >= 0; --i)
            small_[i] = text_[i] == text_[i + 1] ? small_[i + 1] : text_[i] < text_[i + 1];
    }

    Ints sort() {
        Ints valleys;
        for (int32_t i = 1; i < size_; ++i)
            if (valley(i)) valleys.push_back(i);
        if (!size_) return {};
        induce(valleys);
        if (valleys.size() > 1) induce(sorted(valleys));
        return std::move(order_);
    }

private:
    bool valley(int32_t i) const { return i > 0 && small_[i] && !small_[i - 1]; }

    // Derive the order of all suffixes from that of the valleys.
    void induce(const Ints& valleys) {
        order_.assign(text_.size(), -1);
        Ints place = ends_;
        for (size_t i = valleys.size(); i-- > 0;) order_[--place[text_[valleys[i]]]] = valleys[i];
        for (size_t i = 0; i < ends_.size(); ++i) place[i] = i ? ends_[i - 1] : 0;
        order_[place[text_[size_ - 1]]++] = size_ - 1;
        for (int32_t i = 0; i < size_; ++i) {
            const int32_t before = order_[i] - 1;
            if (before >= 0 && !small_[before]) order_[place[text_[before]]++] = before;
        }
        place = ends_;
        for (int32_t i = size_ - 1; i >= 0; --i) {
            const int32_t before = order_[i] - 1;
            if (before >= 0 && small_[before]) order_[--place[text_[before]]] = before;
        }
    }

    // Sort the valleys, once `order_` has them in order of the text up to the next valley.
    Ints sorted(const Ints& valleys) {
        const size_t count = valleys.size();
        Ints number(text_.size(), -1), ranked;
        for (size_t i = 0; i < count; ++i) number[valleys[i]] = static_cast<int32_t>(i);
        for (const int32_t at : order_)
            if (number[at] >= 0) ranked.push_back(number[at]);
        Ints names(count);
        int32_t collect = 0;
        for (size_t i = 1; i < count; ++i) {
            if (!equal(valleys, ranked[i - 1], ranked[i])) ++collect;
            names[ranked[i]] = collect;
        }
        if (static_cast<size_t>(collect) + 1 < count) {
            Ints().swap(order_);
            Ints().swap(number);
            ranked = suffix_array(names, collect + 1);
        }
        for (int32_t& one : ranked) one = valleys[one];
        return ranked;
    }

    bool equal(const Ints& valleys, int32_t a, int32_t b) const {
        const auto last = static_cast<int32_t>(valleys.size()) - 1;
        if (a == last || b == last) return false;  // the end of the text equals nothing
        const int32_t length = valleys[a + 1] - valleys[a];
        if (valleys[b + 1] - valleys[b] != length) return false;
        return std::equal(text_.begin() + valleys[a], text_.begin() + valleys[a] + length + 1,
                          text_.begin() + valleys[b]);
    }

    const Ints& text_;
    int32_t size_;
    Ints ends_;  // [alphabet], where each value's range in the order ends
    std::vector<bool> small_;
    Ints order_;
};

size_t bucket(size_t occurrences) {
    return occurrences <= 1 ? 0 : occurrences <= 3 ? 1 : occurrences <= 15 ? 2 : 3;
}

}  // namespace

std::vector<int32_t> suffix_array(const std::vector<int32_t>& text, int32_t alphabet) {
    return Sorter(text, alphabet).sort();
}

CorpusMatcher::CorpusMatcher(const int32_t* text, const int32_t* suffixes, size_t size,
                             size_t longest, size_t k, size_t samples, float rate)
    : text_(text),
      suffixes_(suffixes),
      size_(size),
      longest_(longest),
      k_(k),
      samples_(samples),
      rate_(rate) {
    reset();
}

void CorpusMatcher::reset() {
    begin();
    reliability.clear();
    // Initially each further token takes a quarter off the probability of error.
    float doubt = 0.85f;
    for (size_t n = 0; n < longest_; ++n, doubt *= 0.75f)
        reliability.insert(reliability.end(), kBuckets, 1.0f - doubt);
}

int32_t CorpusMatcher::token(size_t rank, size_t offset) const {
    const size_t at = static_cast<size_t>(suffixes_[rank]) + offset;
    return at < size_ ? text_[at] : -2;
}

CorpusMatcher::Match CorpusMatcher::narrow(Match match, int32_t next) const {
    const auto bound = [&](size_t low, size_t high, int64_t value) {
        while (low < high) {
            const size_t middle = low + (high - low) / 2;
            if (token(middle, match.length) < value)
                low = middle + 1;
            else
                high = middle;
        }
        return low;
    };
    const size_t first = bound(match.first, match.last, next);
    return {first, bound(first, match.last, int64_t{next} + 1), match.length + 1};
}

CorpusMatcher::Match CorpusMatcher::find(const int32_t* last, size_t n) const {
    Match match{0, size_, 0};
    for (size_t i = n; i-- > 0 && match.first < match.last;) match = narrow(match, last[i]);
    return match;
}

std::vector<CorpusMatcher::Match> CorpusMatcher::matches(const int32_t* last) const {
    size_t known = 0, most = 0;
    while (most < longest_ && last[most] >= 0) ++most;
    // A context that occurs with n tokens also occurs with fewer: bisect.
    while (known < most) {
        const size_t middle = (known + most + 1) / 2;
        const Match match = find(last, middle);
        if (match.first < match.last)
            known = middle;
        else
            most = middle - 1;
    }
    std::vector<Match> listed;
    for (size_t n = known; n > 0 && listed.size() < kLevels; --n) {
        const Match match = find(last, n);
        const size_t before = listed.empty() ? 0 : listed.back().last - listed.back().first;
        if (match.last - match.first > before) listed.push_back(match);
    }
    return listed;
}

void CorpusMatcher::collect(const std::vector<Match>& from, std::vector<Candidate>& out,
                            std::vector<Group>& groups) const {
    std::vector<Candidate> listed;
    for (const Match& match : from) {
        const size_t occurrences = match.last - match.first;
        const size_t looks = std::min(samples_, occurrences);
        listed.clear();
        for (size_t i = 0; i < looks; ++i) {
            const size_t rank = match.first + (2 * i + 1) * occurrences / (2 * looks);
            const int32_t next = token(rank, match.length);
            if (next < 0) continue;
            if (!listed.empty() && listed.back().token == next)
                listed.back().prob += 1.0f;  // equal tokens are adjacent
            else if (std::none_of(out.begin(), out.end(), [next](const Candidate& other) {
                         return other.token == next;
                     }))
                listed.push_back({next, 1.0f});
        }
        if (listed.empty()) continue;
        std::stable_sort(listed.begin(), listed.end(),
                         [](const Candidate& a, const Candidate& b) { return a.prob > b.prob; });
        listed.resize(std::min(k_, listed.size()));
        const size_t first = out.size();
        out.insert(out.end(), listed.begin(), listed.end());
        const size_t length = std::min(match.length, longest_);
        groups.push_back({(length - 1) * kBuckets + bucket(occurrences), first, out.size()});
    }
}

void CorpusMatcher::successors(const std::vector<Match>& from, std::vector<Candidate>& out) const {
    std::vector<Group> groups;
    collect(from, out, groups);
    float left = 1.0f;
    for (const Group& group : groups) {
        float mass = 0.0f;
        for (size_t i = group.first; i < group.last; ++i) mass += out[i].prob;
        const float share = left * reliability[group.kind] / mass;
        for (size_t i = group.first; i < group.last; ++i) out[i].prob *= share;
        left *= 1.0f - reliability[group.kind];
    }
}

void CorpusMatcher::extend(const int32_t* text, size_t length, size_t learn_from) {
    read_ = std::max(read_, learn_from);
    Ints last(longest_);
    for (; read_ < length; ++read_) {
        for (size_t i = 0; i < longest_; ++i) last[i] = i < read_ ? text[read_ - 1 - i] : -1;
        std::vector<Candidate> out;
        std::vector<Group> groups;
        collect(matches(last.data()), out, groups);
        for (const Group& group : groups) {
            bool hit = false;
            for (size_t i = group.first; i < group.last; ++i) hit |= out[i].token == text[read_];
            reliability[group.kind] += rate_ * ((hit ? 1.0f : 0.0f) - reliability[group.kind]);
            if (hit) break;
        }
    }
}

void CorpusMatcher::propose(DraftTree& tree, size_t budget) const {
    std::vector<std::vector<Match>> known;  // [nodes]; `grow` visits them in order
    grow(tree, budget, 0.0f, [&](size_t node, std::vector<Candidate>& out) {
        std::vector<Match> here;
        if (!node) here = matches(tree.last(0));
        for (size_t i = 0; node && i < known[tree.parents[node]].size(); ++i) {
            const Match match = narrow(known[tree.parents[node]][i], tree.tokens[node]);
            if (match.first < match.last) here.push_back(match);
        }
        successors(here, out);
        known.push_back(std::move(here));
    });
}

}  // namespace paceline
