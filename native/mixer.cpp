#include "mixer.hpp"

#include <cmath>

namespace paceline {

namespace {

size_t bucket(uint32_t count) { return count <= 1 ? 0 : count <= 3 ? 1 : count <= 9 ? 2 : 3; }

// The weights before anything is learnt: the most exact context leads, each vaguer one has half
// the say. The learning needs only a fair start.
constexpr float kLead = 0.7f, kFall = 0.5f, kVague = 0.1f, kFirst = 0.1f, kHeard = 0.2f;
constexpr float kLargest = 8.0f;

}  // namespace

Mixer::Mixer(size_t orders, size_t skips, size_t k, size_t capacity, float keep, float rate,
             size_t kinds)
    : table(capacity, k),
      orders_(orders),
      skips_(skips),
      contexts_(1 + skips + orders),
      kinds_(kinds),
      keep_(keep),
      rate_(rate) {
    reset();
}

void Mixer::reset() {
    table.clear();
    biases.assign(contexts_ + 1, 0.0f);
    weights.clear();
    for (size_t set = 0; set <= contexts_; ++set)
        for (size_t context = 0; context < contexts_; ++context) {
            const bool vague = context <= skips_;
            const auto behind = static_cast<float>(set) - 1.0f - static_cast<float>(context);
            const float w = vague ? kVague : kLead * std::pow(kFall, std::max(behind, 0.0f));
            for (size_t i = 0; i < kBuckets; ++i) {
                weights.push_back(w);
                weights.push_back(kFirst);
            }
        }
    for (size_t i = 0; i < (contexts_ + 1) * kinds_; ++i) {
        weights.push_back(kHeard);
        weights.push_back(0.0f);
    }
}

uint64_t Mixer::key(const int32_t* last, size_t context) const {
    uint64_t hash = hashed(0x9e3779b97f4a7c15ULL, static_cast<int32_t>(context));
    if (context > skips_) {
        for (size_t i = 0; i < context - skips_; ++i) {
            if (last[i] < 0) return 0;
            hash = hashed(hash, last[i]);
        }
    } else if (context > 0) {
        const int32_t token = last[skips_ + 1 - context];
        if (token < 0) return 0;
        hash = hashed(hash, token);
    }
    return hash ? hash : 1;
}

size_t Mixer::candidate(int32_t token) {
    size_t slot = static_cast<uint32_t>(token) * 2654435769u >> 25;
    for (; slots_[slot]; slot = (slot + 1) & (kSlots - 1))
        if (tokens_[slots_[slot] - 1] == token) return slots_[slot] - 1;
    if (count_ == kMost) return kMost + 1;
    tokens_[count_] = token;
    chances_[count_] = 0.0f;
    named_[count_] = 0;
    said_[count_].fill(0.0f);
    slots_[slot] = static_cast<uint8_t>(++count_);
    return count_ - 1;
}

void Mixer::add(int32_t token, float chance, bool first, size_t weight, int16_t origin) {
    const size_t at = candidate(token);
    if (at > kMost) return;
    const float likelihood = std::log1p(chance / kFloor);
    const float one = first ? 1.0f : 0.0f;
    const float said = weights[weight] * likelihood + weights[weight + 1] * one;
    chances_[at] += said;
    named_[at] |= 1u << origin;
    said_[at][static_cast<size_t>(origin)] += said;
    terms_.push_back({weight, at, likelihood, one});
}

void Mixer::add_rest(float rest, size_t weight) {
    const float likelihood = std::log1p(std::max(rest, 0.0f) / kFloor);
    chances_[kMost] += weights[weight] * likelihood;
    terms_.push_back({weight, kMost, likelihood, 0.0f});
}

void Mixer::hear(const Voice& voice) {
    const size_t ours = (contexts_ + 1) * contexts_ * kBuckets;
    const size_t weight = (ours + set_ * kinds_ + voice.kind) * 2;
    float rest = 1.0f;
    for (const Candidate& c : voice.shares) {
        rest -= c.chance;
        add(c.token, c.chance, &c == voice.shares.data(), weight, voice.origin);
    }
    add_rest(rest, weight);
}

void Mixer::mix(const int32_t* last, const Voices& voices) {
    slots_.fill(0);
    terms_.clear();
    count_ = set_ = known_ = 0;
    chances_[kMost] = 0.0f;
    for (size_t context = contexts_; context-- > 0;) {
        const uint64_t hash = key(last, context);
        const auto row = hash ? table.find(hash) : SuccessorTable::Row{};
        if (!row.count) continue;
        ++known_;
        if (!set_) set_ = context + 1;
        const size_t weight = ((set_ * contexts_ + context) * kBuckets + bucket(row.count)) * 2;
        float rest = 1.0f;
        for (size_t i = 0; i < table.k && row.tokens[i] >= 0; ++i) {
            rest -= row.probs[i];
            add(row.tokens[i], row.probs[i], i == 0, weight, 0);
        }
        add_rest(rest, weight);
    }
    for (const Voice& voice : voices) hear(voice);
    normalise();
}

// Scores become chances that sum to one with that of another token.
void Mixer::normalise() {
    chances_[kMost] += biases[set_];
    float largest = chances_[kMost], sum = 0.0f;
    for (size_t i = 0; i < count_; ++i) largest = std::max(largest, chances_[i]);
    for (size_t i = 0; i < count_; ++i) sum += chances_[i] = std::exp(chances_[i] - largest);
    sum += chances_[kMost] = std::exp(chances_[kMost] - largest);
    for (size_t i = 0; i < count_; ++i) chances_[i] /= sum;
    chances_[kMost] /= sum;
}

void Mixer::successors(const int32_t* last, const Voices& voices, std::vector<Candidate>& out) {
    mix(last, voices);
    for (size_t i = 0; i < count_; ++i) {
        const auto loudest = std::max_element(said_[i].begin(), said_[i].end());
        out.push_back({tokens_[i], chances_[i], named_[i],
                       static_cast<int16_t>(loudest - said_[i].begin())});
    }
}

void Mixer::learn(const int32_t* last, const Voices& voices, int32_t drawn) {
    mix(last, voices);
    size_t target = kMost;
    for (size_t i = 0; i < count_; ++i)
        if (tokens_[i] == drawn) target = i;
    // Many contexts that agree move the chance together: each takes its part of the step.
    const float rate = rate_ / static_cast<float>(std::max<size_t>(known_, 1));
    for (const Term& term : terms_) {
        const float hit = term.candidate == target ? 1.0f : 0.0f;
        const float step = rate * (hit - chances_[term.candidate]);
        float& w = weights[term.weight];
        float& v = weights[term.weight + 1];
        w = std::clamp(w + step * term.likelihood, -kLargest, kLargest);
        v = std::clamp(v + step * term.first, -kLargest, kLargest);
    }
    const float surprise = (target == kMost ? 1.0f : 0.0f) - chances_[kMost];
    biases[set_] = std::clamp(biases[set_] + rate * surprise, -kLargest, kLargest);
}

void Mixer::observe(const int32_t* last, const int32_t* top, const float* p, size_t n) {
    for (size_t context = 0; context < contexts_; ++context)
        if (const uint64_t hash = key(last, context)) table.observe(hash, top, p, n, keep_);
}

}  // namespace paceline
