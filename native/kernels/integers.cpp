// The kernels of integers in blocks, compiled once for each instruction set, as kernels.cpp.

#include "kernels/formats/block_formats.hpp"
#include "kernels/formats/integers.hpp"

namespace paceline::PACELINE_ISA {

#define BARE(...) __VA_ARGS__
#define FORMAT(Type, name, head) const FormatKernels name##_kernels = integer_format<BARE Type>(#name, #head);
INTEGER_FORMATS(FORMAT)
#undef FORMAT
#undef BARE

}  // namespace paceline::PACELINE_ISA
