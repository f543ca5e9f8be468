// What a grammar's bits leave of logits.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <bit>
#include <limits>
#include <memory>
#include <stdexcept>

#include "arrays.hpp"

namespace nb = nanobind;

using paceline::arrays::Input;

namespace {

nb::ndarray<nb::numpy, float> masked(Input<float, 1> logits, Input<uint32_t, 1> bits) {
    const size_t size = logits.shape(0);
    if (bits.shape(0) < (size + 31) / 32) throw std::invalid_argument("a mask needs V bits");
    auto edited = std::make_unique_for_overwrite<float[]>(size);
    const float* in = logits.data();
    float* out = edited.get();
    std::fill_n(out, size, -std::numeric_limits<float>::infinity());
    for (size_t start = 0; start < size; start += 32) {
        uint32_t left = bits.data()[start / 32];
        const size_t count = std::min<size_t>(32, size - start);
        if (count == 32 && !~left) {
            std::copy_n(in + start, 32, out + start);
            continue;
        }
        if (count < 32) left &= (1u << count) - 1;
        for (; left; left &= left - 1) {
            const size_t token = start + std::countr_zero(left);
            out[token] = in[token];
        }
    }
    nb::capsule owner(out, [](void* p) noexcept { delete[] static_cast<float*>(p); });
    edited.release();
    return nb::ndarray<nb::numpy, float>(out, {size}, owner);
}

}  // namespace

void bind_mask(nb::module_& m) {
    m.def("masked", &masked, nb::arg("logits"), nb::arg("bits"),
          "`logits` [V] with -inf where `bits` uint32 [V / 32 and more] has 0, lowest bit first.");
}
