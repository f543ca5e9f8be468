// The weight formats: the one list of them. A format is a file beside this one; names, defaults and
// what each holds come from its entry.
#pragma once

#include "kernels/formats/floats.hpp"
#include "kernels/formats/block_formats.hpp"
#include "kernels/formats/group_formats.hpp"
#include "kernels/formats/integers.hpp"
#include "kernels/formats/row_formats.hpp"
#include "kernels/formats/sparse_formats.hpp"
#include "kernels/formats/ternary.hpp"

namespace paceline {

namespace {

static const FormatKernels int8_kernels =
    format_kernels<IntWeights<Int8, Bf16Scales>>("int8", "int8");
static const FormatKernels int4_kernels =
    format_kernels<IntWeights<Int4, Bf16Scales>>("int4", "int8");
static const FormatKernels int8_fp16_kernels =
    format_kernels<IntWeights<Int8, Fp16Scales>>("int8_fp16", "int8_fp16");
static const FormatKernels int4_fp16_kernels =
    format_kernels<IntWeights<Int4, Fp16Scales>>("int4_fp16", "int8_fp16");
static const FormatKernels int8_zero_kernels =
    format_kernels<IntWeights<Int8Zero, Fp16Scales>>("int8_zero", "int8_zero");
static const FormatKernels int4_zero_kernels =
    format_kernels<IntWeights<Int4Zero, Fp16Scales>>("int4_zero", "int8_zero");

#define FORMAT(Type, name) &PACELINE_ISA::name##_kernels,
#define GROUPED(bits, name, Scales) &PACELINE_ISA::name##_kernels,
#define SPARSE(name) &PACELINE_ISA::name##_kernels,
#define IN_ROWS(name, Type) &PACELINE_ISA::name##_kernels,
static const FormatKernels* const all_formats[] = {
    &fp32_kernels, &bf16_kernels,      &fp16_kernels,      &int8_kernels,      &int4_kernels,
    &ternary_kernels, &int8_fp16_kernels, &int8_zero_kernels, &int4_fp16_kernels,
    &int4_zero_kernels, GGUF_FORMATS(FORMAT) GROUP_FORMATS(GROUPED)
    SPARSE_FORMATS(SPARSE) ROW_FORMATS(IN_ROWS) nullptr};
#undef FORMAT
#undef GROUPED
#undef SPARSE
#undef IN_ROWS

}  // namespace

}  // namespace paceline
