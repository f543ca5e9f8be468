// The kernels of a cache in 4 or 3 bits, compiled once for each instruction set, as kernels.cpp.

#include "kernels/packed_attention.hpp"
#include "kernels/packed_rows.hpp"

namespace paceline::PACELINE_ISA {

namespace {

template <int kBits>
constexpr PackedKernels packed = {
    {PackedBlock<kBits>::bytes, OpenRow::put, OpenRow::copy, attend_packed<kBits>, nullptr,
     nullptr},
    packed_attention_bytes,
    close_group<kBits>,
    OpenRow::get,
    read_packed<kBits>};

}  // namespace

extern const PackedKernels packed_int4, packed_int3;
const PackedKernels packed_int4 = packed<4>;
const PackedKernels packed_int3 = packed<3>;

}  // namespace paceline::PACELINE_ISA
