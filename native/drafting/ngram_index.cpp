#include "drafting/ngram_index.hpp"

namespace paceline {

NgramIndex::NgramIndex(size_t longest, size_t k, size_t capacity, float keep, float rate)
    : table_(capacity, k), longest_(longest), keep_(keep), rate_(rate) {
    reset();
}

void NgramIndex::reset() {
    table_.clear();
    text_ = 0;
    begin();
    reliability.clear();
    // Initially each further token halves the probability of error.
    for (float doubt = 0.7f; reliability.size() < longest_; doubt /= 2.0f)
        reliability.push_back(1.0f - doubt);
}

void NgramIndex::begin() {
    ++text_;
    indexed_ = 0;
    last_.assign(longest_, -1);
}

uint64_t NgramIndex::key(const int32_t* last, size_t n) const {
    if (last[n - 1] < 0) return 0;
    uint64_t hash = hashed(text_ * 0x9e3779b97f4a7c15ULL, static_cast<int32_t>(n));
    for (size_t i = 0; i < n; ++i) hash = hashed(hash, last[i]);
    return hash ? hash : 1;
}

bool NgramIndex::unseen(const std::vector<Candidate>& out, int32_t token) const {
    return std::none_of(out.begin(), out.end(),
                        [token](const Candidate& other) { return other.token == token; });
}

void NgramIndex::extend(const int32_t* text, size_t length, size_t learn_from) {
    const float certain = 1.0f;
    for (; indexed_ < length; ++indexed_) {
        const int32_t token = text[indexed_];
        if (indexed_ >= learn_from) learn(last_.data(), token);
        for (size_t n = 1; n <= longest_; ++n)
            if (const uint64_t hash = key(last_.data(), n))
                table_.observe(&hash, 1, &token, &certain, 1, keep_);
        std::copy_backward(last_.begin(), last_.end() - 1, last_.end());
        last_[0] = token;
    }
}

void NgramIndex::successors(const int32_t* last, std::vector<Candidate>& out) {
    float left = 1.0f;
    for (size_t n = longest_; n > 0; --n) {
        const uint64_t hash = key(last, n);
        const auto row = hash ? table_.find(hash) : SuccessorTable::Row{};
        float mass = 0.0f;
        const size_t known = out.size();
        for (size_t i = 0; row.count && i < table_.k && row.successors[i].token >= 0; ++i)
            if (unseen(out, row.successors[i].token)) {
                out.push_back({row.successors[i].token, row.successors[i].prob});
                mass += row.successors[i].prob;
            }
        if (out.size() == known) continue;
        const float share = left * reliability[n - 1] / mass;
        for (size_t i = known; i < out.size(); ++i) out[i].prob *= share;
        left *= 1.0f - reliability[n - 1];
    }
}

void NgramIndex::learn(const int32_t* last, int32_t token) {
    candidates_.clear();
    for (size_t n = longest_; n > 0; --n) {
        const uint64_t hash = key(last, n);
        const auto row = hash ? table_.find(hash) : SuccessorTable::Row{};
        const size_t known = candidates_.size();
        for (size_t i = 0; row.count && i < table_.k && row.successors[i].token >= 0; ++i)
            if (unseen(candidates_, row.successors[i].token))
                candidates_.push_back({row.successors[i].token, row.successors[i].prob});
        if (candidates_.size() == known) continue;
        const bool hit = !unseen(candidates_, token);
        reliability[n - 1] += rate_ * ((hit ? 1.0f : 0.0f) - reliability[n - 1]);
        if (hit) return;
    }
}

}  // namespace paceline
