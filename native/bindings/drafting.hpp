// What the bindings of several drafters share: a decoding step's arrays, and trees as tuples.

#pragma once

#include <algorithm>
#include <cmath>

#include "bindings/arrays.hpp"
#include "bindings/checks.hpp"
#include "drafting/successor_table.hpp"

namespace paceline {

using Tokens = arrays::Input<int32_t, 1>;
using Scores = arrays::Input<float, 1>;

// What one decoding step tells a drafter, as `drafters.base.step_arrays` lays it out.
struct StepArrays {
    Tokens context;                        // [S], up to and with the root
    Tokens tokens, parents;                // [N], the tree
    arrays::Input<int32_t, 2> top_tokens;  // [N, K], the model's most likely next tokens
    arrays::Input<float, 2> top_probs;     // [N, K]
    Tokens path, drawn;                    // [A], accepted nodes, and the token drawn at each

    size_t nodes() const { return tokens.shape(0); }
    size_t k() const { return top_tokens.shape(1); }
    const int32_t* top(size_t node) const { return top_tokens.data() + node * k(); }
    const float* probs(size_t node) const { return top_probs.data() + node * k(); }

    // Whether the model gave a distribution at `node`: nodes that it did not run have NaN.
    bool known(size_t node) const {
        return std::all_of(probs(node), probs(node) + k(),
                           [](float p) { return std::isfinite(p); });
    }

    void check() const {
        check_context(context);
        const size_t n = nodes();
        if (parents.shape(0) != n || top_tokens.shape(0) != n || top_probs.shape(0) != n ||
            top_probs.shape(1) != k() || path.shape(0) != drawn.shape(0))
            refuse("a step's arrays disagree about their sizes");
        size_in_range("the number of a step's nodes", n, 1, kMaxNodes);
        size_in_range("the number of successors of a node", k(), 0, kMaxTopK);
        for (size_t i = 1; i < n; ++i)
            if (parents(i) < 0 || static_cast<size_t>(parents(i)) >= i)
                refuse("a parent comes before its children");
        for (size_t i = 0; i < path.shape(0); ++i)
            if (path(i) < 0 || static_cast<size_t>(path(i)) >= n) refuse("a path lies in its tree");
    }

    // The tree with the last `width` tokens before each node.
    DraftTree tree(size_t width) const {
        DraftTree tree(context.data(), context.shape(0), width);
        for (size_t node = 1; node < nodes(); ++node) tree.add(parents(node), {tokens(node), 0.0f});
        return tree;
    }
};

inline nanobind::tuple tree_arrays(const DraftTree& tree) {
    return nanobind::make_tuple(arrays::copied(tree.tokens), arrays::copied(tree.parents),
                                arrays::copied(tree.scores));
}

// The columns of a table by name, as writable views that keep `owner` alive.
nanobind::dict table_arrays(nanobind::handle owner, const SuccessorTable& table);

// Refuses a table that the machine cannot hold.
void check_table(size_t capacity, size_t k);

#define PACELINE_TREE "tuple[Tokens, Tokens, Floats]"
#define PACELINE_STEP                                                              \
    "self, context: Tokens, tokens: Tokens, parents: Tokens, top_tokens: Tokens, " \
    "top_probs: Floats, path: Tokens, drawn: Tokens, learn: bool"

}  // namespace paceline
