// The kernels of sparse integers, compiled once for each instruction set, as kernels.cpp.

#include "kernels/formats/sparse.hpp"
#include "kernels/formats/sparse_formats.hpp"

namespace paceline::PACELINE_ISA {

const FormatKernels pairs8_kernels = sparse_format<PairWeights<8>>("pairs8");
const FormatKernels pairs4_kernels = sparse_format<PairWeights<4>>("pairs4");
const FormatKernels bitmap8_kernels = sparse_format<BitmapWeights>("bitmap8");

}  // namespace paceline::PACELINE_ISA
