// Reads the shape of a decoder from a Python `ModelConfig`.

#pragma once

#include <nanobind/nanobind.h>

#include <vector>

#include "engine/shape.hpp"

namespace paceline {

// The shape that the kernels need. Distinct rotary embeddings are appended to `ropes`, in the order
// of `LayerShape::rope`. Throws std::invalid_argument for a shape that no kernel can run.
Shape shape_of(nanobind::handle config, std::vector<nanobind::object>& ropes);

}  // namespace paceline
