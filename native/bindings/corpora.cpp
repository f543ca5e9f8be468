// Bindings of the drafters that look texts up: trie, trigrams, suffix array of a corpus.

#include <nanobind/stl/vector.h>

#include <limits>

#include "bindings/drafting.hpp"
#include "drafting/suffix_array.hpp"
#include "drafting/trie.hpp"
#include "drafting/trigram.hpp"
#include "support/memory.hpp"

namespace paceline {

namespace nb = nanobind;

using namespace arrays;

namespace {

constexpr size_t kMaxLength = 4096;  // of a context
constexpr int32_t kMaxCorpusToken = (1 << 24) - 1;

void make_trie(TokenTrie* self, size_t depth, size_t k, size_t capacity, float here, float rate) {
    size_in_range("depth", depth, 2, kMaxLength);
    size_in_range("k", k, 1, kMaxTopK);
    size_in_range("capacity", capacity, 0, kMaxCapacity);
    in_range("here", here, 0.0f, 1e6f);
    share_in_range("rate", rate);
    constexpr double kSlotBytes = 4 * sizeof(uint32_t);
    check_memory("a trie of this capacity", static_cast<double>(capacity) * kSlotBytes);
    new (self) TokenTrie(depth, k, capacity, here, rate);
}

nb::tuple propose_trie(TokenTrie& trie, Tokens context, size_t budget) {
    check_context(context);
    check_budget(budget);
    DraftTree tree(context.data(), context.shape(0), trie.width());
    grow(tree, budget, 0.0f,
         [&](size_t node, std::vector<Candidate>& out) { trie.successors(tree.last(node), out); });
    return tree_arrays(tree);
}

void load_trie(TokenTrie& trie, Tokens tokens, Tokens parents, Scores counts) {
    const size_t n = tokens.shape(0);
    if (parents.shape(0) != n || counts.shape(0) != n)
        refuse("a trie's arrays disagree about their sizes");
    size_in_range("the number of nodes", n, 0, trie.capacity() - 1);
    for (size_t i = 0; i < n; ++i) {
        if (parents(i) < 0 || static_cast<size_t>(parents(i)) > i)
            refuse("a parent comes before its children");
        in_range("a count", counts(i), 0.0f, std::numeric_limits<float>::max());
    }
    trie.load(tokens.data(), parents.data(), counts.data(), n);
}

// Copies, because the trie moves its nodes as it grows; `reliability` stays where it is.
nb::dict trie_arrays(nb::handle self) {
    auto& trie = nb::cast<TokenTrie&>(self);
    nb::dict views;
    views["tokens"] = copied(trie.tokens);
    views["parents"] = copied(trie.parents);
    views["counts"] = copied(trie.counts);
    views["reliability"] = view(self, trie.reliability);
    return views;
}

void make_trigram(TrigramSearch* self, size_t k, size_t capacity, float explore, size_t depth,
                  float keep, float rate) {
    check_table(capacity, k);
    in_range("explore", explore, 0.0f, 1e6f);
    size_in_range("depth", depth, 0, kMaxNodes);
    share_in_range("keep", keep);
    share_in_range("rate", rate);
    new (self) TrigramSearch(k, capacity, explore, depth, keep, rate);
}

nb::tuple propose_trigram(TrigramSearch& trigram, Tokens context, size_t budget) {
    check_context(context);
    check_budget(budget);
    DraftTree tree(context.data(), context.shape(0), TrigramSearch::kWidth);
    trigram.propose(tree, budget);
    return tree_arrays(tree);
}

void observe_trigram(TrigramSearch& trigram, Tokens context, Tokens tokens, Tokens parents,
                     Input<int32_t, 2> top_tokens, Input<float, 2> top_probs, Tokens path,
                     Tokens drawn, bool learn) {
    const StepArrays step{context, tokens, parents, top_tokens, top_probs, path, drawn};
    step.check();
    const DraftTree tree = step.tree(TrigramSearch::kWidth);
    for (size_t i = 0; learn && i < path.shape(0); ++i)
        trigram.learn(tree.last(static_cast<size_t>(path(i))), drawn(i));
    for (size_t node = 0; node < step.nodes(); ++node)
        if (step.known(node))
            trigram.observe(tree.last(node), step.top(node), step.probs(node), step.k());
}

nb::dict trigram_arrays(nb::handle self) {
    auto& trigram = nb::cast<TrigramSearch&>(self);
    nb::dict views = table_arrays(self, trigram.table);
    views["reliability"] = view(self, trigram.reliability);
    return views;
}

// Keeps the corpus and its suffix array alive, which may be mapped files.
struct Corpus {
    Corpus(Tokens text, Tokens suffixes, size_t longest, size_t k, size_t samples, float rate)
        : text(text),
          suffixes(suffixes),
          matcher(text.data(), suffixes.data(), text.shape(0), longest, k, samples, rate) {}

    Tokens text, suffixes;
    CorpusMatcher matcher;
};

void make_corpus(Corpus* self, Tokens text, Tokens suffixes, size_t longest, size_t k,
                 size_t samples, float rate) {
    const size_t n = text.shape(0);
    if (suffixes.shape(0) != n) refuse("a corpus needs all its suffixes");
    for (size_t i = 0; i < n; ++i)
        if (suffixes(i) < 0 || static_cast<size_t>(suffixes(i)) >= n)
            refuse("a suffix starts within the corpus");
    size_in_range("longest", longest, 1, kMaxLength);
    size_in_range("k", k, 1, kMaxTopK);
    size_in_range("samples", samples, 1, kMaxCapacity);
    share_in_range("rate", rate);
    new (self) Corpus(text, suffixes, longest, k, samples, rate);
}

nb::tuple propose_corpus(Corpus& corpus, Tokens context, size_t budget) {
    check_context(context);
    check_budget(budget);
    DraftTree tree(context.data(), context.shape(0), corpus.matcher.width());
    corpus.matcher.propose(tree, budget);
    return tree_arrays(tree);
}

Array1<int32_t> sorted_suffixes(Tokens text) {
    if (text.shape(0) > static_cast<size_t>(std::numeric_limits<int32_t>::max()))
        refuse("a corpus has less than 2^31 tokens");
    std::vector<int32_t> shifted(text.data(), text.data() + text.shape(0));
    int32_t largest = 0;
    for (int32_t& token : shifted) {
        if (token < -1 || token > kMaxCorpusToken)
            refuse("tokens are -1 (the end of a document) to 2^24 - 1");
        largest = std::max(largest, ++token);  // the ends of documents come first
    }
    std::vector<int32_t> order;
    {
        nb::gil_scoped_release unlocked;
        order = suffix_array(shifted, largest + 1);
    }
    return copied(order);
}

void bind_trie(nb::module_& m) {
    nb::class_<TokenTrie>(m, "TokenTrie", "Branches of earlier texts; native/drafting/trie.hpp.")
        .def("__init__", &make_trie, nb::arg("depth"), nb::arg("k"), nb::arg("capacity"),
             nb::arg("here"), nb::arg("rate"))
        .def("begin", &TokenTrie::begin, "Begin a new text; the old ones are kept.")
        .def(
            "extend",
            [](TokenTrie& trie, Tokens text, size_t learn_from) {
                trie.extend(text.data(), text.shape(0), learn_from);
            },
            nb::arg("text"), nb::arg("learn_from"),
            nb::sig("def extend(self, text: Tokens, learn_from: int) -> None"),
            "Read the rest of a text; tokens from `learn_from` on also teach the reliabilities.")
        .def("propose", &propose_trie, nb::arg("context"), nb::arg("budget"),
             nb::sig("def propose(self, context: Tokens, budget: int) -> " PACELINE_TREE),
             "Return tokens, parents and scores of a tree; see `ContextMixer.propose`.")
        .def("load", &load_trie, nb::arg("tokens"), nb::arg("parents"), nb::arg("counts"),
             nb::sig("def load(self, tokens: Tokens, parents: Tokens, counts: Floats) -> None"),
             "Replace all nodes but the root by nodes 1 to n [n each], parents first.")
        .def("arrays", &trie_arrays, nb::sig("def arrays(self) -> State"),
             "Return copies of the nodes' tokens, parents and counts, root first, and a writable\n"
             "view of the reliabilities, by name.")
        .def("reset", &TokenTrie::reset, "Forget everything.");
}

void bind_trigram(nb::module_& m) {
    nb::class_<TrigramSearch>(m, "TrigramSearch",
                              "Trigrams and a tree search over them; native/drafting/trigram.hpp.")
        .def("__init__", &make_trigram, nb::arg("k"), nb::arg("capacity"), nb::arg("explore"),
             nb::arg("depth"), nb::arg("keep"), nb::arg("rate"))
        .def("propose", &propose_trigram, nb::arg("context"), nb::arg("budget"),
             nb::sig("def propose(self, context: Tokens, budget: int) -> " PACELINE_TREE),
             "Return tokens, parents and scores of a tree; see `ContextMixer.propose`.")
        .def("observe", &observe_trigram, nb::arg("context"), nb::arg("tokens"), nb::arg("parents"),
             nb::arg("top_tokens"), nb::arg("top_probs"), nb::arg("path"), nb::arg("drawn"),
             nb::arg("learn"), nb::sig("def observe(" PACELINE_STEP ") -> None"),
             "Store the distributions of a step; with `learn`, fit the reliabilities to what was\n"
             "drawn.")
        .def("arrays", &trigram_arrays, nb::sig("def arrays(self) -> State"),
             "Return writable views of the table and the reliabilities, by name.")
        .def("reset", &TrigramSearch::reset, "Forget everything.")
        .def_prop_rw(
            "clock", [](const TrigramSearch& trigram) { return trigram.table.clock; },
            [](TrigramSearch& trigram, uint32_t clock) { trigram.table.clock = clock; },
            "Observations so far; rows that were written longest ago are replaced first.");
}

void bind_corpus(nb::module_& m) {
    nb::class_<Corpus>(m, "CorpusMatcher",
                       "A corpus and its suffix array; native/drafting/suffix_array.hpp.")
        .def("__init__", &make_corpus, nb::arg("text"), nb::arg("suffixes"), nb::arg("longest"),
             nb::arg("k"), nb::arg("samples"), nb::arg("rate"),
             nb::sig("def __init__(self, text: Tokens, suffixes: Tokens, longest: int, k: int, "
                     "samples: int, rate: float) -> None"))
        .def(
            "begin", [](Corpus& corpus) { corpus.matcher.begin(); }, "Begin a new text.")
        .def(
            "extend",
            [](Corpus& corpus, Tokens text, size_t learn_from) {
                corpus.matcher.extend(text.data(), text.shape(0), learn_from);
            },
            nb::arg("text"), nb::arg("learn_from"),
            nb::sig("def extend(self, text: Tokens, learn_from: int) -> None"),
            "Learn from the tokens of a text from `learn_from` on how reliable matches are.")
        .def("propose", &propose_corpus, nb::arg("context"), nb::arg("budget"),
             nb::sig("def propose(self, context: Tokens, budget: int) -> " PACELINE_TREE),
             "Return tokens, parents and scores of a tree; see `ContextMixer.propose`.")
        .def(
            "reset", [](Corpus& corpus) { corpus.matcher.reset(); },
            "Forget what was learnt; the corpus stays.")
        .def(
            "reliability",
            [](nb::handle self) { return view(self, nb::cast<Corpus&>(self).matcher.reliability); },
            nb::sig("def reliability(self) -> Floats"),
            "Return a writable view: the probability that each kind of match is right.");
    m.def(
        "suffix_array", &sorted_suffixes, nb::arg("text"),
        nb::sig("def suffix_array(text: Tokens) -> Tokens"),
        "Return the starts of the suffixes of a text [N] in order, int32 [N]; -1 ends a document.");
}

}  // namespace

void bind_corpora(nb::module_& m) {
    bind_trie(m);
    bind_trigram(m);
    bind_corpus(m);
}

}  // namespace paceline
