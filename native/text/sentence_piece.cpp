#include "text/sentence_piece.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <queue>
#include <random>
#include <stdexcept>

namespace paceline {

namespace {

constexpr std::string_view kSpace = "\xe2\x96\x81";  // U+2581

// A piece of the text under way; `size` is 0 once it is part of its left neighbour.
struct Symbol {
    size_t begin, size;  // bytes
    int32_t left, right;  // neighbours, or -1
};

// A pair of neighbours whose join is a piece.
struct Pair {
    float score;
    int32_t left, right;
    size_t size;  // bytes of both, which tells whether one of them has changed since

    bool operator<(const Pair& other) const {
        return score < other.score || (score == other.score && left > other.left);
    }
};

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

// Length of the character that begins with `lead`.
size_t character_size(char lead) {
    const auto byte = static_cast<uint8_t>(lead);
    return byte < 0xc0 ? 1 : byte < 0xe0 ? 2 : byte < 0xf0 ? 3 : 4;
}

bool is_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

size_t first_two(std::string_view text) {
    const auto high = static_cast<uint8_t>(text[0]);
    return size_t{high} << 8 | (text.size() > 1 ? static_cast<uint8_t>(text[1]) : 0);
}

}  // namespace

SentencePiece::SentencePiece(std::string bytes, std::vector<size_t> ends, std::vector<float> scores,
                             std::vector<uint8_t> special, int32_t unknown, bool prefix)
    : bytes_(std::move(bytes)),
      ends_(std::move(ends)),
      scores_(std::move(scores)),
      special_(std::move(special)),
      prefix_(prefix) {
    std::random_device device;
    seed_ = uint64_t{device()} << 32 | device();
    factor_ = uint64_t{device()} << 32 | device() | 1;
    if (scores_.size() != size() || special_.size() != size())
        refuse("pieces, scores and kinds differ in number");
    if (unknown >= static_cast<int64_t>(size())) refuse("the unknown piece is out of range");
    index_pieces();
    index_special();
    constexpr char kDigits[] = "0123456789ABCDEF";
    for (size_t byte = 0; byte < byte_pieces_.size(); ++byte) {
        const char name[] = {'<', '0', 'x', kDigits[byte >> 4], kDigits[byte & 15], '>'};
        const char itself = static_cast<char>(byte);
        int32_t id = find({name, sizeof name});
        if (id < 0) id = find({&itself, 1});
        if (id < 0 && unknown < 0)
            refuse("no piece stands for byte " + std::to_string(byte) + ", and none for unknown");
        byte_pieces_[byte] = id < 0 ? unknown : id;
    }
}

std::string_view SentencePiece::piece(size_t index) const {
    const size_t begin = index ? ends_[index - 1] : 0;
    return std::string_view(bytes_).substr(begin, ends_[index] - begin);
}

// Multiply and fold, eight bytes at a time.
uint64_t SentencePiece::hash(std::string_view text) const {
    uint64_t state = seed_ ^ text.size();
    for (size_t at = 0; at < text.size(); at += 8) {
        uint64_t chunk = 0;
        std::memcpy(&chunk, text.data() + at, std::min<size_t>(8, text.size() - at));
        const auto product = static_cast<unsigned __int128>(state ^ chunk) * factor_;
        state = static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
    }
    return state ^ state >> 29;
}

int32_t SentencePiece::find(std::string_view text) const {
    const size_t mask = slots_.size() - 1;
    for (size_t at = hash(text) & mask; slots_[at] >= 0; at = (at + 1) & mask)
        if (piece(static_cast<size_t>(slots_[at])) == text) return slots_[at];
    return -1;
}

void SentencePiece::index_pieces() {
    if (size() > static_cast<size_t>(std::numeric_limits<int32_t>::max()) / 4)
        refuse("there are too many pieces");
    slots_.assign(std::bit_ceil(2 * size() + 2), -1);
    const size_t mask = slots_.size() - 1;
    for (size_t i = 0; i < size(); ++i) {
        if (std::isnan(scores_[i])) refuse("the score of piece " + std::to_string(i) + " is NaN");
        const std::string_view text = piece(i);
        if (text.empty() || text.size() > kMaxPiece)
            refuse("piece " + std::to_string(i) + " has " + std::to_string(text.size()) +
                   " bytes, expected 1 to " + std::to_string(kMaxPiece));
        size_t at = hash(text) & mask;
        for (; slots_[at] >= 0; at = (at + 1) & mask)
            if (piece(static_cast<size_t>(slots_[at])) == text)
                refuse("pieces " + std::to_string(slots_[at]) + " and " + std::to_string(i) +
                       " are equal");
        slots_[at] = static_cast<int32_t>(i);
        longest_ = std::max(longest_, text.size());
    }
}

void SentencePiece::index_special() {
    starts_.assign(size_t{1} << 16, false);
    std::vector<bool> used(kMaxSpecial + 1, false);
    for (size_t i = 0; i < size(); ++i) {
        if (!special_[i]) continue;
        const std::string_view text = piece(i);
        if (text.size() > kMaxSpecial)
            refuse("special piece " + std::to_string(i) + " has " + std::to_string(text.size()) +
                   " bytes, expected at most " + std::to_string(kMaxSpecial));
        used[text.size()] = true;
        const size_t start = first_two(text);
        if (text.size() > 1)
            starts_[start] = true;
        else
            std::fill_n(starts_.begin() + static_cast<ptrdiff_t>(start), 256, true);
    }
    for (size_t length = kMaxSpecial; length; --length)
        if (used[length]) lengths_.push_back(length);
}

// The special pieces in a text, in order.
std::vector<SentencePiece::Match> SentencePiece::special_in(std::string_view text) const {
    std::vector<size_t> starts;
    for (size_t at = 0; at < text.size(); ++at)
        if (starts_[first_two(text.substr(at, 2))]) starts.push_back(at);
    std::vector<Match> matches;
    if (starts.empty()) return matches;
    std::vector<bool> taken(text.size(), false);
    for (const size_t length : lengths_) {
        for (const size_t begin : starts) {
            if (begin + length > text.size()) break;
            // What was taken before is at least as long: it covers one of the ends.
            if (taken[begin] || taken[begin + length - 1]) continue;
            const int32_t id = find(text.substr(begin, length));
            if (id < 0 || !special_[static_cast<size_t>(id)]) continue;
            size_t end = begin + length;
            if (special_[static_cast<size_t>(id)] == 2)
                while (end < text.size() && !taken[end] && is_space(text[end])) ++end;
            std::fill(taken.begin() + static_cast<ptrdiff_t>(begin),
                      taken.begin() + static_cast<ptrdiff_t>(end), true);
            matches.push_back({begin, end, id});
        }
    }
    std::sort(matches.begin(), matches.end(),
              [](const Match& a, const Match& b) { return a.begin < b.begin; });
    return matches;
}

void SentencePiece::encode(std::string_view text, std::vector<int32_t>& ids) const {
    size_t begin = 0;
    std::string escaped;
    const auto merge_until = [&](size_t end) {
        if (begin == end) return;
        escaped.assign(prefix_ ? kSpace : "");
        for (const char c : text.substr(begin, end - begin))
            c == ' ' ? escaped += kSpace : escaped += c;
        merge(escaped, ids);
    };
    for (const Match& match : special_in(text)) {
        merge_until(match.begin);
        ids.push_back(match.piece);
        begin = match.end;
    }
    merge_until(text.size());
}

void SentencePiece::merge(std::string_view text, std::vector<int32_t>& ids) const {
    if (text.size() > static_cast<size_t>(std::numeric_limits<int32_t>::max()))
        refuse("the text has " + std::to_string(text.size()) + " bytes, expected fewer than 2^31");
    std::vector<Symbol> symbols;
    for (size_t at = 0; at < text.size();) {
        const size_t length = std::min(character_size(text[at]), text.size() - at);
        const auto index = static_cast<int32_t>(symbols.size());
        symbols.push_back({at, length, index - 1, index + 1});
        at += length;
    }
    symbols.back().right = -1;

    std::priority_queue<Pair> pairs;
    const auto consider = [&](int32_t left, int32_t right) {
        if (left < 0 || right < 0) return;
        const Symbol& first = symbols[static_cast<size_t>(left)];
        const size_t length = first.size + symbols[static_cast<size_t>(right)].size;
        if (length > longest_) return;
        const int32_t id = find(text.substr(first.begin, length));
        if (id >= 0) pairs.push({scores_[static_cast<size_t>(id)], left, right, length});
    };
    for (size_t i = 1; i < symbols.size(); ++i)
        consider(static_cast<int32_t>(i) - 1, static_cast<int32_t>(i));
    while (!pairs.empty()) {
        const Pair pair = pairs.top();
        pairs.pop();
        Symbol& left = symbols[static_cast<size_t>(pair.left)];
        Symbol& right = symbols[static_cast<size_t>(pair.right)];
        if (!left.size || !right.size || left.size + right.size != pair.size) continue;
        left.size = pair.size;
        right.size = 0;
        left.right = right.right;
        if (right.right >= 0) symbols[static_cast<size_t>(right.right)].left = pair.left;
        consider(left.left, pair.left);
        consider(pair.left, left.right);
    }

    for (int32_t i = 0; i >= 0; i = symbols[static_cast<size_t>(i)].right) {
        const Symbol& symbol = symbols[static_cast<size_t>(i)];
        const std::string_view own = text.substr(symbol.begin, symbol.size);
        if (const int32_t id = find(own); id >= 0)
            ids.push_back(id);
        else
            for (const char c : own) ids.push_back(byte_pieces_[static_cast<uint8_t>(c)]);
    }
}

}  // namespace paceline
