// SentencePiece tokenizer that merges pieces by score (Kudo and Richardson 2018).

#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace paceline {

// A text is first split at special pieces, longest first. What lies between begins as single
// characters, with U+2581 for spaces; of all adjacent pairs whose join is a piece, the one with the
// highest score is merged, the leftmost of equal ones, until none is left. A character that is no
// piece becomes the pieces of its bytes. All of this is what llama.cpp does.
class SentencePiece {
public:
    // Throws std::invalid_argument for pieces that are empty, too long or equal, scores that are no
    // numbers, and for bytes that have no piece if `unknown` is negative.
    //
    // bytes, ends: the pieces, joined, and where each one ends.
    // scores: of the pieces.
    // special: pieces that are found in the text as they are; 2 also drops the spaces behind.
    // unknown: the piece of bytes that have none.
    // prefix: put a space before the text, and after each special piece.
    SentencePiece(std::string bytes, std::vector<size_t> ends, std::vector<float> scores,
                  std::vector<uint8_t> special, int32_t unknown, bool prefix);

    // Append the pieces of `text`, valid UTF-8, to `ids`.
    void encode(std::string_view text, std::vector<int32_t>& ids) const;

    // The piece of this text, or -1.
    int32_t find(std::string_view text) const;

    size_t size() const { return ends_.size(); }

    static constexpr size_t kMaxPiece = 4096;   // bytes
    static constexpr size_t kMaxSpecial = 256;  // bytes: a text is searched for each length

private:
    struct Match {
        size_t begin, end;  // in the text, spaces behind included
        int32_t piece;
    };

    std::string_view piece(size_t index) const;
    uint64_t hash(std::string_view text) const;
    void index_pieces();
    void index_special();
    std::vector<Match> special_in(std::string_view text) const;
    void merge(std::string_view text, std::vector<int32_t>& ids) const;

    std::string bytes_;
    std::vector<size_t> ends_;
    std::vector<float> scores_;
    std::vector<uint8_t> special_;
    bool prefix_;
    uint64_t seed_, factor_;  // of the hash, random: no file can be made to collide
    size_t longest_ = 0;
    std::vector<int32_t> slots_;  // hash table of pieces, -1 where empty
    std::vector<bool> starts_;    // [2^16], the first two bytes of special pieces
    std::vector<size_t> lengths_;  // of special pieces, longest first
    std::array<int32_t, 256> byte_pieces_{};
};

}  // namespace paceline
