// Matrix products with weights in panels of sixteen output rows: how the work is cut.
//
// Lanes lie across output rows and every output is one sum over the inputs, in order, whatever
// the number of tokens: its bits depend on its own row and token alone. Sums that do not stay in
// registers wait in memory, which changes no bit.
//
// A format W goes through the inputs in steps:
//   kInputs      inputs of a step
//   kStep        bytes that a panel holds for a step
//   kCompact     weights take less than four bytes
//   kMaxTokens   tokens of the widest tile
//   panels(T)    panels that are multiplied together with a tile of T tokens: 4, 2 or 1
//   kSpan        words that a token has for a step, after `arrange`
//   tile<P, T>() P panels times T tokens
//   words(x, n), scales(x) the tiles and the tokens' scales (or null) in what `arrange` made
//   total(sums, panel)     sixteen sums as floats
#pragma once

#include "kernels/math.hpp"
#include "kernels/tiles.hpp"

namespace paceline {

namespace {

constexpr size_t kBlock = 256;  // inputs that several tiles use before the next ones are read
constexpr size_t kUnit = 4;     // panels between two epilogues; even, for gate and up

// Tiles that compute enough for what is fetched to be wanted soon.
template <int T>
constexpr bool fetches_near = T > (kParts == 1 ? 4 : 1);

// How far ahead of a tile of T tokens memory is fetched, in bytes; found by measuring. Long panels
// are fetched a little ahead, or left to the machine, which foresees a plain stream by itself;
// short panels end before it does, so the next ones are fetched.
template <class W, int T>
INLINE size_t fetch_distance(size_t panel_bytes) {
    constexpr size_t kLong = T == 1 || T > 4 ? size_t{1} << 15 : size_t{1} << 18;
    constexpr bool kNextPanels = W::kCompact && (kParts == 1 || T == 1);
    if (kNextPanels && panel_bytes < kLong) return W::panels(T) * panel_bytes;
    return fetches_near<T> ? 4096 : 0;
}

// What to fetch while a tile is multiplied: `step` bytes further at each step.
struct Ahead {
    const uint8_t* from;
    size_t step;
};

// Where the sums of a tile are: [P][stride], T sums of 16 lanes each.
struct Sums {
    float* at;
    size_t stride;
    bool resume;  // go on with what is there
};

INLINE float* place(Sums sums, int panel, int token) {
    return sums.at + panel * sums.stride + token * kPanel;
}

// use(panel, token, part) for each register of sums, N parts of each; unrolled.
template <int P, int T, int N = kParts, class Use>
INLINE void each(Use&& use) {
#pragma GCC unroll 32
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 32
        for (int t = 0; t < T; ++t)
#pragma GCC unroll 32
            for (int i = 0; i < N; ++i) use(p, t, i);
}

// `panels` times one tile, P at a time and the rest one by one.
template <class W, int T>
INLINE void multiply_panels(const uint8_t* from, size_t panel_bytes, size_t panels,
                            const typename W::Word* x, size_t steps, Sums sums, Ahead ahead) {
    constexpr int P = W::panels(T);
    size_t done = 0;
    for (; done + P <= panels; done += P) {
        W::template tile<P, T>(from + done * panel_bytes, panel_bytes, x, steps, sums, ahead);
        sums.at += P * sums.stride;
        ahead.from += P * panel_bytes;
    }
    for (; done < panels; ++done) {
        W::template tile<1, T>(from + done * panel_bytes, panel_bytes, x, steps, sums, ahead);
        sums.at += sums.stride;
        ahead.from += panel_bytes;
    }
}

INLINE void finish_lane(const Product& job, float* to, size_t row, F16 value) {
    if (job.softcap != 0.0f) value = softcap(value, job.softcap);
    if (row + kPanel <= job.rows) return store(to, value);
    float lanes[kPanel];
    store(lanes, value);
    for (size_t i = 0; row + i < job.rows; ++i) to[i] = lanes[i];
}

// Scale, bias, activation and gate; sums of `panels` panels from `panel` on go to `out`.
template <class W>
static void finish(const Product& job, size_t panel, size_t panels, Sums sums) {
    const float* scales = W::scales(job.x);
    const size_t every = job.gated ? 2 : 1;
    for (size_t p = 0; p < panels; p += every) {
        const size_t row = (panel + p) / every * kPanel;
        const float* bias = job.bias ? job.bias + (panel + p) * kPanel : nullptr;
        for (size_t t = 0; t < job.n; ++t) {
            const auto total = [&](size_t other) {
                F16 value = W::total(sums.at + (p + other) * sums.stride + t * kPanel,
                                     job.panels + (panel + p + other) * job.panel_bytes);
                if (scales) value = value * splat(scales[t]);
                if (bias) value = value + load(bias + other * kPanel);
                return value;
            };
            F16 value = activate(total(0), job.activation);
            if (job.gated) value = value * total(1);
            if (job.times_out) value = value * load(job.out + t * job.stride + row);
            finish_lane(job, job.out + t * job.stride + row, row, value);
        }
    }
}

template <class W>
static size_t multiply_scratch(size_t n) {
    return kUnit * room(tiling(n, W::kMaxTokens)) * kPanel * sizeof(float);
}

template <class W>
static void multiply_one_tile(const Product& job, size_t first, size_t last, float* scratch,
                              const Tiling& tiles) {
    const auto* x = W::words(job.x, job.n);
    const size_t steps = (job.inputs + W::kInputs - 1) / W::kInputs;
    const Sums sums{scratch, tiles.width * kPanel, false};
    for (size_t panel = first; panel < last; panel += kUnit) {
        const size_t panels = last - panel < kUnit ? last - panel : kUnit;
        const uint8_t* from = job.panels + panel * job.panel_bytes;
        with_width<W::kMaxTokens>(tiles.width, [&](auto t) {
            constexpr int T = decltype(t)::value;
            multiply_panels<W, T>(from, job.panel_bytes, panels, x, steps, sums,
                                  {from + fetch_distance<W, T>(job.panel_bytes), W::kStep});
        });
        finish<W>(job, panel, panels, sums);
    }
}

// Many tiles: a block of weights stays in the cache until all have used it, while the next one
// is fetched.
template <class W>
static void multiply_tiles(const Product& job, size_t first, size_t last, float* scratch,
                           const Tiling& tiles) {
    const auto* x = W::words(job.x, job.n);
    const size_t steps = (job.inputs + W::kInputs - 1) / W::kInputs;
    constexpr size_t P = W::panels(kBulk), kSteps = kBlock / W::kInputs;
    const size_t stride = room(tiles) * kPanel;
    for (size_t panel = first; panel < last; panel += kUnit) {
        const size_t panels = last - panel < kUnit ? last - panel : kUnit;
        for (size_t group = 0; group < panels; group += P) {
            const size_t grouped = panels - group < P ? panels - group : P;
            const uint8_t* from = job.panels + (panel + group) * job.panel_bytes;
            for (size_t step = 0; step < steps; step += kSteps) {
                const size_t count = steps - step < kSteps ? steps - step : kSteps;
                const uint8_t* block = from + step * W::kStep;
                for (size_t tile = 0; tile < tiles.count; ++tile) {
                    const size_t width = tiles.width_of(tile), start = tile * tiles.width;
                    const size_t part = W::kStep / tiles.count;
                    const Ahead ahead{block + count * (W::kStep + tile * part), part};
                    const Sums sums{scratch + group * stride + start * kPanel, stride, step > 0};
                    with_width<W::kMaxTokens>(width, [&](auto t) {
                        multiply_panels<W, decltype(t)::value>(
                            block, job.panel_bytes, grouped,
                            x + W::kSpan * (start * steps + step * width), count, sums, ahead);
                    });
                }
            }
        }
        finish<W>(job, panel, panels, {scratch, stride, false});
    }
}

template <class W>
static void multiply(const Product& job, size_t first, size_t last, void* scratch) {
    const Tiling tiles = tiling(job.n, W::kMaxTokens);
    if (tiles.count == 1)
        multiply_one_tile<W>(job, first, last, static_cast<float*>(scratch), tiles);
    else
        multiply_tiles<W>(job, first, last, static_cast<float*>(scratch), tiles);
}

}  // namespace

}  // namespace paceline
