// Bindings of the tokenizer.

#include <nanobind/stl/string.h>

#include <string>
#include <vector>

#include "bindings/arrays.hpp"
#include "bindings/checks.hpp"
#include "text/sentence_piece.hpp"

namespace paceline {

namespace nb = nanobind;

using namespace arrays;

namespace {

void make_sentence_piece(SentencePiece* self, nb::list tokens, Input<float, 1> scores,
                         Input<uint8_t, 1> special, int32_t unknown, bool prefix) {
    std::string joined;
    std::vector<size_t> ends;
    ends.reserve(tokens.size());
    for (nb::handle token : tokens) {
        const auto text = nb::cast<nb::bytes>(token);
        joined.append(text.c_str(), text.size());
        ends.push_back(joined.size());
    }
    new (self) SentencePiece(
        std::move(joined), std::move(ends), {scores.data(), scores.data() + scores.shape(0)},
        {special.data(), special.data() + special.shape(0)}, unknown, prefix);
}

Array1<int32_t> encode(const SentencePiece& self, nb::bytes text) {
    std::vector<int32_t> ids;
    {
        nb::gil_scoped_release unlocked;
        self.encode({text.c_str(), text.size()}, ids);
    }
    return copied(ids);
}

}  // namespace

void bind_text(nb::module_& m) {
    nb::class_<SentencePiece>(m, "SentencePiece",
                              "Split text into pieces, merging the best-scored pair first.\n\n"
                              "`special` is 1 for pieces that are looked for in the text as they "
                              "are, 2 if the spaces\nbehind them are dropped. `unknown` is the "
                              "piece of bytes without one, or -1. With `prefix`\na space is put "
                              "before the text and after each special piece.")
        .def("__init__", &make_sentence_piece, nb::arg("tokens"), nb::arg("scores"),
             nb::arg("special"), nb::arg("unknown"), nb::arg("prefix"),
             nb::sig("def __init__(self, tokens: list[bytes], scores: Floats, "
                     "special: NDArray[np.uint8], unknown: int, prefix: bool) -> None"))
        .def("encode", &encode, nb::arg("text"), nb::sig("def encode(self, text: bytes) -> Tokens"),
             "Return the pieces of a text in UTF-8, int32.")
        .def("find", [](const SentencePiece& self,
                        nb::bytes text) { return self.find({text.c_str(), text.size()}); },
             nb::arg("text"), "Return the id of a piece, or -1.");
}

}  // namespace paceline
