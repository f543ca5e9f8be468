// What drafters share: a bounded table of contexts and their successors, and best-first growth.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace paceline {

// A successor and the chance that it comes next; where sources are mixed, who named it (one bit
// each) and who spoke for it most.
struct Candidate {
    int32_t token;
    float chance;
    uint32_t named = 1;
    int16_t origin = 0;
};

// What one source says of the next token. How far such a kind of source is trusted is learnt.
struct Voice {
    size_t kind;
    std::vector<Candidate> shares;
    int16_t origin = 0;
};
using Voices = std::vector<Voice>;

// One more token of a context hashed into `hash`.
inline uint64_t hashed(uint64_t hash, int32_t token) {
    hash = (hash ^ (static_cast<uint64_t>(static_cast<uint32_t>(token)) + 1)) * 0xff51afd7ed558ccdULL;
    return hash ^ hash >> 32;
}

// Contexts by hash, each with its k likeliest successors. Memory is fixed: sets of 8 rows; in a
// full set the row that was not written for longest gives way.
class SuccessorTable {
public:
    SuccessorTable(size_t capacity, size_t k);

    struct Row {
        uint32_t count = 0;  // observations; 0 when the context is unknown
        const int32_t* tokens = nullptr;
        const float* probs = nullptr;
    };

    Row find(uint64_t key) const;

    // Move a context's row towards a distribution: keep * old + (1 - keep) * new. The first
    // observations are averaged, each weighing the same, for as long as that keeps less.
    void observe(uint64_t key, const int32_t* top, const float* p, size_t n, float keep);

    void clear();

    size_t rows() const { return keys.size(); }

    const size_t k;
    uint32_t clock = 0;             // observations so far
    std::vector<uint64_t> keys;     // [rows], 0 where a row is free
    std::vector<uint32_t> counts;   // [rows]
    std::vector<uint32_t> written;  // [rows], the clock at the last observation
    std::vector<int32_t> tokens;    // [rows, k], best first, then -1
    std::vector<float> probs;       // [rows, k]

private:
    size_t first_way(uint64_t key) const;
    size_t claim(uint64_t key);
    void tick();

    std::vector<Candidate> merged_;
};

// A tree under construction. Each node carries its last `width` tokens, newest first, -1 before the
// first: what its successors may depend on.
class Growth {
public:
    Growth(const int32_t* context, size_t length, size_t width) : width_(width) {
        tokens.push_back(context[length - 1]);
        parents.push_back(-1);
        scores.push_back(1.0f);
        named.push_back(0);
        origins.push_back(-1);
        last_.assign(width, -1);
        for (size_t i = 0; i < std::min(width, length); ++i) last_[i] = context[length - 1 - i];
    }

    void add(int32_t parent, Candidate child) {
        tokens.push_back(child.token);
        parents.push_back(parent);
        scores.push_back(child.chance);
        named.push_back(child.named);
        origins.push_back(child.origin);
        const size_t start = last_.size(), above = static_cast<size_t>(parent) * width_;
        last_.resize(start + width_);
        last_[start] = child.token;
        std::copy_n(last_.begin() + above, width_ - 1, last_.begin() + start + 1);
    }

    const int32_t* last(size_t node) const { return last_.data() + node * width_; }

    std::vector<int32_t> tokens, parents;
    std::vector<float> scores;  // chance of each node, given its parent
    std::vector<uint32_t> named;
    std::vector<int16_t> origins;

private:
    size_t width_;
    std::vector<int32_t> last_;
};

// Add the likeliest paths until `tree` has `budget` nodes beyond its root. `successors(node, out)`
// appends to `out` the distinct successors of a node with their chances; it is asked once for each
// node but the last, in order.
template <class Successors>
void grow(Growth& tree, size_t budget, Successors&& successors) {
    struct Open {
        float path;  // chance that the whole path is accepted
        int32_t parent;
        Candidate child;
        bool operator<(const Open& other) const {
            if (path != other.path) return path < other.path;
            if (parent != other.parent) return parent > other.parent;
            return child.token > other.child.token;
        }
    };
    std::vector<Open> open;
    std::vector<Candidate> found;
    std::vector<float> path{1.0f};
    for (size_t node = 0; node < budget; ++node) {
        found.clear();
        successors(node, found);
        for (const Candidate& child : found) {
            open.push_back({path[node] * child.chance, static_cast<int32_t>(node), child});
            std::push_heap(open.begin(), open.end());
        }
        if (open.empty()) return;
        std::pop_heap(open.begin(), open.end());
        path.push_back(open.back().path);
        tree.add(open.back().parent, open.back().child);
        open.pop_back();
    }
}

}  // namespace paceline
