#include "support/file_mapping.hpp"

#include <cstdio>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace paceline {

#if defined(__linux__)

// From /proc/self/maps, whose lines are `begin-end permissions offset device inode path`,
// ascending.
bool is_read_only_file(const void* begin, size_t bytes, AddressRange& known) {
    const auto start = reinterpret_cast<uintptr_t>(begin);
    if (known.begin <= start && start + bytes <= known.end) return true;
    std::FILE* maps = std::fopen("/proc/self/maps", "r");
    if (!maps) return false;
    uintptr_t at = start, mapping = 0;
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
        if (at == start) mapping = first;
        at = last;
    }
    std::fclose(maps);
    if (at >= end && bytes) known = {mapping, at};
    return at >= end;
}

void forget_pages(const void* begin, size_t bytes) {
    const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const auto at = reinterpret_cast<uintptr_t>(begin);
    madvise(reinterpret_cast<void*>(at / page * page), at % page + bytes, MADV_DONTNEED);
}

#else

bool is_read_only_file(const void*, size_t, AddressRange&) { return false; }
void forget_pages(const void*, size_t) {}

#endif

}  // namespace paceline
