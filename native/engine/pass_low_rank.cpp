// Products with matrices some of which have low-rank terms beside them: y = W x + L (R x).
//
// Both are computed apart and added; activation and gate come behind the sum. Each row of results is
// that of its own row of inputs, as everywhere.

#include <algorithm>

#include "engine/pass.hpp"
#include "kernels/isa.hpp"

namespace paceline {

// Widest rows that low-rank terms need: between the factors, of their results, and of the weights'
// results before activation and gate.
void Pass::reserve_low_rank() {
    const auto widen = [&](const FusedMatrix& fused, bool activates) {
        if (!fused.low_rank) return;
        thin_ = std::max(thin_, fused.low_rank->width());
        added_ = std::max(added_, fused.panels() * kPanel);
        if (activates) plain_ = std::max(plain_, fused.panels() * kPanel);
        for (const Matrix& matrix : fused.low_rank->right) reserve_product(matrix);
        for (const Matrix& matrix : fused.low_rank->left) reserve_product(matrix);
    };
    for (const size_t i : layers_) {
        const LayerWeights& weights = model_.weights.layers[i];
        for (const FusedMatrix* fused : {&weights.qkv, &weights.o, &weights.down})
            widen(*fused, false);
        widen(weights.gate_up, true);
    }
    if (!thin_) return;
    work_.thin.reserve(n_ * thin_ * sizeof(float));
    work_.added.reserve(n_ * added_ * sizeof(float));
    work_.plain.reserve(n_ * plain_ * sizeof(float));
}

void Pass::reserve_product(const Matrix& matrix) {
    low_rank_scratch_ = std::max(low_rank_scratch_, matrix.product->scratch_bytes(n_));
    low_rank_arranged_ = std::max(low_rank_arranged_, arranged_bytes(matrix));
}

// The products of one fused matrix with `rows`, and what follows from its low-rank terms.
void Pass::multiply_fused(Stage part, const FusedMatrix& fused, const Buffer& rows, size_t stride,
                          Product job) {
    if (!fused.low_rank) return multiply_later(part, fused.matrices(), fused.bias, rows, stride, job);
    const LowRank& low_rank = *fused.low_rank;
    const bool activates = job.gated || job.activation != Activation::none;
    const size_t index = sums_.size();
    sums_.push_back({&fused, job.activation, job.gated, job.out, job.stride});
    if (activates) {
        sums_.back().to = work_.plain.floats();
        sums_.back().stride = plain_;
        job.activation = Activation::none;
        job.gated = false;
        job.out = work_.plain.floats();
        job.stride = plain_;
        job.rows = fused.panels() * kPanel;
    }
    multiply_later(part, low_rank.right, {}, rows, stride,
                   {.out = work_.thin.floats(), .stride = thin_, .rows = padded(low_rank.parts[0].rank)});
    for (size_t i = 0; i < low_rank.parts.size(); ++i) {
        const LowRank::Part& one = low_rank.parts[i];
        multiply_later(part, {&low_rank.left[i], 1}, {}, work_.thin, thin_,
                       {.out = work_.added.floats() + one.begin * kPanel,
                        .stride = added_,
                        .rows = padded(one.rows)},
                       {}, low_rank.place(i));
    }
    multiply_later(part, fused.matrices(), fused.bias, rows, stride, job);
    add(part, &Pass::add_low_rank, index, n_, 1);
    if (activates) sums_.back().out = work_.wide.floats();
}

// Adds the low-rank terms of some rows, then applies activation and gate.
void Pass::add_low_rank(size_t index, size_t chunk, size_t chunks, Buffer& scratch) {
    const LowRankSum& sum = sums_[index];
    const auto [begin, end] = chunk_range(n_, chunk, chunks);
    for (size_t i = begin; i < end; ++i) {
        float* to = sum.to + i * sum.stride;
        const float* added = row(work_.added, i, added_);
        for (const LowRank::Part& part : sum.fused->low_rank->parts)
            kernels_.add(to + part.begin * kPanel, added + part.begin * kPanel, padded(part.rows));
        if (sum.out) activate_row(sum, to, sum.out + i * wide_, scratch);
    }
}

// A product with no inputs is its bias: activation and gate of what has been summed are its epilogue.
void Pass::activate_row(const LowRankSum& sum, const float* plain, float* out,
                        Buffer& scratch) const {
    const size_t panels = sum.fused->panels() / (sum.gated ? 2 : 1);
    if (sum.gated) std::copy_n(plain + panels * kPanel, panels * kPanel, out);
    Product job;
    job.panels = scratch.bytes();
    job.x = scratch.bytes();
    job.n = 1;
    job.bias = plain;
    job.activation = sum.activation;
    job.times_out = sum.gated;
    job.out = out;
    job.stride = wide_;
    job.rows = panels * kPanel;
    find_format(kernels_, "fp32").product.multiply(job, 0, panels, scratch.bytes());
}

}  // namespace paceline
