#include "support/file_mapping.hpp"

#include <cstdint>
#include <cstdio>

namespace paceline {

#if defined(__linux__)

// From /proc/self/maps, whose lines are `begin-end permissions offset device inode path`,
// ascending.
bool is_read_only_file(const void* begin, size_t bytes) {
    std::FILE* maps = std::fopen("/proc/self/maps", "r");
    if (!maps) return false;
    auto at = reinterpret_cast<uintptr_t>(begin);
    const uintptr_t end = at + bytes;
    char line[512];
    bool starts_line = true;
    while (at < end && std::fgets(line, sizeof(line), maps)) {
        unsigned long first = 0, last = 0, inode = 0;
        char permissions[8] = "";
        const bool fields = starts_line && std::sscanf(line, "%lx-%lx %7s %*s %*s %lu", &first,
                                                       &last, permissions, &inode) == 4;
        starts_line = false;
        for (const char* c = line; *c; ++c) starts_line |= *c == '\n';
        if (!fields || last <= at) continue;
        if (first > at || inode == 0 || permissions[1] == 'w') break;
        at = last;
    }
    std::fclose(maps);
    return at >= end;
}

#else

bool is_read_only_file(const void*, size_t) { return false; }

#endif

}  // namespace paceline
