// What a grammar's bits leave of logits.

#include "sampling/mask.hpp"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <array>
#include <limits>
#include <memory>
#include <stdexcept>

#include "support/arrays.hpp"

namespace nb = nanobind;

using paceline::arrays::Input;

namespace {

constexpr float kForbidden = -std::numeric_limits<float>::infinity();

constexpr auto kBits = [] {
    std::array<uint32_t, 32> found{};
    for (size_t i = 0; i < 32; ++i) found[i] = 1u << i;
    return found;
}();

// By one constant for each place, which vectors can do without shifts.
void chosen(const float* in, uint32_t left, float* out) {
    for (size_t i = 0; i < 32; ++i) {
        const float value = in[i];
        out[i] = left & kBits[i] ? value : kForbidden;
    }
}

}  // namespace

void paceline::mask(const float* in, const uint32_t* bits, size_t size, float* out) {
    for (size_t start = 0; start < size; start += 32) {
        const uint32_t left = bits[start / 32];
        const size_t count = std::min<size_t>(32, size - start);
        if (!left)
            std::fill_n(out + start, count, kForbidden);
        else if (!~left)
            std::copy_n(in + start, count, out + start);
        else if (count == 32)
            chosen(in + start, left, out + start);
        else
            for (size_t i = 0; i < count; ++i)
                out[start + i] = left >> i & 1 ? in[start + i] : kForbidden;
    }
}

namespace {

nb::ndarray<nb::numpy, float> masked(Input<float, 1> logits, Input<uint32_t, 1> bits) {
    const size_t size = logits.shape(0);
    if (bits.shape(0) < (size + 31) / 32) throw std::invalid_argument("a mask needs V bits");
    auto edited = std::make_unique_for_overwrite<float[]>(size);
    paceline::mask(logits.data(), bits.data(), size, edited.get());
    float* out = edited.release();
    nb::capsule owner(out, [](void* p) noexcept { delete[] static_cast<float*>(p); });
    return nb::ndarray<nb::numpy, float>(out, {size}, owner);
}

}  // namespace

void bind_mask(nb::module_& m) {
    m.def("masked", &masked, nb::arg("logits"), nb::arg("bits"),
          "`logits` [V] with -inf where `bits` uint32 [V / 32 and more] has 0, lowest bit first.");
}
