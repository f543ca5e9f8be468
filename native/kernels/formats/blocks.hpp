// Weights in the block types of GGUF, in their own bits.
//
// A file holds a row as structures ("units") of 32 or 256 inputs, with scales and codes. A panel
// holds the units of sixteen rows: the fields of their headers side by side, then the planes of
// each block's codes; see block_codes.hpp. So a panel has as many bytes as its rows in the file.
//
// A type says
//   kInputs, kFileBytes  of a unit
//   kHeader              the fields of its header
//   Codes                how codes are kept: BlockCodes
//   kScales              1 or 2 of a block of 32 inputs
//   kMinima              whether blocks have minima; if not, Codes add kCodeOffset
//   table()              what 4-bit codes name; or null
//   codes(unit, out)     the codes of a unit of a file, a byte each
//   scales(unit, part, scale, minimum)  scale(block, half, value) for all of a panel's unit
// A type whose codes are no planes says instead of `codes`
//   kPacked              words of a unit of a row's codes, which a file begins with
//   expand(words, planes)  makes planes of those of sixteen rows
#pragma once

#include "kernels/formats/byte_products.hpp"

namespace paceline {

namespace {

// What a field holds; floats must be finite.
enum class Holds { bytes, exponent, half_floats, half_words };

struct Field {
    Holds holds;
    size_t at, count;  // byte of a file's unit; elements
    constexpr size_t size() const {
        return holds == Holds::bytes || holds == Holds::exponent ? 1 : 2;
    }
};

template <class Type>
constexpr size_t header_bytes() {  // of one row
    size_t bytes = 0;
    for (const Field& field : Type::kHeader) bytes += field.count * field.size();
    return bytes;
}

template <class Type>
constexpr size_t packed_words() {
    if constexpr (requires { Type::kPacked; }) return Type::kPacked;
    return 0;
}

template <class Type>
constexpr bool linear_table() {  // codes of four bits, less eight
    return requires { Type::kLinear; };
}

template <class Type>
struct BlockWeights {
    using Codes = typename Type::Codes;
    using Products = BlockProducts<Codes, Type::kScales, Type::kMinima>;
    using Bytes = ByteCodes<Codes, Type::kMinima, linear_table<Type>()>;
    using Decoded = DecodedBytes<Bytes::kBits, Bytes::kOffset>;
    using Products8 = ByteProducts<Bytes, Type::kScales, Type::kMinima>;
    static constexpr size_t kBlocks = Type::kInputs / kBlockInputs;  // of a unit
    static constexpr size_t kUnits = kGroup / kBlocks;               // of a group
    static constexpr size_t kCodesAt = header_bytes<Type>() * kPanel;
    static constexpr size_t kPlaneBytes = kBlocks * Codes::kBlockBytes;
    static constexpr size_t kPacked = packed_words<Type>();
    static constexpr size_t kWords = kPacked ? kPacked : kBlocks * Codes::kWords;
    static constexpr size_t kUnitBytes = kCodesAt + kWords * kWordBytes;
    static_assert(kUnitBytes == Type::kFileBytes * kPanel);

    static size_t units(size_t inputs) { return (inputs + Type::kInputs - 1) / Type::kInputs; }
    static size_t panel_bytes(size_t inputs) {
        return units(inputs) * kUnitBytes;
    }
    static size_t stored_row_bytes(size_t inputs) {
        return inputs % Type::kInputs ? 0 : units(inputs) * Type::kFileBytes;
    }

    static bool load_blocks(const uint8_t* rows, size_t row_stride, size_t count, size_t inputs,
                            uint8_t* panel) {
        if (count < kPanel) std::memset(panel, 0, panel_bytes(inputs));
        bool finite = true;
        for (size_t unit = 0; unit < units(inputs); ++unit) {
            for (size_t row = 0; row < count; ++row)
                finite &= load_unit(rows + row * row_stride, row, panel);
            rows += Type::kFileBytes;
            panel += kUnitBytes;
        }
        return finite;
    }

    // False: a scale is not finite.
    static bool load_unit(const uint8_t* from, size_t row, uint8_t* unit) {
        bool finite = true;
        uint8_t* to = unit;
        for (const Field& field : Type::kHeader)
            for (size_t e = 0; e < field.count; ++e) {
                const size_t size = field.size();
                const uint8_t* element = from + field.at + e * size;
                if (field.holds == Holds::half_floats) finite &= (element[1] & 0x7c) != 0x7c;
                if (field.holds == Holds::exponent) finite &= *element <= kMaxExponent;
                std::memcpy(to + row * size, element, size);
                to += size * kPanel;
            }
        uint32_t words[kWords];
        if constexpr (kPacked > 0) {
            std::memcpy(words, from, sizeof(words));
        } else {
            alignas(4) uint8_t codes[Type::kInputs];
            Type::codes(from, codes);
            for (size_t block = 0; block < kBlocks; ++block)
                Codes::pack(codes + block * kBlockInputs, words + block * Codes::kWords);
        }
        for (const uint32_t word : words) {
            std::memcpy(to + row * sizeof(word), &word, sizeof(word));
            to += kWordBytes;
        }
        return finite;
    }

    static void copy(const uint8_t* panel, size_t lane, size_t inputs, uint8_t* to,
                     size_t to_lane) {
        const auto move = [&](size_t size) {
            std::memcpy(to + to_lane * size, panel + lane * size, size);
            panel += size * kPanel;
            to += size * kPanel;
        };
        for (size_t unit = 0; unit < units(inputs); ++unit) {
            for (const Field& field : Type::kHeader)
                for (size_t e = 0; e < field.count; ++e) move(field.size());
            for (size_t word = 0; word < kWords; ++word) move(sizeof(uint32_t));
        }
    }

    // The planes of a unit; `room` is for those that must be made.
    INLINE_MEMBER const uint8_t* planes_of(const uint8_t* unit, uint8_t* room) {
        if constexpr (kPacked == 0) return unit + kCodesAt;
        if constexpr (kPacked > 0) Type::expand(unit + kCodesAt, room);
        return room;
    }

    static void unpack(const uint8_t* panel, size_t lane, size_t inputs, float scale, float* out) {
        BlockScales factors;
        alignas(64) uint8_t codes[kHalfQuads * kWordBytes], room[kPacked ? kPlaneBytes : 1];
        const uint8_t* planes = nullptr;
        for (size_t k = 0; k < inputs; ++k) {
            const size_t in_unit = k % Type::kInputs, block = in_unit / kBlockInputs;
            const size_t half = k / (kBlockInputs / 2) % 2, in_half = k % (kBlockInputs / 2);
            const uint8_t* unit = panel + k / Type::kInputs * kUnitBytes;
            if (in_unit == 0) {
                decode_scales(unit, factors, 0);
                planes = planes_of(unit, room);
            }
            if (in_half == 0)
                for (int q = 0; q < static_cast<int>(kHalfQuads); ++q)
                    for (int part = 0; part < kParts; ++part)
                        store_part((float*)codes + q * static_cast<int>(kPanel), part,
                                   (Reg)Codes::quad(planes + block * Codes::kBlockBytes,
                                                    half, q, part, Type::table()));
            const int code = codes[in_half / 4 * kWordBytes + lane * 4 + in_half % 4];
            const size_t place = in_unit * Type::kScales / kBlockInputs * kPanel + lane;
            if constexpr (Type::kMinima) {
                const float minimum = factors.minima[place] * -kCodeOffset;
                out[k] = (factors.scales[place] * static_cast<float>(code) + minimum) * scale;
            } else {
                const float number = static_cast<float>(code - kCodeOffset);
                out[k] = factors.scales[place] * number * scale;
            }
        }
    }

    // Of the unit that begins with block `first` of a group.
    INLINE_MEMBER void decode_scales(const uint8_t* unit, BlockScales& to, size_t first) {
        for (int part = 0; part < kParts; ++part) {
            const auto at = [&](float* values, size_t block, size_t half) INLINE_LAMBDA {
                return values + ((first + block) * Type::kScales + half) * kPanel;
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

    static size_t scratch_bytes(size_t n) {
        return kUnit * room(tiling(n, kWidest)) * kPanel * sizeof(float);
    }
    static size_t scratch_bytes8(size_t n) { return kUnit * n * kPanel * sizeof(float); }

    static void multiply(const Product& job, size_t first, size_t last, void* scratch) {
        const Tiling tiles = tiling(job.n, kWidest);
        const Sums sums{static_cast<float*>(scratch), room(tiles) * kPanel, false};
        // Bytes of several panels would drive out of the cache what is fetched for wide tiles.
        const size_t together = Codes::kEight && tiles.count == 1 && tiles.width > 4 ? 1 : kUnit;
        for (size_t panel = first; panel < last; panel += kUnit) {
            const size_t panels = last - panel < kUnit ? last - panel : kUnit;
            for (size_t p = 0; p < panels; p += together) {
                const size_t count = panels - p < together ? panels - p : together;
                const Sums to{sums.at + p * sums.stride, sums.stride, false};
                multiply_panels(job, panel + p, count, tiles, to);
            }
            finish<Totals>(job, panel, panels, sums);
        }
    }

    // What `finish` asks for.
    template <class Activations>
    struct TotalsOf {
        static const float* scales(const void* x) { return Activations::scales(x); }
        static F16 total(const float* sums, const uint8_t*) { return load(sums); }
    };
    using Totals = TotalsOf<BlockActivations>;
    using ByteTotals = TotalsOf<ByteActivations>;

    // Up to kUnit panels: a group of blocks is used by all tiles before the next one is read.
    static void multiply_panels(const Product& job, size_t panel, size_t panels,
                                const Tiling& tiles, Sums sums) {
        BlockScales factors[kUnit];
        alignas(64) uint8_t room[kPacked ? kUnit * kPlaneBytes : 1];
        const size_t all = units(job.inputs), blocks = all * kBlocks;
        const int32_t* x = static_cast<const int32_t*>(job.x) + padded(job.n);
        const uint8_t* group = job.panels + panel * job.panel_bytes;
        const size_t fetch = block_fetch(tiles, panels, job.panel_bytes);
        for (size_t unit = 0; unit < all; unit += kUnits) {
            const size_t count = all - unit < kUnits ? all - unit : kUnits;
            for (size_t p = 0; p < panels; ++p) {
                const uint8_t* from = group + p * job.panel_bytes;
                for (size_t i = 0; i < count; ++i, from += kUnitBytes) {
                    for (size_t at = 0; at < kCodesAt; at += 64)
                        __builtin_prefetch(from + fetch + at, 0, 2);
                    decode_scales(from, factors[p], i * kBlocks);
                }
                if constexpr (kPacked > 0)
                    planes_of(group + p * job.panel_bytes, room + p * kPlaneBytes);
            }
            for (size_t tile = 0; tile < tiles.count; ++tile) {
                const size_t first = tile * tiles.width, width = tiles.width_of(tile);
                const BlockTile work{
                    .codes = kPacked ? room : group + kCodesAt,
                    .panel_bytes = kPacked ? kPlaneBytes : job.panel_bytes,
                    .stride = kBlocks == 1 ? kUnitBytes : Codes::kBlockBytes,
                    .table = Type::table(),
                    .factors = factors,
                    .panels = panels,
                    .blocks = count * kBlocks,
                    .x = x + kBlockWords * (first * blocks + unit * kBlocks * width),
                    .width = width,
                    .sums = {sums.at + first * kPanel, sums.stride, unit > 0},
                    .fetch = fetch,
                };
                const size_t together = width <= kTogether ? width : width / 2;
                with_width<kTogether>(together, [&](auto t) {
                    constexpr int T = decltype(t)::value;
                    for (size_t token = 0; token < width; token += T)
                        Products::template multiply<T>(work, token);
                });
            }
            group += count * kUnitBytes;
        }
    }

    // The same with int8 activations.
    static void multiply8(const Product& job, size_t first, size_t last, void* scratch) {
        const ByteTiling tiles = byte_tiling(job.n);
        const Sums sums{static_cast<float*>(scratch), job.n * kPanel, false};
        size_t together = 1;
        with_tokens(tiles.width, [&](auto t) {
            together = static_cast<size_t>(Products8::panels(decltype(t)::value));
        });
        for (size_t panel = first; panel < last; panel += kUnit) {
            const size_t panels = last - panel < kUnit ? last - panel : kUnit;
            for (size_t p = 0; p < panels; p += together) {
                const size_t count = panels - p < together ? panels - p : together;
                const Sums to{sums.at + p * sums.stride, sums.stride, false};
                multiply_panels8(job, panel + p, count, tiles, to);
            }
            finish<ByteTotals>(job, panel, panels, sums);
        }
    }

    // Up to kUnit panels, a group of blocks after the other. Where several tiles use them, codes are
    // decoded once for all.
    static void multiply_panels8(const Product& job, size_t panel, size_t panels,
                                 const ByteTiling& tiles, Sums sums) {
        BlockScales factors[kUnit];
        alignas(64) uint8_t room[kPacked ? kUnit * kPlaneBytes : 1];
        const size_t all = units(job.inputs), stride = kPacked ? kPlaneBytes : job.panel_bytes;
        const uint8_t* group = job.panels + panel * job.panel_bytes;
        const size_t fetch = byte_fetch(tiles, panels, job.panel_bytes);
        for (size_t unit = 0; unit < all; unit += kUnits) {
            const size_t count = all - unit < kUnits ? all - unit : kUnits;
            for (size_t p = 0; p < panels; ++p) {
                const uint8_t* from = group + p * job.panel_bytes;
                for (size_t i = 0; i < count; ++i)
                    decode_scales(from + i * kUnitBytes, factors[p], i * kBlocks);
                if constexpr (kPacked > 0) planes_of(from, room + p * kPlaneBytes);
            }
            ByteTile work{
                .codes = kPacked ? room : group + kCodesAt,
                .panel_bytes = stride,
                .stride = kBlocks == 1 ? kUnitBytes : Codes::kBlockBytes,
                .table = Type::table(),
                .factors = factors,
                .first_scale = 0,
                .panels = panels,
                .blocks = count * kBlocks,
                .ahead = group + fetch,
                .ahead_bytes = job.panel_bytes,
                .step = kUnitBytes / kBlocks / (kBlockInputs / 4),
            };
            if (tiles.count == 1) {
                multiply_byte_tiles<Bytes, Type::kScales, Type::kMinima>(
                    job, work, unit * kBlocks, all * kBlocks, tiles, sums);
            } else {
                alignas(64) uint8_t decoded[kUnit * kGroup * kByteBlock];
                decode_tile<Bytes>(work, decoded);
                multiply_byte_tiles<Decoded, Type::kScales, Type::kMinima>(
                    job, work, unit * kBlocks, all * kBlocks, tiles, sums);
            }
            group += count * kUnitBytes;
        }
    }

    static constexpr uint8_t kMaxExponent = 252;  // more overflows
};

template <class Type>
constexpr FormatKernels block_format(const char* name) {
    using W = BlockWeights<Type>;
    FormatKernels kernels{};
    kernels.name = kernels.head = name;
    kernels.for_heads = true;
    set_panels<W>(kernels);
    kernels.stored_row_bytes = W::stored_row_bytes;
    kernels.load_blocks = W::load_blocks;
    kernels.product = {arranged_pair_bytes<BlockActivations>, arrange_pairs<BlockActivations>,
                       W::multiply, W::scratch_bytes};
    kernels.product8 = {ByteActivations::arranged_bytes, ByteActivations::arrange, W::multiply8,
                        W::scratch_bytes8};
    return kernels;
}

}  // namespace

}  // namespace paceline
