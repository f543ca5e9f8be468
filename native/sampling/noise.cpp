// Which tokens can win a draw: all others need no logarithm.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "support/arrays.hpp"
#include "sampling/noise.hpp"

namespace nb = nanobind;

using paceline::arrays::Input;

namespace {

constexpr double kLog2 = 0.6931471805599453, kRounding = 1e-4;

// The noise is -log(-log(u)) with u = (m + 0.5) / 2^53. As -log(u) >= 1 - u, it is at most
// -log(1 - u) <= (54 - log2(2^53 - m)) * log(2), of which the whole part is a count of zero bits.
double most(uint64_t m) {
    const uint64_t rest = (uint64_t{1} << 53) - m;
    return (54 - (63 - std::countl_zero(rest))) * kLog2;
}

double exact(uint64_t m) {
    return -std::log(-std::log((static_cast<double>(m) + 0.5) * 0x1p-53));
}

nb::object contenders(Input<float, 1> logits, uint64_t start) {
    struct Token {
        int32_t id;
        double most;
    };
    std::vector<Token> found;
    double best = -std::numeric_limits<double>::infinity();
    const size_t size = logits.shape(0);
    const float* values = logits.data();
    for (size_t i = 0; i < size; ++i) {
        const uint64_t m = paceline::random_bits(start, i) >> 11;
        const double bound = static_cast<double>(values[i]) + most(m);
        if (!(bound >= best)) continue;
        best = std::max(best, static_cast<double>(values[i]) + exact(m) - kRounding);
        found.push_back({static_cast<int32_t>(i), bound});
    }
    std::vector<int32_t> tokens;
    for (const Token& token : found)
        if (token.most >= best) tokens.push_back(token.id);
    return nb::cast(paceline::arrays::copied(tokens));
}

}  // namespace

void bind_noise(nb::module_& m) {
    m.def("contenders", &contenders, nb::arg("logits"), nb::arg("start"),
          "The tokens, ascending, one of which has the largest logit + noise, int32 [n]; `start` is\n"
          "`noise.stream(seed, position)`.");
}
