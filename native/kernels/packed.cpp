#include "kernels/packed.hpp"

#include <cstring>
#include <stdexcept>

namespace paceline {

#define DECLARE(name)                                             \
    namespace name {                                              \
    extern const PackedKernels packed_int4, packed_int3;          \
    }
#define RETURN(name)                                              \
    if (!std::strcmp(kernels.isa, #name))                         \
        return bits == 4 ? name::packed_int4 : name::packed_int3;

#if defined(PACELINE_PORTABLE_ONLY)
#define EACH_ISA(use) use(portable)
#elif defined(__x86_64__)
#define EACH_ISA(use) use(portable) use(avx2) use(avxvnni) use(avx512) use(avx512vnni)
#elif defined(__aarch64__)
#define EACH_ISA(use) use(portable) use(neon) use(neondot) use(neoni8mm)
#else
#define EACH_ISA(use) use(portable)
#endif

EACH_ISA(DECLARE)

const PackedKernels& packed_kernels(const Kernels& kernels, int bits) {
    EACH_ISA(RETURN)
    throw std::logic_error("an instruction set has no kernels for a cache in groups");
}

}  // namespace paceline
