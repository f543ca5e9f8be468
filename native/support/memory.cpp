#include "support/memory.hpp"

#include <cstdint>
#include <stdexcept>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace paceline {

namespace {

double physical_memory() {
#if defined(_SC_PHYS_PAGES) && defined(_SC_PAGESIZE)
    const long pages = sysconf(_SC_PHYS_PAGES), size = sysconf(_SC_PAGESIZE);
    if (pages > 0 && size > 0) return static_cast<double>(pages) * static_cast<double>(size);
#endif
    return 0x1p63;  // unknown
}

}  // namespace

void check_memory(const std::string& what, double bytes) {
    const double limit = physical_memory() / 2;
    if (bytes <= limit) return;
    constexpr double kMegabyte = 1 << 20;
    throw std::invalid_argument(what + " would take " + std::to_string(bytes / kMegabyte) +
                                " MB, expected at most half of the machine's memory, " +
                                std::to_string(limit / kMegabyte) + " MB");
}

}  // namespace paceline
