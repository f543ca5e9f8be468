// Coarse logits of a pass, of which the rows that decide a draw are computed exactly when asked for.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "engine/model.hpp"

namespace paceline {

// What a draw is made with: score = logit / temperature + noise.
struct DrawRule {
    float temperature = 1.0f;
    std::optional<uint64_t> noise;  // where its stream starts; none: the scores are without
};

// Tokens in ascending order and their logits, to the bit those of the whole head.
struct ExactLogits {
    std::vector<int32_t> tokens;
    std::vector<float> logits;
};

// One screened pass. Its functions must not be called after the model's next pass.
class ScreenedLogits {
public:
    // `values` and `bounds` [n][V] of the coarse product; `states` [n][stride] are copied.
    ScreenedLogits(Model& model, size_t n, const float* states, size_t stride, float* values,
                   uint16_t* bounds, std::vector<uint8_t> bounded);

    // All tokens that can have the best score of a row. None: so many that the whole row
    // is no dearer.
    std::optional<ExactLogits> contenders(size_t row, const DrawRule& rule);
    // All tokens whose logit is at least `least`, or none as above.
    std::optional<ExactLogits> at_least(size_t row, float least);
    // Makes every logit of a row exact, in place.
    void complete(size_t row);

    size_t rows() const { return n_; }
    // Panels of the head that were computed for all rows so far.
    size_t panels_read() const { return panels_read_; }

private:
    class Search;
    std::optional<ExactLogits> run(size_t row, const DrawRule& rule, std::optional<float> least);

    Model& model_;
    const size_t n_;
    float* values_;
    uint16_t* bounds_;
    const std::vector<uint8_t> bounded_;  // rows of states that bounds hold for
    size_t stride_, arranged_room_, panels_read_ = 0;
    Buffer states_, arranged_;
    std::vector<bool> ready_;  // rows that `arranged_` holds
};

}  // namespace paceline
