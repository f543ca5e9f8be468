#include "storage/huffman.hpp"

#include <algorithm>
#include <array>
#include <cstring>

namespace paceline {

namespace {

constexpr size_t kBytes = 256, kLongest = 11, kTable = size_t{1} << kLongest;
constexpr size_t kAtOnce = 4;  // values that one look-up can decode
constexpr size_t kLookups = 5;  // codes that surely lie in the 56 bits after a refill
constexpr size_t kLeastGain = 16;  // less than 1 / 16 of the bytes is not worth the decoding

using Lengths = std::array<uint8_t, kBytes>;
using Codes = std::array<uint16_t, kBytes>;
using Counts = std::array<uint32_t, kBytes>;

size_t stream_begin(size_t count, size_t stream) { return count * stream / kHuffmanStreams; }

Counts histogram(const uint8_t* values, size_t count) {
    // Four tables: equal neighbours do not wait for one another.
    std::array<Counts, 4> parts{};
    size_t i = 0;
    for (; i + 4 <= count; i += 4)
        for (size_t part = 0; part < 4; ++part) ++parts[part][values[i + part]];
    for (; i < count; ++i) ++parts[0][values[i]];
    Counts total{};
    for (const Counts& part : parts)
        for (size_t byte = 0; byte < kBytes; ++byte) total[byte] += part[byte];
    return total;
}

// Return the lengths of the best prefix code with at most `kLongest` bits (package-merge, Larmore
// and Hirschberg 1990). At least two bytes get a code, so that every code is complete.
Lengths code_lengths(Counts counts) {
    std::vector<uint8_t> symbols;
    for (size_t byte = 0; byte < kBytes; ++byte)
        if (counts[byte]) symbols.push_back(static_cast<uint8_t>(byte));
    for (size_t byte = 0; symbols.size() < 2; ++byte)
        if (!counts[byte]) symbols.push_back(static_cast<uint8_t>(byte));
    std::stable_sort(symbols.begin(), symbols.end(),
                     [&](uint8_t a, uint8_t b) { return counts[a] < counts[b]; });

    // A level's list merges the symbols with pairs of the list below; only which of the items are
    // symbols has to be remembered.
    std::array<std::vector<bool>, kLongest> is_symbol;
    std::vector<uint64_t> below, merged;
    for (auto& level : is_symbol) {
        merged.clear();
        size_t symbol = 0, pair = 0;
        while (symbol < symbols.size() || pair + 1 < below.size()) {
            const bool pairs_left = pair + 1 < below.size();
            const uint64_t package = pairs_left ? below[pair] + below[pair + 1] : 0;
            const bool next = symbol < symbols.size() &&
                              (!pairs_left || counts[symbols[symbol]] <= package);
            merged.push_back(next ? counts[symbols[symbol]] : package);
            level.push_back(next);
            next ? symbol += 1 : pair += 2;
        }
        below.swap(merged);
    }
    Lengths lengths{};
    size_t taken = 2 * symbols.size() - 2;
    for (size_t level = kLongest; level-- > 0;) {
        size_t symbol = 0;
        for (size_t i = 0; i < taken; ++i)
            if (is_symbol[level][i]) ++lengths[symbols[symbol++]];
        taken = 2 * (taken - symbol);
    }
    return lengths;
}

// Assign canonical codes, each with its first bit lowest; false where they are no complete code.
bool assign_codes(const Lengths& lengths, Codes& codes) {
    std::array<uint32_t, kLongest + 2> next{};
    for (const uint8_t length : lengths) {
        if (length > kLongest) return false;
        if (length) ++next[length + 1];
    }
    uint32_t code = 0;
    for (size_t length = 1; length <= kLongest; ++length) {
        code = (code + next[length]) << 1;
        next[length] = code;  // codes of this length begin here
    }
    for (size_t byte = 0; byte < kBytes; ++byte) {
        const size_t length = lengths[byte];
        if (!length) continue;
        const uint32_t forward = next[length]++;
        if (forward >> length) return false;
        uint32_t reversed = 0;
        for (size_t bit = 0; bit < length; ++bit)
            reversed |= (forward >> bit & 1) << (length - 1 - bit);
        codes[byte] = static_cast<uint16_t>(reversed);
    }
    uint32_t used = 0;
    for (const uint8_t length : lengths) used += length ? kTable >> length : 0;
    return used == kTable;
}

// What the next 11 bits decode to, in one word: up to four values, their number, the bits that
// they take, the bits that the first takes.
using Table = std::array<uint64_t, kTable>;

void fill_table(const Lengths& lengths, const Codes& codes, Table& table) {
    std::array<uint8_t, kTable> first;
    for (size_t byte = 0; byte < kBytes; ++byte)
        if (lengths[byte])
            for (size_t i = codes[byte]; i < kTable; i += size_t{1} << lengths[byte])
                first[i] = static_cast<uint8_t>(byte);
    for (size_t i = 0; i < kTable; ++i) {
        uint64_t values = 0, number = 0, bits = 0;
        while (number < kAtOnce) {
            const uint64_t value = first[i >> bits];
            if (bits + lengths[value] > kLongest) break;
            values |= value << 8 * number++;
            bits += lengths[value];
        }
        table[i] = values | number << 32 | bits << 40 | uint64_t{lengths[first[i]]} << 48;
    }
}

uint32_t read32(const uint8_t* at) {
    return static_cast<uint32_t>(at[0]) | static_cast<uint32_t>(at[1]) << 8 |
           static_cast<uint32_t>(at[2]) << 16 | static_cast<uint32_t>(at[3]) << 24;
}

struct Stream {
    const uint8_t* at;
    const uint8_t* end;
    uint8_t* out;
    uint8_t* out_end;
    uint64_t bits = 0;  // read and not yet used, the next one lowest
    uint32_t held = 0;  // how many of them

    // Rounds of `kLookups` look-ups that stay inside of both buffers.
    size_t safe_rounds() const {
        const auto bytes = static_cast<size_t>(end - at);
        const auto room = static_cast<size_t>(out_end - out);
        return bytes < 8 ? 0 : std::min((bytes - 8) / 7 + 1, room / (kAtOnce * kLookups));
    }

    void refill() {
        uint64_t word;
        std::memcpy(&word, at, 8);
        bits |= word << held;
        at += (63 - held) >> 3;
        held |= 56;
    }

    void step(const Table& table) {
        const uint64_t entry = table[bits & (kTable - 1)];
        const auto values = static_cast<uint32_t>(entry);
        std::memcpy(out, &values, 4);
        out += entry >> 32 & 0xff;
        const uint32_t used = entry >> 40 & 0xff;
        bits >>= used;
        held -= used;
    }

    // Decode the rest value by value; return whether the stream ends with it.
    bool finish(const Table& table) {
        while (out < out_end) {
            while (held <= 56 && at < end) {
                bits |= uint64_t{*at++} << held;
                held += 8;
            }
            const uint64_t entry = table[bits & (kTable - 1)];
            const auto used = static_cast<uint32_t>(entry >> 48);
            if (used > held) return false;
            *out++ = static_cast<uint8_t>(entry);
            bits >>= used;
            held -= used;
        }
        return static_cast<size_t>(end - at) * 8 + held < 8;
    }
};

// Write a stream at `at`, where 8 bytes more than it takes are free; return its end.
uint8_t* write_stream(const uint8_t* values, size_t count,
                      const std::array<uint32_t, kBytes>& words, uint8_t* at) {
    uint64_t bits = 0;
    uint32_t held = 0;
    const auto add = [&](uint8_t value) {
        const uint32_t word = words[value];
        bits |= uint64_t{word >> 8} << held;
        held += word & 0xff;
    };
    const auto flush = [&] {  // whole bytes; at most 7 bits are left
        std::memcpy(at, &bits, 8);
        at += held >> 3;
        bits >>= held & 56;
        held &= 7;
    };
    size_t i = 0;
    for (; i + kLookups <= count; i += kLookups) {
        for (size_t k = 0; k < kLookups; ++k) add(values[i + k]);
        flush();
    }
    for (; i < count; ++i) add(values[i]);
    flush();
    if (held) *at++ = static_cast<uint8_t>(bits);
    return at;
}

}  // namespace

bool huffman_encode(const uint8_t* values, size_t count, std::vector<uint8_t>& out) {
    const Counts counts = histogram(values, count);
    const Lengths lengths = code_lengths(counts);
    uint64_t bits = 0;
    for (size_t byte = 0; byte < kBytes; ++byte) bits += uint64_t{counts[byte]} * lengths[byte];
    if (kHuffmanHeader + kHuffmanStreams + bits / 8 > count - count / kLeastGain) return false;
    Codes codes{};
    assign_codes(lengths, codes);
    const size_t begin = out.size();
    out.resize(begin + kHuffmanHeader + kHuffmanStreams + bits / 8 + 8);
    uint8_t* header = out.data() + begin;
    std::array<uint32_t, kBytes> words;
    for (size_t byte = 0; byte < kBytes; ++byte)
        words[byte] = uint32_t{codes[byte]} << 8 | lengths[byte];
    for (size_t byte = 0; byte < kBytes; byte += 2)
        header[byte / 2] = static_cast<uint8_t>(lengths[byte] | lengths[byte + 1] << 4);
    uint8_t* at = header + kHuffmanHeader;
    for (size_t stream = 0; stream < kHuffmanStreams; ++stream) {
        const size_t from = stream_begin(count, stream), to = stream_begin(count, stream + 1);
        uint8_t* end = write_stream(values + from, to - from, words, at);
        const auto size = static_cast<size_t>(end - at);
        for (size_t byte = 0; byte < 4; ++byte)
            header[128 + 4 * stream + byte] = static_cast<uint8_t>(size >> 8 * byte);
        at = end;
    }
    out.resize(static_cast<size_t>(at - out.data()));
    return true;
}

bool huffman_decode(const uint8_t* data, size_t size, uint8_t* out, size_t count) {
    if (size < kHuffmanHeader) return false;
    Lengths lengths;
    for (size_t i = 0; i < kBytes / 2; ++i) {
        lengths[2 * i] = data[i] & 15;
        lengths[2 * i + 1] = data[i] >> 4;
    }
    Codes codes{};
    if (!assign_codes(lengths, codes)) return false;
    Table table;
    fill_table(lengths, codes, table);

    Stream streams[kHuffmanStreams];
    const uint8_t* at = data + kHuffmanHeader;
    size_t left = size - kHuffmanHeader;
    for (size_t k = 0; k < kHuffmanStreams; ++k) {
        const size_t bytes = read32(data + 128 + 4 * k);
        if (bytes > left) return false;
        streams[k] = {at, at + bytes, out + stream_begin(count, k),
                      out + stream_begin(count, k + 1)};
        at += bytes;
        left -= bytes;
    }
    if (left) return false;

    auto [a, b, c, d] = streams;
    while (const size_t rounds = std::min(
               {a.safe_rounds(), b.safe_rounds(), c.safe_rounds(), d.safe_rounds()}))
        for (size_t round = 0; round < rounds; ++round) {
            a.refill(), b.refill(), c.refill(), d.refill();
            for (size_t i = 0; i < kLookups; ++i)
                a.step(table), b.step(table), c.step(table), d.step(table);
        }
    return a.finish(table) && b.finish(table) && c.finish(table) && d.finish(table);
}

}  // namespace paceline
