// Clusters of keys by direction: k-means from evenly spaced points, so that it depends on nothing
// but them.
#pragma once

#include "kernels/few_read_place.hpp"

namespace paceline {

namespace {

constexpr int kRounds = 10;  // of k-means
constexpr int kPointPanels = 2, kCentres = 4;  // that are compared together

INLINE size_t in_pairs(size_t points) { return (padded(points) + kPanel) / (2 * kPanel) * 2 * kPanel; }

struct ClusterScratch {
    float* rows;     // [points][padded D]
    float* inverse;  // [points]: one over the length
    float* centres;  // [centre][padded D]
    float* tiles;    // [tile of 4 centres][D][4]
    float* sums;     // [centre][padded D]
    int32_t* sizes;  // [centre]
};

INLINE size_t divide(const Points& points, size_t count, float* at, ClusterScratch* parts) {
    float* const begin = at;
    const auto take = [&](size_t floats) {
        float* start = at;
        at += padded(floats);
        return start;
    };
    const size_t width = padded(points.dim);
    parts->rows = take(points.size * width);
    parts->inverse = take(points.size);
    parts->centres = take(count * width);
    parts->tiles = take((count + kCentres) * points.dim);
    parts->sums = take(count * width);
    parts->sizes = (int32_t*)take(count);
    return static_cast<size_t>(at - begin);
}

static size_t cluster_bytes(const Points& points, size_t count) {
    ClusterScratch parts;
    return divide(points, count, nullptr, &parts) * sizeof(float);
}

INLINE float length_of(const float* row, size_t width) {
    F16 squares = splat(0.0f);
    for (size_t d = 0; d < width; d += kPanel) squares = fma(load(row + d), load(row + d), squares);
    const float length = __builtin_sqrtf(sum(squares));
    return length > 1e-12f ? length : 1e-12f;
}

static void lay_out(const Points& points, const ClusterScratch& parts) {
    const size_t width = padded(points.dim);
    std::memset(parts.rows, 0, points.size * width * sizeof(float));
    for (size_t i = 0; i < points.size; ++i) {
        const float* from = points.values + i / kPanel * kPanel * points.dim + i % kPanel;
        for (size_t d = 0; d < points.dim; ++d) parts.rows[i * width + d] = from[d * kPanel];
        parts.inverse[i] = 1.0f / length_of(parts.rows + i * width, width);
    }
}

// The centre with the largest product with each point; of equals the first.
static void assign(const Points& points, size_t count, const ClusterScratch& parts,
                   int32_t* labels) {
    const size_t dim = points.dim, width = padded(dim);
    for (size_t c = 0; c < (count + kCentres - 1) / kCentres * kCentres; ++c)
        for (size_t d = 0; d < dim; ++d)
            parts.tiles[(c / kCentres * dim + d) * kCentres + c % kCentres] =
                c < count ? parts.centres[c * width + d] : 0.0f;
    for (size_t first = 0; first < points.size; first += kPointPanels * kPanel) {
        const float* const values = points.values + first * dim;
        F16 best[kPointPanels], label[kPointPanels];
        for (F16& each : best) each = splat(-__builtin_inff());
        for (F16& each : label) each = splat(0.0f);
        for (size_t c = 0; c < count; c += kCentres) {
            const float* tile = parts.tiles + c * dim;
            F16 sums[kPointPanels][kCentres];
#pragma GCC unroll 4
            for (int p = 0; p < kPointPanels; ++p)
#pragma GCC unroll 4
                for (int t = 0; t < kCentres; ++t) sums[p][t] = splat(0.0f);
            for (size_t d = 0; d < dim; ++d)
#pragma GCC unroll 4
                for (int t = 0; t < kCentres; ++t) {
                    const F16 centre = splat(tile[d * kCentres + static_cast<size_t>(t)]);
#pragma GCC unroll 4
                    for (int p = 0; p < kPointPanels; ++p) {
                        const float* of = values + (static_cast<size_t>(p) * dim + d) * kPanel;
                        sums[p][t] = fma(load(of), centre, sums[p][t]);
                    }
                }
#pragma GCC unroll 4
            for (int t = 0; t < kCentres; ++t) {
                if (c + static_cast<size_t>(t) >= count) break;
                const F16 own = splat(static_cast<float>(c + static_cast<size_t>(t)));
#pragma GCC unroll 4
                for (int p = 0; p < kPointPanels; ++p) {
                    label[p] = where_less(best[p], sums[p][t], own, label[p]);
                    best[p] = max(sums[p][t], best[p]);
                }
            }
        }
        for (int p = 0; p < kPointPanels; ++p) {
            float found[kPanel];
            store(found, label[p]);
            const size_t begin = first + static_cast<size_t>(p) * kPanel;
            for (size_t i = 0; i < kPanel && begin + i < points.size; ++i)
                labels[begin + i] = static_cast<int32_t>(found[i]);
        }
    }
}

// Sums of the points of each cluster, of their directions or of themselves.
static void add_points(const Points& points, size_t count, const ClusterScratch& parts,
                       const int32_t* labels, bool directions) {
    const size_t width = padded(points.dim);
    std::memset(parts.sums, 0, count * width * sizeof(float));
    std::memset(parts.sizes, 0, count * sizeof(int32_t));
    for (size_t i = 0; i < points.size; ++i) {
        const auto label = static_cast<size_t>(labels[i]);
        const F16 scale = splat(directions ? parts.inverse[i] : 1.0f);
        float* to = parts.sums + label * width;
        for (size_t d = 0; d < width; d += kPanel)
            store(to + d, fma(load(parts.rows + i * width + d), scale, load(to + d)));
        ++parts.sizes[label];
    }
}

// Labels each point, and writes the mean of the points of each of `count` clusters, [panel][D][16];
// that of an empty one is 0.
static void cluster(const Points& points, size_t count, int32_t* labels, float* means,
                    void* scratch) {
    ClusterScratch parts;
    divide(points, count, static_cast<float*>(scratch), &parts);
    lay_out(points, parts);
    const size_t dim = points.dim, width = padded(dim), gaps = count > 1 ? count - 1 : 1;
    const auto set_centre = [&](size_t centre, const float* row, float scale) {
        for (size_t d = 0; d < width; ++d) parts.centres[centre * width + d] = row[d] * scale;
    };
    for (size_t c = 0; c < count; ++c) {
        const size_t from = c * (points.size - 1) / gaps;
        set_centre(c, parts.rows + from * width, parts.inverse[from]);
    }
    for (int round = 0; round < kRounds; ++round) {
        assign(points, count, parts, labels);
        add_points(points, count, parts, labels, true);
        for (size_t c = 0; c < count; ++c)
            if (parts.sizes[c])
                set_centre(c, parts.sums + c * width,
                           1.0f / length_of(parts.sums + c * width, width));
    }
    assign(points, count, parts, labels);
    add_points(points, count, parts, labels, false);
    std::memset(means, 0, padded(count) * dim * sizeof(float));
    for (size_t c = 0; c < count; ++c) {
        const float scale = 1.0f / static_cast<float>(parts.sizes[c] ? parts.sizes[c] : 1);
        for (size_t d = 0; d < dim; ++d)
            means[(c / kPanel * dim + d) * kPanel + c % kPanel] = parts.sums[c * width + d] * scale;
    }
}

// The keys of a panel of a block, [D][16].
template <class Number>
static void read_keys(const uint8_t* block, size_t panel, size_t head_dim, float* keys) {
    const uint8_t* from = block + panel * head_dim * Block<Number>::kStep;
    for (size_t d = 0; d < head_dim; ++d, from += Block<Number>::kStep) {
        F16 key;
        for (int i = 0; i < kParts; ++i) key.part[i] = Number::read(from, i, 0);
        if constexpr (Block<Number>::kScaled)
            key = key * load(Block<Number>::key_scales(block, head_dim) + panel * kPanel);
        store(keys + d * kPanel, key);
    }
}

}  // namespace

}  // namespace paceline
