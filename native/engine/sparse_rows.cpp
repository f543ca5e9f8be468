#include "engine/sparse_rows.hpp"

#include <algorithm>

namespace paceline {

namespace {

size_t kept_of(const GroupedRows& rows, size_t row) {
    size_t kept = 0;
    for (size_t first = 0; first < rows.inputs; first += kBlockInputs) {
        const auto group = static_cast<size_t>(rows.block_groups[first / kBlockInputs]);
        const int zero = rows.zero(row, group);
        const size_t last = std::min(first + kBlockInputs, rows.inputs);
        for (size_t k = first; k < last; ++k) kept += rows.codes[row * rows.inputs + k] != zero;
    }
    return kept;
}

}  // namespace

size_t largest_panel(const GroupedRows& rows) {
    size_t largest = 0;
    for (size_t first = 0; first < rows.rows; first += kPanel) {
        size_t kept = 0;
        for (size_t row = first; row < std::min(first + kPanel, rows.rows); ++row)
            kept += kept_of(rows, row);
        largest = std::max(largest, kept);
    }
    return largest;
}

}  // namespace paceline
