#include "kernels/isa.hpp"

#include <cstdlib>
#include <stdexcept>
#include <utility>

#include "kernels/few_read.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace paceline {

extern const Kernels kernels_portable;
#if defined(PACELINE_PORTABLE_ONLY)
#elif defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avxvnni, kernels_avx512, kernels_avx512vnni;
#elif defined(__aarch64__)
extern const Kernels kernels_neon, kernels_neondot, kernels_neoni8mm;
#endif

#define FEW_READ(isa)                                                  \
    namespace isa {                                                    \
    extern const FewReadKernels few_read_kernels[kFewReadFormats];     \
    }
FEW_READ(portable)
#if defined(PACELINE_PORTABLE_ONLY)
#elif defined(__x86_64__)
FEW_READ(avx2)
FEW_READ(avxvnni)
FEW_READ(avx512)
FEW_READ(avx512vnni)
#elif defined(__aarch64__)
FEW_READ(neon)
FEW_READ(neondot)
FEW_READ(neoni8mm)
#endif
#undef FEW_READ

namespace {

#if defined(__x86_64__)
// Leaf 7, subleaf 1 of cpuid; compilers differ in the names that they know.
[[maybe_unused]] bool has_avx_vnni() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#elif defined(__aarch64__)
enum class ArmFeature { dot_product, matrix_product };

[[maybe_unused]] bool has_feature(ArmFeature feature) {
    const bool dot = feature == ArmFeature::dot_product;
#if defined(__linux__)  // HWCAP_ASIMDDP and HWCAP2_I8MM, which old headers lack
    return dot ? getauxval(AT_HWCAP) >> 20 & 1 : getauxval(AT_HWCAP2) >> 13 & 1;
#elif defined(__APPLE__)
    int has = 0;
    size_t size = sizeof(has);
    const char* name = dot ? "hw.optional.arm.FEAT_DotProd" : "hw.optional.arm.FEAT_I8MM";
    return sysctlbyname(name, &has, &size, nullptr, 0) == 0 && has != 0;
#else
    return (void)dot, false;
#endif
}
#endif

}  // namespace

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
    if (avx2 && has_avx_vnni()) found.push_back(&kernels_avxvnni);
    if (avx2) found.push_back(&kernels_avx2);
#elif defined(__aarch64__)
    const bool dot = has_feature(ArmFeature::dot_product);
    if (dot && has_feature(ArmFeature::matrix_product)) found.push_back(&kernels_neoni8mm);
    if (dot) found.push_back(&kernels_neondot);
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

const FewReadKernels* find_few_read(const Kernels& kernels) {
    const std::pair<const Kernels*, const FewReadKernels*> all[] = {
#if defined(PACELINE_PORTABLE_ONLY)
#elif defined(__x86_64__)
        {&kernels_avx2, avx2::few_read_kernels},
        {&kernels_avxvnni, avxvnni::few_read_kernels},
        {&kernels_avx512, avx512::few_read_kernels},
        {&kernels_avx512vnni, avx512vnni::few_read_kernels},
#elif defined(__aarch64__)
        {&kernels_neon, neon::few_read_kernels},
        {&kernels_neondot, neondot::few_read_kernels},
        {&kernels_neoni8mm, neoni8mm::few_read_kernels},
#endif
        {&kernels_portable, portable::few_read_kernels},
    };
    for (const auto& [known, few_read] : all)
        if (known == &kernels) return few_read;
    return nullptr;
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
