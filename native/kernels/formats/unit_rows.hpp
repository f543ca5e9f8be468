// What formats share whose panels are sixteen rows, one behind the other; see unit_codes.hpp.
//
// A format W says
//   header(inputs, group)   bytes of a row before its codes
//   Plan(job)               what all rows of a product share
//   kSpare                  floats of a token that `multiply_row` needs for itself
//   multiply_row(job, plan, row, out, spare)   sums of a row, those of neighbouring tokens kPanel floats
//                           apart
//   unpack_row(row, inputs, group, out)   the weights of a row
//   arranged_bytes, arrange, scales       as everywhere
#pragma once

#include "kernels/formats/unit_codes.hpp"

namespace paceline {

namespace {

constexpr size_t kRowFetch = 2048;  // bytes ahead of the codes that are fetched

// As `sum`: lanes are folded in halves, in registers.
INLINE float fold(F16 v) {
    using Four = float __attribute__((vector_size(16), may_alias));
    Four four;
#if defined(__AVX512F__)
    alignas(64) float lanes[kPanel];
    store(lanes, v);
    const __m256 half = _mm256_load_ps(lanes) + _mm256_load_ps(lanes + kPanel / 2);
    four = (Four)_mm256_castps256_ps128(half) + (Four)_mm256_extractf128_ps(half, 1);
#elif defined(__AVX2__)
    const __m256 half = (__m256)(v.part[0] + v.part[1]);
    four = (Four)_mm256_castps256_ps128(half) + (Four)_mm256_extractf128_ps(half, 1);
#else
    four = (Four)((v.part[0] + v.part[2]) + (v.part[1] + v.part[3]));
#endif
    return (four[0] + four[2]) + (four[1] + four[3]);
}

// Calls use(Width<T>, token) for tiles of up to kMost tokens; what a token's sums are depends on none.
template <size_t kMost, class Use>
INLINE void in_tiles(size_t n, Use&& use) {
    for (size_t token = 0; token < n;) {
        const size_t left = n - token;
        if constexpr (kMost >= 6) {
            if (left >= 6) {
                use(Width<6>{}, token);
                token += 6;
                continue;
            }
        }
        if constexpr (kMost >= 3) {
            if (left >= 3) {
                use(Width<3>{}, token);
                token += 3;
                continue;
            }
        }
        if constexpr (kMost >= 3) {
            if (left == 2) {
                use(Width<2>{}, token);
                token += 2;
                continue;
            }
        }
        use(Width<1>{}, token);
        ++token;
    }
}

// The code of input k of a row.
template <int kBits>
INLINE int code_at(const uint8_t* codes, size_t k) {
    const uint8_t* unit = codes + k / kUnitInputs * UnitCodes<kBits>::kBytes;
    const auto lane = static_cast<int>(k % kPanel), sixteen = static_cast<int>(k / kPanel % 4);
    return UnitCodes<kBits>::get(unit, sixteen, lane / kRegLanes)[lane % kRegLanes];
}

template <class W>
struct UnitRows {
    static size_t row_bytes(size_t inputs, size_t group) {
        return W::header(inputs, group) + units_of(inputs) * W::Codes::kBytes;
    }
    static size_t panel_bytes(size_t inputs, size_t group) {
        return kPanel * row_bytes(inputs, group);
    }
    static size_t scratch_bytes(size_t n) {
        return n * (kUnit * kPanel + W::kSpare) * sizeof(float);
    }

    // What `finish` asks for.
    static const float* scales(const void* x) { return W::scales(x); }
    static F16 total(const float* sums, const uint8_t*) { return load(sums); }

    static void multiply(const Product& job, size_t first, size_t last, void* scratch) {
        const Sums sums{static_cast<float*>(scratch), job.n * kPanel, false};
        const typename W::Plan plan(job);
        float* spare = sums.at + kUnit * sums.stride;
        const size_t row_size = job.panel_bytes / kPanel;
        for (size_t panel = first; panel < last; panel += kUnit) {
            const size_t panels = last - panel < kUnit ? last - panel : kUnit;
            const uint8_t* row = job.panels + panel * job.panel_bytes;
            for (size_t i = 0; i < panels * kPanel; ++i, row += row_size)
                W::multiply_row(job, plan, row, sums.at + i / kPanel * sums.stride + i % kPanel,
                                spare);
            finish<UnitRows>(job, panel, panels, sums);
        }
    }

    static bool load_blocks(const uint8_t* rows, size_t row_stride, size_t count, size_t,
                            uint8_t* panel) {
        std::memcpy(panel, rows, count * row_stride);
        std::memset(panel + count * row_stride, 0, (kPanel - count) * row_stride);
        return true;
    }

    static void unpack(const uint8_t* panel, size_t lane, size_t inputs, size_t group, float scale,
                       float* out) {
        W::unpack_row(panel + lane * row_bytes(inputs, group), inputs, group, out);
        for (size_t k = 0; k < inputs; ++k) out[k] *= scale;
    }

    static void copy(const uint8_t* panel, size_t lane, size_t inputs, size_t group, uint8_t* to,
                     size_t to_lane) {
        const size_t bytes = row_bytes(inputs, group);
        std::memcpy(to + to_lane * bytes, panel + lane * bytes, bytes);
    }
};

template <class W>
constexpr FormatKernels row_format(const char* name) {
    using Rows = UnitRows<W>;
    FormatKernels kernels{};
    kernels.name = kernels.head = name;
    kernels.for_heads = kernels.grouped = true;
    kernels.panel_bytes = Rows::panel_bytes;
    kernels.load_blocks = Rows::load_blocks;
    kernels.unpack = Rows::unpack;
    kernels.copy = Rows::copy;
    kernels.product = {W::arranged_bytes, W::arrange, Rows::multiply, Rows::scratch_bytes};
    return kernels;
}

}  // namespace

}  // namespace paceline
