// How n tokens are cut into tiles that fit the registers, and how rows are laid out for them.
//
// A tile of T tokens is stored [K][T]: at each input the T values lie side by side.
#pragma once

#include "kernels/simd.hpp"

namespace paceline {

namespace {

#if defined(__AVX512F__)
constexpr int kWidths[] = {1, 2, 3, 4, 6, 8, 12, 16, 24};
constexpr int kSums = 24;  // sixteen-lane sums that fit the registers
constexpr int kBulk = 12;  // tile width when there are many tokens
#elif defined(__AVX2__) || defined(PACELINE_NEON)
constexpr int kWidths[] = {1, 2, 3, 4, 6};
constexpr int kSums = 6;
constexpr int kBulk = 6;
#else
constexpr int kWidths[] = {1, 2};
constexpr int kSums = 2;
constexpr int kBulk = 2;
#endif
constexpr int kWidest = kWidths[sizeof(kWidths) / sizeof(int) - 1];

// The narrowest tile that holds n <= kWidest tokens; what is too much is zero.
INLINE size_t width_for(size_t n) {
    for (const int width : kWidths)
        if (n <= static_cast<size_t>(width)) return static_cast<size_t>(width);
    return kWidest;
}

// Tiles of equal width but for the last.
struct Tiling {
    size_t n, width, count;
    size_t tokens(size_t tile) const { return tile + 1 < count ? width : n - tile * width; }
    size_t width_of(size_t tile) const { return width_for(tokens(tile)); }
};

INLINE Tiling tiling(size_t n, size_t widest) {
    if (n <= widest) return {n, width_for(n), 1};
    const size_t count = (n + kBulk - 1) / kBulk, width = width_for((n + count - 1) / count);
    return {n, width, (n + width - 1) / width};
}

// Tokens that the tiles have room for.
INLINE size_t room(const Tiling& tiles) {
    return (tiles.count - 1) * tiles.width + tiles.width_of(tiles.count - 1);
}

// Calls use(std integral constant T) for a width that is known only at run time.
template <int T>
struct Width {
    static constexpr int value = T;
};
template <int kMaxTokens = kWidest, size_t I = 0, class Use>
INLINE void with_width(size_t width, Use&& use) {
    if constexpr (I < sizeof(kWidths) / sizeof(int) && kWidths[I] <= kMaxTokens) {
        if (width == static_cast<size_t>(kWidths[I])) return use(Width<kWidths[I]>{});
        with_width<kMaxTokens, I + 1>(width, static_cast<Use&&>(use));
    }
}

}  // namespace

}  // namespace paceline
