// Arrays that cross the border to Python, and the call that every source of guesses offers.

#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "drafting/successor_table.hpp"

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

// A table's columns by name, as writable views.
inline nb::dict table(nb::handle owner, const SuccessorTable& table) {
    using Way = SuccessorTable::Way;
    const auto by_row = [&](auto* first) {
        using T = std::remove_pointer_t<decltype(first)>;
        const auto step = static_cast<int64_t>(sizeof(Way) / sizeof(T));
        return nb::cast(nb::ndarray<nb::numpy, T>(first, {table.rows}, owner, {step}));
    };
    const auto by_share = [&](auto* first) {
        using T = std::remove_pointer_t<decltype(first)>;
        const auto step = static_cast<int64_t>(sizeof(Share) / sizeof(T));
        const auto row = static_cast<int64_t>(table.k) * step;
        return nb::cast(
            nb::ndarray<nb::numpy, T>(first, {table.rows, table.k}, owner, {row, step}));
    };
    nb::dict views;
    views["keys"] = by_row(&table.ways()->key);
    views["counts"] = by_row(&table.ways()->count);
    views["written"] = by_row(&table.ways()->written);
    views["tokens"] = by_share(&table.shares()->token);
    views["probs"] = by_share(&table.shares()->chance);
    return views;
}

inline void check_context(const Input<int32_t, 1>& context) {
    if (!context.shape(0)) throw std::invalid_argument("the context needs a token");
}

inline nb::tuple tree(const Growth& grown) {
    return nb::make_tuple(copied(grown.tokens), copied(grown.parents), copied(grown.scores));
}

}  // namespace paceline::arrays
