// The kernels of one instruction set. CMake compiles this file once for each, with its flags and
// PACELINE_ISA naming it.
//
// Standard templates are avoided on purpose: the linker keeps one copy of an inline function, and
// it might be the copy that the machine cannot run.

#include "kernels/attention.hpp"
#include "kernels/formats/all.hpp"
#include "kernels/rows.hpp"

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define TEXT_(a) #a
#define TEXT(a) TEXT_(a)

namespace paceline {

namespace PACELINE_ISA {
extern const ScreenKernels screen_kernels;  // head_screen.cpp
}

extern const Kernels JOIN(kernels_, PACELINE_ISA);
const Kernels JOIN(kernels_, PACELINE_ISA) = {
    .isa = TEXT(PACELINE_ISA),
    .formats = all_formats,
    .norm = norm,
    .add = add,
    .caches = {&fp32_cache, &fp16_cache, &int8_cache},
    .attention_bytes = attention_bytes,
    .mass_bytes = mass_bytes,
    .state_floats = state_floats,
    .combine = combine,
    .read = read,
    .screen = &PACELINE_ISA::screen_kernels,
};

}  // namespace paceline
