// Bindings of what sizes draft trees: acceptance rates, the cost curve, the ranking of nodes.

#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <numeric>

#include "bindings/arrays.hpp"
#include "bindings/checks.hpp"
#include "drafting/governor.hpp"

namespace paceline {

namespace nb = nanobind;

using namespace arrays;

namespace {

constexpr double kLargest = 1e300;
constexpr size_t kMaxSize = size_t{1} << 20;  // nodes of a pass

// A Python `TokenTree`'s arrays, kept alive.
struct TreeArrays {
    Input<int32_t, 1> parents;
    Input<float, 1> scores;
    Input<int16_t, 1> origins;

    explicit TreeArrays(nb::handle tree)
        : parents(array<Input<int32_t, 1>>(tree, "parents")),
          scores(array<Input<float, 1>>(tree, "scores")),
          origins(array<Input<int16_t, 1>>(tree, "origin")) {
        const size_t n = parents.shape(0);
        if (scores.shape(0) != n || origins.shape(0) != n)
            refuse("a tree's arrays disagree about their sizes");
        check_parents(parents.data(), n);
    }

    Nodes nodes() const {
        return {parents.data(), scores.data(), origins.data(), parents.shape(0)};
    }

private:
    template <class Array>
    static Array array(nb::handle tree, const char* name) {
        Array values;
        if (!nb::try_cast(nb::object(tree.attr(name)), values))
            refuse(std::string(name) + " of a tree is no array of numbers [N]");
        return values;
    }
};

nb::object counts(const std::vector<double>& values) {
    auto data = std::make_unique<double[]>(values.size());
    std::copy(values.begin(), values.end(), data.get());
    const size_t columns = AcceptanceRates::kDepths;
    return nb::cast(owned(std::move(data), values.size() / columns, columns));
}

void make_rates(AcceptanceRates* self, double decay, double prior) {
    in_range("decay", decay, 0.0, 1.0);
    in_range("prior", prior, 0.0, kLargest);
    new (self) AcceptanceRates(decay, prior);
}

Array1<double> path_probs(AcceptanceRates& rates, const std::vector<nb::object>& trees) {
    std::vector<double> probs;
    for (const nb::object& tree : trees) rates.path_probs(TreeArrays(tree).nodes(), probs);
    return copied(probs);
}

NodeRanking rank(AcceptanceRates& rates, const std::vector<nb::object>& trees) {
    std::vector<double> probs;
    std::vector<size_t> sizes;
    for (const nb::object& tree : trees) {
        rates.path_probs(TreeArrays(tree).nodes(), probs);
        sizes.push_back(probs.size() - std::accumulate(sizes.begin(), sizes.end(), size_t{0}));
    }
    return {probs, sizes};
}

void learn(AcceptanceRates& rates, const std::vector<nb::object>& trees,
           const std::vector<std::vector<int32_t>>& paths) {
    if (trees.size() != paths.size()) refuse("every tree has a path");
    for (size_t i = 0; i < trees.size(); ++i) rates.learn(TreeArrays(trees[i]).nodes(), paths[i]);
}

void make_curve(CostCurve* self, std::vector<double> sizes, std::vector<double> seconds) {
    for (const double size : sizes) in_range("size", size, 0.0, kLargest);
    for (size_t i = 1; i < sizes.size(); ++i)
        if (!(sizes[i - 1] < sizes[i])) refuse("the sizes of a curve must increase");
    for (const double time : seconds) in_range("seconds", time, 0.0, kLargest);
    new (self) CostCurve(std::move(sizes), std::move(seconds));
}

Array1<double> seconds_each(const CostCurve& curve, Input<double, 1> sizes) {
    std::vector<double> seconds(sizes.shape(0));
    for (size_t i = 0; i < seconds.size(); ++i) seconds[i] = curve.at(sizes(i));
    return copied(seconds);
}

size_t max_useful(const CostCurve& curve, size_t requests, size_t max_nodes) {
    size_in_range("requests", requests, 0, kMaxSize);
    return curve.max_useful(requests, std::min(max_nodes, kMaxSize));
}

double marginal_seconds(const CostCurve& curve, size_t size) {
    return curve.marginal_seconds(size_in_range("size", size, 0, kMaxSize));
}

bool correct(CostCurve& curve, double size, double ratio) {
    if (!(size > 0.0)) refuse("a pass has at least one node");
    in_range("ratio", ratio, 0.0, kLargest);
    return curve.correct(size, ratio);
}

void make_ranking(NodeRanking* self, Input<double, 1> probs, const std::vector<size_t>& sizes) {
    const double* first = probs.data();
    new (self) NodeRanking({first, first + probs.shape(0)}, sizes);
}

nb::tuple choose(const NodeRanking& ranking, const CostCurve& curve, size_t first, double more,
                 double margin) {
    const auto choice = ranking.choose(curve, size_in_range("first", first, 0, kMaxSize), more, margin);
    return nb::make_tuple(choice.others, choice.pays, choice.needed);
}

// The kept nodes of one tree, from `kept` [nodes]: tokens, parents, scores and origins.
nb::tuple part_of(nb::handle tree, const uint8_t* kept, size_t count) {
    const TreeArrays arrays(tree);
    Input<int32_t, 1> all;
    const size_t n = arrays.parents.shape(0);
    if (!nb::try_cast(nb::object(tree.attr("tokens")), all) || all.shape(0) != n || n != count)
        refuse("these are not the trees that were ranked");
    std::vector<int32_t> tokens, parents, places(n, -1);
    std::vector<float> scores;
    std::vector<int16_t> origins;
    for (size_t node = 0; node < n; ++node) {
        if (!kept[node]) continue;
        const int32_t parent = arrays.parents(node);
        places[node] = static_cast<int32_t>(tokens.size());
        tokens.push_back(all(node));
        parents.push_back(parent < 0 ? -1 : places[static_cast<size_t>(parent)]);
        scores.push_back(arrays.scores(node));
        origins.push_back(arrays.origins(node));
    }
    return nb::make_tuple(copied(tokens), copied(parents), copied(scores), copied(origins));
}

nb::list parts(const NodeRanking& ranking, const std::vector<nb::object>& trees, size_t count) {
    const std::vector<uint8_t> kept = ranking.keep(count);
    if (trees.size() != ranking.sizes.size()) refuse("these are not the trees that were ranked");
    nb::list out;
    size_t first = 0;
    for (size_t i = 0; i < trees.size(); first += ranking.sizes[i++])
        out.append(part_of(trees[i], kept.data() + first, ranking.sizes[i]));
    return out;
}

Array1<bool> keep(const NodeRanking& ranking, size_t count) {
    const std::vector<uint8_t> kept = ranking.keep(count);
    auto* data = new bool[kept.size()];
    std::copy(kept.begin(), kept.end(), data);
    nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<bool*>(p); });
    return Array1<bool>(data, {kept.size()}, owner);
}

}  // namespace

void bind_governor(nb::module_& m) {
    nb::class_<AcceptanceRates>(
        m, "AcceptanceRates",
        "How often drafted tokens are accepted, by origin and depth; native/drafting/governor.hpp.")
        .def("__init__", &make_rates, nb::arg("decay"), nb::arg("prior"))
        .def("path_probs", &path_probs, nb::arg("trees"),
             nb::sig("def path_probs(self, trees: Items[TokenTree]) -> NDArray[np.float64]"),
             "Return the probability that each node of the trees is reached and accepted, float64\n"
             "[nodes of all trees].")
        .def("rank", &rank, nb::arg("trees"),
             nb::sig("def rank(self, trees: Items[TokenTree]) -> NodeRanking"),
             "Return the nodes of the trees by `path_probs`.")
        .def("learn", &learn, nb::arg("trees"), nb::arg("paths"),
             nb::sig("def learn(self, trees: Items[TokenTree], paths: Items[list[int]]) -> None"),
             "Record the accepted path of each tree.")
        .def_prop_ro(
            "predicted", [](AcceptanceRates& self) { return counts(self.predicted); },
            nb::sig("def predicted(self) -> NDArray[np.float64]"),
            "Expected acceptances [origins, depths], a copy.")
        .def_prop_ro(
            "accepted", [](AcceptanceRates& self) { return counts(self.accepted); },
            nb::sig("def accepted(self) -> NDArray[np.float64]"),
            "Acceptances [origins, depths], a copy.");
    nb::class_<CostCurve>(m, "CostCurve",
                          "Seconds of a pass over n nodes; native/drafting/governor.hpp.")
        .def("__init__", &make_curve, nb::arg("sizes"), nb::arg("seconds"),
             nb::sig("def __init__(self, sizes: Items[float], seconds: Items[float]) -> None"))
        .def("at", &CostCurve::at, nb::arg("size"),
             "Return the seconds of a pass over `size` nodes.")
        .def("each", &seconds_each, nb::arg("sizes"),
             nb::sig("def each(self, sizes: NDArray[np.float64]) -> NDArray[np.float64]"),
             "Return the seconds of passes over each of `sizes` [N], float64 [N].")
        .def("max_useful", &max_useful, nb::arg("requests"), nb::arg("max_nodes"),
             "Return the largest n up to `max_nodes` such that a pass with n more nodes beats "
             "plain\n"
             "ones if all of them are accepted; 0 if none does.")
        .def("marginal_seconds", &marginal_seconds, nb::arg("size"),
             "Return the seconds that a node beyond `size` costs, if as many are added as make it\n"
             "cheapest.")
        .def("correct", &correct, nb::arg("size"), nb::arg("ratio"),
             "Record that a pass over `size` nodes took `ratio` times the expected seconds. Return\n"
             "whether the whole curve moved, as passes of this size were repeatedly misjudged.")
        .def_prop_ro("seconds", [](const CostCurve& curve) { return curve.seconds; });
    nb::class_<NodeRanking>(m, "NodeRanking",
                            "Nodes of trees by probability; native/drafting/governor.hpp.")
        .def("__init__", &make_ranking, nb::arg("probs"), nb::arg("sizes"),
             nb::sig("def __init__(self, probs: NDArray[np.float64], sizes: Items[int]) -> None"))
        .def("best", &NodeRanking::best, nb::arg("curve"), nb::arg("first"), nb::arg("more"),
             "Return how many nodes besides the roots give the most tokens a second, if a pass "
             "with\n"
             "the roots alone has `first` nodes and every pass takes `more` seconds besides.")
        .def("choose", &choose, nb::arg("curve"), nb::arg("first"), nb::arg("more"),
             nb::arg("margin"),
             nb::sig("def choose(self, curve: CostCurve, first: int, more: float, margin: float)"
                     " -> tuple[int, bool, float]"),
             "Return how many nodes besides the roots to run, whether they beat plain passes by\n"
             "the factor `margin`, and the tokens that a further node would have had to gain.")
        .def("parts", &parts, nb::arg("trees"), nb::arg("count"),
             nb::sig("def parts(self, trees: Items[TokenTree], count: int) -> "
                     "list[tuple[Tokens, Tokens, Floats, NDArray[np.int16]]]"),
             "Return tokens, parents, scores and origins of the part of each of the ranked trees\n"
             "that `keep` keeps.")
        .def("keep", &keep, nb::arg("count"),
             nb::sig("def keep(self, count: int) -> NDArray[np.bool_]"),
             "Return for each node whether it is a root or one of the best `count` others.")
        .def_prop_ro("sizes", [](const NodeRanking& ranking) { return ranking.sizes; })
        .def_prop_ro(
            "tokens", [](const NodeRanking& ranking) { return ranking.tokens; },
            "Expected tokens with the roots and the best 0, 1, ... other nodes.");
}

}  // namespace paceline
