#include "drafting/suffix_automaton.hpp"

#include <algorithm>
#include <stdexcept>

namespace paceline {

void SuffixAutomaton::clear() {
    states_.assign(1, {0, 0, -1, -1});
    edges_.clear();
    from_.clear();
    slots_.assign(64, -1);
    pushed_ = 0;
}

size_t SuffixAutomaton::bytes() const {
    return states_.capacity() * sizeof(State) + edges_.capacity() * sizeof(Edge) +
           (from_.capacity() + slots_.capacity()) * sizeof(int32_t);
}

int32_t SuffixAutomaton::add(uint32_t length) {
    states_.push_back({length, 0, 0, -1});
    return static_cast<int32_t>(states_.size() - 1);
}

size_t SuffixAutomaton::slot(int32_t state, int32_t token) const {
    const uint64_t hash = hashed(hashed(0x9e3779b97f4a7c15ULL, state), token);
    size_t at = hash & (slots_.size() - 1);
    while (slots_[at] >= 0 && (from_[slots_[at]] != state || edges_[slots_[at]].token != token))
        at = (at + 1) & (slots_.size() - 1);
    return at;
}

int32_t SuffixAutomaton::find(int32_t state, int32_t token) const {
    return slots_[slot(state, token)];
}

void SuffixAutomaton::widen() {
    slots_.assign(slots_.size() * 2, -1);
    for (size_t edge = 0; edge < edges_.size(); ++edge)
        slots_[slot(from_[edge], edges_[edge].token)] = static_cast<int32_t>(edge);
}

void SuffixAutomaton::connect(int32_t state, int32_t token, int32_t to) {
    if (edges_.size() * 2 >= slots_.size()) widen();
    const auto edge = static_cast<int32_t>(edges_.size());
    slots_[slot(state, token)] = edge;
    const int32_t next = states_[state].first;
    edges_.push_back({token, to, next, -1});
    from_.push_back(state);
    if (next >= 0) edges_[next].previous = edge;
    states_[state].first = edge;
}

void SuffixAutomaton::to_front(int32_t state, int32_t edge) {
    State& at = states_[state];
    if (at.first == edge) return;
    Edge& one = edges_[edge];
    edges_[one.previous].next = one.next;
    if (one.next >= 0) edges_[one.next].previous = one.previous;
    one.previous = -1;
    one.next = at.first;
    edges_[at.first].previous = edge;
    at.first = edge;
}

// `from` reaches by `edge` a state that also holds longer strings: split off the shorter ones.
int32_t SuffixAutomaton::clone(int32_t from, int32_t token, int32_t edge) {
    const int32_t whole = edges_[edge].to;
    const int32_t copy = add(states_[from].length + 1);
    states_[copy].count = states_[whole].count;
    states_[copy].link = states_[whole].link;
    states_[whole].link = copy;
    std::vector<int32_t> outgoing;
    for (int32_t e = states_[whole].first; e >= 0; e = edges_[e].next) outgoing.push_back(e);
    for (auto e = outgoing.rbegin(); e != outgoing.rend(); ++e)
        connect(copy, edges_[*e].token, edges_[*e].to);
    for (int32_t state = from; state >= 0; state = states_[state].link) {
        const int32_t e = find(state, token);
        if (e < 0 || edges_[e].to != whole) break;
        edges_[e].to = copy;
    }
    return copy;
}

SuffixAutomaton::Reader SuffixAutomaton::push(Reader last, int32_t token) {
    ++pushed_;
    int32_t state = last;
    const int32_t edge = find(state, token);
    if (edge >= 0) {
        const int32_t to = edges_[edge].to;
        last = states_[to].length == states_[state].length + 1 ? to : clone(state, token, edge);
    } else {
        const int32_t made = add(states_[state].length + 1);
        int32_t known = -1;
        for (; state >= 0; state = states_[state].link) {
            known = find(state, token);
            if (known >= 0) break;
            connect(state, token, made);
        }
        if (state >= 0) {
            const int32_t to = edges_[known].to;
            states_[made].link = states_[to].length == states_[state].length + 1
                                     ? to
                                     : clone(state, token, known);
        }
        // The strings at the end of the text have just got this edge: it is their latest.
        for (int deep = 0; state > 0 && deep < kMaxLinks; state = states_[state].link, ++deep)
            to_front(state, find(state, token));
        last = made;
    }
    if (edge >= 0)
        for (int deep = 0; state > 0 && deep < kMaxLinks; state = states_[state].link, ++deep)
            to_front(state, find(state, token));
    int32_t seen = last;
    for (int deep = 0; seen > 0 && deep < kMaxLinks; seen = states_[seen].link, ++deep)
        ++states_[seen].count;
    return last;
}

SuffixAutomaton::Match SuffixAutomaton::now(Reader last) const {
    const int32_t state = states_[last].first >= 0 || last == 0 ? last : states_[last].link;
    return {state, states_[state].length};
}

SuffixAutomaton::Match SuffixAutomaton::advance(Match match, int32_t token) const {
    for (int32_t state = match.state; state >= 0; state = states_[state].link) {
        if (state != match.state) match.length = states_[state].length;
        const int32_t edge = find(state, token);
        if (edge >= 0) return {edges_[edge].to, match.length + 1};
    }
    return {};
}

SuffixAutomaton::Match SuffixAutomaton::shorter(Match match) const {
    if (match.state <= 0) return {};
    const int32_t link = states_[match.state].link;
    return {link, states_[link].length};
}

void SuffixAutomaton::successors(int32_t state, size_t most, std::vector<Successor>& out) const {
    for (int32_t e = states_[state].first; e >= 0 && most > 0; e = edges_[e].next, --most)
        out.push_back({edges_[e].token, static_cast<float>(states_[edges_[e].to].count)});
}

namespace {

constexpr size_t kCounts = 3;

// Lengths 1, 2, 3, 4-5, 6-9, 10-19, more; counts 1, 2-3, more.
size_t kind_of(uint32_t length, float count) {
    const size_t by_length = length <= 3    ? length - 1
                             : length <= 5  ? 3
                             : length <= 9  ? 4
                             : length <= 19 ? 5
                                            : 6;
    return by_length * kCounts + (count < 2.0f ? 0 : count < 4.0f ? 1 : 2);
}

}  // namespace

SuffixMatcher::SuffixMatcher(size_t capacity, size_t k, float rate)
    : capacity_(capacity), k_(k), rate_(rate) {
    reset();
}

void SuffixMatcher::reset() {
    if (texts->held) throw std::logic_error("a tree that grows cannot forget its texts");
    texts->young.clear();
    texts->old.clear();
    texts->read.clear();
    texts->aged = length_ = 0;
    texts->writer = nullptr;
    generation_ = texts->generation += 2;  // `age` adds one
    last_ = 0;
    in_old_ = {};
    std::vector<float>& reliability = texts->reliability;
    reliability.clear();
    for (size_t kind = 0; kind < kKinds; ++kind) {
        // As in the n-gram index, each longer kind halves the initial probability of error.
        const float doubt = 0.7f / static_cast<float>(1 << kind / kCounts);
        reliability.push_back(1.0f - doubt);
    }
}

void SuffixMatcher::begin() {
    length_ = 0;
    generation_ = texts->generation;
    last_ = 0;
    in_old_ = {};
    texts->writer = nullptr;
}

void SuffixMatcher::age() {
    std::swap(texts->old, texts->young);
    texts->young.clear();
    std::vector<int32_t>& read = texts->read;
    read.erase(read.begin(), read.begin() + static_cast<std::ptrdiff_t>(texts->aged));
    texts->aged = read.size();
    ++texts->generation;
}

// Move to the current generation of automata if another copy has aged or reset them.
void SuffixMatcher::catch_up() {
    if (generation_ == texts->generation) return;
    const bool aged = texts->generation == generation_ + 1 && texts->old.size();
    in_old_ = aged ? texts->old.now(last_) : SuffixAutomaton::Match{};
    last_ = 0;
    generation_ = texts->generation;
}

void SuffixMatcher::push(int32_t token) {
    if (texts->young.size() >= std::max<size_t>(capacity_ / 2, 1) && !texts->held) age();
    catch_up();
    if (texts->writer != this && !texts->read.empty() && texts->read.back() >= 0)
        texts->read.push_back(-1);
    texts->writer = this;
    in_old_ = texts->old.advance(in_old_, token);
    last_ = texts->young.push(last_, token);
    texts->read.push_back(token);
}

void SuffixMatcher::replay(const int32_t* tokens, size_t count, size_t boundary) {
    reset();
    SuffixAutomaton::Reader at = 0;
    for (size_t i = 0; i < count; ++i) {
        SuffixAutomaton& side = i < boundary ? texts->old : texts->young;
        at = tokens[i] < 0 || i == boundary ? 0 : at;
        if (tokens[i] >= 0) at = side.push(at, tokens[i]);
    }
    texts->read.assign(tokens, tokens + count);
    texts->aged = boundary;
}

void SuffixMatcher::extend(const int32_t* text, size_t length, size_t learn_from) {
    catch_up();
    for (; length_ < length; ++length_) {
        const int32_t token = text[length_];
        if (length_ >= learn_from) {
            predicted_.clear();
            gather({texts->young.now(last_), in_old_}, predicted_);
            for (const Prediction& one : predicted_.each) {
                const Successor* successors = predicted_.successors.data();
                const bool hit = std::any_of(successors + one.first, successors + one.last,
                                             [=](const Successor& c) { return c.token == token; });
                float& prob = texts->reliability[one.kind];
                prob += rate_ * ((hit ? 1.0f : 0.0f) - prob);
                if (hit) break;
            }
        }
        push(token);
    }
}

SuffixMatcher::Position SuffixMatcher::advance(const Position& place, int32_t token) const {
    return {texts->young.advance(place.young, token), texts->old.advance(place.old, token)};
}

void SuffixMatcher::start() {
    catch_up();
    positions_.assign(1, {texts->young.now(last_), in_old_});
}

// Append the predictions of the longest matches of both automata, each without the tokens that a
// longer match listed.
void SuffixMatcher::gather(const Position& place, Predictions& out) const {
    const size_t begin = out.successors.size(), most = out.each.size() + kLevels;
    SuffixAutomaton::Match young = place.young, old = place.old;
    while (out.each.size() < most && (young.length || old.length)) {
        const bool from_young = young.length >= old.length;
        const SuffixAutomaton& side = from_young ? texts->young : texts->old;
        SuffixAutomaton::Match& match = from_young ? young : old;
        const size_t first = out.successors.size();
        side.successors(match.state, k_, out.successors);
        float count = 0.0f, mass = 0.0f;
        size_t last = first;
        for (size_t i = first; i < out.successors.size(); ++i) {
            const Successor one = out.successors[i];
            count += one.prob;
            const auto named = out.successors.begin() + static_cast<std::ptrdiff_t>(begin);
            const auto here = out.successors.begin() + static_cast<std::ptrdiff_t>(first);
            if (std::any_of(named, here, [=](const Successor& c) { return c.token == one.token; }))
                continue;
            mass += one.prob;
            out.successors[last++] = one;
        }
        out.successors.resize(last);
        if (mass > 0.0f) {
            for (size_t i = first; i < last; ++i) out.successors[i].prob /= mass;
            out.each.push_back({kind_of(match.length, count), first, last, kOrigin});
        }
        match = side.shorter(match);
    }
}

void SuffixMatcher::predictions(const DraftTree& tree, size_t node, Predictions& out) {
    while (positions_.size() <= node) {
        const size_t next = positions_.size();
        positions_.push_back(
            advance(positions_[static_cast<size_t>(tree.parents[next])], tree.tokens[next]));
    }
    gather(positions_[node], out);
}

void SuffixMatcher::successors(const DraftTree& tree, size_t node, std::vector<Candidate>& out) {
    predicted_.clear();
    predictions(tree, node, predicted_);
    float left = 1.0f;
    for (const Prediction& one : predicted_.each) {
        const float prob = texts->reliability[one.kind];
        for (size_t i = one.first; i < one.last; ++i) {
            const Successor& share = predicted_.successors[i];
            out.push_back({share.token, share.prob * left * prob});
        }
        left *= 1.0f - prob;
    }
}

}  // namespace paceline
