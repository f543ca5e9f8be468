#include "drafting/successor_table.hpp"

#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <limits>
#include <optional>
#include <span>
#include <stdexcept>

#include "support/arrays.hpp"
#include "drafting/blend.hpp"
#include "drafting/ngram_index.hpp"
#include "drafting/context_mixer.hpp"
#include "drafting/suffix_automaton.hpp"

namespace nb = nanobind;

namespace paceline {

namespace {

constexpr size_t kWays = 8;
constexpr size_t kLine = 64;  // bytes

void fetch(const void* first, size_t bytes) {
    const auto* at = static_cast<const char*>(first);
    for (size_t i = 0; i < bytes; i += kLine) __builtin_prefetch(at + i);
}

// By insertion: they are nearly in order.
void sort(Share* first, Share* last) {
    for (Share* next = first; next != last; ++next) {
        const Share one = *next;
        Share* place = next;
        for (; place != first && one < place[-1]; --place) *place = place[-1];
        *place = one;
    }
}

size_t rows_for(size_t capacity) {
    size_t rows = kWays;
    while (rows < capacity) rows *= 2;
    return rows;
}

}  // namespace

SuccessorTable::SuccessorTable(size_t capacity, size_t k_)
    : rows(rows_for(capacity)),
      k(k_),
      ways_(rows * sizeof(Way)),
      shares_(rows * k * sizeof(Share)) {
    clear();
}

void SuccessorTable::clear() {
    clock = 0;
    std::fill_n(ways(), rows, Way{});
    std::fill_n(shares(), rows * k, Share{-1, 0.0f});
}

size_t SuccessorTable::first_way(uint64_t key) const {
    return (key >> 8 & (rows / kWays - 1)) * kWays;
}

// Where a context's row is, or else the one that gives way to it.
size_t SuccessorTable::way(uint64_t key) const {
    const size_t first = first_way(key);
    const Way* ways = this->ways();
    size_t oldest = first;
    for (size_t row = first; row < first + kWays; ++row) {
        if (ways[row].key == key) return row;
        if (ways[row].written < ways[oldest].written) oldest = row;
    }
    return oldest;
}

void SuccessorTable::fetch_set(uint64_t key) const {
    fetch(ways() + first_way(key), kWays * sizeof(Way));
}

void SuccessorTable::fetch_row(uint64_t key) const {
    fetch(shares() + way(key) * k, k * sizeof(Share));
}

SuccessorTable::Row SuccessorTable::find(uint64_t key) const {
    const size_t row = way(key);
    if (ways()[row].key != key) return {};
    return {ways()[row].count, shares() + row * k};
}

size_t SuccessorTable::claim(uint64_t key) {
    const size_t row = way(key);
    Way& here = ways()[row];
    if (here.key == key) return row;
    here.key = key;
    here.count = 0;
    return row;
}

void SuccessorTable::tick() {
    if (clock == std::numeric_limits<uint32_t>::max()) {  // weeks of work: ages start anew
        for (size_t row = 0; row < rows; ++row) ways()[row].written = 0;
        clock = 0;
    }
    ++clock;
}

uint16_t& SuccessorTable::slot(int32_t token) {
    size_t at = (static_cast<uint32_t>(token) * 2654435769u >> 8) & (slots_.size() - 1);
    while (slots_[at] && heard_[slots_[at] - 1u].token != token)
        at = (at + 1) & (slots_.size() - 1);
    return slots_[at];
}

void SuccessorTable::hear(const int32_t* top, const float* p, size_t n) {
    heard_.clear();
    for (size_t i = 0; i < n; ++i) heard_.push_back({top[i], p[i]});
    sort(heard_.data(), heard_.data() + n);
    size_t slots = 64;
    while (slots < 4 * n) slots *= 2;
    slots_.assign(slots, 0);
    for (size_t i = 0; i < n; ++i) slot(heard_[i].token) = static_cast<uint16_t>(i + 1);
    merged_.resize(n + k);
}

// One row towards what was heard. Both are merged without a branch that depends on what they hold.
void SuccessorTable::move(Share* row, uint32_t count, float keep) {
    const auto seen = static_cast<float>(count);
    const float old = std::min(keep, seen / (seen + 1.0f)), fresh = 1.0f - old;
    const size_t heard = heard_.size();
    Share* merged = merged_.data();
    for (size_t i = 0; i < heard; ++i) merged[i] = {heard_[i].token, heard_[i].chance * fresh};
    size_t all = heard;  // behind what was heard, what only the row knows
    for (size_t i = 0; count && i < k && row[i].token >= 0; ++i) {
        const size_t place = slot(row[i].token);
        const size_t at = place ? place - 1 : all;
        const float here = place ? merged[at].chance : 0.0f;
        merged[at] = {row[i].token, here + row[i].chance * old};
        all += !place;
    }
    const Share *a = merged, *b = merged + heard, *const middle = b, *const end = merged + all;
    if (count) sort(merged, merged + heard);
    sort(merged + heard, merged + all);
    size_t kept = 0;
    while (kept < k && (a != middle || b != end)) {
        const bool first = b == end || (a != middle && *a < *b);
        const Share next = first ? *a : *b;
        a += first;
        b += !first;
        if (!(next.chance > 0.0f)) break;
        row[kept++] = next;
    }
    std::fill(row + kept, row + k, Share{-1, 0.0f});
}

void SuccessorTable::observe(const uint64_t* keys, size_t contexts, const int32_t* top,
                             const float* p, size_t n, float keep) {
    for (size_t i = 0; i < contexts; ++i) if (keys[i]) fetch_set(keys[i]);
    hear(top, p, n);
    for (size_t i = 0; i < contexts; ++i) if (keys[i]) fetch_row(keys[i]);
    for (size_t i = 0; i < contexts; ++i) {
        if (!keys[i]) continue;
        const size_t row = claim(keys[i]);
        Way& here = ways()[row];
        move(shares() + row * k, here.count, keep);
        tick();
        here.written = clock;
        if (here.count < std::numeric_limits<uint32_t>::max()) ++here.count;
    }
}

}  // namespace paceline

using namespace paceline;
using namespace paceline::arrays;

namespace {

// tokens, parents and scores of the tree a source grows from a context.
template <class Source>
nb::tuple propose(Source& source, Input<int32_t, 1> context, size_t budget, float least) {
    check_context(context);
    Growth tree(context.data(), context.shape(0), source.width());
    source.start();
    grow(tree, budget, least, [&](size_t node, std::vector<Candidate>& out) {
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
nb::tuple propose_blend(Blend& blend, Input<int32_t, 1> context, size_t budget, float least,
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
    grow(tree, budget, least, [&](size_t node, std::vector<Candidate>& out) {
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
    nb::dict views = table(self, mixer.table);
    views["weights"] = view(self, mixer.weights);
    views["biases"] = view(self, mixer.biases);
    return views;
}

}  // namespace

void bind_drafting(nb::module_& m) {
    nb::class_<Mixer>(m, "Mixer", "The model's distributions by context, mixed; native/drafting/context_mixer.hpp.")
        .def(nb::init<size_t, size_t, size_t, size_t, float, float>(), nb::arg("orders"),
             nb::arg("skips"), nb::arg("k"), nb::arg("capacity"), nb::arg("keep"), nb::arg("rate"))
        .def("propose", &propose<Mixer>, nb::arg("context"), nb::arg("budget"),
             nb::arg("least") = 0.0f)
        .def("observe", &observe_mixer, nb::arg("context"), nb::arg("tokens"), nb::arg("parents"),
             nb::arg("top_tokens"), nb::arg("top_probs"), nb::arg("path"), nb::arg("drawn"),
             nb::arg("learn"))
        .def("arrays", &learnt)
        .def("reset", &Mixer::reset)
        .def_prop_rw(
            "clock", [](const Mixer& mixer) { return mixer.table.clock; },
            [](Mixer& mixer, uint32_t clock) { mixer.table.clock = clock; });
    nb::class_<Blend>(m, "Blend", "Several sources under one mixture; native/drafting/blend.hpp.")
        .def(nb::init<size_t, size_t, size_t, size_t, float, float, size_t, size_t, size_t>(),
             nb::arg("orders"), nb::arg("skips"), nb::arg("k"), nb::arg("capacity"),
             nb::arg("keep"), nb::arg("rate"), nb::arg("reach"), nb::arg("follow"),
             nb::arg("members"))
        .def("propose", &propose_blend, nb::arg("context"), nb::arg("budget"), nb::arg("least"),
             nb::arg("guesses"), nb::arg("noise"), nb::arg("allowed").none())
        .def("observe", &observe_blend, nb::arg("context"), nb::arg("tokens"), nb::arg("parents"),
             nb::arg("top_tokens"), nb::arg("top_probs"), nb::arg("path"), nb::arg("drawn"),
             nb::arg("learn"))
        .def("reset", &Blend::reset)
        .def("fork", [](const Blend& blend) { return Blend(blend); })
        .def_prop_ro(
            "mixer", [](Blend& blend) -> Mixer& { return *blend.mixer; },
            nb::rv_policy::reference_internal)
        .def_prop_rw(
            "foresight", [](const Blend& blend) { return *blend.foresight.weights; },
            [](Blend& blend, Foresight::Weights weights) { *blend.foresight.weights = weights; })
        .def_ro("suffix", &Blend::suffix, nb::rv_policy::reference_internal);
    nb::class_<Lookup>(m, "Lookup", "An index of one text's n-grams; native/drafting/ngram_index.hpp.")
        .def(nb::init<size_t, size_t, size_t, float, float>(), nb::arg("longest"), nb::arg("k"),
             nb::arg("capacity"), nb::arg("keep"), nb::arg("rate"))
        .def("begin", &Lookup::begin)
        .def(
            "extend",
            [](Lookup& lookup, Input<int32_t, 1> text, size_t learn_from) {
                lookup.extend(text.data(), text.shape(0), learn_from);
            },
            nb::arg("text"), nb::arg("learn_from"))
        .def("propose", &propose<Lookup>, nb::arg("context"), nb::arg("budget"),
             nb::arg("least") = 0.0f)
        .def("reset", &Lookup::reset)
        .def("reliability", [](nb::handle self) {
            return view(self, nb::cast<Lookup&>(self).reliability);
        });
    nb::class_<Suffix>(m, "Suffix", "Suffix automata of the texts so far; native/drafting/suffix_automaton.hpp.")
        .def(nb::init<size_t, size_t, float>(), nb::arg("capacity"), nb::arg("k"), nb::arg("rate"))
        .def("begin", &Suffix::begin)
        .def(
            "extend",
            [](Suffix& suffix, Input<int32_t, 1> text, size_t learn_from) {
                suffix.extend(text.data(), text.shape(0), learn_from);
            },
            nb::arg("text"), nb::arg("learn_from"))
        .def("propose", &propose<Suffix>, nb::arg("context"), nb::arg("budget"),
             nb::arg("least") = 0.0f)
        .def("reset", &Suffix::reset)
        .def_prop_ro("bytes", &Suffix::bytes)
        .def("fork", [](const Suffix& suffix) { return Suffix(suffix); })
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
