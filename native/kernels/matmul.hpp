// Matrix products with weights in panels of sixteen output rows, [K][16] each.
//
// Lanes lie across output rows and every output is one sum over K, in order, whatever the number
// of tokens: its bits depend on its own row and token alone. Sums that do not stay in registers
// wait in memory, which changes no bit.
#pragma once

#include "math.hpp"
#include "tiles.hpp"

namespace {

constexpr size_t kBlock = 256;  // inputs that several tiles use before the next ones are read
constexpr size_t kUnit = 4;     // panels between two epilogues; even, for gate and up

struct Fp32Weights {
    static constexpr size_t kStep = kPanel * sizeof(float);  // bytes at each input
    static Reg part(const uint8_t* from, int part) { return load_part((const float*)from, part); }
};

// What to fetch while a tile is multiplied: `step` bytes further at each input.
struct Ahead {
    const uint8_t* from;
    size_t step;
};

// P panels times T tokens over `count` inputs. sums: [P][sums_stride], T sums of 16 lanes each.
template <class W, int P, int T>
static void multiply_tile(const uint8_t* panels, size_t panel_bytes, const float* x, size_t count,
                          float* sums, size_t sums_stride, bool resume, Ahead ahead) {
    Reg sum[P][T][kParts];
#pragma GCC unroll 32
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 32
        for (int t = 0; t < T; ++t)
#pragma GCC unroll 32
            for (int i = 0; i < kParts; ++i)
                sum[p][t][i] = resume ? load_part(sums + p * sums_stride + t * kPanel, i) : Reg{};
    const uint8_t* fetch = ahead.from;
    for (size_t k = 0; k < count; ++k) {
        Reg w[P][kParts];
#pragma GCC unroll 32
        for (int p = 0; p < P; ++p) {
#pragma GCC unroll 32
            for (int i = 0; i < kParts; ++i) w[p][i] = W::part(panels + p * panel_bytes, i);
            __builtin_prefetch(fetch + p * panel_bytes, 0, 3);
        }
        panels += W::kStep;
        fetch += ahead.step;
#pragma GCC unroll 32
        for (int t = 0; t < T; ++t) {
            const Reg value = x[t] - Reg{};
#pragma GCC unroll 32
            for (int p = 0; p < P; ++p)
#pragma GCC unroll 32
                for (int i = 0; i < kParts; ++i)
                    sum[p][t][i] = reg_fma(w[p][i], value, sum[p][t][i]);
        }
        x += T;
    }
#pragma GCC unroll 32
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 32
        for (int t = 0; t < T; ++t)
#pragma GCC unroll 32
            for (int i = 0; i < kParts; ++i)
                store_part(sums + p * sums_stride + t * kPanel, i, sum[p][t][i]);
}

// `panels` times one tile, P at a time and the rest one by one.
template <class W, int T>
INLINE void multiply_panels(const uint8_t* from, size_t panel_bytes, size_t panels, const float* x,
                            size_t count, float* sums, size_t sums_stride, bool resume,
                            Ahead ahead) {
    constexpr int P = panels_for(T);
    size_t done = 0;
    for (; done + P <= panels; done += P) {
        multiply_tile<W, P, T>(from + done * panel_bytes, panel_bytes, x, count,
                               sums + done * sums_stride, sums_stride, resume, ahead);
        ahead.from += P * panel_bytes;
    }
    for (; done < panels; ++done) {
        multiply_tile<W, 1, T>(from + done * panel_bytes, panel_bytes, x, count,
                               sums + done * sums_stride, sums_stride, resume, ahead);
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

// Bias, activation and gate; sums of `panels` panels from `panel` on go to `out`.
static void finish(const Product& job, size_t panel, size_t panels, const float* sums,
                   size_t sums_stride) {
    const size_t every = job.gated ? 2 : 1;
    for (size_t p = 0; p < panels; p += every) {
        const size_t row = (panel + p) / every * kPanel;
        const float* bias = job.bias ? job.bias + (panel + p) * kPanel : nullptr;
        for (size_t t = 0; t < job.n; ++t) {
            const float* from = sums + p * sums_stride + t * kPanel;
            F16 value = load(from);
            if (bias) value = value + load(bias);
            value = activate(value, job.activation);
            if (job.gated) {
                F16 up = load(from + sums_stride);
                if (bias) up = up + load(bias + kPanel);
                value = value * up;
            }
            finish_lane(job, job.out + t * job.stride + row, row, value);
        }
    }
}

static size_t multiply_scratch(size_t n) {
    return kUnit * room(tiling(n)) * kPanel * sizeof(float);
}

template <class W>
static void multiply_one_tile(const Product& job, size_t first, size_t last, float* sums,
                              size_t width) {
    const float* x = static_cast<const float*>(job.x);
    const size_t sums_stride = width * kPanel;
    for (size_t panel = first; panel < last; panel += kUnit) {
        const size_t panels = last - panel < kUnit ? last - panel : kUnit;
        const uint8_t* from = job.panels + panel * job.panel_bytes;
        with_width(width, [&](auto t) {
            multiply_panels<W, decltype(t)::value>(from, job.panel_bytes, panels, x, job.inputs,
                                                   sums, sums_stride, false,
                                                   {from + 16 * W::kStep, W::kStep});
        });
        finish(job, panel, panels, sums, sums_stride);
    }
}

// Many tiles: a block of weights stays in the cache until all have used it, while the next one
// is fetched.
template <class W>
static void multiply_tiles(const Product& job, size_t first, size_t last, float* sums,
                           const Tiling& tiles) {
    const float* x = static_cast<const float*>(job.x);
    const size_t sums_stride = room(tiles) * kPanel;
    constexpr size_t P = panels_for(kBulk);
    for (size_t panel = first; panel < last; panel += kUnit) {
        const size_t panels = last - panel < kUnit ? last - panel : kUnit;
        for (size_t group = 0; group < panels; group += P) {
            const size_t grouped = panels - group < P ? panels - group : P;
            const uint8_t* from = job.panels + (panel + group) * job.panel_bytes;
            for (size_t k = 0; k < job.inputs; k += kBlock) {
                const size_t count = job.inputs - k < kBlock ? job.inputs - k : kBlock;
                for (size_t tile = 0; tile < tiles.count; ++tile) {
                    const size_t width = tiles.width_of(tile);
                    const size_t start = tile * tiles.width;
                    const Ahead ahead{from + (k + count) * W::kStep + tile * count * W::kStep / tiles.count,
                                      W::kStep / tiles.count};
                    with_width(width, [&](auto t) {
                        multiply_panels<W, decltype(t)::value>(
                            from + k * W::kStep, job.panel_bytes, grouped,
                            x + start * job.inputs + k * width, count,
                            sums + group * sums_stride + start * kPanel, sums_stride, k > 0,
                            ahead);
                    });
                }
            }
        }
        finish(job, panel, panels, sums, sums_stride);
    }
}

template <class W>
static void multiply(const Product& job, size_t first, size_t last, void* scratch) {
    const Tiling tiles = tiling(job.n);
    float* sums = static_cast<float*>(scratch);
    if (tiles.count == 1) return multiply_one_tile<W>(job, first, last, sums, tiles.width);
    multiply_tiles<W>(job, first, last, sums, tiles);
}

static size_t panel_bytes_fp32(size_t inputs) { return inputs * Fp32Weights::kStep; }

static void pack_fp32(const float* weights, size_t rows, size_t inputs, uint8_t* panel) {
    float* to = (float*)panel;
    for (size_t k = 0; k < inputs; ++k)
        for (size_t row = 0; row < kPanel; ++row)
            to[k * kPanel + row] = row < rows ? weights[row * inputs + k] : 0.0f;
}

static void unpack_fp32(const uint8_t* panel, size_t lane, size_t inputs, float scale, float* out) {
    const float* from = (const float*)panel + lane;
    for (size_t k = 0; k < inputs; ++k) out[k] = from[k * kPanel] * scale;
}

static const FormatKernels fp32_kernels = {
    panel_bytes_fp32, pack_fp32,       unpack_fp32,     arranged_float_bytes,
    arrange_floats,   multiply<Fp32Weights>, multiply_scratch,
};

}  // namespace
