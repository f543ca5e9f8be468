#include "drafting/draw_model.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <utility>

#include "sampling/noise.hpp"

namespace paceline {

namespace {

float gumbel(uint64_t start, int32_t token) {
    const uint64_t m = random_bits(start, static_cast<uint64_t>(token)) >> 11;
    return static_cast<float>(-std::log(-std::log((static_cast<double>(m) + 0.5) * 0x1p-53)));
}

void add_unlisted(std::span<const uint32_t> allowed, float share,
                  std::vector<Candidate>& successors) {
    const size_t named = successors.size();
    for (size_t word = 0; word < allowed.size(); ++word)
        for (uint32_t left = allowed[word]; left; left &= left - 1) {
            const auto token = static_cast<int32_t>(word * 32) + std::countr_zero(left);
            const auto end = successors.begin() + static_cast<std::ptrdiff_t>(named);
            if (std::none_of(successors.begin(), end,
                             [&](const Candidate& one) { return one.token == token; }))
                successors.push_back({token, share, 0, 0});
        }
}

float remaining_prob(const std::vector<Candidate>& successors) {
    float rest = 1.0f;
    for (const Candidate& one : successors) rest -= one.prob;
    return std::max(rest, 0.0f);
}

}  // namespace

void DrawModel::start(std::vector<uint64_t> noise) {
    noise_ = std::move(noise);
    nodes_.clear();
    outcomes_.clear();
}

void DrawModel::adjust(const DraftTree& tree, size_t node, std::span<const uint32_t> allowed,
                       std::vector<Candidate>& successors) {
    while (nodes_.size() <= node) {
        const size_t next = nodes_.size();
        const auto parent = next ? static_cast<size_t>(tree.parents[next]) : 0;
        nodes_.push_back({parent, next ? nodes_[parent].depth + 1 : 0, tree.tokens[next]});
    }
    if (!allowed.empty()) allow(allowed, successors);
    if (nodes_[node].depth < noise_.size()) apply_noise(nodes_[node], successors);
}

void DrawModel::allow(std::span<const uint32_t> allowed, std::vector<Candidate>& successors) {
    const auto can = [&](const Candidate& one) {
        const auto token = static_cast<size_t>(one.token);
        return token / 32 < allowed.size() && allowed[token / 32] >> token % 32 & 1;
    };
    float sum = remaining_prob(successors);
    std::erase_if(successors, [&](const Candidate& one) { return !can(one); });
    size_t count = 0;
    for (const uint32_t word : allowed) count += static_cast<size_t>(std::popcount(word));
    if (count <= kMaxListed) {
        const auto unlisted = static_cast<float>(count) - static_cast<float>(successors.size());
        add_unlisted(allowed, std::max(sum, kMinProb) / std::max(unlisted, 1.0f), successors);
        sum = 0.0f;
    }
    for (const Candidate& one : successors) sum += one.prob;
    for (Candidate& one : successors) one.prob /= std::max(sum, kMinProb);
}

void DrawModel::apply_noise(Node& node, std::vector<Candidate>& successors) {
    const auto [a, b, c, d] = *weights;
    const float rest = remaining_prob(successors);
    const uint64_t start = noise_[node.depth];
    node.first = outcomes_.size();
    for (const Candidate& one : successors) {
        const float log = std::log(std::max(one.prob, kMinProb)), noise = gumbel(start, one.token);
        outcomes_.push_back({one.token, log, noise, a * log + b * noise});
    }
    const float log = std::log(std::max(rest, kMinProb));
    outcomes_.push_back({-1, log, 1.0f, c * log + d});
    node.last = outcomes_.size();
    float largest = outcomes_.back().prob, sum = 0.0f;
    for (size_t i = node.first; i < node.last; ++i) largest = std::max(largest, outcomes_[i].prob);
    for (size_t i = node.first; i < node.last; ++i)
        sum += outcomes_[i].prob = std::exp(outcomes_[i].prob - largest);
    for (size_t i = node.first; i < node.last; ++i) outcomes_[i].prob /= sum;
    for (size_t i = 0; i < successors.size(); ++i)
        successors[i].prob = outcomes_[node.first + i].prob;
}

void DrawModel::learn(const int32_t* drawn, size_t count) {
    size_t node = 0;
    for (size_t i = 0; i < count && node < nodes_.size(); ++i) {
        if (nodes_[node].first < nodes_[node].last) learn(nodes_[node], drawn[i]);
        size_t child = node + 1;
        while (child < nodes_.size() &&
               !(nodes_[child].parent == node && nodes_[child].token == drawn[i]))
            ++child;
        node = child;
    }
    nodes_.clear();
}

void DrawModel::learn(const Node& node, int32_t drawn) {
    size_t target = node.last - 1;
    for (size_t i = node.first; i < node.last; ++i)
        if (outcomes_[i].token == drawn) target = i;
    Weights slope{};
    for (size_t i = node.first; i < node.last; ++i) {
        const Outcome& one = outcomes_[i];
        const float step = (i == target ? 1.0f : 0.0f) - one.prob;
        const size_t kind = one.token < 0 ? 2 : 0;
        slope[kind] += step * one.log;
        slope[kind + 1] += step * one.noise;
    }
    for (size_t i = 0; i < slope.size(); ++i) {
        float& weight = (*weights)[i];
        const float step = kRate * std::clamp(slope[i], -kMaxSlope, kMaxSlope);
        weight = std::clamp(weight + step, -kMaxWeight, kMaxWeight);
    }
}

}  // namespace paceline
