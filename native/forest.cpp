// What the nodes of many trees have from those above them. A parent comes before its children; the
// parent of a root is -1.

#include <cmath>

#include "arrays.hpp"

namespace nb = nanobind;

using namespace paceline::arrays;

namespace {

// `at(node, parent)` for each node, in order; the parent is -1 for roots.
template <class At>
void walk(Input<int32_t, 1> parents, At&& at) {
    for (size_t node = 0; node < parents.shape(0); ++node) {
        const int32_t parent = parents(node);
        if (parent < -1 || parent >= static_cast<int32_t>(node))
            throw std::invalid_argument("a parent comes before its children");
        at(node, parent);
    }
}

nb::ndarray<nb::numpy, int32_t> depths(Input<int32_t, 1> parents) {
    std::vector<int32_t> found(parents.shape(0));
    walk(parents, [&](size_t node, int32_t parent) {
        found[node] = parent < 0 ? 0 : found[static_cast<size_t>(parent)] + 1;
    });
    return copied(found);
}

nb::ndarray<nb::numpy, double> reached(Input<int32_t, 1> parents, Input<double, 1> scores) {
    if (scores.shape(0) != parents.shape(0))
        throw std::invalid_argument("every node needs a parent and a score");
    std::vector<double> found(parents.shape(0));
    walk(parents, [&](size_t node, int32_t parent) {
        const double own = std::fmin(std::fmax(scores(node), 0.0), 1.0);
        found[node] = parent < 0 ? 1.0 : found[static_cast<size_t>(parent)] * own;
    });
    return copied(found);
}

}  // namespace

void bind_forest(nb::module_& m) {
    m.def("depths", &depths, nb::arg("parents"),
          "Distance of every node of a forest from its root, int32 [N].");
    m.def("reached", &reached, nb::arg("parents"), nb::arg("scores"),
          "Chance that every node of a forest is reached, float64 [N]; `scores` [N], cut to 0..1,\n"
          "are those that it is reached when its parent is. Roots are.");
}
