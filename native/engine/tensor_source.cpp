#include "engine/tensor_source.hpp"

#include <cstring>

#include "support/file_mapping.hpp"

namespace paceline {

namespace {

struct Fp32 {
    using Stored = uint32_t;
    static bool finite(uint32_t bits) { return (bits & 0x7f800000) != 0x7f800000; }
    static uint32_t widen(uint32_t bits) { return bits; }
};

struct Bf16 {
    using Stored = uint16_t;
    static bool finite(uint16_t bits) { return (bits & 0x7f80) != 0x7f80; }
    static uint32_t widen(uint16_t bits) { return uint32_t{bits} << 16; }
};

struct Fp16 {
    using Stored = uint16_t;
    static bool finite(uint16_t bits) { return (bits & 0x7c00) != 0x7c00; }
    // Exponent and fraction in their places, then the exponent's bias by a product.
    static uint32_t widen(uint16_t bits) {
        const uint32_t shifted = (bits & 0x7fffu) << 13;
        float size;
        std::memcpy(&size, &shifted, sizeof(size));
        size *= 0x1p112f;
        uint32_t wide;
        std::memcpy(&wide, &size, sizeof(wide));
        return wide | uint32_t{bits & 0x8000u} << 16;
    }
};

template <class Type>
bool read_as(const uint8_t* from, ptrdiff_t step, size_t count, float* out) {
    unsigned finite = 1;
    const auto one = [&](size_t i, const uint8_t* at) {
        typename Type::Stored bits;
        std::memcpy(&bits, at, sizeof(bits));
        finite &= Type::finite(bits);
        const uint32_t wide = Type::widen(bits);
        std::memcpy(out + i, &wide, sizeof(wide));
    };
    constexpr ptrdiff_t kSize = sizeof(typename Type::Stored);
    if (step == kSize)
        for (size_t i = 0; i < count; ++i) one(i, from + i * kSize);
    else
        for (size_t i = 0; i < count; ++i) one(i, from + static_cast<ptrdiff_t>(i) * step);
    return finite;
}

}  // namespace

bool TensorSource::read(size_t row, float* out) const {
    const uint8_t* from = data + static_cast<ptrdiff_t>(row) * row_step;
    switch (type) {
        case Type::fp32: return read_as<Fp32>(from, column_step, columns, out);
        case Type::fp16: return read_as<Fp16>(from, column_step, columns, out);
        default: return read_as<Bf16>(from, column_step, columns, out);
    }
}

void TensorSource::forget(size_t first, size_t last) const {
    // Columns may be the outer axis; then rows are not together, and all are forgotten at the end.
    const bool together = row_step >= column_step;
    if (!mapped || (!together && last < rows)) return;
    const auto at = [&](size_t row, size_t column) {
        return data + static_cast<ptrdiff_t>(row) * row_step +
               static_cast<ptrdiff_t>(column) * column_step;
    };
    const uint8_t* begin = at(together ? first : 0, 0);
    forget_pages(begin, static_cast<size_t>(at(last - 1, columns - 1) + 1 - begin));
}

}  // namespace paceline
