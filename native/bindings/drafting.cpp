// Bindings of the drafters that learn while they draft: context mixer, n-gram index, suffix matcher
// and the blend of several sources.

#include "bindings/drafting.hpp"

#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <limits>
#include <optional>
#include <span>

#include "drafting/blend.hpp"
#include "drafting/context_mixer.hpp"
#include "drafting/ngram_index.hpp"
#include "drafting/suffix_automaton.hpp"
#include "support/memory.hpp"

namespace paceline {

namespace nb = nanobind;

using namespace arrays;

nb::dict table_arrays(nb::handle owner, const SuccessorTable& table) {
    using Way = SuccessorTable::Way;
    const auto by_row = [&](auto* first) {
        using T = std::remove_pointer_t<decltype(first)>;
        const auto step = static_cast<int64_t>(sizeof(Way) / sizeof(T));
        return nb::cast(nb::ndarray<nb::numpy, T>(first, {table.rows}, owner, {step}));
    };
    const auto by_successor = [&](auto* first) {
        using T = std::remove_pointer_t<decltype(first)>;
        const auto step = static_cast<int64_t>(sizeof(Successor) / sizeof(T));
        const auto row = static_cast<int64_t>(table.k) * step;
        return nb::cast(
            nb::ndarray<nb::numpy, T>(first, {table.rows, table.k}, owner, {row, step}));
    };
    nb::dict views;
    views["keys"] = by_row(&table.ways()->key);
    views["counts"] = by_row(&table.ways()->count);
    views["written"] = by_row(&table.ways()->written);
    views["tokens"] = by_successor(&table.successors()->token);
    views["probs"] = by_successor(&table.successors()->prob);
    return views;
}

void check_table(size_t capacity, size_t k) {
    size_in_range("capacity", capacity, 0, kMaxCapacity);
    size_in_range("k", k, 1, kMaxTopK);
    check_memory("a table of this capacity",
                 2.0 * static_cast<double>(capacity) *
                     static_cast<double>(sizeof(SuccessorTable::Way) + k * sizeof(Successor)));
}

namespace {

constexpr size_t kMaxOrders = 64;
constexpr size_t kMaxMembers = ContextMixer::kOrigins - 2;  // besides contexts and matches

void check_mixer(size_t orders, size_t skips, size_t k, size_t capacity, float keep, float rate) {
    size_in_range("orders", orders, 0, kMaxOrders);
    size_in_range("skips", skips, 0, kMaxOrders);
    check_table(capacity, k);
    share_in_range("keep", keep);
    share_in_range("rate", rate);
}

void make_mixer(ContextMixer* self, size_t orders, size_t skips, size_t k, size_t capacity,
                float keep, float rate) {
    check_mixer(orders, skips, k, capacity, keep, rate);
    new (self) ContextMixer(orders, skips, k, capacity, keep, rate);
}

void make_blend(SourceBlend* self, size_t orders, size_t skips, size_t k, size_t capacity,
                float keep, float rate, size_t reach, size_t follow, size_t members) {
    check_mixer(orders, skips, k, capacity, keep, rate);
    size_in_range("reach", reach, 0, kMaxCapacity);
    size_in_range("follow", follow, 0, kMaxTopK);
    size_in_range("members", members, 0, kMaxMembers);
    new (self) SourceBlend(orders, skips, k, capacity, keep, rate, reach, follow, members);
}

void make_index(NgramIndex* self, size_t longest, size_t k, size_t capacity, float keep,
                float rate) {
    size_in_range("longest", longest, 1, kMaxOrders);
    check_table(capacity, k);
    share_in_range("keep", keep);
    share_in_range("rate", rate);
    new (self) NgramIndex(longest, k, capacity, keep, rate);
}

void make_matcher(SuffixMatcher* self, size_t capacity, size_t k, float rate) {
    size_in_range("capacity", capacity, 0, kMaxCapacity);
    size_in_range("k", k, 0, kMaxTopK);
    share_in_range("rate", rate);
    new (self) SuffixMatcher(capacity, k, rate);
}

// Grow a tree of at most `budget` nodes beyond the end of the context from what a source predicts.
template <class Source>
nb::tuple propose(Source& source, Tokens context, size_t budget, float min_path_prob) {
    check_context(context);
    check_budget(budget);
    DraftTree tree(context.data(), context.shape(0), source.width());
    source.start();
    grow(tree, budget, min_path_prob,
         [&](size_t node, std::vector<Candidate>& out) { source.successors(tree, node, out); });
    return tree_arrays(tree);
}

// Store the model's distribution at every node in the mixer. Before that, `learn(tree, node,
// drawn)` is called for each drawn token, so that it is judged by what was known when it was
// drafted.
template <class Learn>
void observe(ContextMixer& mixer, const StepArrays& step, Learn&& learn) {
    const DraftTree tree = step.tree(mixer.width());
    for (size_t node = 0, at = 0; node < step.nodes(); ++node) {
        if (at < step.path.shape(0) && step.path(at) == static_cast<int32_t>(node)) {
            learn(tree, node, step.drawn(at));
            ++at;
        }
        if (step.known(node))
            mixer.observe(tree.last(node), step.top(node), step.probs(node), step.k());
    }
}

void observe_mixer(ContextMixer& mixer, Tokens context, Tokens tokens, Tokens parents,
                   Input<int32_t, 2> top_tokens, Input<float, 2> top_probs, Tokens path,
                   Tokens drawn, bool learn) {
    const StepArrays step{context, tokens, parents, top_tokens, top_probs, path, drawn};
    step.check();
    observe(mixer, step, [&](const DraftTree& tree, size_t node, int32_t token) {
        if (learn) mixer.learn(tree.last(node), {}, token);
    });
}

// Keep the distributions at the last accepted nodes for the next tree.
void keep_recent(SourceBlend& blend, const StepArrays& step) {
    const size_t accepted = step.path.shape(0), length = step.context.shape(0);
    for (size_t at = accepted - std::min(accepted, SourceBlend::kRecent); at < accepted; ++at) {
        const auto node = static_cast<size_t>(step.path(at));
        if (step.known(node))
            blend.keep(length + at, step.top(node), step.probs(node), step.k(), step.drawn(at));
    }
}

void observe_blend(SourceBlend& blend, Tokens context, Tokens tokens, Tokens parents,
                   Input<int32_t, 2> top_tokens, Input<float, 2> top_probs, Tokens path,
                   Tokens drawn, bool learn) {
    const StepArrays step{context, tokens, parents, top_tokens, top_probs, path, drawn};
    step.check();
    // The context and the members' proposals are those of the last `propose`: predict once more.
    if (learn) {
        blend.start(context.data(), context.shape(0), std::move(blend.proposals));
        blend.draw_model.learn(drawn.data(), drawn.shape(0));
    }
    observe(*blend.mixer, step, [&](const DraftTree& tree, size_t node, int32_t token) {
        if (learn) blend.learn(tree, node, token);
    });
    keep_recent(blend, step);
    blend.proposals.clear();
}

// One member's tree: its number, whether nothing else can follow, tokens, parents, scores.
using MemberTree = std::tuple<size_t, bool, Tokens, Tokens, Scores>;

using Bits = Input<uint32_t, 1>;

std::vector<SourceBlend::Proposal> checked_proposals(const std::vector<MemberTree>& trees,
                                                     size_t members) {
    std::vector<SourceBlend::Proposal> proposals;
    for (const auto& [member, certain, tokens, parents, scores] : trees) {
        const size_t n = tokens.shape(0);
        if (member >= members)
            refuse("member is " + std::to_string(member) + ", expected less than " +
                   std::to_string(members));
        if (!n || parents.shape(0) != n || scores.shape(0) != n)
            refuse("a member's tree needs a root and arrays of one size");
        check_parents(parents.data(), n);
        proposals.push_back({member,
                             certain,
                             {tokens.data(), tokens.data() + n},
                             {parents.data(), parents.data() + n},
                             {scores.data(), scores.data() + n}});
    }
    return proposals;
}

// Ask `allowed` for the mask behind a node, given the tokens below the root; None allows all.
std::optional<Bits> mask_at(const nb::object& allowed, const DraftTree& tree, size_t node) {
    if (allowed.is_none()) return {};
    std::vector<int32_t> path;
    for (; node; node = static_cast<size_t>(tree.parents[node])) path.push_back(tree.tokens[node]);
    nb::list below;
    for (size_t i = path.size(); i-- > 0;) below.append(path[i]);
    const nb::object answer = allowed(below);
    std::optional<Bits> bits;
    if (!nb::try_cast(answer, bits)) refuse("allowed must return a uint32 array or None");
    return bits;
}

nb::tuple propose_blend(SourceBlend& blend, Tokens context, size_t budget, float min_path_prob,
                        const std::vector<MemberTree>& proposals, std::vector<uint64_t> noise,
                        const nb::object& allowed) {
    check_context(context);
    check_budget(budget);
    std::vector<SourceBlend::Proposal> checked = checked_proposals(proposals, blend.members());
    blend.start(context.data(), context.shape(0), std::move(checked));
    blend.draw_model.start(std::move(noise));
    const auto held = blend.suffix.hold();  // `allowed` may call methods of this object
    DraftTree tree(context.data(), context.shape(0), blend.width());
    grow(tree, budget, min_path_prob, [&](size_t node, std::vector<Candidate>& out) {
        blend.successors(tree, node, out);
        const std::optional<Bits> bits = mask_at(allowed, tree, node);
        std::span<const uint32_t> mask;
        if (bits) mask = {bits->data(), bits->size()};
        blend.draw_model.adjust(tree, node, mask, out);
    });
    return nb::make_tuple(copied(tree.tokens), copied(tree.parents), copied(tree.scores),
                          copied(tree.origins), copied(tree.named_by));
}

nb::dict mixer_arrays(nb::handle self) {
    auto& mixer = nb::cast<ContextMixer&>(self);
    nb::dict views = table_arrays(self, mixer.table);
    views["weights"] = view(self, mixer.weights);
    views["biases"] = view(self, mixer.biases);
    return views;
}

void replay(SuffixMatcher& matcher, Tokens read, size_t aged) {
    size_in_range("aged", aged, 0, read.shape(0));
    matcher.replay(read.data(), read.shape(0), aged);
}

void bind_mixer(nb::module_& m) {
    nb::class_<ContextMixer>(
        m, "ContextMixer",
        "The model's own distributions by context, mixed; native/drafting/context_mixer.hpp.")
        .def("__init__", &make_mixer, nb::arg("orders"), nb::arg("skips"), nb::arg("k"),
             nb::arg("capacity"), nb::arg("keep"), nb::arg("rate"))
        .def("propose", &propose<ContextMixer>, nb::arg("context"), nb::arg("budget"),
             nb::arg("min_path_prob") = 0.0f,
             nb::sig("def propose(self, context: Tokens, budget: int, min_path_prob: float = 0.0)"
                     " -> " PACELINE_TREE),
             "Return tokens, parents and scores of a tree with at most `budget` nodes beyond its\n"
             "root, the end of the context; paths below `min_path_prob` are left out.")
        .def("observe", &observe_mixer, nb::arg("context"), nb::arg("tokens"), nb::arg("parents"),
             nb::arg("top_tokens"), nb::arg("top_probs"), nb::arg("path"), nb::arg("drawn"),
             nb::arg("learn"), nb::sig("def observe(" PACELINE_STEP ") -> None"),
             "Store the distributions of a step; with `learn`, fit the weights to what was drawn.")
        .def("arrays", &mixer_arrays, nb::sig("def arrays(self) -> State"),
             "Return writable views of the table, the weights and the biases, by name.")
        .def("reset", &ContextMixer::reset, "Forget everything.")
        .def_prop_rw(
            "clock", [](const ContextMixer& mixer) { return mixer.table.clock; },
            [](ContextMixer& mixer, uint32_t clock) { mixer.table.clock = clock; },
            "Observations so far; rows that were written longest ago are replaced first.");
}

void bind_blend(nb::module_& m) {
    nb::class_<SourceBlend>(m, "SourceBlend",
                            "Several drafters under one mixture; native/drafting/blend.hpp.")
        .def("__init__", &make_blend, nb::arg("orders"), nb::arg("skips"), nb::arg("k"),
             nb::arg("capacity"), nb::arg("keep"), nb::arg("rate"), nb::arg("reach"),
             nb::arg("follow"), nb::arg("members"))
        .def("propose", &propose_blend, nb::arg("context"), nb::arg("budget"),
             nb::arg("min_path_prob"), nb::arg("proposals"), nb::arg("noise"),
             nb::arg("allowed").none(),
             nb::sig("def propose(self, context: Tokens, budget: int, min_path_prob: float, "
                     "proposals: Items[tuple[int, bool, Tokens, Tokens, Floats]], "
                     "noise: Items[int], "
                     "allowed: Callable[[list[int]], Words | None] | None) -> "
                     "tuple[Tokens, Tokens, Floats, NDArray[np.int16], Words]"),
             "Return tokens, parents, scores, origins and the origins that predicted each node\n"
             "(one bit each) of a tree. `proposals` are the members' trees (member, whether\n"
             "nothing else can follow, tokens, parents, scores); `noise` is where the noise of\n"
             "the draws below each depth starts; `allowed` returns the mask behind a path.")
        .def("observe", &observe_blend, nb::arg("context"), nb::arg("tokens"), nb::arg("parents"),
             nb::arg("top_tokens"), nb::arg("top_probs"), nb::arg("path"), nb::arg("drawn"),
             nb::arg("learn"), nb::sig("def observe(" PACELINE_STEP ") -> None"),
             "Store the distributions of a step; with `learn`, fit the weights to what was drawn.")
        .def("begin", &SourceBlend::begin, "Begin a new text; what was learnt is kept.")
        .def("reset", &SourceBlend::reset, "Forget everything.")
        .def(
            "fork", [](const SourceBlend& blend) { return SourceBlend(blend); },
            "Return a copy for another text at the same time; both learn from both.")
        .def_prop_ro(
            "mixer", [](SourceBlend& blend) -> ContextMixer& { return *blend.mixer; },
            nb::rv_policy::reference_internal)
        .def_prop_rw(
            "draw_weights", [](const SourceBlend& blend) { return *blend.draw_model.weights; },
            [](SourceBlend& blend, DrawModel::Weights weights) {
                for (const float weight : weights)
                    if (!std::isfinite(weight)) refuse("draw_weights must be finite");
                *blend.draw_model.weights = weights;
            },
            nb::for_getter(nb::sig("def draw_weights(self) -> list[float]")),
            nb::for_setter(nb::sig("def draw_weights(self, weights: Items[float], /) -> None")),
            "The four weights a, b, c, d of the draw model.")
        .def_ro("suffix", &SourceBlend::suffix, nb::rv_policy::reference_internal);
}

void bind_index(nb::module_& m) {
    nb::class_<NgramIndex>(m, "NgramIndex",
                           "An index of one text's n-grams; native/drafting/ngram_index.hpp.")
        .def("__init__", &make_index, nb::arg("longest"), nb::arg("k"), nb::arg("capacity"),
             nb::arg("keep"), nb::arg("rate"))
        .def("begin", &NgramIndex::begin, "Begin a new text; the old one is forgotten.")
        .def(
            "extend",
            [](NgramIndex& index, Tokens text, size_t learn_from) {
                index.extend(text.data(), text.shape(0), learn_from);
            },
            nb::arg("text"), nb::arg("learn_from"),
            nb::sig("def extend(self, text: Tokens, learn_from: int) -> None"),
            "Index the rest of a text; tokens from `learn_from` on also teach the reliabilities.")
        .def("propose", &propose<NgramIndex>, nb::arg("context"), nb::arg("budget"),
             nb::arg("min_path_prob") = 0.0f,
             nb::sig("def propose(self, context: Tokens, budget: int, min_path_prob: float = 0.0)"
                     " -> " PACELINE_TREE),
             "Return tokens, parents and scores of a tree; see `ContextMixer.propose`.")
        .def("reset", &NgramIndex::reset, "Forget everything.")
        .def(
            "reliability",
            [](nb::handle self) { return view(self, nb::cast<NgramIndex&>(self).reliability); },
            nb::sig("def reliability(self) -> Floats"),
            "Return a writable view: the probability that n-grams of each length are right.");
}

void bind_matcher(nb::module_& m) {
    nb::class_<SuffixMatcher>(
        m, "SuffixMatcher",
        "Suffix automata of the texts so far; native/drafting/suffix_automaton.hpp.")
        .def("__init__", &make_matcher, nb::arg("capacity"), nb::arg("k"), nb::arg("rate"))
        .def("begin", &SuffixMatcher::begin, "Begin a new text; the old ones are kept.")
        .def(
            "extend",
            [](SuffixMatcher& matcher, Tokens text, size_t learn_from) {
                matcher.extend(text.data(), text.shape(0), learn_from);
            },
            nb::arg("text"), nb::arg("learn_from"),
            nb::sig("def extend(self, text: Tokens, learn_from: int) -> None"),
            "Read the rest of a text; tokens from `learn_from` on also teach the reliabilities.")
        .def("propose", &propose<SuffixMatcher>, nb::arg("context"), nb::arg("budget"),
             nb::arg("min_path_prob") = 0.0f,
             nb::sig("def propose(self, context: Tokens, budget: int, min_path_prob: float = 0.0)"
                     " -> " PACELINE_TREE),
             "Return tokens, parents and scores of a tree; see `ContextMixer.propose`.")
        .def("reset", &SuffixMatcher::reset, "Forget everything.")
        .def_prop_ro("bytes", &SuffixMatcher::bytes, "Memory of both automata.")
        .def(
            "fork", [](const SuffixMatcher& matcher) { return SuffixMatcher(matcher); },
            "Return a copy for another text at the same time; both learn from both.")
        .def_prop_ro(
            "aged", [](const SuffixMatcher& matcher) { return matcher.texts->aged; },
            "How many of the tokens of `read` lie in the older automaton.")
        .def(
            "read", [](const SuffixMatcher& matcher) { return copied(matcher.texts->read); },
            nb::sig("def read(self) -> Tokens"),
            "Return the tokens that both automata hold, oldest first, -1 between texts.")
        .def("replay", &replay, nb::arg("read"), nb::arg("aged"),
             nb::sig("def replay(self, read: Tokens, aged: int) -> None"),
             "Forget everything and read again what `read` and `aged` were.")
        .def(
            "reliability",
            [](nb::handle self) {
                return view(self, nb::cast<SuffixMatcher&>(self).texts->reliability);
            },
            nb::sig("def reliability(self) -> Floats"),
            "Return a writable view: the probability that each kind of match is right.");
}

}  // namespace

void bind_drafting(nb::module_& m) {
    bind_mixer(m);
    bind_matcher(m);
    bind_index(m);
    bind_blend(m);
}

}  // namespace paceline
