// What Python sees of the sources of guesses that keep texts: trie, tri-grams, suffixes.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cmath>
#include <limits>
#include <stdexcept>

#include "support/arrays.hpp"
#include "drafting/suffix_array.hpp"
#include "drafting/trie.hpp"
#include "drafting/trigram.hpp"

namespace nb = nanobind;

using namespace paceline;
using namespace paceline::arrays;

namespace {

nb::tuple propose_trie(Trie& trie, Input<int32_t, 1> context, size_t budget) {
    check_context(context);
    Growth grown(context.data(), context.shape(0), trie.width());
    grow(grown, budget, 0.0f, [&](size_t node, std::vector<Candidate>& out) {
        trie.successors(grown.last(node), out);
    });
    return tree(grown);
}

void load_trie(Trie& trie, Input<int32_t, 1> tokens, Input<int32_t, 1> parents,
               Input<float, 1> counts) {
    const size_t n = tokens.shape(0);
    if (parents.shape(0) != n || counts.shape(0) != n)
        throw std::invalid_argument("a trie's arrays disagree about their sizes");
    for (size_t i = 0; i < n; ++i)
        if (parents(i) < 0 || static_cast<size_t>(parents(i)) > i)
            throw std::invalid_argument("a parent comes before its children");
    trie.load(tokens.data(), parents.data(), counts.data(), n);
}

nb::dict trie_arrays(nb::handle self) {
    auto& trie = nb::cast<Trie&>(self);
    nb::dict views;
    views["tokens"] = view(self, trie.tokens);
    views["parents"] = view(self, trie.parents);
    views["counts"] = view(self, trie.counts);
    views["reliability"] = view(self, trie.reliability);
    return views;
}

nb::tuple propose_trigram(Trigram& trigram, Input<int32_t, 1> context, size_t budget) {
    check_context(context);
    Growth grown(context.data(), context.shape(0), Trigram::kWidth);
    trigram.propose(grown, budget);
    return tree(grown);
}

void observe_trigram(Trigram& trigram, Input<int32_t, 1> context, Input<int32_t, 1> tokens,
                     Input<int32_t, 1> parents, Input<int32_t, 2> top, Input<float, 2> probs,
                     Input<int32_t, 1> path, Input<int32_t, 1> drawn, bool learn) {
    check_context(context);
    const size_t nodes = tokens.shape(0), k = top.shape(1);
    if (parents.shape(0) != nodes || top.shape(0) != nodes || probs.shape(0) != nodes ||
        probs.shape(1) != k || path.shape(0) != drawn.shape(0))
        throw std::invalid_argument("a step's arrays disagree about their sizes");
    Growth grown(context.data(), context.shape(0), Trigram::kWidth);
    for (size_t node = 1; node < nodes; ++node) {
        if (parents(node) < 0 || static_cast<size_t>(parents(node)) >= node)
            throw std::invalid_argument("a parent comes before its children");
        grown.add(parents(node), {tokens(node), 0.0f});
    }
    for (size_t i = 0; learn && i < path.shape(0); ++i) {
        if (path(i) < 0 || static_cast<size_t>(path(i)) >= nodes)
            throw std::invalid_argument("a path lies in its tree");
        trigram.learn(grown.last(path(i)), drawn(i));
    }
    for (size_t node = 0; node < nodes; ++node) {
        const float* p = probs.data() + node * k;
        if (std::all_of(p, p + k, [](float x) { return std::isfinite(x); }))
            trigram.observe(grown.last(node), top.data() + node * k, p, k);
    }
}

nb::dict trigram_arrays(nb::handle self) {
    auto& trigram = nb::cast<Trigram&>(self);
    nb::dict views = table(self, trigram.table);
    views["reliability"] = view(self, trigram.reliability);
    return views;
}

// Keeps the corpus and its suffix array alive, which may be mapped files.
struct Corpus {
    Corpus(Input<int32_t, 1> text_, Input<int32_t, 1> suffixes_, size_t longest, size_t k,
           size_t samples, float rate)
        : text(checked(text_, suffixes_)),
          suffixes(suffixes_),
          search(text.data(), suffixes.data(), text.shape(0), longest, k, samples, rate) {}

    static Input<int32_t, 1> checked(Input<int32_t, 1> text, Input<int32_t, 1> suffixes) {
        const size_t n = text.shape(0);
        if (suffixes.shape(0) != n) throw std::invalid_argument("a corpus needs all its suffixes");
        for (size_t i = 0; i < n; ++i)
            if (suffixes(i) < 0 || static_cast<size_t>(suffixes(i)) >= n)
                throw std::invalid_argument("a suffix starts within the corpus");
        return text;
    }

    Input<int32_t, 1> text, suffixes;
    Suffixes search;
};

nb::tuple propose_corpus(Corpus& corpus, Input<int32_t, 1> context, size_t budget) {
    check_context(context);
    Growth grown(context.data(), context.shape(0), corpus.search.width());
    corpus.search.propose(grown, budget);
    return tree(grown);
}

nb::ndarray<nb::numpy, int32_t> sorted_suffixes(Input<int32_t, 1> text) {
    std::vector<int32_t> shifted(text.data(), text.data() + text.shape(0));
    int32_t largest = 0;
    for (int32_t& token : shifted) {
        if (token < -1 || token >= 1 << 24)
            throw std::invalid_argument("tokens are -1 (the end of a document) to 2^24 - 1");
        largest = std::max(largest, ++token);  // ends come first
    }
    if (shifted.size() > static_cast<size_t>(std::numeric_limits<int32_t>::max()))
        throw std::invalid_argument("a corpus has less than 2^31 tokens");
    std::vector<int32_t> order;
    {
        nb::gil_scoped_release released;
        order = suffix_array(shifted, largest + 1);
    }
    return copied(order);
}

}  // namespace

void bind_guesses(nb::module_& m) {
    nb::class_<Trie>(m, "Trie", "Branches of earlier texts; native/drafting/trie.hpp.")
        .def(nb::init<size_t, size_t, size_t, float, float>(), nb::arg("depth"), nb::arg("k"),
             nb::arg("capacity"), nb::arg("here"), nb::arg("rate"))
        .def("begin", &Trie::begin)
        .def(
            "extend",
            [](Trie& trie, Input<int32_t, 1> text, size_t learn_from) {
                trie.extend(text.data(), text.shape(0), learn_from);
            },
            nb::arg("text"), nb::arg("learn_from"))
        .def("propose", &propose_trie, nb::arg("context"), nb::arg("budget"))
        .def("load", &load_trie, nb::arg("tokens"), nb::arg("parents"), nb::arg("counts"))
        .def("arrays", &trie_arrays)
        .def("reset", &Trie::reset);
    nb::class_<Trigram>(m, "Trigram", "Tri-grams and a search over them; native/drafting/trigram.hpp.")
        .def(nb::init<size_t, size_t, float, size_t, float, float>(), nb::arg("k"),
             nb::arg("capacity"), nb::arg("explore"), nb::arg("depth"), nb::arg("keep"),
             nb::arg("rate"))
        .def("propose", &propose_trigram, nb::arg("context"), nb::arg("budget"))
        .def("observe", &observe_trigram, nb::arg("context"), nb::arg("tokens"),
             nb::arg("parents"), nb::arg("top_tokens"), nb::arg("top_probs"), nb::arg("path"),
             nb::arg("drawn"), nb::arg("learn"))
        .def("arrays", &trigram_arrays)
        .def("reset", &Trigram::reset)
        .def_prop_rw(
            "clock", [](const Trigram& trigram) { return trigram.table.clock; },
            [](Trigram& trigram, uint32_t clock) { trigram.table.clock = clock; });
    nb::class_<Corpus>(m, "Corpus", "A corpus and its suffix array; native/drafting/suffix_array.hpp.")
        .def(nb::init<Input<int32_t, 1>, Input<int32_t, 1>, size_t, size_t, size_t, float>(),
             nb::arg("text"), nb::arg("suffixes"), nb::arg("longest"), nb::arg("k"),
             nb::arg("samples"), nb::arg("rate"))
        .def("begin", [](Corpus& corpus) { corpus.search.begin(); })
        .def(
            "extend",
            [](Corpus& corpus, Input<int32_t, 1> text, size_t learn_from) {
                corpus.search.extend(text.data(), text.shape(0), learn_from);
            },
            nb::arg("text"), nb::arg("learn_from"))
        .def("propose", &propose_corpus, nb::arg("context"), nb::arg("budget"))
        .def("reset", [](Corpus& corpus) { corpus.search.reset(); })
        .def("reliability", [](nb::handle self) {
            return view(self, nb::cast<Corpus&>(self).search.reliability);
        });
    m.def("suffix_array", &sorted_suffixes, nb::arg("text"),
          "The starts of the suffixes of a text in order, int32 [N]; -1 ends a document.");
}
