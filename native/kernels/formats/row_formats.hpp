// The formats whose panels are rows, one behind the other, compiled apart from the list: `table` names
// numbers of each row, `fine` levels that are scaled by a step of 8 bits for each small group, or by fp16.
#pragma once

#include "kernels/kernels.hpp"

#if !defined(ROW_FORMATS)
#define ROW_FORMATS(USE)                                                                       \
    USE(table2, RowTables<2>) USE(table3, RowTables<3>) USE(table4, RowTables<4>)               \
    USE(table5, RowTables<5>) USE(table6, RowTables<6>) USE(table7, RowTables<7>)              \
    USE(table8, RowTables<8>)                                                                  \
    USE(fine2, FineGroups<2 COMMA false>) USE(fine3, FineGroups<3 COMMA false>)                \
    USE(fine4, FineGroups<4 COMMA false>) USE(fine2_fp16, FineGroups<2 COMMA true>)            \
    USE(fine3_fp16, FineGroups<3 COMMA true>) USE(fine4_fp16, FineGroups<4 COMMA true>)
#endif

// One namespace for each instruction set: they are compiled apart from the list.
namespace paceline::PACELINE_ISA {

#define FORMAT(name, Type) extern const FormatKernels name##_kernels;
ROW_FORMATS(FORMAT)
#undef FORMAT

}  // namespace paceline::PACELINE_ISA
