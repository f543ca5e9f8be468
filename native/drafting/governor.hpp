// Arithmetic that sizes draft trees in every pass: calibrated path probabilities, the best nodes of
// all trees, and the time of a pass. `decoding/governor.py` decides with them.

#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace paceline {

// The nodes of a tree. A parent comes before its children; the root's parent is -1.
struct Nodes {
    const int32_t* parents;
    const float* scores;
    const int16_t* origins;
    size_t count;
};

// How often drafted tokens are accepted relative to their scores, by origin and depth. Counts decay
// with every tree that is learned from; `prior` drafted tokens that are accepted as predicted damp
// the start.
class AcceptanceRates {
public:
    AcceptanceRates(double decay, double prior) : decay_(decay), prior_(prior) {}

    // Append the probability that each node is reached and accepted.
    void path_probs(const Nodes& tree, std::vector<double>& out);

    // Record an accepted path: every child of an accepted node was tested.
    void learn(const Nodes& tree, const std::vector<int32_t>& path);

    static constexpr size_t kDepths = 8;

    std::vector<double> predicted, accepted;  // [origins, kDepths]

private:
    void find_kinds(const Nodes& tree);

    double decay_, prior_;
    std::vector<size_t> depths_, kinds_;
};

// T(n): seconds of a pass over n nodes, interpolated between measured sizes and extrapolated beyond
// the last.
class CostCurve {
public:
    CostCurve(std::vector<double> sizes, std::vector<double> seconds);

    double at(double size) const;

    // Return the largest n up to `max_nodes` such that a pass with n more nodes beats plain passes
    // if all of them are accepted; 0 if there is none.
    size_t max_useful(size_t requests, size_t max_nodes) const;

    // Return the seconds that a further node costs, if as many are added as make it cheapest.
    double marginal_seconds(size_t size) const;

    // Record that a pass over `size` nodes took `ratio` times the expected seconds; the curve
    // changes most near that size. One pass changes it by a tenth of the difference. Where three
    // passes of one size in a row all differ by more than 15 % in one direction, the curve was
    // measured in other circumstances: it moves to their median at that size, and elsewhere half
    // as far at least. Returns whether it did.
    bool correct(double size, double ratio);

    std::vector<double> sizes, seconds;

private:
    struct Recent {
        double size;
        std::array<double, 3> seconds;  // of the last passes of that size, newest first
        size_t count;
    };

    bool move(const Recent& recent);

    std::vector<Recent> recent_;  // of sizes whose last passes differed
};

// The nodes of several trees by falling path probability, all roots first.
class NodeRanking {
public:
    NodeRanking(const std::vector<double>& probs, const std::vector<size_t>& sizes);

    // Return how many nodes besides the roots give the most tokens a second. Passes take the
    // seconds of `curve`, where the roots alone are `first` nodes, and `more` seconds besides.
    size_t best(const CostCurve& curve, size_t first, double more) const;

    // Return for each node whether it is a root or one of the best `count` others.
    std::vector<uint8_t> keep(size_t count) const;

    // What to run: `others` nodes besides the roots. `pays`: they beat passes over the roots alone,
    // by more than the factor `margin`; several requests otherwise run none. A node that was left
    // out would have had to gain `needed` tokens.
    struct Choice {
        size_t others;
        bool pays;
        double needed;
    };
    Choice choose(const CostCurve& curve, size_t first, double more, double margin) const;

    std::vector<size_t> sizes;
    std::vector<double> tokens;  // expected tokens with the roots and the best 0, 1, ... others

private:
    std::vector<size_t> order_;
};

}  // namespace paceline
