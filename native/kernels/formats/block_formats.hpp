// The formats in blocks, compiled apart from the list: GGUF's block types, under their names in lower
// case.
#pragma once

#include "kernels/kernels.hpp"

#if !defined(GGUF_FORMATS)  // tests take fewer, to be compiled sooner
#define GGUF_FORMATS(USE)                                                                    \
    USE(Q4_0, q4_0) USE(Q4_1, q4_1) USE(Q5_0, q5_0) USE(Q5_1, q5_1) USE(Q8_0, q8_0)            \
    USE(Q2K, q2_k) USE(Q3K, q3_k) USE(Q4K, q4_k) USE(Q5K, q5_k) USE(Q6K, q6_k)                 \
    USE(Iq4Nl, iq4_nl) USE(Iq4Xs, iq4_xs) USE(Tq1_0, tq1_0) USE(Tq2_0, tq2_0) USE(Mxfp4, mxfp4)
#endif

// One namespace for each instruction set: they are compiled apart from the list.
namespace paceline::PACELINE_ISA {

#define FORMAT(Type, name) extern const FormatKernels name##_kernels;
GGUF_FORMATS(FORMAT)
#undef FORMAT

}  // namespace paceline::PACELINE_ISA
