// Bindings of sampling: top-k, masks, noise, tournaments.

#include <nanobind/stl/optional.h>

#include <memory>
#include <optional>
#include <stdexcept>

#include "bindings/arrays.hpp"
#include "sampling/mask.hpp"
#include "sampling/noise.hpp"
#include "sampling/top_k.hpp"
#include "sampling/tournament.hpp"

namespace paceline {

namespace nb = nanobind;

using arrays::Array1;
using arrays::Input;

namespace {

size_t words_for(size_t vocabulary) { return (vocabulary + 31) / 32; }

nb::tuple bound_top_k(Input<float, 2> logits, size_t k, std::optional<Input<uint32_t, 2>> masks) {
    const size_t rows = logits.shape(0), vocabulary = logits.shape(1);
    if (k == 0 || k > vocabulary) throw std::invalid_argument("k must be between 1 and V");
    if (masks && (masks->shape(0) != rows || masks->shape(1) < words_for(vocabulary)))
        throw std::invalid_argument("masks need V bits for each row");
    auto tokens = std::make_unique<int32_t[]>(rows * k);
    auto probs = std::make_unique<float[]>(rows * k);
    {
        nb::gil_scoped_release unlocked;
        top_k(logits.data(), rows, vocabulary, k, masks ? masks->data() : nullptr,
              masks ? masks->shape(1) : 0, tokens.get(), probs.get());
    }
    return nb::make_tuple(arrays::owned(std::move(tokens), rows, k),
                          arrays::owned(std::move(probs), rows, k));
}

Array1<float> bound_mask_logits(Input<float, 1> logits, Input<uint32_t, 1> bits) {
    const size_t size = logits.shape(0);
    if (bits.shape(0) < words_for(size)) throw std::invalid_argument("a mask needs V bits");
    auto masked = std::make_unique_for_overwrite<float[]>(size);
    mask_logits(logits.data(), bits.data(), size, masked.get());
    float* out = masked.release();
    nb::capsule owner(out, [](void* p) noexcept { delete[] static_cast<float*>(p); });
    return Array1<float>(out, {size}, owner);
}

Array1<int32_t> bound_contenders(Input<float, 1> logits, uint64_t start) {
    return arrays::copied(contenders(logits.data(), logits.shape(0), start));
}

Array1<float> bound_tournament(Input<float, 1> probs, uint64_t start, int layers) {
    if (layers < 1 || layers > 64) throw std::invalid_argument("a tournament has 1 to 64 layers");
    return arrays::copied(tournament(probs.data(), probs.shape(0), start, layers));
}

}  // namespace

void bind_sampling(nb::module_& m) {
    m.def("top_k", &bound_top_k, nb::arg("logits"), nb::arg("k"), nb::arg("masks") = nb::none(),
          nb::sig("def top_k(logits: Floats, k: int, masks: Words | None = None) -> "
                  "tuple[Tokens, Floats]"),
          "Return the k most likely tokens of each row of logits [N, V] and their softmax\n"
          "probabilities, int32 [N, K] and float32 [N, K], best first, of equal ones the lower\n"
          "token; only those that `masks`, uint32 [N, V / 32 or more], allow (see `mask_logits`).");
    m.def("mask_logits", &bound_mask_logits, nb::arg("logits"), nb::arg("bits"),
          nb::sig("def mask_logits(logits: Floats, bits: Words) -> Floats"),
          "Return a copy of logits [V] with -inf where `bits`, uint32 [V / 32 or more], has 0;\n"
          "token i is bit i % 32 of word i // 32.");
    m.def("contenders", &bound_contenders, nb::arg("logits"), nb::arg("start"),
          nb::sig("def contenders(logits: Floats, start: int) -> Tokens"),
          "Return the tokens, ascending, one of which has the largest logit + noise, int32 [n];\n"
          "`start` is `noise.stream(seed, position)`.");
    m.def("tournament", &bound_tournament, nb::arg("probs"), nb::arg("start"), nb::arg("layers"),
          nb::sig("def tournament(probs: Floats, start: int, layers: int) -> Floats"),
          "Return the distribution [V] after all layers of a tournament over probabilities [V];\n"
          "`start` as for `noise.bits`.");
}

}  // namespace paceline
