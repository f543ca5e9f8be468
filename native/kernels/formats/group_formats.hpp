// The formats of integers in groups of any size, compiled apart from the list: `group` has an fp16
// scale for each group, `nested` and `levels` six bits of a number for each row.
#pragma once

#include "kernels/kernels.hpp"

#if !defined(GROUP_FORMATS)  // tests take fewer, to be compiled sooner
#define GROUP_FORMATS(USE)                                                            \
    USE(2, group2, PlainScales<2>) USE(3, group3, PlainScales<3>)                     \
    USE(4, group4, PlainScales<4>) USE(5, group5, PlainScales<5>)                     \
    USE(6, group6, PlainScales<6>) USE(8, group8, PlainScales<8>)                     \
    USE(2, group2_zero, ZeroScales<2>) USE(3, group3_zero, ZeroScales<3>)             \
    USE(4, group4_zero, ZeroScales<4>) USE(5, group5_zero, ZeroScales<5>)             \
    USE(6, group6_zero, ZeroScales<6>) USE(8, group8_zero, ZeroScales<8>)             \
    USE(2, nested2, NestedPlain<2>) USE(3, nested3, NestedPlain<3>)                   \
    USE(4, nested4, NestedPlain<4>) USE(5, nested5, NestedPlain<5>)                   \
    USE(6, nested6, NestedPlain<6>) USE(8, nested8, NestedPlain<8>)                   \
    USE(2, nested2_zero, NestedZeros<2>) USE(3, nested3_zero, NestedZeros<3>)         \
    USE(4, nested4_zero, NestedZeros<4>) USE(5, nested5_zero, NestedZeros<5>)         \
    USE(6, nested6_zero, NestedZeros<6>)                                              \
    USE(2, levels2, NestedLevels<2>) USE(3, levels3, NestedLevels<3>)                 \
    USE(4, levels4, NestedLevels<4>)
#endif

// One namespace for each instruction set: they are compiled apart from the list.
namespace paceline::PACELINE_ISA {

#define FORMAT(bits, name, Scales) extern const FormatKernels name##_kernels;
GROUP_FORMATS(FORMAT)
#undef FORMAT

}  // namespace paceline::PACELINE_ISA
