// The kernels of codes in rows, compiled once for each instruction set, as kernels.cpp.

#include "kernels/formats/fine_groups.hpp"
#include "kernels/formats/row_formats.hpp"
#include "kernels/formats/row_tables.hpp"

namespace paceline::PACELINE_ISA {

#define COMMA ,
#define FORMAT(name, Type) const FormatKernels name##_kernels = row_format<Type>(#name);
ROW_FORMATS(FORMAT)
#undef FORMAT

}  // namespace paceline::PACELINE_ISA
