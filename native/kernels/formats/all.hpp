// The weight formats: the one list of them. A format is a file beside this one; names, defaults and
// what each holds come from its entry.
#pragma once

#include "kernels/formats/block_formats.hpp"
#include "kernels/formats/floats.hpp"
#include "kernels/formats/ternary.hpp"

namespace paceline {

namespace {

namespace own = PACELINE_ISA;  // those that are compiled apart

#define FORMAT(Type, name) &own::name##_kernels,
static const FormatKernels* const all_formats[] = {
    &fp32_kernels,         &bf16_kernels,           &fp16_kernels,
    &own::int8_kernels,    &own::int4_kernels,      &ternary_kernels,
    &own::int8_fp16_kernels, &own::int8_zero_kernels, &own::int4_fp16_kernels,
    &own::int4_zero_kernels, GGUF_FORMATS(FORMAT) nullptr};
#undef FORMAT

}  // namespace

}  // namespace paceline
