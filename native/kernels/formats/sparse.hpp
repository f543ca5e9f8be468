// Integers in groups of which only those that are not zero are held: formats of PairCodes and
// BitmapCodes with the scales of `group`, see group_scales.hpp.
#pragma once

#include "kernels/formats/bitmap_codes.hpp"
#include "kernels/formats/pair_codes.hpp"

namespace paceline {

namespace {

// The codes of one row in a block, with half the range at what is behind the last input.
template <int kBits>
INLINE void block_codes(const GroupedRows& from, size_t row, size_t block, uint8_t* codes) {
    const auto group = static_cast<size_t>(from.block_groups[block]);
    const int offset = PlainScales<kBits>::offset(from, row, group);
    const size_t first = block * kBlockInputs;
    for (size_t k = 0; k < kBlockInputs; ++k)
        codes[k] = static_cast<uint8_t>(
            first + k < from.inputs ? from.codes[row * from.inputs + first + k] + offset
                                    : PlainScales<kBits>::kHalf);
}

// What both kinds share: products, scales, and rows as floats.
template <class W, class Codes>
struct SparseWeights {
    using Scales = PlainScales<Codes::kBits>;
    using Products = GroupedProducts<Codes, false>;

    static typename Products::Layout layout_of(const Product& job) {
        return {Scales::bytes({job.inputs, job.group}), Scales::decode, Scales::levels};
    }
    static void multiply(const Product& job, size_t first, size_t last, void* scratch) {
        Products::multiply(job, first, last, scratch, layout_of(job));
    }
    static void multiply8(const Product& job, size_t first, size_t last, void* scratch) {
        Products::multiply8(job, first, last, scratch, layout_of(job));
    }

    static void unpack(const uint8_t* panel, size_t lane, size_t inputs, size_t group, float scale,
                       float* out) {
        const GroupCount of(inputs, group);
        BlockScales factors;
        uint8_t codes[kBlockInputs];
        for (size_t block = 0; block < blocks_of(inputs); ++block) {
            Scales::decode(of, panel, block, 1, factors);
            W::get(panel + Scales::bytes(of), blocks_of(inputs), block, lane, codes);
            const float minimum = factors.minima[lane] * -kCodeOffset;
            const size_t first = block * kBlockInputs;
            for (size_t k = 0; k < kBlockInputs && first + k < inputs; ++k)
                out[first + k] =
                    (factors.scales[lane] * static_cast<float>(codes[k]) + minimum) * scale;
        }
    }
};

template <int kBits>
struct PairWeights : SparseWeights<PairWeights<kBits>, PairCodes<kBits>> {
    using Codes = PairCodes<kBits>;
    using Scales = PlainScales<kBits>;

    static size_t panel_bytes(size_t inputs, size_t group) {
        return Scales::bytes({inputs, group}) + blocks_of(inputs) * Codes::kBlockBytes;
    }

    // Reads codes, too.
    static bool holds(const GroupedRows& from) {
        if (!from.codes || from.inputs % 4 || !Scales::holds(from)) return false;
        for (size_t row = 0; row < from.rows; ++row)
            for (size_t k = 0; k < from.inputs; k += 4) {
                const auto group = static_cast<size_t>(from.block_groups[k / kBlockInputs]);
                if (!Codes::fits(from.codes + row * from.inputs + k, from.zero(row, group)))
                    return false;
            }
        return true;
    }

    static void load(const GroupedRows& from, size_t group, uint8_t* panel) {
        const GroupCount of(from.inputs, group);
        uint8_t codes[kBlockInputs];
        std::memset(panel, 0, panel_bytes(from.inputs, group));
        for (size_t row = 0; row < from.rows; ++row) {
            Scales::load(from, row, of, panel);
            for (size_t block = 0; block < blocks_of(from.inputs); ++block) {
                block_codes<kBits>(from, row, block, codes);
                Codes::put(panel + Scales::bytes(of) + block * Codes::kBlockBytes, row, codes);
            }
        }
    }

    static void get(const uint8_t* codes, size_t, size_t block, size_t lane, uint8_t* to) {
        Codes::get(codes + block * Codes::kBlockBytes, lane, to);
    }

    static void copy(const uint8_t* panel, size_t lane, size_t inputs, size_t group, uint8_t* to,
                     size_t to_lane) {
        const GroupCount of(inputs, group);
        const size_t header = Scales::bytes(of);
        uint8_t codes[kBlockInputs];
        Scales::copy(of, panel, lane, to, to_lane);
        for (size_t block = 0; block < blocks_of(inputs); ++block) {
            get(panel + header, 0, block, lane, codes);
            Codes::put(to + header + block * Codes::kBlockBytes, to_lane, codes);
        }
    }
};

struct BitmapWeights : SparseWeights<BitmapWeights, BitmapCodes> {
    using Codes = BitmapCodes;
    using Scales = PlainScales<8>;

    static size_t panel_bytes(size_t inputs, size_t group) {
        return Scales::bytes({inputs, group}) +
               blocks_of(inputs) * (sizeof(uint32_t) + kBitmapBytes) + weight_room(group) +
               kReadBehind;
    }

    static bool holds(const GroupedRows& from) { return from.codes && Scales::holds(from); }

    static void load(const GroupedRows& from, size_t group, uint8_t* panel) {
        const GroupCount of(from.inputs, group);
        const size_t blocks = blocks_of(from.inputs);
        std::memset(panel, 0, panel_bytes(from.inputs, group));
        auto* bytes = new uint8_t[blocks * kByteBlock];
        std::memset(bytes, Codes::kHalf, blocks * kByteBlock);
        uint8_t codes[kBlockInputs];
        for (size_t row = 0; row < from.rows; ++row) {
            Scales::load(from, row, of, panel);
            for (size_t block = 0; block < blocks; ++block) {
                block_codes<8>(from, row, block, codes);
                put_row(codes, row, bytes + block * kByteBlock);
            }
        }
        Codes::encode(bytes, blocks, weight_room(group), panel + Scales::bytes(of));
        delete[] bytes;
    }

    static void get(const uint8_t* codes, size_t blocks, size_t block, size_t lane, uint8_t* to) {
        alignas(64) uint8_t bytes[kByteBlock];
        Codes::decode(codes, blocks, block, 1, 0, bytes);
        for (size_t k = 0; k < kBlockInputs; ++k) to[k] = bytes[place_of(k, lane)];
    }

    static void copy(const uint8_t* panel, size_t lane, size_t inputs, size_t group, uint8_t* to,
                     size_t to_lane) {
        const GroupCount of(inputs, group);
        const size_t header = Scales::bytes(of), blocks = blocks_of(inputs);
        auto* bytes = new uint8_t[blocks * kByteBlock];
        uint8_t codes[kBlockInputs];
        Scales::copy(of, panel, lane, to, to_lane);
        Codes::decode(to + header, blocks, 0, blocks, 0, bytes);
        for (size_t block = 0; block < blocks; ++block) {
            get(panel + header, blocks, block, lane, codes);
            put_row(codes, to_lane, bytes + block * kByteBlock);
        }
        Codes::encode(bytes, blocks, weight_room(group), to + header);
        delete[] bytes;
    }

private:
    static size_t place_of(size_t k, size_t lane) { return k / 4 * kWordBytes + lane * 4 + k % 4; }
    static void put_row(const uint8_t* codes, size_t row, uint8_t* bytes) {
        for (size_t k = 0; k < kBlockInputs; ++k) bytes[place_of(k, row)] = codes[k];
    }
};

template <class W>
constexpr FormatKernels sparse_format(const char* name) {
    FormatKernels kernels{};
    kernels.name = kernels.head = name;
    kernels.for_heads = kernels.grouped = true;
    kernels.panel_bytes = W::panel_bytes;
    kernels.holds = W::holds;
    kernels.load = W::load;
    kernels.unpack = W::unpack;
    kernels.copy = W::copy;
    kernels.product = {arranged_pair_bytes<BlockActivations>, arrange_pairs<BlockActivations>,
                       W::multiply, W::Products::scratch_bytes};
    kernels.product8 = {ByteActivations::arranged_bytes, ByteActivations::arrange, W::multiply8,
                        W::Products::scratch_bytes8};
    return kernels;
}

}  // namespace

}  // namespace paceline
