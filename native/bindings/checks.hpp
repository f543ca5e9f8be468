// Checks of arguments that come from Python. Every one ends in std::invalid_argument, which
// nanobind raises as ValueError.

#pragma once

#include <cmath>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

#include "bindings/arrays.hpp"

namespace paceline {

constexpr size_t kMaxNodes = size_t{1} << 16;       // of a draft tree, or of a step's tree
constexpr size_t kMaxTopK = (size_t{1} << 16) - 2;  // successors of one context
constexpr size_t kMaxCapacity = size_t{1} << 30;    // rows, nodes or tokens of an index

[[noreturn]] inline void refuse(const std::string& message) {
    throw std::invalid_argument(message);
}

// `value` if it lies between `low` and `high`; NaN does not.
template <class T>
T in_range(const char* name, T value, T low, T high) {
    if (value >= low && value <= high) return value;
    std::ostringstream text;
    text << name << " is " << value << ", expected " << low << " to " << high;
    refuse(text.str());
}

inline size_t size_in_range(const char* name, size_t value, size_t low, size_t high) {
    return in_range<size_t>(name, value, low, high);
}

inline float share_in_range(const char* name, float value) {
    return in_range<float>(name, value, 0.0f, 1.0f);
}

inline size_t check_budget(size_t budget) { return size_in_range("budget", budget, 0, kMaxNodes); }

inline void check_context(const arrays::Input<int32_t, 1>& context) {
    if (!context.shape(0)) refuse("the context is empty, expected at least one token");
}

// Parents [N] of a tree: -1 for the root, then each node's parent before the node.
inline void check_parents(const int32_t* parents, size_t nodes) {
    for (size_t i = 0; i < nodes; ++i)
        if (i ? parents[i] < 0 || static_cast<size_t>(parents[i]) >= i : parents[i] != -1)
            refuse("node " + std::to_string(i) + " has parent " + std::to_string(parents[i]) +
                   ", expected " + (i ? "an earlier node" : "-1 for the root"));
}

}  // namespace paceline
