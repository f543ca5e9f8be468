// What a block of a prompt's queries reads in one head, position by position.
//
// MInference (Jiang et al. 2024, "MInference 1.0", section 3) gives heads one of three patterns: the
// positions just before (A-shape), columns and diagonals (vertical-slash), or blocks whose mean keys
// fit the mean query. HiP (Lee et al. 2024, "HiP Attention", section 3) searches a tree of ranges
// for the runs of keys that fit best. What is chosen depends on the block's own queries and the
// keys before it alone.
#pragma once

#include <span>

#include "engine/model.hpp"

namespace paceline {

class PrefillChoice {
public:
    // Working memory for `blocks` blocks of keys, of heads of `head_dim`.
    static size_t bytes(const CacheKernels& kernels, size_t blocks, size_t head_dim);

    // `job` is what the block's 64 queries would read in full: its `queries` are theirs, its own
    // page is number `own`.
    PrefillChoice(const SparsePrefill& rule, const CacheKernels& kernels, const Attention& job,
                  size_t own, uint8_t* memory);

    // Chooses for a head; there is something to choose from.
    void choose(const PrefillHead& head);

    // Lists the blocks [own] of this head that hold what was chosen, those that are not whole in
    // copies; returns how many.
    size_t list(const uint8_t** pages);

    // Memory that later kernels may use.
    uint8_t* rest() const { return rest_; }

private:
    const float* query(size_t node) const;
    void add_lines();
    void take_near(size_t positions);
    void take_slashes(size_t positions);
    void take_columns(size_t positions);
    void take_blocks(size_t count);
    void take_runs(size_t count);
    double best_score(size_t run) const;
    size_t take(size_t position);
    void fill();
    void copy(std::span<const int32_t> positions, uint8_t* to) const;

    const SparsePrefill& rule_;
    const CacheKernels& kernels_;
    Attention job_;
    const size_t own_, begin_, end_;  // what there is to choose from: positions begin .. end - 1
    double* columns_;                 // [positions]
    double* slashes_;                 // [positions + 64], by distance
    double* sample_;                  // [positions]
    int32_t* order_;                  // [positions]
    uint8_t* read_;                   // [positions]
    float* mean_;                     // [D]
    uint8_t* copies_;                 // [own] blocks
    uint8_t* rest_;
};

}  // namespace paceline
