#include "engine/screened_logits.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <span>

#include "sampling/noise.hpp"

namespace paceline {

namespace {

constexpr double kNoiseRounding = 1e-4;  // of logarithms that round in other ways
constexpr size_t kFirst = 8;             // tokens that are computed to find a threshold
constexpr size_t kChunks = 16;
// From so many on the whole head is read: panels, and a part of the tokens in one chunk.
constexpr double kLargestShare = 0.4;
constexpr size_t kMostCandidates = 32;

float below(double value) {
    const auto rounded = static_cast<float>(value);
    return std::nextafter(rounded, -std::numeric_limits<float>::infinity());
}

}  // namespace

// Phases: a good token of each chunk; a threshold from the best of them, computed exactly; the
// tokens that may reach it; a higher threshold from the best of those; the panels of those left.
class ScreenedLogits::Search : public Task {
public:
    Search(Model& model, const Product& job, uint16_t* bounds, const DrawRule& rule,
           std::optional<float> least, size_t threads)
        : model_(model),
          screen_(*model.screen),
          head_(model.weights.head.matrices()[0]),
          job_(job),
          bounds_(bounds),
          rule_(rule),
          least_(least),
          row_{job.out, bounds, rule.temperature, 0.0f, rule.noise.has_value(),
               rule.noise.value_or(0)},
          found_(kChunks),
          seeds_(kChunks) {
        model.work.found.reserve(screen_.rows() * sizeof(int32_t));
        model.work.scratch.resize(threads);
        for (Buffer& scratch : model.work.scratch) rooms_.emplace_back(head_, scratch);
        if (least) row_.threshold = *least;
        add_phase(least ? 1 : kChunks);
        add_phase(1);
        add_phase(kChunks);
        add_phase(1);
        add_phase(kChunks);
    }

    std::atomic<bool> too_many{false};
    size_t computed = 0;  // panels

    ExactLogits result() const {
        ExactLogits exact;
        for (const int32_t token : left_) {
            const float value = job_.out[token];
            if (least_ && value < *least_) continue;
            exact.tokens.push_back(token);
            exact.logits.push_back(value);
        }
        return exact;
    }

private:
    struct Candidate {
        size_t token;
        double upper, lower;
    };

    static constexpr size_t kTogether = 4;  // panels that are multiplied together

    // Of one thread; the product may fetch from behind the panels.
    struct Room {
        Room(const Matrix& head, Buffer& buffer) {
            const size_t copies = (2 * kTogether * head.panel_bytes + 63) / 64 * 64;
            buffer.reserve(copies + head.product->scratch_bytes(1));
            panels = buffer.bytes();
            scratch = panels + copies;
        }
        uint8_t *panels, *scratch;
        float logits[kTogether * kPanel];
    };

    void work(size_t phase, size_t chunk, size_t thread) override {
        const auto [begin, end] = chunk_range(screen_.rows(), chunk, kChunks, kPanel);
        if (phase == 0 && !least_) {
            if (begin < end) seeds_[chunk] = model_.kernels.screen->best(row_, begin, end);
        } else if (phase == 1 && !least_) {
            first_threshold(rooms_[thread]);
        } else if (phase == 2 && begin < end) {
            find(begin, end, found_[chunk]);
        } else if (phase == 3) {
            narrow(rooms_[thread]);
        } else if (phase == 4) {
            const auto [from, to] = chunk_range(panels_.size(), chunk, kChunks);
            compute(std::span(panels_).subspan(from, to - from), rooms_[thread]);
        }
    }

    // Computes the logits of some panels as the whole head does. They are copied side by side, so
    // that what the product fetches ahead is not in vain.
    void compute(std::span<const size_t> panels, Room& room) {
        for (size_t i = 0; i < panels.size(); i += kTogether) {
            const size_t count = std::min(kTogether, panels.size() - i);
            for (size_t j = 0; j < count; ++j)
                std::memcpy(room.panels + j * head_.panel_bytes,
                            job_.panels + panels[i + j] * head_.panel_bytes, head_.panel_bytes);
            Product job = job_;
            job.panels = room.panels;
            job.out = room.logits;
            job.stride = job.rows = count * kPanel;
            head_.product->multiply(job, 0, count, room.scratch);
            for (size_t j = 0; j < count; ++j) {
                const size_t first = panels[i + j] * kPanel;
                const size_t rows = std::min(kPanel, screen_.rows() - first);
                std::copy_n(room.logits + j * kPanel, rows, job_.out + first);
                std::fill_n(bounds_ + first, rows, uint16_t{0});
            }
        }
    }
    bool exact(size_t token) const { return bounds_[token] == 0; }

    // Logarithms may round in other ways where the draw is made.
    double margin() const { return rule_.noise ? kNoiseRounding : 0.0; }
    double noise(size_t token) const {
        return rule_.noise ? exact_noise(*rule_.noise, token) : 0.0;
    }
    double scaled(float logit) const { return logit / rule_.temperature; }
    double upper(size_t token) const { return scaled(job_.out[token] + row_.bound(token)); }
    double lower(size_t token) const { return scaled(job_.out[token] - row_.bound(token)); }

    // Computes some tokens; what no token may stay below that has the best score.
    double threshold_of(const std::vector<size_t>& tokens, Room& room) {
        double best = -std::numeric_limits<double>::infinity();
        std::vector<size_t> panels;
        for (const size_t token : tokens)
            if (!exact(token)) panels.push_back(token / kPanel);
        compute(panels, room);
        computed += panels.size();
        for (const size_t token : tokens)
            best = std::max(best, scaled(job_.out[token]) + noise(token));
        return best - margin();
    }

    void first_threshold(Room& room) {
        std::vector<size_t> tokens;
        for (size_t chunk = 0; chunk < kChunks; ++chunk) {
            const auto [begin, end] = chunk_range(screen_.rows(), chunk, kChunks, kPanel);
            if (begin < end) tokens.push_back(seeds_[chunk]);
        }
        const size_t count = std::min(kFirst, tokens.size());
        std::ranges::partial_sort(tokens, tokens.begin() + static_cast<ptrdiff_t>(count), {},
                                  [&](size_t token) { return -lower(token); });
        tokens.resize(count);
        row_.threshold = below(threshold_of(tokens, room));
    }

    // The tokens of begin .. end - 1 that may reach the threshold, with their noise.
    void find(size_t begin, size_t end, std::vector<Candidate>& found) {
        int32_t* tokens = reinterpret_cast<int32_t*>(model_.work.found.bytes()) + begin;
        const size_t count = model_.kernels.screen->survivors(row_, begin, end, tokens);
        if (count > screen_.rows() / kMostCandidates) too_many = true;
        for (size_t i = 0; i < count && !too_many; ++i) {
            const auto token = static_cast<size_t>(tokens[i]);
            const double more = noise(token), high = upper(token) + more;
            if (least_ || high + margin() >= row_.threshold)
                found.push_back({token, high, lower(token) + more});
        }
    }

    void narrow(Room& room) {
        std::vector<Candidate> candidates;
        if (too_many) return;
        for (const auto& found : found_)
            candidates.insert(candidates.end(), found.begin(), found.end());
        if (!least_) raise_threshold(candidates, room);
        size_t last = SIZE_MAX;
        for (const Candidate& candidate : candidates) {
            left_.push_back(static_cast<int32_t>(candidate.token));
            const size_t panel = candidate.token / kPanel;
            if (exact(candidate.token) || panel == last) continue;
            panels_.push_back(last = panel);
        }
        const auto limit = kLargestShare * static_cast<double>(screen_.panels());
        if (static_cast<double>(panels_.size()) > limit) {
            too_many = true;
            panels_.clear();
        }
        computed += panels_.size();
    }

    // Drops the candidates that cannot reach the best ones.
    void raise_threshold(std::vector<Candidate>& candidates, Room& room) {
        double best = -std::numeric_limits<double>::infinity();
        for (const Candidate& candidate : candidates) best = std::max(best, candidate.lower);
        drop(candidates, best - margin());
        std::vector<Candidate> likely = candidates;
        const size_t count = std::min(kFirst, likely.size());
        std::ranges::partial_sort(likely, likely.begin() + static_cast<ptrdiff_t>(count),
                                  std::greater<>(), &Candidate::lower);
        std::vector<size_t> tokens;
        for (size_t i = 0; i < count; ++i) tokens.push_back(likely[i].token);
        drop(candidates, threshold_of(tokens, room));
    }

    void drop(std::vector<Candidate>& candidates, double threshold) const {
        std::erase_if(candidates, [&](const Candidate& candidate) {
            return candidate.upper + margin() < threshold;
        });
    }

    Model& model_;
    const HeadScreen& screen_;
    const Matrix& head_;
    const Product job_;
    uint16_t* bounds_;
    const DrawRule rule_;
    const std::optional<float> least_;
    ScreenRow row_;
    std::vector<std::vector<Candidate>> found_;  // of each chunk
    std::vector<size_t> seeds_;                // of each chunk
    std::vector<int32_t> left_;
    std::vector<size_t> panels_;
    std::vector<Room> rooms_;
};

ScreenedLogits::ScreenedLogits(Model& model, size_t n, const float* states, size_t stride,
                               float* values, uint16_t* bounds, std::vector<uint8_t> bounded)
    : model_(model),
      n_(n),
      values_(values),
      bounds_(bounds),
      bounded_(std::move(bounded)),
      stride_(stride),
      states_(n * stride * sizeof(float)),
      ready_(n) {
    std::copy_n(states, n * stride, states_.floats());
    const Matrix& head = model.weights.head.matrices()[0];
    arranged_room_ = (head.product->arranged_bytes(1, head.inputs) + 63) / 64 * 64;
    arranged_ = Buffer(n * arranged_room_);
}

// The product of one row with the head, to be run for some panels.
static Product product_of(const Model& model, const float* state, void* arranged, bool ready,
                          float* out) {
    const Matrix& head = model.weights.head.matrices()[0];
    Product job;
    job.panels = head.data.bytes();
    job.panel_bytes = head.panel_bytes;
    job.group = head.group;
    job.inputs = head.inputs;
    job.n = 1;
    job.out = out;
    job.stride = job.rows = model.shape.vocabulary;
    job.x = state;
    if (!head.product->arranged_bytes(1, head.inputs)) return job;
    const int32_t* order = head.order.empty() ? nullptr : head.order.data();
    if (!ready)
        head.product->arrange(state, padded(model.shape.hidden), 1, head.inputs, order, arranged, 0,
                             1);
    job.x = arranged;
    return job;
}

std::optional<ExactLogits> ScreenedLogits::run(size_t row, const DrawRule& rule,
                                               std::optional<float> least) {
    if (!bounded_[row]) return std::nullopt;
    float* out = values_ + row * model_.shape.vocabulary;
    const Product job = product_of(model_, states_.floats() + row * stride_,
                                   arranged_.bytes() + row * arranged_room_, ready_[row], out);
    ready_[row] = true;
    const auto search =
        std::make_shared<Search>(model_, job, bounds_ + row * model_.shape.vocabulary, rule, least,
                                 model_.threads());
    model_.pool().run(search, model_.threads());
    panels_read_ += search->computed;
    if (search->too_many) return std::nullopt;
    return search->result();
}

std::optional<ExactLogits> ScreenedLogits::contenders(size_t row, const DrawRule& rule) {
    return run(row, rule, std::nullopt);
}

std::optional<ExactLogits> ScreenedLogits::at_least(size_t row, float least) {
    return run(row, {}, least);
}

namespace {

class Completing : public Task {
public:
    Completing(const Matrix& head, const Product& job, size_t threads) : head_(head), job_(job) {
        for (size_t i = 0; i < threads; ++i) scratch_.emplace_back(head.product->scratch_bytes(1));
        add_phase(kChunks);
    }

private:
    void work(size_t, size_t chunk, size_t thread) override {
        const auto [begin, end] = chunk_range(head_.panels, chunk, kChunks, 4);
        if (begin < end) head_.product->multiply(job_, begin, end, scratch_[thread].bytes());
    }

    const Matrix& head_;
    const Product job_;
    std::vector<Buffer> scratch_;
};

}  // namespace

void ScreenedLogits::complete(size_t row) {
    const Matrix& head = model_.weights.head.matrices()[0];
    const size_t vocabulary = model_.shape.vocabulary;
    const Product job =
        product_of(model_, states_.floats() + row * stride_,
                   arranged_.bytes() + row * arranged_room_, ready_[row], values_ + row * vocabulary);
    ready_[row] = true;
    model_.pool().run(std::make_shared<Completing>(head, job, model_.threads()), model_.threads());
    std::fill_n(bounds_ + row * vocabulary, vocabulary, uint16_t{0});
    panels_read_ += head.panels;
}

}  // namespace paceline
