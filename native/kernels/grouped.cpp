// The kernels of integers in groups, compiled once for each instruction set, as kernels.cpp.

#include "kernels/formats/grouped.hpp"
#include "kernels/formats/group_formats.hpp"

namespace paceline::PACELINE_ISA {

#define FORMAT(bits, name, Scales) \
    const FormatKernels name##_kernels = group_format<bits, Scales>(#name);
GROUP_FORMATS(FORMAT)
#undef FORMAT

}  // namespace paceline::PACELINE_ISA
