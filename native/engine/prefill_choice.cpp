#include "engine/prefill_choice.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

namespace paceline {

namespace {

struct Parts {
    double *columns, *slashes, *sample;
    int32_t* order;
    uint8_t* read;
    float* mean;
    uint8_t *copies, *rest;
};

size_t divide(size_t blocks, size_t head_dim, size_t block_bytes, uint8_t* at, Parts* parts) {
    const size_t positions = blocks * kCacheBlock;
    uint8_t* const begin = at;
    const auto take = [&](size_t bytes) {
        uint8_t* const start = at;
        at += (bytes + 63) / 64 * 64;
        return start;
    };
    parts->columns = reinterpret_cast<double*>(take(positions * sizeof(double)));
    parts->slashes = reinterpret_cast<double*>(take((positions + kCacheBlock) * sizeof(double)));
    parts->sample = reinterpret_cast<double*>(take(positions * sizeof(double)));
    parts->order = reinterpret_cast<int32_t*>(take((positions + kCacheBlock) * sizeof(int32_t)));
    parts->read = take(positions);
    parts->mean = reinterpret_cast<float*>(take(padded(head_dim) * sizeof(float)));
    parts->copies = take(blocks * block_bytes);
    parts->rest = at;
    return static_cast<size_t>(at - begin);
}

// The larger value first, of equals the smaller index; what is no number comes last.
auto better(const double* values) {
    const auto value = [values](int32_t index) {
        const double found = values[index];
        return std::isnan(found) ? -std::numeric_limits<double>::infinity() : found;
    };
    return [value](int32_t one, int32_t other) {
        const double first = value(one), second = value(other);
        return first > second || (first == second && one < other);
    };
}

}  // namespace

size_t PrefillChoice::bytes(const CacheKernels& kernels, size_t blocks, size_t head_dim) {
    Parts parts;
    return divide(blocks, head_dim, kernels.block_bytes(head_dim), nullptr, &parts);
}

PrefillChoice::PrefillChoice(const SparsePrefill& rule, const CacheKernels& kernels,
                             const Attention& job, size_t own, uint8_t* memory)
    : rule_(rule),
      kernels_(kernels),
      job_(job),
      own_(own),
      begin_(rule.sinks * kCacheBlock),
      end_((own + 1 - rule.local) * kCacheBlock) {
    Parts parts;
    divide(own + 1, job.head_dim, kernels.block_bytes(job.head_dim), memory, &parts);
    columns_ = parts.columns;
    slashes_ = parts.slashes;
    sample_ = parts.sample;
    order_ = parts.order;
    read_ = parts.read;
    mean_ = parts.mean;
    copies_ = parts.copies;
    rest_ = parts.rest;
    std::fill_n(read_, own * kCacheBlock, uint8_t{1});
    std::fill(read_ + begin_, read_ + end_, uint8_t{0});
}

void PrefillChoice::choose(const PrefillHead& head) {
    switch (head.rule) {
        case PrefillRule::a_shape:
            take_near(head.first);
            break;
        case PrefillRule::vertical_slash:
            add_lines();
            take_slashes(head.second);
            take_columns(head.first);
            break;
        case PrefillRule::mean_blocks:
            take_blocks(head.first);
            break;
        default:
            take_runs(head.first);
    }
    fill();
}

const float* PrefillChoice::query(size_t node) const {
    return job_.queries + node * job_.query_stride + job_.first_head * job_.head_dim;
}

// Marks a position; returns how many were not marked before.
size_t PrefillChoice::take(size_t position) {
    const size_t fresh = !read_[position];
    read_[position] = 1;
    return fresh;
}

void PrefillChoice::take_near(size_t positions) {
    const size_t size = std::min(positions, end_ - begin_);
    std::fill(read_ + end_ - size, read_ + end_, uint8_t{1});
}

// What the samples give to each position, and to each distance.
void PrefillChoice::add_lines() {
    const size_t columns = (own_ + 1) * kCacheBlock;
    std::fill_n(columns_, columns, 0.0);
    std::fill_n(slashes_, columns, 0.0);
    Attention job = job_;
    job.count = 1;
    for (size_t sample = 0; sample < rule_.samples; ++sample) {
        const size_t node = (sample + 1) * kCacheBlock / rule_.samples - 1;
        const size_t position = own_ * kCacheBlock + node;
        job.first = node;
        std::fill_n(sample_, columns, 0.0);
        kernels_.add_mass(job, sample_, rest_);
        for (size_t column = 0; column <= position; ++column) {
            columns_[column] += sample_[column];
            slashes_[position - column] += sample_[column];
        }
    }
}

// Takes the distances with most attention until they have marked so many positions.
void PrefillChoice::take_slashes(size_t positions) {
    const size_t root = own_ * kCacheBlock;
    const size_t nearest = root - end_ + 1, farthest = root + kCacheBlock - 1 - begin_;
    const auto worse = [better = better(slashes_)](int32_t one, int32_t other) {
        return better(other, one);
    };
    int32_t* last = order_ + (farthest + 1 - nearest);
    std::iota(order_, last, static_cast<int32_t>(nearest));
    std::make_heap(order_, last, worse);
    for (size_t taken = 0; taken < positions && last > order_;) {
        std::pop_heap(order_, last--, worse);
        const auto distance = static_cast<size_t>(*last);
        const size_t first = std::max(begin_ + distance, root) - distance;
        const size_t behind = std::min(end_ + distance, root + kCacheBlock) - distance;
        for (size_t position = first; position < behind; ++position) taken += take(position);
    }
}

// Takes the unmarked positions with most attention.
void PrefillChoice::take_columns(size_t positions) {
    int32_t* last = order_;
    for (size_t position = begin_; position < end_; ++position)
        if (!read_[position]) *last++ = static_cast<int32_t>(position);
    int32_t* const taken = order_ + std::min(positions, static_cast<size_t>(last - order_));
    std::nth_element(order_, taken, last, better(columns_));
    for (const int32_t* at = order_; at < taken; ++at) take(static_cast<size_t>(*at));
}

// Takes the blocks whose mean key has the largest product with the mean query.
void PrefillChoice::take_blocks(size_t count) {
    std::fill_n(mean_, job_.head_dim, 0.0f);
    for (size_t node = 0; node < kCacheBlock; ++node)
        for (size_t d = 0; d < job_.head_dim; ++d) mean_[d] += query(node)[d];
    for (size_t d = 0; d < job_.head_dim; ++d) mean_[d] /= kCacheBlock;
    const size_t first = begin_ / kCacheBlock, behind = end_ / kCacheBlock;
    std::fill(columns_ + first, columns_ + behind, 0.0);
    for (size_t row = begin_; row < end_; row += kPanel) {
        alignas(64) float scores[kPanel];
        kernels_.score_run(job_, row, mean_, scores);
        columns_[row / kCacheBlock] += std::accumulate(scores, scores + kPanel, 0.0);
    }
    int32_t* const last = order_ + (behind - first);
    std::iota(order_, last, static_cast<int32_t>(first));
    int32_t* const taken = std::min(order_ + count, last);
    std::nth_element(order_, taken, last, better(columns_));
    for (const int32_t* block = order_; block < taken; ++block)
        std::fill_n(read_ + static_cast<size_t>(*block) * kCacheBlock, kCacheBlock, uint8_t{1});
}

// The largest score of a run of 16 keys with any of the samples.
double PrefillChoice::best_score(size_t run) const {
    alignas(64) float scores[kPanel];
    float best = -std::numeric_limits<float>::infinity();
    for (size_t sample = 0; sample < rule_.samples; ++sample) {
        kernels_.score_run(job_, run * kPanel,
                           query((sample + 1) * kCacheBlock / rule_.samples - 1), scores);
        best = std::max(best, *std::max_element(scores, scores + kPanel));
    }
    return best;
}

// Halves `count` ranges of runs, keeps the `count` best halves, and so on down to single runs.
void PrefillChoice::take_runs(size_t count) {
    const size_t first = begin_ / kPanel, runs = (end_ - begin_) / kPanel;
    if (count >= runs) return take_near(end_ - begin_);
    struct Range {
        size_t begin, end;
        double score;
    };
    std::vector<Range> ranges, halves;
    for (size_t i = 0; i < count; ++i)
        ranges.push_back({first + i * runs / count, first + (i + 1) * runs / count, 0.0});
    const auto wide = [](const Range& range) { return range.end - range.begin > 1; };
    while (std::any_of(ranges.begin(), ranges.end(), wide)) {
        halves.clear();
        for (const Range& range : ranges) {
            const size_t middle = range.begin + (range.end - range.begin + 1) / 2;
            halves.push_back({range.begin, middle, 0.0});
            if (middle < range.end) halves.push_back({middle, range.end, 0.0});
        }
        for (Range& half : halves)
            half.score = best_score(half.begin + (half.end - half.begin) / 2);
        std::stable_sort(halves.begin(), halves.end(), [](const Range& one, const Range& other) {
            return one.score > other.score;
        });
        halves.resize(std::min(halves.size(), count));
        std::sort(halves.begin(), halves.end(), [](const Range& one, const Range& other) {
            return one.begin < other.begin;
        });
        ranges.swap(halves);
    }
    for (const Range& range : ranges)
        std::fill_n(read_ + range.begin * kPanel, kPanel, uint8_t{1});
}

// Marks the last unmarked positions until all that is marked makes whole blocks.
void PrefillChoice::fill() {
    const size_t marked = static_cast<size_t>(std::count(read_ + begin_, read_ + end_, 1));
    size_t left = (kCacheBlock - marked % kCacheBlock) % kCacheBlock;
    for (size_t position = end_; left && position-- > begin_;) left -= take(position);
}

void PrefillChoice::copy(std::span<const int32_t> positions, uint8_t* to) const {
    for (size_t place = 0, count = 0; place < positions.size(); place += count) {
        const auto from = static_cast<size_t>(positions[place]);
        const size_t room = kPanel - std::max(place % kPanel, from % kPanel);
        for (count = 1; count < room && place + count < positions.size() &&
                        static_cast<size_t>(positions[place + count]) == from + count;)
            ++count;
        kernels_.copy(job_.pages[from / kCacheBlock] + job_.offset, from % kCacheBlock, to, place,
                      count, job_.head_dim);
    }
}

size_t PrefillChoice::list(const uint8_t** pages) {
    size_t listed = 0, apart = 0;
    for (size_t block = 0; block < own_; ++block) {
        const uint8_t* const read = read_ + block * kCacheBlock;
        if (std::all_of(read, read + kCacheBlock, [](uint8_t one) { return one; })) {
            pages[listed++] = job_.pages[block] + job_.offset;
            continue;
        }
        for (size_t place = 0; place < kCacheBlock; ++place)
            if (read[place]) order_[apart++] = static_cast<int32_t>(block * kCacheBlock + place);
    }
    uint8_t* to = copies_;
    for (size_t begin = 0; begin < apart; begin += kCacheBlock) {
        copy({order_ + begin, kCacheBlock}, to);
        pages[listed++] = to;
        to += kernels_.block_bytes(job_.head_dim);
    }
    return listed;
}

}  // namespace paceline
