#include "kernels/isa.hpp"

#include <cstdlib>
#include <stdexcept>

namespace paceline {

extern const Kernels kernels_portable;
#if defined(PACELINE_PORTABLE_ONLY)
#elif defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx512, kernels_avx512vnni;
#elif defined(__aarch64__)
extern const Kernels kernels_neon;
#endif

std::vector<const Kernels*> runnable() {
    std::vector<const Kernels*> found;
#if defined(PACELINE_PORTABLE_ONLY)
#elif defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx512 && __builtin_cpu_supports("avx512vnni")) found.push_back(&kernels_avx512vnni);
    if (avx512) found.push_back(&kernels_avx512);
    if (avx2) found.push_back(&kernels_avx2);
#elif defined(__aarch64__)
    found.push_back(&kernels_neon);
#endif
    found.push_back(&kernels_portable);
    return found;
}

const Kernels& choose(const std::string& name) {
    const auto found = runnable();
    if (name.empty()) {
        const char* requested = std::getenv("PACELINE_ISA");
        return requested && *requested ? choose(requested) : *found.front();
    }
    std::string names;
    for (const Kernels* kernels : found) {
        if (name == kernels->isa) return *kernels;
        names += (names.empty() ? "" : ", ") + std::string(kernels->isa);
    }
    throw std::invalid_argument("instruction set '" + name + "' does not run here; choose one of " +
                                names);
}

const FormatKernels& find_format(const Kernels& kernels, const std::string& name) {
    std::string names;
    for (const FormatKernels* const* format = kernels.formats; *format; ++format) {
        if (name == (*format)->name) return **format;
        names += (names.empty() ? "" : ", ") + std::string((*format)->name);
    }
    throw std::invalid_argument("format '" + name + "' is unknown; choose one of " + names);
}

}  // namespace paceline
