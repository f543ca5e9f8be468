// A weight as the caller gives it: in the type and memory order of its checkpoint.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace paceline {

struct TensorSource {
    enum class Type { fp32, fp16, bf16 };

    // Row `row` as `columns` floats. False: one of them is infinite or no number.
    bool read(size_t row, float* out) const;
    // Lets the system reclaim the pages of rows first .. last - 1, if they map a file.
    void forget(size_t first, size_t last) const;

    const uint8_t* data;
    Type type;
    size_t rows, columns;           // a vector has one row
    ptrdiff_t row_step, column_step;  // in bytes
    bool matrix;
    bool mapped;  // a read-only view of a file
};

}  // namespace paceline
