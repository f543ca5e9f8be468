#include "drafting/trie.hpp"

namespace paceline {

namespace {

size_t bucket(float sightings) {
    return sightings < 1.5f ? 0 : sightings < 3.5f ? 1 : sightings < 9.5f ? 2 : 3;
}

uint64_t edge(int32_t parent, int32_t token) {
    return hashed(hashed(0x9e3779b97f4a7c15ULL, parent), token);
}

}  // namespace

TokenTrie::TokenTrie(size_t depth, size_t k, size_t capacity, float here, float rate)
    : depth_(depth), k_(k), capacity_(std::max(capacity, 4 * depth)), here_(here), rate_(rate) {
    size_t slots = 16;
    while (slots < 2 * capacity_) slots *= 2;
    slots_.resize(slots);
    reset();
}

void TokenTrie::reset() {
    clear();
    text_ = 0;
    begin();
    reliability.clear();
    // Initially each further token halves the probability of error.
    float doubt = 0.7f;
    for (size_t n = 1; n < depth_; ++n, doubt /= 2.0f)
        reliability.insert(reliability.end(), kBuckets, 1.0f - doubt);
}

void TokenTrie::clear() {
    tokens.assign(1, -1);
    parents.assign(1, -1);
    counts.assign(1, 0.0f);
    first_child_.assign(1, -1);
    sibling_.assign(1, -1);
    seen_in_.assign(1, 0);
    seen_.assign(1, 0.0f);
    std::fill(slots_.begin(), slots_.end(), 0);
}

void TokenTrie::begin() {
    ++text_;
    read_ = 0;
    cursors_.assign(depth_, -1);
    cursors_[0] = 0;
    last_.assign(depth_ - 1, -1);
}

int32_t TokenTrie::child(int32_t parent, int32_t token) const {
    const size_t mask = slots_.size() - 1;
    for (size_t slot = edge(parent, token) & mask; slots_[slot]; slot = (slot + 1) & mask) {
        const auto node = static_cast<int32_t>(slots_[slot] - 1);
        if (parents[node] == parent && tokens[node] == token) return node;
    }
    return -1;
}

int32_t TokenTrie::find(const int32_t* last, size_t n) const {
    int32_t node = 0;
    for (size_t i = n; i-- > 0 && node >= 0;) node = last[i] < 0 ? -1 : child(node, last[i]);
    return node;
}

int32_t TokenTrie::add(int32_t parent, int32_t token, float count) {
    const auto node = static_cast<int32_t>(tokens.size());
    tokens.push_back(token);
    parents.push_back(parent);
    counts.push_back(count);
    first_child_.push_back(-1);
    sibling_.push_back(first_child_[parent]);
    first_child_[parent] = node;
    seen_in_.push_back(0);
    seen_.push_back(0.0f);
    const size_t mask = slots_.size() - 1;
    size_t slot = edge(parent, token) & mask;
    while (slots_[slot]) slot = (slot + 1) & mask;
    slots_[slot] = static_cast<uint32_t>(node) + 1;
    return node;
}

float TokenTrie::weight(int32_t node) const {
    return counts[node] + (seen_in_[node] == text_ ? here_ * seen_[node] : 0.0f);
}

void TokenTrie::insert(int32_t token) {
    if (tokens.size() + depth_ > capacity_) squeeze();
    for (size_t d = depth_; d-- > 0;) {
        int32_t node = cursors_[d] < 0 ? -1 : child(cursors_[d], token);
        if (node < 0 && cursors_[d] >= 0) node = add(cursors_[d], token, 0.0f);
        if (d + 1 < depth_) cursors_[d + 1] = node;
        if (node < 0) continue;
        counts[node] += 1.0f;
        if (seen_in_[node] != text_) {
            seen_in_[node] = text_;
            seen_[node] = 0.0f;
        }
        seen_[node] += 1.0f;
    }
    std::copy_backward(last_.begin(), last_.end() - 1, last_.end());
    last_[0] = token;
}

void TokenTrie::squeeze() {
    // Strings of the current text are spared in the first round.
    for (bool spare = true; spare || tokens.size() > capacity_ - capacity_ / 4; spare = false) {
        std::vector<bool> kept(tokens.size());
        kept[0] = true;
        for (size_t node = 1; node < tokens.size(); ++node) {
            const bool often = counts[node] > 1.0f;
            if (often) counts[node] *= 0.5f;
            kept[node] = kept[parents[node]] && (often || (spare && seen_in_[node] == text_));
        }
        keep(kept);
    }
    for (size_t d = 1; d < depth_; ++d) cursors_[d] = find(last_.data(), d);
}

void TokenTrie::keep(const std::vector<bool>& kept) {
    std::vector<int32_t> old_tokens, old_parents;
    std::vector<float> old_counts, old_seen;
    std::vector<uint32_t> old_seen_in;
    old_tokens.swap(tokens);
    old_parents.swap(parents);
    old_counts.swap(counts);
    old_seen.swap(seen_);
    old_seen_in.swap(seen_in_);
    clear();
    std::vector<int32_t> place(kept.size(), 0);
    for (size_t node = 1; node < kept.size(); ++node) {
        if (!kept[node]) continue;
        place[node] = add(place[old_parents[node]], old_tokens[node], old_counts[node]);
        seen_in_.back() = old_seen_in[node];
        seen_.back() = old_seen[node];
    }
}

void TokenTrie::load(const int32_t* token, const int32_t* parent, const float* count, size_t n) {
    clear();
    for (size_t i = 0; i < n; ++i) add(parent[i], token[i], count[i]);
    begin();
}

void TokenTrie::extend(const int32_t* text, size_t length, size_t learn_from) {
    for (; read_ < length; ++read_) {
        if (read_ >= learn_from) learn(last_.data(), text[read_]);
        insert(text[read_]);
    }
}

void TokenTrie::collect(const int32_t* last, std::vector<Candidate>& out,
                        std::vector<Group>& groups) {
    groups.clear();
    for (size_t n = depth_ - 1; n > 0; --n) {
        const int32_t node = find(last, n);
        if (node < 0) continue;
        listed_.clear();
        float sightings = 0.0f;
        for (int32_t at = first_child_[node]; at >= 0; at = sibling_[at]) {
            const int32_t token = tokens[at];
            sightings += weight(at);
            if (std::none_of(out.begin(), out.end(),
                             [token](const Candidate& other) { return other.token == token; }))
                listed_.push_back({token, weight(at)});
        }
        if (listed_.empty()) continue;
        const size_t kept = std::min(k_, listed_.size());
        std::partial_sort(listed_.begin(), listed_.begin() + static_cast<std::ptrdiff_t>(kept),
                          listed_.end(), [](const Candidate& a, const Candidate& b) {
                              return a.prob != b.prob ? a.prob > b.prob : a.token < b.token;
                          });
        const size_t first = out.size();
        out.insert(out.end(), listed_.begin(), listed_.begin() + static_cast<std::ptrdiff_t>(kept));
        groups.push_back({(n - 1) * kBuckets + bucket(sightings), first, out.size()});
    }
}

void TokenTrie::successors(const int32_t* last, std::vector<Candidate>& out) {
    collect(last, out, groups_);
    float left = 1.0f;
    for (const Group& group : groups_) {
        float mass = 0.0f;
        for (size_t i = group.first; i < group.last; ++i) mass += out[i].prob;
        const float share = left * reliability[group.kind] / mass;
        for (size_t i = group.first; i < group.last; ++i) out[i].prob *= share;
        left *= 1.0f - reliability[group.kind];
    }
}

void TokenTrie::learn(const int32_t* last, int32_t token) {
    std::vector<Candidate> out;
    collect(last, out, groups_);
    for (const Group& group : groups_) {
        bool hit = false;
        for (size_t i = group.first; i < group.last; ++i) hit |= out[i].token == token;
        reliability[group.kind] += rate_ * ((hit ? 1.0f : 0.0f) - reliability[group.kind]);
        if (hit) return;
    }
}

}  // namespace paceline
