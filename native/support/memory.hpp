// Refuses to reserve more memory than the machine has: the system would grant it and later end the
// process.

#pragma once

#include <string>

namespace paceline {

// Throws std::invalid_argument if `bytes` for `what` are more than half of the machine's memory.
void check_memory(const std::string& what, double bytes);

}  // namespace paceline
