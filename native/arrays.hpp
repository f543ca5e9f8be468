// Arrays that cross the border to Python, and the call that every source of guesses offers.

#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "drafting.hpp"

namespace paceline::arrays {

namespace nb = nanobind;

template <class T, size_t Dims>
using Input = nb::ndarray<const T, nb::ndim<Dims>, nb::c_contig, nb::device::cpu>;

template <class T>
nb::ndarray<nb::numpy, T> copied(const std::vector<T>& values) {
    auto* data = new T[values.size()];
    std::copy(values.begin(), values.end(), data);
    nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
    return nb::ndarray<nb::numpy, T>(data, {values.size()}, owner);
}

// A writable view of what `owner` holds.
template <class T>
nb::object view(nb::handle owner, std::vector<T>& values) {
    return nb::cast(nb::ndarray<nb::numpy, T>(values.data(), {values.size()}, owner));
}

inline void check_context(const Input<int32_t, 1>& context) {
    if (!context.shape(0)) throw std::invalid_argument("the context needs a token");
}

inline nb::tuple tree(const Growth& grown) {
    return nb::make_tuple(copied(grown.tokens), copied(grown.parents), copied(grown.scores));
}

}  // namespace paceline::arrays
