// Integers of 2 to 8 bits whose scales are shared by groups of any multiple of 32 inputs.
//
// A panel holds the scales of its groups, see group_scales.hpp, then the planes of its blocks, see
// block_codes.hpp. One tile multiplies with codes as they are decoded. For several tiles, and for
// codes that name levels, they are decoded to bytes first, a few blocks at a time: formats of all widths share
// those products. Sums are the same either way, to the bit.
#pragma once

#include "kernels/formats/byte_products.hpp"
#include "kernels/formats/group_scales.hpp"
#include "kernels/formats/integers.hpp"

namespace paceline {

namespace {

using DecodeScales = void (*)(GroupCount, const uint8_t*, size_t, size_t, BlockScales&);

// How `C` is read: codes that lie at the same distances, and are decoded where they are multiplied;
// or a stream, which `C::decode` turns into bytes first.
template <class C>
constexpr bool is_stream = requires { &C::decode; };

// Products with codes that `C` decodes, whatever their scales are. With kLevels, codes name levels.
template <class C, bool kLevels>
struct GroupedProducts {
    using Codes = C;
    using Direct = BlockProducts<Codes, 1, true>;
    using Wide = BlockProducts<BlockCodes<8, 0>, 1, true>;
    using Bytes = ByteCodes<Codes, true, false>;
    using Decoded = DecodedBytes<Bytes::kBits, Bytes::kOffset>;
    using WideBytes = ByteProducts<Decoded, 1, true>;
    static constexpr bool kDecodes = !Codes::kEight;  // others are bytes
    static constexpr bool kFirst = kLevels || is_stream<C>;  // decoded first even for one tile

    static size_t scratch_bytes(size_t n) {
        return kUnit * room(tiling(n, kWidest)) * kPanel * sizeof(float);
    }
    static size_t scratch_bytes8(size_t n) { return kUnit * n * kPanel * sizeof(float); }

    // What `finish` asks for.
    template <class Activations>
    struct Totals {
        static const float* scales(const void* x) { return Activations::scales(x); }
        static F16 total(const float* sums, const uint8_t*) { return load(sums); }
    };

    // How formats that share these products differ.
    struct Layout {
        size_t header;  // bytes of scales before the codes of a panel
        DecodeScales decode;
        const uint8_t* (*levels)(GroupCount, const uint8_t* panel);
    };
    // Some panels of a product.
    struct Panels {
        const Product& job;
        const Layout& layout;
        const uint8_t* from;
        size_t count;
        const uint8_t* codes(size_t block) const {
            return from + layout.header + block * Codes::kBlockBytes;
        }
    };

    // Decodes the scales of blocks of all panels, while those of the next panels are fetched.
    static void decode_scales(const Panels& panels, size_t block, size_t count, BlockScales* to) {
        const Product& job = panels.job;
        const GroupCount of(job.inputs, job.group);
        const size_t header = panels.layout.header, all = blocks_of(job.inputs);
        const size_t start = header * block / all, share = header * count / all + 63;
        for (size_t p = 0; p < panels.count; ++p) {
            const uint8_t* from = panels.from + p * job.panel_bytes;
            for (size_t at = 0; at < share; at += 64)
                __builtin_prefetch(from + panels.count * job.panel_bytes + start + at, 0, 2);
            panels.layout.decode(of, from, block, count, to[p]);
        }
    }

    // Decodes codes of all panels to bytes, `count` blocks of one behind the other.
    static void decode_codes(const Panels& panels, size_t block, size_t count, size_t fetch,
                             uint8_t* to) {
        const Product& job = panels.job;
        for (size_t p = 0; p < panels.count; ++p) {
            if constexpr (is_stream<C>) {
                C::decode(panels.codes(0) + p * job.panel_bytes, blocks_of(job.inputs), block,
                          count, fetch, to + p * count * kByteBlock);
            } else {
                ByteTile tile{};
                tile.codes = panels.codes(block) + p * job.panel_bytes;
                tile.stride = Codes::kBlockBytes;
                tile.panels = 1;
                tile.blocks = count;
                if constexpr (kLevels)
                    tile.table = panels.layout.levels({job.inputs, job.group},
                                                      panels.from + p * job.panel_bytes);
                for (size_t at = 0; at < count * Codes::kBlockBytes; at += 64)
                    __builtin_prefetch(tile.codes + fetch + at, 0, 3);
                decode_tile<Bytes>(tile, to + p * count * kByteBlock);
            }
        }
    }

    static void multiply(const Product& job, size_t first, size_t last, void* scratch,
                         const Layout& layout) {
        const Tiling tiles = tiling(job.n, kWidest);
        const Sums sums{static_cast<float*>(scratch), room(tiles) * kPanel, false};
        // Bytes of several panels would drive out of the cache what is fetched for wide tiles.
        const bool bytes = !kDecodes || kFirst || tiles.count > 1;
        const size_t together = bytes && tiles.width > 4 ? 1 : kUnit;
        for (size_t panel = first; panel < last; panel += kUnit) {
            const size_t panels = last - panel < kUnit ? last - panel : kUnit;
            for (size_t p = 0; p < panels; p += together) {
                const size_t count = panels - p < together ? panels - p : together;
                const uint8_t* from = job.panels + (panel + p) * job.panel_bytes;
                multiply_panels({job, layout, from, count}, tiles,
                                {sums.at + p * sums.stride, sums.stride, false});
            }
            finish<Totals<BlockActivations>>(job, panel, panels, sums);
        }
    }

    // A few blocks are used by all tiles before the next ones are read.
    static void multiply_panels(const Panels& panels, const Tiling& tiles, Sums sums) {
        const Product& job = panels.job;
        BlockScales factors[kUnit];
        alignas(64) uint8_t decoded[kDecodes ? kUnit * kGroup * kByteBlock : 1];
        const size_t all = blocks_of(job.inputs);
        const size_t fetch = block_fetch(tiles, panels.count, job.panel_bytes);
        const int32_t* x = static_cast<const int32_t*>(job.x) + padded(job.n);
        const bool decodes = kDecodes && (kFirst || tiles.count > 1);
        for (size_t block = 0; block < all; block += kGroup) {
            const size_t count = all - block < kGroup ? all - block : kGroup;
            decode_scales(panels, block, count, factors);
            if (decodes) decode_codes(panels, block, count, fetch, decoded);
            for (size_t tile = 0; tile < tiles.count; ++tile) {
                const size_t token = tile * tiles.width, width = tiles.width_of(tile);
                const BlockTile work{
                    .codes = decodes ? decoded : panels.codes(block),
                    .panel_bytes = decodes ? count * kByteBlock : job.panel_bytes,
                    .stride = decodes ? kByteBlock : Codes::kBlockBytes,
                    .table = nullptr,
                    .factors = factors,
                    .panels = panels.count,
                    .blocks = count,
                    .x = x + kBlockWords * (token * all + block * width),
                    .width = width,
                    .sums = {sums.at + token * kPanel, sums.stride, block > 0},
                    .fetch = decodes ? 0 : fetch,
                };
                if constexpr (kDecodes && !kFirst) {
                    if (!decodes) {
                        multiply_tile<Direct>(work);
                        continue;
                    }
                }
                multiply_tile<Wide>(work);
            }
        }
    }

    template <class Products>
    INLINE_MEMBER void multiply_tile(const BlockTile& work) {
        const size_t together = work.width <= kTogether ? work.width : work.width / 2;
        with_width<kTogether>(together, [&](auto t) {
            constexpr int T = decltype(t)::value;
            for (size_t token = 0; token < work.width; token += T)
                Products::template multiply<T>(work, token);
        });
    }

    // The same with int8 activations.
    static void multiply8(const Product& job, size_t first, size_t last, void* scratch,
                          const Layout& layout) {
        const ByteTiling tiles = byte_tiling(job.n);
        const Sums sums{static_cast<float*>(scratch), job.n * kPanel, false};
        size_t together = 1;
        with_tokens(tiles.width, [&](auto t) {
            together = static_cast<size_t>(WideBytes::panels(decltype(t)::value));
        });
        for (size_t panel = first; panel < last; panel += kUnit) {
            const size_t panels = last - panel < kUnit ? last - panel : kUnit;
            for (size_t p = 0; p < panels; p += together) {
                const size_t count = panels - p < together ? panels - p : together;
                const uint8_t* from = job.panels + (panel + p) * job.panel_bytes;
                multiply_panels8({job, layout, from, count}, tiles,
                                 {sums.at + p * sums.stride, sums.stride, false});
            }
            finish<Totals<ByteActivations>>(job, panel, panels, sums);
        }
    }

    static void multiply_panels8(const Panels& panels, const ByteTiling& tiles, Sums sums) {
        const Product& job = panels.job;
        BlockScales factors[kUnit];
        alignas(64) uint8_t decoded[kDecodes ? kUnit * kGroup * kByteBlock : 1];
        const size_t all = blocks_of(job.inputs);
        const size_t fetch = byte_fetch(tiles, panels.count, job.panel_bytes);
        const bool decodes = kDecodes && (kFirst || tiles.count > 1);
        for (size_t block = 0; block < all; block += kGroup) {
            const size_t count = all - block < kGroup ? all - block : kGroup;
            decode_scales(panels, block, count, factors);
            if (decodes) decode_codes(panels, block, count, fetch, decoded);
            const ByteTile work{
                .codes = decodes ? decoded : panels.codes(block),
                .panel_bytes = decodes ? count * kByteBlock : job.panel_bytes,
                .stride = decodes ? kByteBlock : Codes::kBlockBytes,
                .table = nullptr,
                .factors = factors,
                .first_scale = 0,
                .panels = panels.count,
                .blocks = count,
                .ahead = panels.codes(block) + fetch,
                .ahead_bytes = job.panel_bytes,
                .step = decodes ? 0 : Codes::kBlockBytes / (kBlockInputs / 4),
            };
            if constexpr (kDecodes && !kFirst) {
                if (!decodes) {
                    multiply_byte_tiles<Bytes, 1, true>(job, work, block, all, tiles, sums);
                    continue;
                }
            }
            multiply_byte_tiles<Decoded, 1, true>(job, work, block, all, tiles, sums);
        }
    }
};

// How floats are rounded.
template <int kBits>
struct Rounded {
    using Type = Int8;
};
template <>
struct Rounded<4> {
    using Type = Int4;
};

// A format: codes of kBits bits with the scales of a layout.
template <int kBits, class Scales>
struct GroupedWeights {
    using Products = GroupedProducts<BlockCodes<kBits, 0, Scales::kLevels>, Scales::kLevels>;
    using Codes = typename Products::Codes;

    static size_t panel_bytes(size_t inputs, size_t group) {
        return Scales::bytes({inputs, group}) + blocks_of(inputs) * Codes::kBlockBytes;
    }

    static bool holds(const GroupedRows& from) { return Scales::holds(from); }

    static void load(const GroupedRows& from, size_t group, uint8_t* panel) {
        const GroupCount of(from.inputs, group);
        std::memset(panel, 0, panel_bytes(from.inputs, group));
        for (size_t row = 0; row < from.rows; ++row) {
            Scales::load(from, row, of, panel);
            for (size_t block = 0; block < blocks_of(from.inputs); ++block) {
                const int offset = Scales::offset(from, row, block / of.blocks);
                uint8_t codes[kBlockInputs] = {};
                const size_t first = block * kBlockInputs;
                for (size_t k = 0; k < kBlockInputs && first + k < from.inputs; ++k)
                    codes[k] =
                        static_cast<uint8_t>(from.codes[row * from.inputs + first + k] + offset);
                put_block(codes, row, panel + Scales::bytes(of) + block * Codes::kBlockBytes);
            }
        }
    }
    static void put_block(const uint8_t* codes, size_t row, uint8_t* to) {
        uint32_t words[Codes::kWords];
        Codes::pack(codes, words);
        for (size_t i = 0; i < Codes::kWords; ++i)
            std::memcpy(to + i * kWordBytes + row * sizeof(uint32_t), words + i, sizeof(uint32_t));
    }

    // Rounds as `int4` and `int8` do, in groups of one block.
    static bool pack(const float* weights, size_t rows, size_t inputs, uint8_t* panel) {
        using Rounding = IntWeights<typename Rounded<kBits>::Type, Bf16Scales>;
        const GroupCount of(inputs, 1);
        std::memset(panel, 0, panel_bytes(inputs, 1));
        const size_t header = Scales::bytes(of);
        for (size_t block = 0; block < of.groups; ++block) {
            float values[kBlockInputs][kPanel] = {};
            alignas(64) uint8_t packed[Rounding::kStep];
            const size_t first = block * kBlockInputs;
            for (size_t row = 0; row < rows; ++row)
                for (size_t k = 0; k < kBlockInputs && first + k < inputs; ++k)
                    values[k][row] = weights[row * inputs + first + k];
            Rounding::pack_block(values, packed);
            std::memcpy(panel + block * kPanel * 2, packed, kPanel * 2);
            for (size_t row = 0; row < kPanel; ++row) {
                uint8_t codes[kBlockInputs];
                for (size_t k = 0; k < kBlockInputs; ++k)
                    codes[k] = static_cast<uint8_t>(Rounding::get(packed, k, row) + Scales::kHalf);
                put_block(codes, row, panel + header + block * Codes::kBlockBytes);
            }
        }
        for (size_t row = 0; row < kPanel; ++row) narrow_scales(panel, row, of);
        return true;
    }
    // Makes the bf16 scales of a row those of the format.
    static void narrow_scales(uint8_t* panel, size_t row, GroupCount of) {
        auto* stored = (uint16_t*)panel + row;
        float largest = 0.0f;
        bool exact = true;
        for (size_t group = 0; group < of.groups; ++group) {
            const float scale = Bf16::from(stored[group * kPanel]);
            largest = Fp16Scales::max_of(largest, __builtin_fabsf(scale));
            exact = exact && Fp16::from(Fp16::to(scale)) == scale;
        }
        const float factor = Fp16Scales::row_factor(largest, exact);
        for (size_t group = 0; group < of.groups; ++group)
            stored[group * kPanel] = Fp16::to(Bf16::from(stored[group * kPanel]) / factor);
        panel[of.groups * kPanel * 2 + row] = static_cast<uint8_t>(Scales::exponent_of(factor));
    }

    static void copy(const uint8_t* panel, size_t lane, size_t inputs, size_t group, uint8_t* to,
                     size_t to_lane) {
        const GroupCount of(inputs, group);
        const size_t header = Scales::bytes(of);
        Scales::copy(of, panel, lane, to, to_lane);
        copy_lane(sizeof(uint32_t), blocks_of(inputs) * Codes::kWords, panel + header, lane,
                  to + header, to_lane);
    }

    static void unpack(const uint8_t* panel, size_t lane, size_t inputs, size_t group, float scale,
                       float* out) {
        const GroupCount of(inputs, group);
        BlockScales factors;
        const uint8_t* levels = Scales::levels(of, panel);
        alignas(64) uint8_t codes[kByteBlock];
        for (size_t block = 0; block < blocks_of(inputs); ++block) {
            Scales::decode(of, panel, block, 1, factors);
            const uint8_t* from = panel + Scales::bytes(of) + block * Codes::kBlockBytes;
            for (int q = 0; q < static_cast<int>(kBlockInputs / 4); ++q)
                for (int part = 0; part < kParts; ++part)
                    store_part((float*)codes + q * static_cast<int>(kPanel), part,
                               (Reg)Codes::quad(from, static_cast<size_t>(q) / kHalfQuads,
                                                q % static_cast<int>(kHalfQuads), part, levels));
            const float minimum = factors.minima[lane] * -kCodeOffset;
            const size_t first = block * kBlockInputs;
            for (size_t k = 0; k < kBlockInputs && first + k < inputs; ++k) {
                const auto code = static_cast<float>(codes[k / 4 * kWordBytes + lane * 4 + k % 4]);
                out[first + k] = (factors.scales[lane] * code + minimum) * scale;
            }
        }
    }

    static typename Products::Layout layout_of(const Product& job) {
        return {Scales::bytes({job.inputs, job.group}), Scales::decode, Scales::levels};
    }
    static void multiply(const Product& job, size_t first, size_t last, void* scratch) {
        Products::multiply(job, first, last, scratch, layout_of(job));
    }
    static void multiply8(const Product& job, size_t first, size_t last, void* scratch) {
        Products::multiply8(job, first, last, scratch, layout_of(job));
    }
};

template <int kBits, class Scales>
constexpr FormatKernels group_format(const char* name) {
    using W = GroupedWeights<kBits, Scales>;
    FormatKernels kernels{};
    kernels.name = kernels.head = name;
    kernels.for_heads = kernels.grouped = true;
    kernels.panel_bytes = W::panel_bytes;
    kernels.holds = W::holds;
    kernels.load = W::load;
    if constexpr (Scales::kRounds) kernels.pack = W::pack;
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
