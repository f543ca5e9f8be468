// Where the time of passes goes, by kind of work.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>

namespace paceline {

enum class Stage { embed, norm, arrange, qkv, rotate, attention, output, up, down, head, stream, count };
constexpr size_t kStageCount = static_cast<size_t>(Stage::count);
constexpr const char* kStageNames[kStageCount] = {"embed",  "norm",      "arrange", "qkv", "rotate",
                                            "attention", "output", "up",      "down", "head",    "stream"};

struct Spent {
    double seconds = 0;  // from a phase's beginning to the next one's
    double busy = 0;     // of all threads together; the rest of `seconds` they waited
    double bytes = 0;    // of weights, or of cached keys and values
    double macs = 0;     // multiply-adds
};
using Profile = std::array<Spent, kStageCount>;

inline double now() {
    const auto since = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration<double>(since).count();
}

}  // namespace paceline
