// Norms, sums, the most likely tokens, and the coarse logits of a head.
#include "checks.hpp"

namespace check {

using paceline::kPanel;
using paceline::padded;

void check_rows(const Tables& tables, uint64_t seed, Record& record) {
    const paceline::Kernels& kernels = *tables.kernels;
    Random random(seed * 1000003 + 3);
    const Kind kind = static_cast<Kind>(seed % static_cast<size_t>(Kind::count));
    const size_t size = 1 + random.below(700), room = padded(size);
    const Memory<float> x = random_rows(random, 3, size, room, kind);
    const Memory<float> weight = random_rows(random, 2, size, room, Kind::plain);
    Memory<float> out(room);
    const paceline::NormJob norm{weight.data(), random.one_in(2) ? weight.data() + room : nullptr,
                                 size, 1e-5f, random.one_in(2)};
    kernels.norm(norm, x.data(), out.data());
    record.floats("norm", out.data(), size);
    kernels.add(out.data(), x.data() + room, room);
    record.floats("add", out.data(), size);
    const float sum = kernels.read(x.data(), x.size() * sizeof(float));
    record.floats("read", &sum, 1);

    const size_t tokens = random.one_in(2) ? 1 + random.below(3000) : 5000 + random.below(3000);
    const Memory<float> logits = random_rows(random, 1, tokens, tokens, kind);
    const size_t k = 1 + random.below(tokens < 100 ? tokens : 100);
    std::vector<int32_t> best(k);
    std::vector<float> probs(k);
    tables.top_row(logits.data(), tokens, k, best.data(), probs.data());
    record.bytes("top tokens", best.data(), k * sizeof(int32_t));
    record.floats("top probabilities", probs.data(), k);
}

namespace {

// Activations as the engine gives them, in tiles of `width` tokens: bytes in quads, then what a block
// needs of them.
std::vector<int32_t> screen_words(size_t n, size_t inputs, size_t width, Random& random) {
    const size_t blocks = inputs / paceline::kBlockInputs;
    std::vector<int32_t> words(n * blocks * paceline::kScreenWords);
    for (size_t token = 0; token < n; ++token) {
        const size_t first = token / width * width, count = std::min(width, n - first);
        for (size_t block = 0; block < blocks; ++block) {
            int32_t* to = words.data() + token - first +
                          (first * blocks + block * count) * paceline::kScreenWords;
            int8_t bytes[paceline::kBlockInputs];
            int32_t sum = 0;
            for (int8_t& byte : bytes) {
                byte = static_cast<int8_t>(static_cast<int>(random.below(255)) - 127);
                sum += byte;
            }
            for (size_t quad = 0; quad < 8; ++quad)
                std::memcpy(to + quad * count, bytes + 4 * quad, sizeof(int32_t));
            const float scale = random.normal() * 0.01f;
            const float rest[] = {-7.5f * static_cast<float>(sum), scale, 1.5f};
            for (size_t i = 0; i < 3; ++i)
                std::memcpy(to + (8 + i) * count, rest + i, sizeof(float));
        }
    }
    return words;
}

}  // namespace

void check_screen(const Tables& tables, uint64_t seed, Record& record) {
    Random random(seed * 1000003 + 4);
    const paceline::ScreenKernels& screen = *tables.kernels->screen;
    const size_t inputs = paceline::kBlockInputs * (1 + random.below(8)), n = 1 + random.below(11);
    const size_t panels = 1 + random.below(6), rows = panels * kPanel - random.below(kPanel);
    const Kind kinds[] = {Kind::plain, Kind::outliers, Kind::steps, Kind::zeros};
    const Memory<float> weights = random_rows(random, rows, inputs, inputs,
                                              kinds[random.below(4)]);
    const size_t bytes = screen.panel_bytes(inputs);
    Memory<uint8_t> packed((panels + 8) * bytes);
    Memory<float> scratch(inputs / 2);
    for (size_t panel = 0; panel < panels; ++panel) {
        const size_t first = panel * kPanel;
        screen.pack({weights.data() + first * inputs, std::min(kPanel, rows - first), inputs, 0.01f,
                     1e-6f, scratch.data()},
                    packed.data() + panel * bytes);
    }
    record.bytes("screen panels", packed.data(), panels * bytes);
    const std::vector<int32_t> words = screen_words(n, inputs, screen.width(), random);
    Memory<float> out(n * rows + kPanel);
    Memory<uint16_t> bounds(n * rows + kPanel);
    screen.multiply({packed.data(), inputs, words.data(), n, out.data(), bounds.data(), rows}, 0,
                    panels);
    record.floats("coarse logits", out.data(), n * rows);
    record.bytes("bounds", bounds.data(), n * rows * sizeof(uint16_t));
    for (size_t token = 0; token < n; ++token) {
        paceline::ScreenRow row{out.data() + token * rows, bounds.data() + token * rows, 0.8f,
                                random.normal(), random.one_in(2), random.bits()};
        const auto best = static_cast<uint64_t>(screen.best(row, 0, rows));
        record.bytes("best", &best, sizeof(best));
        std::vector<int32_t> left(rows);
        left.resize(screen.survivors(row, 0, rows, left.data()));
        record.bytes("survivors", left.data(), left.size() * sizeof(int32_t));
    }
}

}  // namespace check
