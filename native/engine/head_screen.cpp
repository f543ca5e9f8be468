#include "engine/head_screen.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

namespace paceline {

namespace {

constexpr float kTooSmall = 1e-15f, kTooLarge = 1e15f;

size_t blocks_of(size_t inputs) { return (inputs + kBlockInputs - 1) / kBlockInputs; }

// Copies the head's panels, each thread with room for sixteen rows as floats.
class Copying : public Task {
public:
    Copying(const Matrix& head, size_t rows, const ScreenKernels& kernels, Buffer& to,
            size_t threads)
        : head_(head), rows_(rows), kernels_(kernels), to_(to) {
        chunks_ = std::min<size_t>(head.panels, 64);
        add_phase(chunks_);
        const size_t scratch = (blocks_of(head.inputs) + head.inputs) * kPanel;
        for (size_t i = 0; i < threads; ++i) room_.emplace_back(scratch * sizeof(float));
    }

    std::atomic<bool> fits{true};

private:
    void work(size_t, size_t chunk, size_t thread) override {
        const auto [begin, end] = chunk_range(head_.panels, chunk, chunks_);
        float* weights = room_[thread].floats();
        for (size_t panel = begin; panel < end; ++panel) {
            const size_t first = panel * kPanel, count = std::min(rows_ - first, kPanel);
            for (size_t i = 0; i < count; ++i)
                head_.unpack(first + i, 1.0f, weights + i * head_.inputs);
            // Sums of K products, and what rounds on the way: at most (K + 64) * 2^-24 each.
            const float rounding = static_cast<float>(head_.inputs + 64) * 0x1p-23f;
            const ScreenPack job{weights,
                                 count,
                                 head_.inputs,
                                 HeadScreen::kDrift * 1.0001f,
                                 rounding,
                                 weights + head_.inputs * kPanel};
            if (!kernels_.pack(job, to_.bytes() + panel * kernels_.panel_bytes(head_.inputs)))
                fits = false;
        }
    }

    const Matrix& head_;
    const size_t rows_;
    const ScreenKernels& kernels_;
    Buffer& to_;
    size_t chunks_;
    std::vector<Buffer> room_;
};

}  // namespace

bool HeadScreen::fits(const FusedMatrix& head, float softcap) {
    if (head.bias || softcap != 0.0f || head.matrices().size() != 1) return false;
    const Matrix& matrix = head.matrices()[0];
    const size_t bytes = matrix.panels * matrix.panel_bytes;
    // Bounds know of rounding in blocks that lie side by side.
    if (!matrix.order.empty()) return false;
    // And of sums that are not much larger than the weights: codes of a file may all be small.
    if (matrix.format->grouped && !matrix.rounded) return false;
    return matrix.data && bytes * 8 > 6 * matrix.panels * kPanel * matrix.inputs;
}

HeadScreen::HeadScreen(const Matrix& head, size_t rows, const ScreenKernels& kernels)
    : head_(head),
      kernels_(kernels),
      rows_(rows),
      inputs_(head.inputs),
      panels_(head.panels),
      data_(head.panels * kernels.panel_bytes(head.inputs)) {}

std::unique_ptr<HeadScreen> HeadScreen::copy(const Matrix& head, size_t rows,
                                             const ScreenKernels& kernels, Pool& pool) {
    auto screen = std::unique_ptr<HeadScreen>(new HeadScreen(head, rows, kernels));
    const auto copying =
        std::make_shared<Copying>(head, rows, kernels, screen->data_, pool.size());
    pool.run(copying, pool.size());
    return copying->fits ? std::move(screen) : nullptr;
}

size_t HeadScreen::arranged_bytes(size_t n) const {
    return n * blocks_of(inputs_) * kScreenWords * sizeof(int32_t);
}

// The most that the head's product changes the activations of a block by, besides what this one
// does; `scale` is the step here, 0 where all became 0.
//
// It rounds to whole numbers of sixteen bits, the row's largest being 32767: by half of one, and what
// division rounds. With activations of 8 bits it takes the very numbers that are taken here, or for
// some blocks 8 bits more.
double HeadScreen::head_rounding(float largest_in_row, float largest, float scale) const {
    const double root = std::sqrt(static_cast<double>(kBlockInputs));
    if (head_.product == &head_.format->product8) {
        const double more = scale * (0.51 / 254.0) + largest * 0x1p-22;
        return root * (scale > 0.0f ? more : largest * (0.51 / 127.0));
    }
    const bool reads_rows = head_.product->arranged_bytes(1, inputs_) == 0;
    return reads_rows ? 0.0 : root * largest_in_row * (0.51 / 32767.0);
}

bool HeadScreen::arrange(const float* from, size_t row, size_t n, void* arranged) const {
    const size_t width = kernels_.width(), blocks = blocks_of(inputs_);
    const size_t tile = row / width * width, tokens = std::min(width, n - tile), at = row - tile;
    auto* words = static_cast<int32_t*>(arranged) + kScreenWords * blocks * tile + at;
    float largest = 0.0f;
    bool finite = true;
    for (size_t k = 0; k < inputs_; ++k) {
        largest = std::max(largest, std::fabs(from[k]));
        finite = finite && std::isfinite(from[k]);
    }
    const bool bounded = finite && (largest == 0.0f || (largest > kTooSmall && largest < kTooLarge));
    for (size_t block = 0; block < blocks; ++block, words += kScreenWords * tokens) {
        const size_t first = block * kBlockInputs, count = std::min(kBlockInputs, inputs_ - first);
        float edge = 0.0f;
        for (size_t k = 0; k < count; ++k) edge = std::max(edge, std::fabs(from[first + k]));
        // What is far below the row's largest is 0 here: its squares would be lost.
        const bool some = bounded && edge > largest * 1e-12f;
        const float scale = some ? edge / 127.0f : 0.0f, inverse = some ? 127.0f / edge : 0.0f;
        int8_t numbers[kBlockInputs] = {};
        int sum = 0;
        double squares = 0.0, missed = 0.0;
        for (size_t k = 0; k < count && bounded; ++k) {
            const float value = from[first + k];
            const int number = static_cast<int>(std::lrint(value * inverse));
            numbers[k] = static_cast<int8_t>(std::clamp(number, -127, 127));
            sum += numbers[k];
            const double coarse = static_cast<double>(scale) * numbers[k], rest = value - coarse;
            squares += coarse * coarse;
            missed += rest * rest;
        }
        for (size_t word = 0; word < kBlockInputs / 4; ++word)
            std::memcpy(words + word * tokens, numbers + 4 * word, 4);
        const double drift = std::sqrt(missed) + head_rounding(largest, edge, scale);
        const double size = std::max(std::sqrt(squares), drift / kDrift);
        const float floats[3] = {-7.5f * static_cast<float>(sum), scale,
                                 static_cast<float>(size * (1.0 + 1e-6))};
        for (size_t i = 0; i < 3; ++i)
            std::memcpy(words + (kBlockInputs / 4 + i) * tokens, &floats[i], sizeof(float));
    }
    return bounded;
}

void HeadScreen::multiply(const void* arranged, size_t n, float* out, uint16_t* bounds,
                          size_t first, size_t last) const {
    const ScreenProduct job{data_.bytes(), inputs_, static_cast<const int32_t*>(arranged), n, out,
                            bounds,        rows_};
    kernels_.multiply(job, first, last);
}

}  // namespace paceline
