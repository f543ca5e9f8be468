// Rounds 32 positions to codes in groups, and reads rows back; see packed_cache.hpp.
#pragma once

#include "kernels/packed_cache.hpp"

namespace paceline {

namespace {

// A row in fp16 among sixteen: keys [D][16], then values [D / 16][16][16].
struct OpenRow {
    static uint16_t* key(const uint8_t* rows, size_t place) { return (uint16_t*)rows + place; }
    static uint16_t* value(const uint8_t* rows, size_t place, size_t dim) {
        return (uint16_t*)rows + dim * kPanel + place * kPanel;
    }
    static size_t value_at(size_t d) { return d / kPanel * kPanel * kPanel + d % kPanel; }

    static void put(uint8_t* rows, size_t place, size_t dim, const float* key_row,
                    const float* value_row) {
        uint16_t *keys = key(rows, place), *values = value(rows, place, dim);
        for (size_t d = 0; d < dim; ++d) keys[d * kPanel] = Fp16::to(key_row[d]);
        for (size_t d = 0; d < padded(dim); ++d)
            values[value_at(d)] = d < dim ? Fp16::to(value_row[d]) : uint16_t{0};
    }

    static void get(const uint8_t* rows, size_t place, size_t dim, float* key_row,
                    float* value_row) {
        const uint16_t *keys = key(rows, place), *values = value(rows, place, dim);
        for (size_t d = 0; d < dim; ++d) {
            key_row[d] = Fp16::from(keys[d * kPanel]);
            value_row[d] = Fp16::from(values[value_at(d)]);
        }
    }

    static void copy(const uint8_t* from, size_t from_place, uint8_t* to, size_t to_place,
                     size_t count, size_t dim) {
        for (size_t i = 0; i < count; ++i) {
            const uint16_t* keys = key(from, from_place + i);
            for (size_t d = 0; d < dim; ++d) key(to, to_place + i)[d * kPanel] = keys[d * kPanel];
            const uint16_t* values = value(from, from_place + i, dim);
            for (size_t d = 0; d < padded(dim); d += kPanel)
                std::memcpy(value(to, to_place + i, dim) + value_at(d), values + value_at(d),
                            kPanel * sizeof(uint16_t));
        }
    }
};

// A scale and a minimum in fp16, and what numbers are divided by.
struct Grid {
    uint16_t scale, minimum;
    float low, step;

    INLINE_MEMBER Grid of(float low, float high, int top) {
        Grid grid;
        grid.minimum = Fp16::to(low);
        grid.low = Fp16::from(grid.minimum);
        grid.scale = Fp16::to((high - grid.low) / static_cast<float>(top));
        grid.step = Fp16::from(grid.scale);
        return grid;
    }
    // Rounded to the nearest, ties to even.
    F16 codes(F16 numbers, int top) const {
        if (step == 0.0f) return splat(0.0f);
        const F16 magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
        const F16 code = ((numbers - splat(low)) / splat(step) + magic) - magic;
        return min(max(code, splat(0.0f)), splat(static_cast<float>(top)));
    }
};

INLINE float smallest(F16 numbers) { return -largest(splat(0.0f) - numbers); }

// 32 numbers that share a grid become the k-th codes of the lanes of two panels.
template <int kBits>
static void pack_group(const float* numbers, size_t k, size_t inputs, uint8_t* group) {
    using Code = Codes<kBits>;
    constexpr int kTop = PackedBlock<kBits>::kTop;
    constexpr size_t kLine = PackedBlock<kBits>::kLine;
    const F16 halves[kGroupPanels] = {load(numbers), load(numbers + kPanel)};
    const Grid grid = Grid::of(smallest(min(halves[0], halves[1])),
                               largest(max(halves[0], halves[1])), kTop);
    const PackedPanels<kBits> panels(group, inputs);
    const_cast<uint16_t*>(panels.scales)[k] = grid.scale;
    const_cast<uint16_t*>(panels.minima)[k] = grid.minimum;
    uint32_t* words = (uint32_t*)const_cast<uint8_t*>(panels.codes) +
                      k / Code::kRun * Code::kWords * kLine;
    for (size_t p = 0; p < kGroupPanels; ++p) {
        float codes[kPanel];
        store(codes, grid.codes(halves[p], kTop));
        for (size_t i = 0; i < kPanel; ++i)
            Code::put(words + p * kPanel + i, kLine, k % Code::kRun,
                      static_cast<uint32_t>(codes[i]));
    }
}

template <int kBits>
static void close_keys(const CloseGroup& job, size_t dim, const float* keys) {
    using Layout = PackedBlock<kBits>;
    const size_t inputs = whole_groups(dim);
    uint8_t* group = job.block + Layout::keys_at(dim, job.half);
    std::memset(group, 0, Layout::group_bytes(inputs));
    for (size_t d = 0; d < dim; ++d) pack_group<kBits>(keys + d * kCacheGroup, d, inputs, group);
}

template <int kBits>
static void close_values(const CloseGroup& job, size_t dim, const float* values) {
    using Layout = PackedBlock<kBits>;
    constexpr size_t kWords = kCacheGroup / Layout::Code::kRun * Layout::Code::kWords;
    for (size_t d = 0; d < dim; d += kCacheGroup) {
        uint8_t* group = job.block + Layout::values_at(dim, d / kCacheGroup);
        const PackedPanels<kBits> panels(group, kCacheBlock);
        const size_t words = kWords * Layout::kLine;
        std::memset((uint32_t*)const_cast<uint8_t*>(panels.codes) + job.half * words, 0,
                    words * sizeof(uint32_t));
        for (size_t i = 0; i < kCacheGroup; ++i) {
            float row[kCacheGroup];
            for (size_t j = 0; j < kCacheGroup; ++j)  // what is missing changes no grid
                row[j] = values[i * padded(dim) + (d + j < dim ? d + j : d)];
            pack_group<kBits>(row, job.half * kCacheGroup + i, kCacheBlock, group);
        }
    }
}

template <int kBits>
static void close_group(const CloseGroup& job, size_t dim) {
    alignas(64) float keys[kLargestHead * kCacheGroup], row[kLargestHead];  // [D][32]
    alignas(64) float values[kLargestHead * kCacheGroup];                   // [32][D]
    for (size_t i = 0; i < kCacheGroup; ++i) {
        const size_t slot = static_cast<size_t>(job.slots[i]);
        OpenRow::get(job.open[slot / kPanel] + job.offset, slot % kPanel, dim, row,
                     values + i * padded(dim));
        for (size_t d = 0; d < dim; ++d) keys[d * kCacheGroup + i] = row[d];
    }
    close_keys<kBits>(job, dim, keys);
    close_values<kBits>(job, dim, values);
}

template <int kBits>
static float number_at(const uint8_t* group, size_t inputs, size_t k, size_t lane) {
    using Code = Codes<kBits>;
    constexpr size_t kLine = PackedBlock<kBits>::kLine;
    const PackedPanels<kBits> panels(group, inputs);
    const uint32_t* words = (const uint32_t*)panels.codes +
                            k / Code::kRun * Code::kWords * kLine + lane;
    const uint32_t code = Code::get(words, kLine, k % Code::kRun);
    return __builtin_fmaf(static_cast<float>(code), Fp16::from(panels.scales[k]),
                          Fp16::from(panels.minima[k]));
}

template <int kBits>
static void read_packed(const uint8_t* block, size_t place, size_t dim, float* key, float* value) {
    using Layout = PackedBlock<kBits>;
    const uint8_t* keys = block + Layout::keys_at(dim, place / kCacheGroup);
    for (size_t d = 0; d < dim; ++d) {
        key[d] = number_at<kBits>(keys, whole_groups(dim), d, place % kCacheGroup);
        value[d] = number_at<kBits>(block + Layout::values_at(dim, d / kCacheGroup), kCacheBlock,
                                    place, d % kCacheGroup);
    }
}

}  // namespace

}  // namespace paceline
