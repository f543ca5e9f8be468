// How many integers of a matrix are not zero.
#pragma once

#include "kernels/kernels.hpp"

namespace paceline {

// Of the sixteen rows of a panel, in the panel with most of them.
size_t largest_panel(const GroupedRows& rows);

}  // namespace paceline
