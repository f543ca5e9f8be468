// A tournament of many layers over a whole distribution; see `watermarks/synthid.py`.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <array>
#include <bit>
#include <stdexcept>
#include <vector>

#include "support/arrays.hpp"
#include "sampling/noise.hpp"

namespace nb = nanobind;

using paceline::arrays::Input;

namespace {

constexpr float kNever = 1e-30f;
constexpr size_t kLanes = 32;  // sums side by side, whose order the reference follows

using Lanes = std::array<float, kLanes>;

// By masks instead of branches, which vectors of every kind can do.
float chosen(uint32_t bits, int place, float yes, float no) {
    const uint32_t mask = -(bits >> place & 1);
    const auto a = std::bit_cast<uint32_t>(yes), b = std::bit_cast<uint32_t>(no);
    return std::bit_cast<float>((a & mask) | (b & ~mask));
}

// Every lane's share of the chance of bit 1.
void add_set(Lanes& sums, const float* p, const uint32_t* bits, int place) {
    for (size_t i = 0; i < kLanes; ++i) sums[i] += chosen(bits[i], place, p[i], 0.0f);
}

void play(float* p, const uint32_t* bits, int place, float won, float lost) {
    for (size_t i = 0; i < kLanes; ++i) {
        const float left = p[i] * chosen(bits[i], place, won, lost);
        p[i] = left < kNever ? 0.0f : left;
    }
}

nb::object tournament(Input<float, 1> chances, uint64_t start, int layers) {
    if (layers < 1 || layers > 64) throw std::invalid_argument("a tournament has 1 to 64 layers");
    std::vector<uint32_t> tokens;
    for (size_t token = 0; token < chances.shape(0); ++token)
        if (chances.data()[token]) tokens.push_back(static_cast<uint32_t>(token));
    const size_t n = tokens.size(), padded = (n + kLanes - 1) / kLanes * kLanes;
    std::vector<float> p(padded), found(chances.shape(0));
    std::vector<uint32_t> bits(padded);
    for (size_t i = 0; i < n; ++i) p[i] = chances.data()[tokens[i]];
    Lanes sums{};
    for (int layer = 0; layer < layers; ++layer) {
        const int place = layer % 32;
        if (place == 0) {
            for (size_t i = 0; i < n; ++i)
                bits[i] = static_cast<uint32_t>(paceline::random_bits(start, tokens[i]) >> layer);
            sums = {};
            for (size_t i = 0; i < padded; i += kLanes) add_set(sums, &p[i], &bits[i], 0);
        }
        double total = 0.0;
        for (const float sum : sums) total += sum;
        const double rest = 1.0 - std::min(total, 1.0);
        const auto won = static_cast<float>(1.0 + rest), lost = static_cast<float>(rest);
        sums = {};
        for (size_t i = 0; i < padded; i += kLanes) {
            play(&p[i], &bits[i], place, won, lost);
            add_set(sums, &p[i], &bits[i], (place + 1) % 32);  // what the next layer asks
        }
    }
    for (size_t i = 0; i < n; ++i) found[tokens[i]] = p[i];
    return nb::cast(paceline::arrays::copied(found));
}

}  // namespace

void bind_tournament(nb::module_& m) {
    m.def("tournament", &tournament, nb::arg("chances"), nb::arg("start"), nb::arg("layers"),
          "`chances` [V] after all layers; `start` as of `noise.bits`.");
}
