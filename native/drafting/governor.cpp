#include "drafting/governor.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>

namespace paceline {

namespace {

constexpr double kSurprise = 0.15;  // of the expected time: more than passes usually differ

}  // namespace

void AcceptanceRates::find_kinds(const Nodes& tree) {
    depths_.assign(tree.count, 0);
    kinds_.assign(tree.count, 0);
    for (size_t node = 0; node < tree.count; ++node) {
        const int32_t parent = tree.parents[node];
        if (parent >= 0) depths_[node] = depths_[static_cast<size_t>(parent)] + 1;
        const auto origin = static_cast<size_t>(std::max<int16_t>(tree.origins[node], 0));
        kinds_[node] = origin * kDepths + std::min(depths_[node], kDepths - 1);
        if (origin * kDepths >= predicted.size()) {
            predicted.resize((origin + 1) * kDepths);
            accepted.resize((origin + 1) * kDepths);
        }
    }
}

void AcceptanceRates::path_probs(const Nodes& tree, std::vector<double>& out) {
    find_kinds(tree);
    const size_t start = out.size();
    for (size_t node = 0; node < tree.count; ++node) {
        const int32_t parent = tree.parents[node];
        const size_t kind = kinds_[node];
        const double ratio = (accepted[kind] + prior_) / (predicted[kind] + prior_);
        const double own = std::clamp(static_cast<double>(tree.scores[node]) * ratio, 0.0, 1.0);
        out.push_back(parent < 0 ? 1.0 : out[start + static_cast<size_t>(parent)] * own);
    }
}

void AcceptanceRates::learn(const Nodes& tree, const std::vector<int32_t>& path) {
    find_kinds(tree);
    for (double& count : predicted) count *= decay_;
    for (double& count : accepted) count *= decay_;
    const auto came = [&](int32_t node) {
        return std::find(path.begin(), path.end(), node) != path.end();
    };
    for (size_t node = 0; node < tree.count; ++node) {
        if (tree.parents[node] < 0 || !came(tree.parents[node])) continue;
        predicted[kinds_[node]] += static_cast<double>(tree.scores[node]);
        accepted[kinds_[node]] += came(static_cast<int32_t>(node)) ? 1.0 : 0.0;
    }
}

CostCurve::CostCurve(std::vector<double> sizes_, std::vector<double> seconds_)
    : sizes(std::move(sizes_)), seconds(std::move(seconds_)) {
    if (sizes.empty() || sizes.size() != seconds.size())
        throw std::invalid_argument("a curve needs one time for each size");
}

double CostCurve::at(double size) const {
    const size_t n = sizes.size();
    if (size <= sizes[0] || n == 1) return seconds[0];
    const auto above = std::upper_bound(sizes.begin(), sizes.end(), size) - sizes.begin();
    const size_t high = std::min(static_cast<size_t>(above), n - 1), low = high - 1;
    const double slope = (seconds[high] - seconds[low]) / (sizes[high] - sizes[low]);
    return seconds[low] + slope * (size - sizes[low]);
}

size_t CostCurve::max_useful(size_t requests, size_t max_nodes) const {
    const auto nodes = static_cast<double>(requests);
    const double plain = at(nodes);
    for (size_t more = max_nodes; more > 0; --more) {
        const auto size = static_cast<double>(requests + more);
        if (size * plain > nodes * at(size)) return more;
    }
    return 0;
}

double CostCurve::marginal_seconds(size_t size) const {
    const double here = at(static_cast<double>(size));
    double min_cost = std::numeric_limits<double>::infinity();
    for (size_t more = 1; more <= size; ++more)
        min_cost = std::min(
            min_cost, (at(static_cast<double>(size + more)) - here) / static_cast<double>(more));
    return min_cost;
}

bool CostCurve::correct(double size, double ratio) {
    const double expected = at(size), measured = ratio * expected;
    for (size_t i = 0; i < sizes.size(); ++i) {
        const double near = std::exp(-std::fabs(std::log2(sizes[i] / size)));
        seconds[i] *= 1.0 + (ratio - 1.0) * (0.02 + 0.08 * near);
    }
    const auto own = std::find_if(recent_.begin(), recent_.end(),
                                  [&](const Recent& one) { return one.size == size; });
    if (std::fabs(ratio - 1.0) <= kSurprise) {
        if (own != recent_.end()) recent_.erase(own);
        return false;
    }
    if (own == recent_.end()) {
        recent_.push_back({size, {measured, 0.0, 0.0}, 1});
        return false;
    }
    if ((own->seconds[0] > expected) != (measured > expected)) own->count = 0;
    own->seconds = {measured, own->seconds[0], own->seconds[1]};
    own->count = std::min<size_t>(own->count + 1, 3);
    return own->count == 3 && move(*own);
}

bool CostCurve::move(const Recent& recent) {
    std::array<double, 3> sorted = recent.seconds;
    std::sort(sorted.begin(), sorted.end());
    const double size = recent.size, ratio = sorted[1] / at(size);
    for (size_t i = 0; i < sizes.size(); ++i) {
        const double near = std::exp(-std::fabs(std::log2(sizes[i] / size)));
        seconds[i] *= 1.0 + (ratio - 1.0) * (0.5 + 0.5 * near);
    }
    for (size_t i = 1; i < sizes.size(); ++i)  // more nodes never take less
        if (sizes[i] > size) seconds[i] = std::max(seconds[i], seconds[i - 1]);
    for (size_t i = sizes.size() - 1; i-- > 0;)
        if (sizes[i] < size) seconds[i] = std::min(seconds[i], seconds[i + 1]);
    recent_.clear();
    return true;
}

NodeRanking::NodeRanking(const std::vector<double>& probs, const std::vector<size_t>& sizes_)
    : sizes(sizes_), order_(probs.size()) {
    std::vector<double> rank = probs;
    size_t root = 0;
    for (const size_t size : sizes) {
        if (root >= rank.size()) throw std::invalid_argument("every tree has a root");
        rank[root] = 2.0;  // a probability is at max_nodes 1
        root += size;
    }
    if (root != rank.size()) throw std::invalid_argument("every node needs a probability");
    std::iota(order_.begin(), order_.end(), 0);
    // Parents come before their children, which are at max_nodes as likely.
    std::stable_sort(order_.begin(), order_.end(),
                     [&](size_t a, size_t b) { return rank[a] > rank[b]; });
    double sum = 0.0;
    for (size_t i = 0; i < order_.size(); ++i) {
        sum += probs[order_[i]];
        if (i + 1 >= sizes.size()) tokens.push_back(sum);
    }
}

size_t NodeRanking::best(const CostCurve& curve, size_t first, double more) const {
    size_t count = 0;
    double fastest = 0.0;
    for (size_t i = 0; i < tokens.size(); ++i) {
        const double speed = tokens[i] / (curve.at(static_cast<double>(first + i)) + more);
        if (i == 0 || speed > fastest) count = i, fastest = speed;
    }
    return count;
}

NodeRanking::Choice NodeRanking::choose(const CostCurve& curve, size_t first, double more,
                                        double margin) const {
    const auto requests = static_cast<double>(sizes.size());
    size_t others = best(curve, first, more);
    const double rate = tokens[others] / (curve.at(static_cast<double>(first + others)) + more);
    const bool pays = rate > margin * requests / curve.at(requests);
    if (!pays && sizes.size() > 1) others = 0;
    double needed = rate * curve.marginal_seconds(first + others);
    if (others) needed = std::min(needed, tokens[others] - tokens[others - 1]);
    return {others, pays, needed};
}

std::vector<uint8_t> NodeRanking::keep(size_t count) const {
    std::vector<uint8_t> kept(order_.size(), 0);
    const size_t others = order_.size() - std::min(sizes.size(), order_.size());
    const size_t kept_count = order_.size() - others + std::min(count, others);
    for (size_t i = 0; i < kept_count; ++i) kept[order_[i]] = 1;
    return kept;
}

}  // namespace paceline
