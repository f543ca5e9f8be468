// The likeliest tokens of each row of logits, with their probabilities.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <vector>

#include "kernels/isa.hpp"
#include "sampling/mask.hpp"

namespace nb = nanobind;

using Logits = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Masks = nb::ndarray<const uint32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

namespace {

template <class T>
nb::ndarray<nb::numpy, T> to_numpy(std::unique_ptr<T[]> values, size_t rows, size_t columns) {
    T* data = values.release();
    nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
    return nb::ndarray<nb::numpy, T>(data, {rows, columns}, owner);
}

nb::tuple top(Logits logits, size_t k, std::optional<Masks> masks) {
    const size_t rows = logits.shape(0), vocabulary = logits.shape(1);
    if (k == 0 || k > vocabulary) throw std::invalid_argument("k must be between 1 and V");
    if (masks && (masks->shape(0) != rows || masks->shape(1) < (vocabulary + 31) / 32))
        throw std::invalid_argument("masks need V bits for each row");
    const Kernels& kernels = choose("");
    auto tokens = std::make_unique<int32_t[]>(rows * k);
    auto probs = std::make_unique<float[]>(rows * k);
    {
        nb::gil_scoped_release unlocked;
        std::vector<float> left(masks ? vocabulary : 0);
        for (size_t row = 0; row < rows; ++row) {
            const float* values = logits.data() + row * vocabulary;
            if (masks) {
                paceline::mask(values, masks->data() + row * masks->shape(1), vocabulary,
                               left.data());
                values = left.data();
            }
            kernels.top(values, vocabulary, k, tokens.get() + row * k, probs.get() + row * k);
        }
    }
    return nb::make_tuple(to_numpy(std::move(tokens), rows, k),
                          to_numpy(std::move(probs), rows, k));
}

}  // namespace

void bind_rank(nb::module_& m) {
    m.def("top", &top, nb::arg("logits"), nb::arg("k"), nb::arg("masks") = nb::none(),
          "The k likeliest tokens of each row of logits [N, V] and their softmax probabilities,\n"
          "int32 [N, K] and float32 [N, K], best first, of equal ones the lower token; of those\n"
          "that `masks` uint32 [N, V / 32 and more] allow, as `masked` reads them.");
}
