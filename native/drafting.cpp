#include "drafting.hpp"

#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <limits>
#include <optional>
#include <span>
#include <stdexcept>

#include "arrays.hpp"
#include "blend.hpp"
#include "lookup.hpp"
#include "mixer.hpp"
#include "suffix.hpp"

namespace nb = nanobind;

namespace paceline {

namespace {

constexpr size_t kWays = 8;

// By insertion: what is merged was nearly in order.
void sort_best_first(std::vector<Candidate>& all) {
    for (size_t i = 1; i < all.size(); ++i) {
        const Candidate one = all[i];
        size_t place = i;
        for (; place > 0; --place) {
            const Candidate& above = all[place - 1];
            if (above.chance > one.chance) break;
            if (above.chance == one.chance && above.token < one.token) break;
            all[place] = above;
        }
        all[place] = one;
    }
}

}  // namespace

SuccessorTable::SuccessorTable(size_t capacity, size_t k_) : k(k_) {
    size_t rows = kWays;
    while (rows < capacity) rows *= 2;
    keys.resize(rows);
    counts.resize(rows);
    written.resize(rows);
    tokens.resize(rows * k);
    probs.resize(rows * k);
    clear();
}

void SuccessorTable::clear() {
    clock = 0;
    std::fill(keys.begin(), keys.end(), 0);
    std::fill(counts.begin(), counts.end(), 0);
    std::fill(written.begin(), written.end(), 0);
    std::fill(tokens.begin(), tokens.end(), -1);
    std::fill(probs.begin(), probs.end(), 0.0f);
}

size_t SuccessorTable::first_way(uint64_t key) const {
    return (key >> 8 & (rows() / kWays - 1)) * kWays;
}

SuccessorTable::Row SuccessorTable::find(uint64_t key) const {
    const size_t first = first_way(key);
    for (size_t row = first; row < first + kWays; ++row)
        if (keys[row] == key) return {counts[row], &tokens[row * k], &probs[row * k]};
    return {};
}

size_t SuccessorTable::claim(uint64_t key) {
    const size_t first = first_way(key);
    size_t oldest = first;
    for (size_t row = first; row < first + kWays; ++row) {
        if (keys[row] == key) return row;
        if (written[row] < written[oldest]) oldest = row;
    }
    keys[oldest] = key;
    counts[oldest] = 0;
    std::fill_n(&tokens[oldest * k], k, -1);
    std::fill_n(&probs[oldest * k], k, 0.0f);
    return oldest;
}

void SuccessorTable::tick() {
    if (clock == std::numeric_limits<uint32_t>::max()) {  // weeks of work: ages start anew
        std::fill(written.begin(), written.end(), 0);
        clock = 0;
    }
    ++clock;
}

void SuccessorTable::observe(uint64_t key, const int32_t* top, const float* p, size_t n,
                             float keep) {
    const size_t row = claim(key);
    int32_t* token = &tokens[row * k];
    float* prob = &probs[row * k];
    const auto seen = static_cast<float>(counts[row]);
    const float old = std::min(keep, seen / (seen + 1.0f)), fresh = 1.0f - old;
    merged_.clear();
    for (size_t i = 0; i < k && token[i] >= 0; ++i) merged_.push_back({token[i], prob[i] * old});
    const size_t known = merged_.size();
    for (size_t i = 0; i < n; ++i) {
        const auto at = static_cast<size_t>(std::find(token, token + known, top[i]) - token);
        if (at == known)
            merged_.push_back({top[i], p[i] * fresh});
        else
            merged_[at].chance += p[i] * fresh;
    }
    sort_best_first(merged_);
    while (!merged_.empty() && !(merged_.back().chance > 0.0f)) merged_.pop_back();
    const size_t kept = std::min(k, merged_.size());
    for (size_t i = 0; i < kept; ++i) {
        token[i] = merged_[i].token;
        prob[i] = merged_[i].chance;
    }
    std::fill(token + kept, token + k, -1);
    std::fill(prob + kept, prob + k, 0.0f);
    tick();
    written[row] = clock;
    if (counts[row] < std::numeric_limits<uint32_t>::max()) ++counts[row];
}

}  // namespace paceline

using namespace paceline;
using namespace paceline::arrays;

namespace {

// A writable view of what `owner` holds, in rows of `columns`.
template <class T>
nb::object rows_of(nb::handle owner, std::vector<T>& values, size_t columns) {
    const size_t rows = values.size() / columns;
    return nb::cast(nb::ndarray<nb::numpy, T>(values.data(), {rows, columns}, owner));
}

// tokens, parents and scores of the tree a source grows from a context.
template <class Source>
nb::tuple propose(Source& source, Input<int32_t, 1> context, size_t budget) {
    check_context(context);
    Growth tree(context.data(), context.shape(0), source.width());
    source.start();
    grow(tree, budget, [&](size_t node, std::vector<Candidate>& out) {
        source.successors(tree, node, out);
    });
    return arrays::tree(tree);
}

// Every node's distribution goes into the mixer; before that, `learn(tree, node, drawn)` hears of
// each draw.
template <class Learn>
void observe(Mixer& mixer, Input<int32_t, 1> context, Input<int32_t, 1> tokens,
             Input<int32_t, 1> parents, Input<int32_t, 2> top, Input<float, 2> probs,
             Input<int32_t, 1> path, Input<int32_t, 1> drawn, Learn&& learn) {
    check_context(context);
    const size_t nodes = tokens.shape(0), k = top.shape(1);
    if (parents.shape(0) != nodes || top.shape(0) != nodes || probs.shape(0) != nodes ||
        probs.shape(1) != k || path.shape(0) != drawn.shape(0))
        throw std::invalid_argument("a step's arrays disagree about their sizes");
    Growth tree(context.data(), context.shape(0), mixer.width());
    for (size_t node = 1; node < nodes; ++node) {
        const int32_t parent = parents(node);
        if (parent < 0 || static_cast<size_t>(parent) >= node)
            throw std::invalid_argument("a parent comes before its children");
        tree.add(parent, {tokens(node), 0.0f});
    }
    for (size_t node = 0, at = 0; node < nodes; ++node) {
        if (at < path.shape(0) && path(at) == static_cast<int32_t>(node)) {
            learn(tree, node, drawn(at));
            ++at;
        }
        const float* p = probs.data() + node * k;
        if (std::all_of(p, p + k, [](float x) { return std::isfinite(x); }))
            mixer.observe(tree.last(node), top.data() + node * k, p, k);
    }
}

void observe_mixer(Mixer& mixer, Input<int32_t, 1> context, Input<int32_t, 1> tokens,
                   Input<int32_t, 1> parents, Input<int32_t, 2> top, Input<float, 2> probs,
                   Input<int32_t, 1> path, Input<int32_t, 1> drawn, bool learn) {
    observe(mixer, context, tokens, parents, top, probs, path, drawn,
            [&](const Growth& tree, size_t node, int32_t token) {
                if (learn) mixer.learn(tree.last(node), {}, token);
            });
}

void observe_blend(Blend& blend, Input<int32_t, 1> context, Input<int32_t, 1> tokens,
                   Input<int32_t, 1> parents, Input<int32_t, 2> top, Input<float, 2> probs,
                   Input<int32_t, 1> path, Input<int32_t, 1> drawn, bool learn) {
    check_context(context);
    // The same text as at the proposal, and the same members: their voices are heard once more.
    if (learn) {
        blend.start(context.data(), context.shape(0), std::move(blend.proposals));
        blend.foresight.learn(drawn.data(), drawn.shape(0));
    }
    observe(*blend.mixer, context, tokens, parents, top, probs, path, drawn,
            [&](const Growth& tree, size_t node, int32_t token) {
                if (learn) blend.learn(tree, node, token);
            });
    blend.proposals.clear();
}

using Guess = std::tuple<size_t, bool, Input<int32_t, 1>, Input<int32_t, 1>, Input<float, 1>>;

using Bits = Input<uint32_t, 1>;

// What `allowed` answers about the tokens below the root: bits, or None.
std::optional<Bits> asked(const nb::object& allowed, const Growth& tree, size_t node) {
    if (allowed.is_none()) return {};
    std::vector<int32_t> path;
    for (; node; node = static_cast<size_t>(tree.parents[node])) path.push_back(tree.tokens[node]);
    nb::list below;
    for (size_t i = path.size(); i-- > 0;) below.append(path[i]);
    return nb::cast<std::optional<Bits>>(allowed(below));
}

// tokens, parents, scores, origins, and who named each node.
nb::tuple propose_blend(Blend& blend, Input<int32_t, 1> context, size_t budget,
                        const std::vector<Guess>& guesses, std::vector<uint64_t> noise,
                        const nb::object& allowed) {
    check_context(context);
    std::vector<Blend::Proposal> proposals;
    for (const auto& [member, certain, tokens, parents, scores] : guesses) {
        const size_t n = tokens.shape(0);
        if (!n || parents.shape(0) != n || scores.shape(0) != n)
            throw std::invalid_argument("a member's tree needs a root and arrays of one size");
        proposals.push_back({member,
                             certain,
                             {tokens.data(), tokens.data() + n},
                             {parents.data(), parents.data() + n},
                             {scores.data(), scores.data() + n}});
    }
    blend.start(context.data(), context.shape(0), std::move(proposals));
    blend.foresight.start(std::move(noise));
    Growth tree(context.data(), context.shape(0), blend.width());
    grow(tree, budget, [&](size_t node, std::vector<Candidate>& out) {
        blend.successors(tree, node, out);
        const std::optional<Bits> bits = asked(allowed, tree, node);
        std::span<const uint32_t> some;
        if (bits) some = {bits->data(), bits->size()};
        blend.foresight.look(tree, node, some, out);
    });
    return nb::make_tuple(copied(tree.tokens), copied(tree.parents), copied(tree.scores),
                          copied(tree.origins), copied(tree.named));
}

// What a mixer has learnt, as writable views by name.
nb::dict learnt(nb::handle self) {
    auto& mixer = nb::cast<Mixer&>(self);
    SuccessorTable& table = mixer.table;
    nb::dict views;
    views["keys"] = view(self, table.keys);
    views["counts"] = view(self, table.counts);
    views["written"] = view(self, table.written);
    views["tokens"] = rows_of(self, table.tokens, table.k);
    views["probs"] = rows_of(self, table.probs, table.k);
    views["weights"] = view(self, mixer.weights);
    views["biases"] = view(self, mixer.biases);
    return views;
}

}  // namespace

void bind_drafting(nb::module_& m) {
    nb::class_<Mixer>(m, "Mixer", "The model's distributions by context, mixed; native/mixer.hpp.")
        .def(nb::init<size_t, size_t, size_t, size_t, float, float>(), nb::arg("orders"),
             nb::arg("skips"), nb::arg("k"), nb::arg("capacity"), nb::arg("keep"), nb::arg("rate"))
        .def("propose", &propose<Mixer>, nb::arg("context"), nb::arg("budget"))
        .def("observe", &observe_mixer, nb::arg("context"), nb::arg("tokens"), nb::arg("parents"),
             nb::arg("top_tokens"), nb::arg("top_probs"), nb::arg("path"), nb::arg("drawn"),
             nb::arg("learn"))
        .def("arrays", &learnt)
        .def("reset", &Mixer::reset)
        .def_prop_rw(
            "clock", [](const Mixer& mixer) { return mixer.table.clock; },
            [](Mixer& mixer, uint32_t clock) { mixer.table.clock = clock; });
    nb::class_<Blend>(m, "Blend", "Several sources under one mixture; native/blend.hpp.")
        .def(nb::init<size_t, size_t, size_t, size_t, float, float, size_t, size_t, size_t>(),
             nb::arg("orders"), nb::arg("skips"), nb::arg("k"), nb::arg("capacity"),
             nb::arg("keep"), nb::arg("rate"), nb::arg("reach"), nb::arg("follow"),
             nb::arg("members"))
        .def("propose", &propose_blend, nb::arg("context"), nb::arg("budget"), nb::arg("guesses"),
             nb::arg("noise"), nb::arg("allowed").none())
        .def("observe", &observe_blend, nb::arg("context"), nb::arg("tokens"), nb::arg("parents"),
             nb::arg("top_tokens"), nb::arg("top_probs"), nb::arg("path"), nb::arg("drawn"),
             nb::arg("learn"))
        .def("reset", &Blend::reset)
        .def("beside", [](const Blend& blend) { return Blend(blend); })
        .def_prop_ro(
            "mixer", [](Blend& blend) -> Mixer& { return *blend.mixer; },
            nb::rv_policy::reference_internal)
        .def_prop_rw(
            "foresight", [](const Blend& blend) { return *blend.foresight.weights; },
            [](Blend& blend, Foresight::Weights weights) { *blend.foresight.weights = weights; })
        .def_ro("suffix", &Blend::suffix, nb::rv_policy::reference_internal);
    nb::class_<Lookup>(m, "Lookup", "An index of one text's n-grams; native/lookup.hpp.")
        .def(nb::init<size_t, size_t, size_t, float, float>(), nb::arg("longest"), nb::arg("k"),
             nb::arg("capacity"), nb::arg("keep"), nb::arg("rate"))
        .def("begin", &Lookup::begin)
        .def(
            "extend",
            [](Lookup& lookup, Input<int32_t, 1> text, size_t learn_from) {
                lookup.extend(text.data(), text.shape(0), learn_from);
            },
            nb::arg("text"), nb::arg("learn_from"))
        .def("propose", &propose<Lookup>, nb::arg("context"), nb::arg("budget"))
        .def("reset", &Lookup::reset)
        .def("reliability", [](nb::handle self) {
            return view(self, nb::cast<Lookup&>(self).reliability);
        });
    nb::class_<Suffix>(m, "Suffix", "Suffix automata of the texts so far; native/suffix.hpp.")
        .def(nb::init<size_t, size_t, float>(), nb::arg("capacity"), nb::arg("k"), nb::arg("rate"))
        .def("begin", &Suffix::begin)
        .def(
            "extend",
            [](Suffix& suffix, Input<int32_t, 1> text, size_t learn_from) {
                suffix.extend(text.data(), text.shape(0), learn_from);
            },
            nb::arg("text"), nb::arg("learn_from"))
        .def("propose", &propose<Suffix>, nb::arg("context"), nb::arg("budget"))
        .def("reset", &Suffix::reset)
        .def_prop_ro("bytes", &Suffix::bytes)
        .def("beside", [](const Suffix& suffix) { return Suffix(suffix); })
        .def_prop_ro("aged", [](const Suffix& suffix) { return suffix.texts->aged; })
        .def("read", [](const Suffix& suffix) { return copied(suffix.texts->read); })
        .def(
            "replay",
            [](Suffix& suffix, Input<int32_t, 1> read, size_t aged) {
                suffix.replay(read.data(), read.shape(0), aged);
            },
            nb::arg("read"), nb::arg("aged"))
        .def("reliability", [](nb::handle self) {
            return view(self, nb::cast<Suffix&>(self).texts->reliability);
        });
}
