// The kernels of GGUF's block types, compiled once for each instruction set, as kernels.cpp.

#include "kernels/formats/block_types.hpp"
#include "kernels/formats/block_formats.hpp"

namespace paceline::PACELINE_ISA {

#define FORMAT(Type, name) const FormatKernels name##_kernels = block_format<Type>(#name);
GGUF_FORMATS(FORMAT)
#undef FORMAT

}  // namespace paceline::PACELINE_ISA
