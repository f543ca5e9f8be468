// The weight formats: the one list of them. A format is a file beside this one; names, defaults and
// what each holds come from its entry.
#pragma once

#include "kernels/formats/floats.hpp"
#include "kernels/formats/block_formats.hpp"
#include "kernels/formats/integers.hpp"
#include "kernels/formats/ternary.hpp"

namespace paceline {

namespace {

#define FORMAT(Type, name) &PACELINE_ISA::name##_kernels,
static const FormatKernels* const all_formats[] = {
    &fp32_kernels, &bf16_kernels,      &fp16_kernels,      &int8_kernels,      &int4_kernels,
    &ternary_kernels, &int8_fp16_kernels, &int8_zero_kernels, &int4_fp16_kernels,
    &int4_zero_kernels, GGUF_FORMATS(FORMAT) nullptr};
#undef FORMAT

}  // namespace

}  // namespace paceline
