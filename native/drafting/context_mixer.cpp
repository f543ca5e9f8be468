#include "drafting/context_mixer.hpp"

#include <bit>
#include <cmath>

namespace paceline {

namespace {

size_t bucket(uint32_t count) { return count <= 1 ? 0 : count <= 3 ? 1 : count <= 9 ? 2 : 3; }

// Initial weights: the most specific context leads, and each less specific one has half the weight
// of the one before. Learning only needs a fair start.
constexpr float kLeadWeight = 0.7f, kFall = 0.5f, kVague = 0.1f, kFirst = 0.1f, kOther = 0.2f;
constexpr float kMaxWeight = 8.0f;

// Replace each y >= 1 by its logarithm, nearly to a float's precision: the same on every machine,
// and in few instructions for many at once. y = m * 2^e with m around 1; log m by its series in m -
// 1.
void logarithms(float* y, size_t n) {
    constexpr float kSeries[] = {7.0376836292e-2f, -1.1514610310e-1f, 1.1676998740e-1f,
                                 -1.2420140846e-1f, 1.4249322787e-1f, -1.6668057665e-1f,
                                 2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f};
    for (size_t i = 0; i < n; ++i) {
        const auto bits = std::bit_cast<int32_t>(y[i]) - std::bit_cast<int32_t>(0.70710678f);
        const auto e = static_cast<float>(bits >> 23);
        const int32_t around = (bits & 0x7fffff) + std::bit_cast<int32_t>(0.70710678f);
        const float x = std::bit_cast<float>(around) - 1.0f, square = x * x;
        float sum = kSeries[0];
        for (int term = 1; term < 9; ++term) sum = sum * x + kSeries[term];
        y[i] = x * square * sum - 0.5f * square + x + e * 0.69314718f;
    }
}

}  // namespace

ContextMixer::ContextMixer(size_t orders, size_t skips, size_t k, size_t capacity, float keep,
                           float rate, size_t kinds, float floor)
    : table(capacity, k),
      orders_(orders),
      skips_(skips),
      contexts_(1 + skips + orders),
      kinds_(kinds),
      keep_(keep),
      rate_(rate),
      floor_(floor) {
    reset();
}

void ContextMixer::reset() {
    table.clear();
    biases.assign(contexts_ + 1, 0.0f);
    weights.clear();
    for (size_t set = 0; set <= contexts_; ++set)
        for (size_t context = 0; context < contexts_; ++context) {
            const bool vague = context <= skips_;
            const auto behind = static_cast<float>(set) - 1.0f - static_cast<float>(context);
            const float w = vague ? kVague : kLeadWeight * std::pow(kFall, std::max(behind, 0.0f));
            for (size_t i = 0; i < kBuckets; ++i) {
                weights.push_back(w);
                weights.push_back(kFirst);
            }
        }
    for (size_t i = 0; i < (contexts_ + 1) * kinds_; ++i) {
        weights.push_back(kOther);
        weights.push_back(0.0f);
    }
}

uint64_t ContextMixer::key(const int32_t* last, size_t context) const {
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

void ContextMixer::find_keys(const int32_t* last) {
    keys_.resize(contexts_);
    for (size_t context = 0; context < contexts_; ++context) keys_[context] = key(last, context);
}

size_t ContextMixer::candidate(int32_t token) {
    size_t slot = static_cast<uint32_t>(token) * 2654435769u >> 25;
    for (; slots_[slot]; slot = (slot + 1) & (kSlots - 1))
        if (tokens_[slots_[slot] - 1] == token) return slots_[slot] - 1;
    if (count_ == kMaxCandidates) return kMaxCandidates;
    tokens_[count_] = token;
    probs_[count_] = 0.0f;
    named_by_[count_] = 0;
    support_[count_].fill(0.0f);
    slots_[slot] = static_cast<uint8_t>(++count_);
    return count_ - 1;
}

void ContextMixer::add(const Successor* successors, size_t count, size_t weight, int16_t origin) {
    const float w = weights[weight], v = weights[weight + 1];
    const size_t first = likelihoods_.size();
    Term term{weight, first, first, false, 0.0f};
    float rest = 1.0f;
    for (size_t i = 0; i < count; ++i) {
        rest -= successors[i].prob;
        likelihoods_.push_back(1.0f + successors[i].prob / floor_);
    }
    likelihoods_.push_back(1.0f + std::max(rest, 0.0f) / floor_);
    logarithms(likelihoods_.data() + first, count + 1);
    term.rest = likelihoods_.back();
    for (size_t i = 0; i < count; ++i) {
        const size_t at = candidate(successors[i].token);
        if (at == kMaxCandidates) continue;
        const float likelihood = likelihoods_[first + i];
        const float added = i ? w * likelihood : w * likelihood + v;
        probs_[at] += added;
        named_by_[at] |= 1u << origin;
        support_[at][static_cast<size_t>(origin)] += added;
        term.has_top |= !i;
        likelihoods_[term.last++] = likelihood;
        candidates_.push_back(static_cast<uint8_t>(at));
    }
    likelihoods_.resize(term.last);
    probs_[kMaxCandidates] += w * term.rest;
    terms_.push_back(term);
}

void ContextMixer::mix(const int32_t* last, const Predictions& predictions) {
    find_keys(last);
    for (const uint64_t key : keys_) if (key) table.fetch_set(key);
    slots_.fill(0);
    terms_.clear();
    candidates_.clear();
    likelihoods_.clear();
    count_ = set_ = known_ = 0;
    probs_[kMaxCandidates] = 0.0f;
    for (const uint64_t key : keys_) if (key) table.fetch_row(key);
    for (size_t context = contexts_; context-- > 0;) {
        const auto row = keys_[context] ? table.find(keys_[context]) : SuccessorTable::Row{};
        if (!row.count) continue;
        ++known_;
        if (!set_) set_ = context + 1;
        size_t count = 0;
        while (count < table.k && row.successors[count].token >= 0) ++count;
        const size_t weight = ((set_ * contexts_ + context) * kBuckets + bucket(row.count)) * 2;
        add(row.successors, count, weight, 0);
    }
    const size_t ours = (contexts_ + 1) * contexts_ * kBuckets;
    for (const Prediction& prediction : predictions.each)
        add(predictions.successors.data() + prediction.first, prediction.last - prediction.first,
            (ours + set_ * kinds_ + prediction.kind) * 2, prediction.origin);
    normalise();
}

// Turn scores into probabilities that sum to one, that of another token included.
void ContextMixer::normalise() {
    probs_[kMaxCandidates] += biases[set_];
    float largest = probs_[kMaxCandidates], sum = 0.0f;
    for (size_t i = 0; i < count_; ++i) largest = std::max(largest, probs_[i]);
    for (size_t i = 0; i < count_; ++i) sum += probs_[i] = std::exp(probs_[i] - largest);
    sum += probs_[kMaxCandidates] = std::exp(probs_[kMaxCandidates] - largest);
    for (size_t i = 0; i < count_; ++i) probs_[i] /= sum;
    probs_[kMaxCandidates] /= sum;
}

// Return the origin that added most to a candidate's score.
int16_t ContextMixer::main_origin(size_t candidate) const {
    const uint32_t named = named_by_[candidate];
    int16_t best = static_cast<int16_t>(std::countr_zero(named));
    for (auto i = static_cast<int16_t>(best + 1); named >> i; ++i)
        if ((named >> i & 1) && support_[candidate][i] > support_[candidate][best]) best = i;
    return best;
}

void ContextMixer::successors(const int32_t* last, const Predictions& predictions,
                              std::vector<Candidate>& out) {
    mix(last, predictions);
    for (size_t i = 0; i < count_; ++i)
        out.push_back({tokens_[i], probs_[i], named_by_[i], main_origin(i)});
}

void ContextMixer::learn(const int32_t* last, const Predictions& predictions, int32_t drawn) {
    mix(last, predictions);
    // The gradient of the log probability by each score: 1 for the drawn token, minus the
    // probability.
    std::array<float, kMaxCandidates + 1> error;
    bool known = false;
    for (size_t i = 0; i < count_; ++i) {
        known |= tokens_[i] == drawn;
        error[i] = (tokens_[i] == drawn ? 1.0f : 0.0f) - probs_[i];
    }
    error[kMaxCandidates] = (known ? 0.0f : 1.0f) - probs_[kMaxCandidates];
    // Contexts that agree move the probability together, so each takes its part of the step.
    const float rate = rate_ / static_cast<float>(std::max<size_t>(known_, 1));
    const auto stepped = [](float weight, float step) {
        return std::clamp(weight + step, -kMaxWeight, kMaxWeight);
    };
    for (const Term& term : terms_) {
        float& w = weights[term.weight];
        float& v = weights[term.weight + 1];
        if (term.has_top) v = stepped(v, rate * error[candidates_[term.first]]);
        for (size_t i = term.first; i < term.last; ++i)
            w = stepped(w, rate * error[candidates_[i]] * likelihoods_[i]);
        w = stepped(w, rate * error[kMaxCandidates] * term.rest);
    }
    biases[set_] = stepped(biases[set_], rate * error[kMaxCandidates]);
}

void ContextMixer::observe(const int32_t* last, const int32_t* top, const float* p, size_t n) {
    find_keys(last);
    table.observe(keys_.data(), contexts_, top, p, n, keep_);
}

}  // namespace paceline
