// Products of two thin matrices that are added to what some weights multiply to.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "engine/matrix.hpp"

namespace paceline {

// Those of the weights that one product multiplies with: of each weight a right matrix
// [rank, inputs], whose results a left one [rows, rank] multiplies. `FusedMatrix` says where the
// weights' rows lie; they must not alternate.
struct LowRank {
    struct Part {
        size_t weight;       // of the fused matrix
        size_t rows, rank;   // of the weight, and between the factors
        size_t begin;        // panel of all that its rows begin with
    };
    std::vector<Part> parts;
    std::vector<Matrix> right, left;  // of each part

    // Floats of a row of all right matrices' results, and where those of a part begin.
    size_t width() const { return place(parts.size()); }
    size_t place(size_t part) const {
        size_t place = 0;
        for (size_t i = 0; i < part; ++i) place += padded(parts[i].rank);
        return place;
    }
    size_t bytes() const {
        size_t bytes = 0;
        for (const Matrix& matrix : right) bytes += matrix.bytes();
        for (const Matrix& matrix : left) bytes += matrix.bytes();
        return bytes;
    }
};

}  // namespace paceline
