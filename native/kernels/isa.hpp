// Which instruction sets this build holds and this machine runs.
#pragma once

#include <string>
#include <vector>

#include "kernels/kernels.hpp"

namespace paceline {

// Runnable here, the fastest first.
std::vector<const Kernels*> runnable();

// The kernels called `name`; when it is empty, those that PACELINE_ISA names or the fastest.
// Throws std::invalid_argument.
const Kernels& choose(const std::string& name);

// The weight format called `name`. Throws std::invalid_argument.
const FormatKernels& find_format(const Kernels& kernels, const std::string& name);

}  // namespace paceline
