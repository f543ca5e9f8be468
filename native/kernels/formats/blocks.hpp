// Weights in the block types of GGUF, in their own bits.
//
// A type's file holds a row as structures ("units") of 32 or 256 inputs: scales and codes, each an
// array of fields of 1, 2 or 4 bytes. A panel holds the same structures of sixteen rows, interleaved
// field by field: element e of a field lies in 16 x its size bytes, row by row. So a panel has as
// many bytes as its rows in the file, and four code bytes of a row make one word of a register.
//
// A type says
//   kInputs     inputs of a unit
//   kFields     its fields in the order of the file
//   kScales     1 or 2 of a block of 32 inputs
//   kMinima     whether blocks have minima; if not, `codes` adds kCodeOffset
//   codes(unit, part, use)             use(block, quad, four codes of each row) for all of a unit
//   scales(unit, part, scale, minimum) scale(block, half, value) for all of a unit, and minima
#pragma once

#include "kernels/formats/block_products.hpp"

namespace paceline {

namespace {

// What a field holds. Spread: a word of bits, bit 4q + i moved to 8i + q, so that those of quad q
// lie at bit q of each byte. Biased: four signed codes, kCodeOffset added.
enum class Holds { byte, half_float, half_word, word, spread, biased, exponent };

struct Field {
    Holds holds;
    size_t count;
    constexpr size_t size() const {
        return holds == Holds::byte || holds == Holds::exponent             ? 1
               : holds == Holds::half_float || holds == Holds::half_word ? 2
                                                                         : 4;
    }
};

template <class Type>
constexpr size_t unit_bytes() {  // of one row
    size_t bytes = 0;
    for (const Field& field : Type::kFields) bytes += field.count * field.size();
    return bytes;
}

INLINE uint32_t spread(uint32_t bits) {
    uint32_t out = 0;
    for (uint32_t i = 0; i < 4; ++i)
        for (uint32_t q = 0; q < 8; ++q) out |= (bits >> (4 * q + i) & 1) << (8 * i + q);
    return out;
}

template <class Type>
struct BlockWeights {
    static constexpr size_t kRowBytes = unit_bytes<Type>();
    static constexpr size_t kUnitBytes = kRowBytes * kPanel;
    static constexpr size_t kBlocks = Type::kInputs / kBlockInputs;  // of a unit
    static constexpr int kScales = Type::kScales;

    static size_t units(size_t inputs) { return (inputs + Type::kInputs - 1) / Type::kInputs; }
    static size_t panel_bytes(size_t inputs) { return units(inputs) * kUnitBytes; }
    static size_t stored_row_bytes(size_t inputs) {
        return inputs % Type::kInputs ? 0 : units(inputs) * kRowBytes;
    }

    static bool load_blocks(const uint8_t* rows, size_t row_stride, size_t count, size_t inputs,
                            uint8_t* panel) {
        if (count < kPanel) std::memset(panel, 0, panel_bytes(inputs));
        bool finite = true;
        for (size_t unit = 0; unit < units(inputs); ++unit) {
            const uint8_t* from = rows + unit * kRowBytes;
            for (const Field& field : Type::kFields)
                for (size_t e = 0; e < field.count; ++e) {
                    finite &= load_element(field.holds, from, row_stride, count, panel);
                    from += field.size();
                    panel += field.size() * kPanel;
                }
        }
        return finite;
    }

    // One element of a field of `count` rows. False: it is a scale that is not finite.
    INLINE_MEMBER bool load_element(Holds holds, const uint8_t* rows, size_t row_stride,
                                    size_t count, uint8_t* to) {
        bool finite = true;
        const auto each_row = [&](auto element, auto use) INLINE_LAMBDA {
            for (size_t row = 0; row < count; ++row) {
                std::memcpy(&element, rows + row * row_stride, sizeof(element));
                use(element);
                std::memcpy(to + row * sizeof(element), &element, sizeof(element));
            }
        };
        switch (holds) {
            case Holds::byte: each_row(uint8_t{}, [](uint8_t&) {}); break;
            case Holds::exponent:
                each_row(uint8_t{}, [&](uint8_t& e) { finite &= e <= kMaxExponent; });
                break;
            case Holds::half_word: each_row(uint16_t{}, [](uint16_t&) {}); break;
            case Holds::half_float:
                each_row(uint16_t{}, [&](uint16_t& half) { finite &= (half & 0x7c00) != 0x7c00; });
                break;
            case Holds::word: each_row(uint32_t{}, [](uint32_t&) {}); break;
            case Holds::spread:
                each_row(uint32_t{}, [](uint32_t& word) { word = spread(word); });
                break;
            case Holds::biased:
                each_row(uint32_t{}, [](uint32_t& word) { word ^= 0x80808080; });
                break;
        }
        return finite;
    }

    static void copy(const uint8_t* panel, size_t lane, size_t inputs, uint8_t* to,
                     size_t to_lane) {
        for (size_t unit = 0; unit < units(inputs); ++unit)
            for (const Field& field : Type::kFields)
                for (size_t e = 0; e < field.count; ++e) {
                    const size_t size = field.size();
                    std::memcpy(to + to_lane * size, panel + lane * size, size);
                    panel += size * kPanel;
                    to += size * kPanel;
                }
    }

    static void unpack(const uint8_t* panel, size_t lane, size_t inputs, float scale, float* out) {
        alignas(64) uint8_t codes[kBlocks * kBlockCodes];
        BlockScales factors;
        for (size_t k = 0; k < inputs; ++k) {
            const size_t in_unit = k % Type::kInputs;
            if (in_unit == 0) {
                const uint8_t* unit = panel + k / Type::kInputs * kUnitBytes;
                decode_codes(unit, codes);
                decode_scales(unit, factors, 0);
            }
            const size_t place = in_unit * kScales / kBlockInputs * kPanel + lane;
            const int code = codes[in_unit / 4 * kQuadBytes + lane * 4 + in_unit % 4];
            if constexpr (Type::kMinima) {
                const float minimum = factors.minima[place] * -kCodeOffset;
                out[k] = (factors.scales[place] * static_cast<float>(code) + minimum) * scale;
            } else {
                out[k] = factors.scales[place] * static_cast<float>(code - kCodeOffset) * scale;
            }
        }
    }

    static void decode_codes(const uint8_t* unit, uint8_t* codes) {
        for (int part = 0; part < kParts; ++part)
            Type::codes(unit, part, [&](size_t block, size_t quad, Int value) INLINE_LAMBDA {
                uint8_t* to = codes + block * kBlockCodes + quad * kQuadBytes;
                store_part((float*)to, part, (Reg)value);
            });
    }

    // Of the unit that begins with block `first` of a group.
    INLINE_MEMBER void decode_scales(const uint8_t* unit, BlockScales& to, size_t first) {
        for (int part = 0; part < kParts; ++part) {
            const auto at = [&](float* values, size_t block, size_t half) INLINE_LAMBDA {
                return values + ((first + block) * kScales + half) * kPanel;
            };
            Type::scales(
                unit, part,
                [&](size_t block, size_t half, Reg value) INLINE_LAMBDA {
                    store_part(at(to.scales, block, half), part, value);
                },
                [&](size_t block, size_t half, Reg value) INLINE_LAMBDA {
                    store_part(at(to.minima, block, half), part, value * (-1.0f / kCodeOffset));
                });
        }
    }

    static size_t arranged_bytes(size_t n, size_t inputs) {
        return arranged_pair_bytes<BlockActivations>(n, inputs);
    }
    static size_t scratch_bytes(size_t n) {
        return kUnit * room(tiling(n, kWidest)) * kPanel * sizeof(float);
    }

    static void multiply(const Product& job, size_t first, size_t last, void* scratch) {
        const Tiling tiles = tiling(job.n, kWidest);
        const Sums sums{static_cast<float*>(scratch), room(tiles) * kPanel, false};
        const size_t stride = sums.stride;
        const int32_t* x = static_cast<const int32_t*>(job.x) + padded(job.n);
        for (size_t panel = first; panel < last; panel += kUnit) {
            const size_t panels = last - panel < kUnit ? last - panel : kUnit;
            for (size_t p = 0; p < panels; ++p) {
                const uint8_t* from = job.panels + (panel + p) * job.panel_bytes;
                float* to = sums.at + p * stride;
                if constexpr (kFused)
                    if (job.n == 1) {
                        multiply_token(from, units(job.inputs), x, to);
                        continue;
                    }
                multiply_panel(from, units(job.inputs), x, tiles, to);
            }
            finish<BlockActivations>(job, panel, panels, sums);
        }
    }

    // One panel times one token; nothing is decoded to memory but the scales.
    static void multiply_token(const uint8_t* panel, size_t units, const int32_t* x, float* sums) {
        Reg total[kParts] = {};
        BlockScales factors;
        for (size_t unit = 0; unit < units; ++unit) {
            for (size_t at = 0; at < kUnitBytes; at += 64)
                __builtin_prefetch(panel + kFetchAhead + at, 0, 3);
            decode_scales(panel, factors, 0);
#pragma GCC unroll 4
            for (int i = 0; i < kParts; ++i) total[i] = add_unit(total[i], panel, i, x, factors);
            panel += kUnitBytes;
            x += kBlocks * kBlockWords;
        }
        for (int i = 0; i < kParts; ++i) store_part(sums, i, total[i]);
    }

    INLINE_MEMBER Reg add_unit(Reg total, const uint8_t* unit, int part, const int32_t* x,
                               const BlockScales& factors) {
        constexpr size_t kSums = kBlocks * kScales;
        const auto lead = [&](size_t s) INLINE_LAMBDA {
            return splat_word(x[s / kScales * kBlockWords + (kScales == 1 ? 0 : 1 + s % 2)]);
        };
        Int sum[kSums];
#pragma GCC unroll 16
        for (size_t s = 0; s < kSums; ++s) sum[s] = Type::kMinima ? Int{} : lead(s);
        Type::codes(unit, part, [&](size_t block, size_t quad, Int codes) INLINE_LAMBDA {
            const int32_t* at = x + block * kBlockWords + kLeads + 2 * quad;
            Int& to = sum[block * kScales + quad * kScales / kQuads];
            to = add_pairs(to, even_pair(codes), (Shorts)splat_word(at[0]));
            to = add_pairs(to, odd_pair(codes), (Shorts)splat_word(at[1]));
        });
#pragma GCC unroll 16
        for (size_t s = 0; s < kSums; ++s) {
            const Reg exact = __builtin_convertvector(sum[s], Reg);
            total = reg_fma(exact, load_part(factors.scales + s * kPanel, part), total);
            if constexpr (Type::kMinima)
                total = reg_fma(__builtin_convertvector(lead(s), Reg),
                                load_part(factors.minima + s * kPanel, part), total);
        }
        return total;
    }

    // One panel times all tiles: a group of blocks is decoded once and used by all.
    static void multiply_panel(const uint8_t* panel, size_t units, const int32_t* x,
                               const Tiling& tiles, float* sums) {
        constexpr size_t kUnits = kGroup / kBlocks;  // of a group
        alignas(64) uint8_t codes[kGroup * kBlockCodes];
        BlockScales factors;
        const size_t blocks = units * kBlocks;
        for (size_t unit = 0; unit < units; unit += kUnits) {
            const size_t count = units - unit < kUnits ? units - unit : kUnits;
            for (size_t i = 0; i < count; ++i) {
                for (size_t at = 0; at < kUnitBytes; at += 64)
                    __builtin_prefetch(panel + kFetchAhead + at, 0, 3);
                decode_codes(panel, codes + i * kBlocks * kBlockCodes);
                decode_scales(panel, factors, i * kBlocks);
                panel += kUnitBytes;
            }
            for (size_t tile = 0; tile < tiles.count; ++tile) {
                const size_t first = tile * tiles.width, width = tiles.width_of(tile);
                multiply_tile_of<kScales, Type::kMinima>(
                    width, {codes, kBlockCodes, &factors,
                            x + kBlockWords * (first * blocks + unit * kBlocks * width),
                            count * kBlocks, sums + first * kPanel, unit > 0});
            }
        }
    }

    // Whether a token alone is multiplied without decoding: small registers compile slowly.
    static constexpr bool kFused = kParts <= 2;
    static constexpr size_t kFetchAhead = 4096;
    static constexpr uint8_t kMaxExponent = 252;  // more overflows
};

template <class Type>
constexpr FormatKernels block_format(const char* name) {
    using W = BlockWeights<Type>;
    FormatKernels kernels{};
    kernels.name = kernels.head = name;
    kernels.for_heads = true;
    kernels.panel_bytes = W::panel_bytes;
    kernels.stored_row_bytes = W::stored_row_bytes;
    kernels.load_blocks = W::load_blocks;
    kernels.unpack = W::unpack;
    kernels.copy = W::copy;
    kernels.arranged_bytes = W::arranged_bytes;
    kernels.arrange = arrange_pairs<BlockActivations>;
    kernels.multiply = W::multiply;
    kernels.scratch_bytes = W::scratch_bytes;
    return kernels;
}

}  // namespace

}  // namespace paceline
