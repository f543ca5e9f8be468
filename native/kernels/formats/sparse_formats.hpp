// The formats of integers most of which may be zero, compiled apart from the list: `pairs` keep two of
// every four neighbours, `bitmap` keeps any. Scales are those of `group`.
#pragma once

#include "kernels/kernels.hpp"

#if !defined(SPARSE_FORMATS)
#define SPARSE_FORMATS(USE) USE(pairs8) USE(pairs4) USE(bitmap8)
#endif

// One namespace for each instruction set: they are compiled apart from the list.
namespace paceline::PACELINE_ISA {

#define FORMAT(name) extern const FormatKernels name##_kernels;
SPARSE_FORMATS(FORMAT)
#undef FORMAT

}  // namespace paceline::PACELINE_ISA
