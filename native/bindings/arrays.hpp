// NumPy arrays that cross the border between Python and C++.

#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <memory>
#include <vector>

namespace paceline::arrays {

namespace nb = nanobind;

// A C-contiguous array of exactly this type and number of axes; another one is converted if it is
// safe, or refused with a TypeError.
template <class T, size_t Dims>
using Input = nb::ndarray<const T, nb::ndim<Dims>, nb::c_contig, nb::device::cpu>;

template <class T>
using Array1 = nb::ndarray<nb::numpy, T, nb::ndim<1>>;
template <class T>
using Array2 = nb::ndarray<nb::numpy, T, nb::ndim<2>>;

// A new array [N] with a copy of `values`.
template <class T>
Array1<T> copied(const std::vector<T>& values) {
    auto* data = new T[values.size()];
    std::copy(values.begin(), values.end(), data);
    nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
    return Array1<T>(data, {values.size()}, owner);
}

// A new array [N] that owns `values`.
template <class T>
Array1<T> owned(std::unique_ptr<T[]> values, size_t count) {
    T* data = values.release();
    nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
    return Array1<T>(data, {count}, owner);
}

// A new array [rows, columns] that owns `values`.
template <class T>
Array2<T> owned(std::unique_ptr<T[]> values, size_t rows, size_t columns) {
    T* data = values.release();
    nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
    return Array2<T>(data, {rows, columns}, owner);
}

// A writable view of a vector inside the Python object `owner`, which it keeps alive.
template <class T>
nb::object view(nb::handle owner, std::vector<T>& values) {
    return nb::cast(nb::ndarray<nb::numpy, T>(values.data(), {values.size()}, owner));
}

}  // namespace paceline::arrays
