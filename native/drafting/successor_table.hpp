// What drafters share: a bounded table of contexts and their most likely next tokens, and the
// growth of a draft tree, best path first.

#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "support/buffer.hpp"

namespace paceline {

// A token that may come next, and its probability.
struct Successor {
    int32_t token;
    float prob;

    // More likely tokens first, of equal ones the lower token. Probabilities are positive, so their
    // bits have the same order.
    bool operator<(const Successor& other) const { return rank() > other.rank(); }
    uint64_t rank() const {
        return uint64_t{std::bit_cast<uint32_t>(prob)} << 32 | ~static_cast<uint32_t>(token);
    }
};

// A token that may become a node of the tree. Where sources are mixed: the origins that listed it
// (one bit each), and the one that contributed most.
struct Candidate {
    int32_t token;
    float prob;
    uint32_t named_by = 1;
    int16_t origin = 0;
};

// What one source predicts: successors `first` to `last` of `Predictions`. How far a source is
// trusted is learned for each kind.
struct Prediction {
    size_t kind;
    size_t first, last;
    int16_t origin;
};

// The predictions at one node. Reused from node to node, so that little is allocated.
struct Predictions {
    std::vector<Prediction> each;
    std::vector<Successor> successors;

    void clear() {
        each.clear();
        successors.clear();
    }
};

// Hash one more token of a context into `hash`.
inline uint64_t hashed(uint64_t hash, int32_t token) {
    hash = (hash ^ (static_cast<uint64_t>(static_cast<uint32_t>(token)) + 1)) * 0xff51afd7ed558ccdULL;
    return hash ^ hash >> 32;
}

// A hash table from contexts to their k most likely next tokens. Its memory is fixed: sets of 8
// rows; in a full set the row written longest ago is replaced. A pass of the model evicts the table
// from the processor's caches, so callers prefetch all rows they need before they read the first.
class SuccessorTable {
public:
    SuccessorTable(size_t capacity, size_t k);

    struct Row {
        uint32_t count = 0;  // observations; 0 when the context is unknown
        const Successor* successors = nullptr;  // k of them, best first, then some with token -1
    };

    Row find(uint64_t key) const;

    // Prefetch the row of a context; call `fetch_set` for all contexts first.
    void fetch_set(uint64_t key) const;
    void fetch_row(uint64_t key) const;

    // Move the rows of several contexts towards a distribution: keep * old + (1 - keep) * new. The
    // first observations are averaged with equal weight, as long as that keeps less. Key 0 is no
    // context.
    void observe(const uint64_t* keys, size_t contexts, const int32_t* top, const float* p,
                 size_t n, float keep);

    void clear();

    struct Way {
        uint64_t key;      // 0 where a row is free
        uint32_t count;    // observations
        uint32_t written;  // the clock at the last one
    };

    Way* ways() const { return reinterpret_cast<Way*>(ways_.bytes()); }         // [rows]
    Successor* successors() const {
        return reinterpret_cast<Successor*>(successors_.bytes());
    }  // [rows, k]

    const size_t rows, k;
    uint32_t clock = 0;  // observations so far

private:
    size_t first_way(uint64_t key) const;
    size_t way(uint64_t key) const;
    size_t claim(uint64_t key);
    void tick();
    void set_observed(const int32_t* top, const float* p, size_t n);
    uint16_t& slot(int32_t token);
    void move(Successor* row, uint32_t seen, float keep);

    Buffer ways_, successors_;
    std::vector<Successor> observed_, merged_;
    std::vector<uint16_t> slots_;  // index of an observed token plus 1, by hash
};

// A draft tree while it grows. Every node carries its last `width` tokens, newest first and -1
// before the beginning of the text: what its successors may depend on.
class DraftTree {
public:
    DraftTree(const int32_t* context, size_t length, size_t width) : width_(width) {
        tokens.push_back(context[length - 1]);
        parents.push_back(-1);
        scores.push_back(1.0f);
        named_by.push_back(0);
        origins.push_back(-1);
        last_.assign(width, -1);
        for (size_t i = 0; i < std::min(width, length); ++i) last_[i] = context[length - 1 - i];
    }

    void add(int32_t parent, Candidate child) {
        tokens.push_back(child.token);
        parents.push_back(parent);
        scores.push_back(child.prob);
        named_by.push_back(child.named_by);
        origins.push_back(child.origin);
        const size_t start = last_.size(), above = static_cast<size_t>(parent) * width_;
        last_.resize(start + width_);
        last_[start] = child.token;
        std::copy_n(last_.begin() + above, width_ - 1, last_.begin() + start + 1);
    }

    const int32_t* last(size_t node) const { return last_.data() + node * width_; }

    std::vector<int32_t> tokens, parents;
    std::vector<float> scores;  // probability of each node, given its parent
    std::vector<uint32_t> named_by;
    std::vector<int16_t> origins;

private:
    size_t width_;
    std::vector<int32_t> last_;
};

// Add the most likely paths until `tree` has `budget` nodes beyond its root. `successors(node,
// out)` appends the distinct candidates that may follow a node; it is called once for each node but
// the last, in order. Paths with a probability below `min_path_prob` are left out.
template <class Successors>
void grow(DraftTree& tree, size_t budget, float min_path_prob, Successors&& successors) {
    struct Open {
        float path;  // probability that the whole path is accepted
        int32_t parent;
        Candidate child;
        bool operator<(const Open& other) const {
            if (path != other.path) return path < other.path;
            if (parent != other.parent) return parent > other.parent;
            return child.token > other.child.token;
        }
    };
    std::vector<Open> open;  // the best last, no more than there is room for
    std::vector<Candidate> candidates;
    std::vector<float> path{1.0f};
    for (size_t node = 0; node < budget; ++node) {
        candidates.clear();
        successors(node, candidates);
        const size_t room = budget - node;
        for (const Candidate& child : candidates) {
            const Open one{path[node] * child.prob, static_cast<int32_t>(node), child};
            const bool full = open.size() == room;
            if (one.path < min_path_prob || (full && one < open.front())) continue;
            auto place = std::lower_bound(open.begin(), open.end(), one);
            if (!full) {
                open.insert(place, one);
                continue;
            }
            std::move(open.begin() + 1, place, open.begin());
            *(place - 1) = one;
        }
        if (open.empty()) return;
        path.push_back(open.back().path);
        tree.add(open.back().parent, open.back().child);
        open.pop_back();
    }
}

}  // namespace paceline
