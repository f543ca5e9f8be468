// The likeliest tokens of each row of logits, with their probabilities.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <vector>

namespace nb = nanobind;

using Logits = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

namespace {

struct Ranked {
    float logit;
    int32_t token;
    // Higher logit first; of equal ones the lower token.
    bool operator>(const Ranked& other) const {
        return logit > other.logit || (logit == other.logit && token < other.token);
    }
};

// The k best of one row, best first. `best` keeps the worst of them at its end.
void top_of_row(const float* row, size_t vocabulary, std::vector<Ranked>& best) {
    const size_t k = best.size();
    size_t filled = 0;
    for (size_t token = 0; token < vocabulary; ++token) {
        const Ranked found{row[token], static_cast<int32_t>(token)};
        if (filled == k && !(found > best[k - 1])) continue;
        size_t place = filled < k ? filled++ : k - 1;
        for (; place > 0 && found > best[place - 1]; --place) best[place] = best[place - 1];
        best[place] = found;
    }
}

// Sum of exp(logit - largest). Softmax here only steers drafts, so float's range is enough.
double mass(const float* row, size_t vocabulary, float largest) {
    double sum = 0.0;
    for (size_t token = 0; token < vocabulary; ++token) {
        const float below = row[token] - largest;
        if (below > -30.0f) sum += std::exp(below);
    }
    return sum;
}

nb::tuple top(Logits logits, size_t k) {
    const size_t rows = logits.shape(0), vocabulary = logits.shape(1);
    if (k == 0 || k > vocabulary) throw std::invalid_argument("k must be between 1 and V");
    auto* tokens = new int32_t[rows * k];
    nb::capsule own_tokens(tokens, [](void* p) noexcept { delete[] static_cast<int32_t*>(p); });
    auto* probs = new float[rows * k];
    nb::capsule own_probs(probs, [](void* p) noexcept { delete[] static_cast<float*>(p); });
    {
        nb::gil_scoped_release unlocked;
        std::vector<Ranked> best(k);
        for (size_t r = 0; r < rows; ++r) {
            const float* row = logits.data() + r * vocabulary;
            top_of_row(row, vocabulary, best);
            const double sum = mass(row, vocabulary, best[0].logit);
            for (size_t i = 0; i < k; ++i) {
                tokens[r * k + i] = best[i].token;
                probs[r * k + i] =
                    static_cast<float>(std::exp(best[i].logit - best[0].logit) / sum);
            }
        }
    }
    return nb::make_tuple(
        nb::ndarray<nb::numpy, int32_t>(tokens, {rows, k}, own_tokens),
        nb::ndarray<nb::numpy, float>(probs, {rows, k}, own_probs));
}

}  // namespace

void bind_rank(nb::module_& m) {
    m.def("top", &top, nb::arg("logits"), nb::arg("k"),
          "The k likeliest tokens of each row of logits [N, V] and their softmax probabilities,\n"
          "int32 [N, K] and float32 [N, K], best first, of equal ones the lower token.");
}
