// What sizing trees needs in every pass: probabilities by what came true, the best nodes of all trees,
// and the time of a pass. `decoding/governor.py` decides with them.

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace paceline {

// Nodes of a tree; a parent comes before its children, that of the root is -1.
struct Nodes {
    const int32_t* parents;
    const float* scores;
    const int16_t* origins;
    size_t count;
};

// How often guesses come true, compared with their scores, by origin and depth. Counts fade with
// every tree that is learnt; `prior` guesses at face value damp the start.
class AcceptanceRates {
public:
    AcceptanceRates(double decay, double prior) : decay_(decay), prior_(prior) {}

    // Append the probability that each node is reached and accepted.
    void path_probs(const Nodes& tree, std::vector<double>& out);

    // Every child of an accepted node was put to the test.
    void learn(const Nodes& tree, const std::vector<int32_t>& path);

    static constexpr size_t kDepths = 8;

    std::vector<double> predicted, accepted;  // [origins, kDepths]

private:
    void find_kinds(const Nodes& tree);

    double decay_, prior_;
    std::vector<size_t> depths_, kinds_;
};

// T(n): seconds of a pass over n nodes, between and beyond some known sizes.
class CostCurve {
public:
    CostCurve(std::vector<double> sizes, std::vector<double> seconds);

    double at(double size) const;

    // The largest n up to `most` more nodes with which a pass beats plain ones if all of them are
    // right; 0 if none does.
    size_t max_useful(size_t requests, size_t max_nodes) const;

    // Seconds that a further node costs, if as many come as are cheapest.
    double marginal_seconds(size_t size) const;

    // A pass over `size` nodes took so many times what was expected: most changes near it.
    void correct(double size, double ratio);

    std::vector<double> sizes, seconds;
};

// The nodes of some trees, the likeliest first, their roots before all others.
class NodeRanking {
public:
    NodeRanking(const std::vector<double>& probs, const std::vector<size_t>& sizes);

    // How many nodes besides the roots give the most tokens a second, where passes take `curve`,
    // read from `first` nodes on, and `more` seconds.
    size_t best(const CostCurve& curve, size_t first, double more) const;

    // For each node whether it is a root or one of the first `count` others.
    std::vector<uint8_t> keep(size_t count) const;

    std::vector<size_t> sizes;
    std::vector<double> tokens;  // expected from the roots and the first 0, 1, ... others

private:
    std::vector<size_t> order_;
};

}  // namespace paceline
