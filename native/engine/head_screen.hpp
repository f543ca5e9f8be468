// A coarse copy of the head. It gives every logit of a pass approximately, with a rigorous bound of
// the difference to the logit that the head itself would give; few rows can then win a draw, and
// only those are computed; see screened_logits.hpp.
//
// What a block b of 32 inputs misses: with weights w, their copy v, activations x as the head's
// product rounds them and y as this one does,
//   w x - v y = (w - v) y + w (x - y), at most |w - v| |y| + |w| |x - y|  (Cauchy and Schwarz).
// The copy holds |w - v| + kDrift |w| for each block of each row, and a pass has for each block of
// a token the size max(|y|, |x - y| / kDrift).
#pragma once

#include <memory>
#include <vector>

#include "engine/matrix.hpp"
#include "kernels/kernels.hpp"
#include "support/thread_pool.hpp"

namespace paceline {

class HeadScreen {
public:
    // Whether a head can be screened: one matrix of more than six bits, no bias.
    static bool fits(const FusedMatrix& head, float softcap);
    // Copies the head. Null: its weights are too large or too small for bounds.
    static std::unique_ptr<HeadScreen> copy(const Matrix& head, size_t rows,
                                            const ScreenKernels& kernels, Pool& pool);

    size_t bytes() const { return data_.size(); }
    size_t panels() const { return panels_; }
    size_t rows() const { return rows_; }

    // Bytes of n rows of activations, arranged.
    size_t arranged_bytes(size_t n) const;
    // Arranges row `row` of n [stride]. False: it is too large or too small for bounds.
    bool arrange(const float* from, size_t row, size_t n, void* arranged) const;
    // Writes coarse logits and bounds [n][rows] of panels first .. last - 1.
    void multiply(const void* arranged, size_t n, float* out, uint16_t* bounds, size_t first,
                  size_t last) const;

    static constexpr float kDrift = 0.0075f;  // typical of activations of eight bits

private:
    HeadScreen(const Matrix& head, size_t rows, const ScreenKernels& kernels);
    double head_rounding(float largest_in_row, float largest, float scale) const;

    const Matrix& head_;
    const ScreenKernels& kernels_;
    const size_t rows_, inputs_, panels_;
    Buffer data_;
};

}  // namespace paceline
