#include "drafting/governor.hpp"

#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "support/arrays.hpp"

namespace paceline {

void Calibration::find_kinds(const Nodes& tree) {
    depths_.assign(tree.count, 0);
    kinds_.assign(tree.count, 0);
    for (size_t node = 0; node < tree.count; ++node) {
        const int32_t parent = tree.parents[node];
        if (parent >= 0) depths_[node] = depths_[static_cast<size_t>(parent)] + 1;
        const auto origin = static_cast<size_t>(std::max<int16_t>(tree.origins[node], 0));
        kinds_[node] = origin * kDepths + std::min(depths_[node], kDepths - 1);
        if (origin * kDepths >= predicted.size()) {
            predicted.resize((origin + 1) * kDepths);
            accepted.resize((origin + 1) * kDepths);
        }
    }
}

void Calibration::chances(const Nodes& tree, std::vector<double>& out) {
    find_kinds(tree);
    const size_t start = out.size();
    for (size_t node = 0; node < tree.count; ++node) {
        const int32_t parent = tree.parents[node];
        const size_t kind = kinds_[node];
        const double ratio = (accepted[kind] + prior_) / (predicted[kind] + prior_);
        const double own = std::clamp(static_cast<double>(tree.scores[node]) * ratio, 0.0, 1.0);
        out.push_back(parent < 0 ? 1.0 : out[start + static_cast<size_t>(parent)] * own);
    }
}

void Calibration::learn(const Nodes& tree, const std::vector<int32_t>& path) {
    find_kinds(tree);
    for (double& count : predicted) count *= decay_;
    for (double& count : accepted) count *= decay_;
    const auto came = [&](int32_t node) {
        return std::find(path.begin(), path.end(), node) != path.end();
    };
    for (size_t node = 0; node < tree.count; ++node) {
        if (tree.parents[node] < 0 || !came(tree.parents[node])) continue;
        predicted[kinds_[node]] += static_cast<double>(tree.scores[node]);
        accepted[kinds_[node]] += came(static_cast<int32_t>(node)) ? 1.0 : 0.0;
    }
}

Curve::Curve(std::vector<double> sizes_, std::vector<double> seconds_)
    : sizes(std::move(sizes_)), seconds(std::move(seconds_)) {
    if (sizes.empty() || sizes.size() != seconds.size())
        throw std::invalid_argument("a curve needs one time for each size");
}

double Curve::at(double size) const {
    const size_t n = sizes.size();
    if (size <= sizes[0] || n == 1) return seconds[0];
    const auto above = std::upper_bound(sizes.begin(), sizes.end(), size) - sizes.begin();
    const size_t high = std::min(static_cast<size_t>(above), n - 1), low = high - 1;
    const double slope = (seconds[high] - seconds[low]) / (sizes[high] - sizes[low]);
    return seconds[low] + slope * (size - sizes[low]);
}

size_t Curve::useful(size_t requests, size_t most) const {
    const auto least = static_cast<double>(requests);
    const double plain = at(least);
    for (size_t more = most; more > 0; --more) {
        const auto size = static_cast<double>(requests + more);
        if (size * plain > least * at(size)) return more;
    }
    return 0;
}

double Curve::price(size_t size) const {
    const double here = at(static_cast<double>(size));
    double least = std::numeric_limits<double>::infinity();
    for (size_t more = 1; more <= size; ++more)
        least = std::min(least, (at(static_cast<double>(size + more)) - here) /
                                    static_cast<double>(more));
    return least;
}

void Curve::correct(double size, double ratio) {
    for (size_t i = 0; i < sizes.size(); ++i) {
        const double near = std::exp(-std::fabs(std::log2(sizes[i] / size)));
        seconds[i] *= 1.0 + (ratio - 1.0) * (0.02 + 0.08 * near);
    }
}

Ranking::Ranking(const std::vector<double>& chances, const std::vector<size_t>& sizes_)
    : sizes(sizes_), order_(chances.size()) {
    std::vector<double> rank = chances;
    size_t root = 0;
    for (const size_t size : sizes) {
        if (root >= rank.size()) throw std::invalid_argument("every tree has a root");
        rank[root] = 2.0;  // a chance is at most 1
        root += size;
    }
    if (root != rank.size()) throw std::invalid_argument("every node needs a chance");
    std::iota(order_.begin(), order_.end(), 0);
    // Parents come before their children, which are as likely at most.
    std::stable_sort(order_.begin(), order_.end(),
                     [&](size_t a, size_t b) { return rank[a] > rank[b]; });
    double sum = 0.0;
    for (size_t i = 0; i < order_.size(); ++i) {
        sum += chances[order_[i]];
        if (i + 1 >= sizes.size()) tokens.push_back(sum);
    }
}

size_t Ranking::best(const Curve& curve, size_t first, double more) const {
    size_t found = 0;
    double fastest = 0.0;
    for (size_t i = 0; i < tokens.size(); ++i) {
        const double speed = tokens[i] / (curve.at(static_cast<double>(first + i)) + more);
        if (i == 0 || speed > fastest) found = i, fastest = speed;
    }
    return found;
}

std::vector<uint8_t> Ranking::keep(size_t count) const {
    std::vector<uint8_t> kept(order_.size(), 0);
    for (size_t i = 0; i < std::min(sizes.size() + count, order_.size()); ++i) kept[order_[i]] = 1;
    return kept;
}

}  // namespace paceline

using namespace paceline;
using namespace paceline::arrays;

namespace {

// A tree as Python has it, with what keeps its arrays alive.
struct Held {
    Input<int32_t, 1> parents;
    Input<float, 1> scores;
    Input<int16_t, 1> origins;

    explicit Held(nb::handle tree)
        : parents(nb::cast<Input<int32_t, 1>>(tree.attr("parents"))),
          scores(nb::cast<Input<float, 1>>(tree.attr("scores"))),
          origins(nb::cast<Input<int16_t, 1>>(tree.attr("origin"))) {}

    Nodes nodes() const {
        return {parents.data(), scores.data(), origins.data(), parents.shape(0)};
    }
};

nb::object counts(std::vector<double>& values) {
    const size_t rows = values.size() / Calibration::kDepths;
    return nb::cast(nb::ndarray<nb::numpy, double>(values.data(), {rows, Calibration::kDepths}),
                    nb::rv_policy::copy);
}

}  // namespace

void bind_governor(nb::module_& m) {
    nb::class_<Calibration>(m, "Calibration", "How often guesses come true; native/drafting/governor.hpp.")
        .def(nb::init<double, double>(), nb::arg("decay"), nb::arg("prior"))
        .def(
            "chances",
            [](Calibration& calibration, const std::vector<nb::handle>& trees) {
                std::vector<double> found;
                for (const nb::handle tree : trees) calibration.chances(Held(tree).nodes(), found);
                return copied(found);
            },
            nb::arg("trees"))
        .def(
            "learn",
            [](Calibration& calibration, const std::vector<nb::handle>& trees,
               const std::vector<std::vector<int32_t>>& paths) {
                if (trees.size() != paths.size())
                    throw std::invalid_argument("every tree has a path");
                for (size_t i = 0; i < trees.size(); ++i)
                    calibration.learn(Held(trees[i]).nodes(), paths[i]);
            },
            nb::arg("trees"), nb::arg("paths"))
        .def_prop_ro("predicted", [](Calibration& self) { return counts(self.predicted); })
        .def_prop_ro("accepted", [](Calibration& self) { return counts(self.accepted); });
    nb::class_<Curve>(m, "Curve", "Seconds of a pass over n nodes; native/drafting/governor.hpp.")
        .def(nb::init<std::vector<double>, std::vector<double>>(), nb::arg("sizes"),
             nb::arg("seconds"))
        .def("at", &Curve::at, nb::arg("size"))
        .def(
            "each",
            [](const Curve& curve, Input<double, 1> sizes) {
                std::vector<double> found(sizes.shape(0));
                for (size_t i = 0; i < found.size(); ++i) found[i] = curve.at(sizes(i));
                return copied(found);
            },
            nb::arg("sizes"))
        .def("useful", &Curve::useful, nb::arg("requests"), nb::arg("most"))
        .def("price", &Curve::price, nb::arg("size"))
        .def("correct", &Curve::correct, nb::arg("size"), nb::arg("ratio"))
        .def_prop_ro("seconds", [](const Curve& curve) { return curve.seconds; });
    nb::class_<Ranking>(m, "Ranking", "Nodes of some trees by chance; native/drafting/governor.hpp.")
        .def(
            "__init__",
            [](Ranking* self, Input<double, 1> chances, const std::vector<size_t>& sizes) {
                const double* first = chances.data();
                new (self) Ranking({first, first + chances.shape(0)}, sizes);
            },
            nb::arg("chances"), nb::arg("sizes"))
        .def("best", &Ranking::best, nb::arg("curve"), nb::arg("first"), nb::arg("more"))
        .def(
            "keep",
            [](const Ranking& ranking, size_t count) {
                const std::vector<uint8_t> kept = ranking.keep(count);
                auto* data = new bool[kept.size()];
                std::copy(kept.begin(), kept.end(), data);
                nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<bool*>(p); });
                return nb::ndarray<nb::numpy, bool>(data, {kept.size()}, owner);
            },
            nb::arg("count"))
        .def_prop_ro("sizes", [](const Ranking& ranking) { return ranking.sizes; })
        .def_prop_ro("tokens", [](const Ranking& ranking) { return ranking.tokens; });
}
