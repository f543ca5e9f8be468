// A model's weights as the kernels want them.
#pragma once

#include <string>
#include <vector>

#include "buffer.hpp"
#include "kernels.hpp"
#include "shape.hpp"

// A matrix in panels of sixteen output rows, in one of the formats.
struct Matrix {
    Matrix() = default;
    Matrix(const FormatKernels& format, size_t panels, size_t inputs);

    // Packs weights [rows][inputs] into every `every`-th panel from `first` on.
    void pack(const float* weights, size_t rows, size_t first, size_t every);
    // Row `row` times `scale`, `inputs` floats.
    void unpack(size_t row, float scale, float* out) const;

    const FormatKernels* format = nullptr;
    size_t panels = 0, inputs = 0, panel_bytes = 0;
    Buffer data;
};

struct Norm {
    Buffer weight, bias;
    explicit operator bool() const { return bool(weight); }
};

struct LayerWeights {
    Matrix qkv, o, gate_up, down;
    Buffer qkv_bias, o_bias, gate_up_bias, down_bias;
    Norm attn_norm, q_norm, k_norm, attn_inner_norm, attn_post_norm;
    Norm mlp_norm, mlp_inner_norm, mlp_post_norm;
    unsigned seen = 0;  // which of the required parts have been given
};

// A weight as it is handed in: float32, C-contiguous.
struct Given {
    const float* data;
    size_t rows, columns;  // a vector has one row
    bool matrix;
};

class Weights {
public:
    Weights(const Shape& shape, const FormatKernels& format, const FormatKernels& head_format);

    // Takes one weight under its canonical name, e.g. `layers.3.q` or `layers.3.q.bias`.
    // Throws std::invalid_argument for a name or shape that does not belong to the model.
    void set(const std::string& name, const Given& weight);
    // Throws std::invalid_argument with the name of a missing weight.
    void check() const;
    // Of the matrices that every pass multiplies with, padding included.
    size_t bytes() const;
    size_t parameters() const;

    std::vector<LayerWeights> layers;
    Matrix head;
    Buffer head_bias, embedding, positions;  // embedding [V][hidden], empty when tied
    Norm final_norm;

private:
    void set_global(const std::string& name, const Given& weight, bool bias);
    void set_layer(size_t index, const std::string& part, const Given& weight, bool bias);
    template <class Use>
    void each_matrix(Use use) const;
    size_t position_rows() const { return shape_.context + shape_.position_offset; }

    const Shape& shape_;
    const FormatKernels& format_;
    bool embedding_given_ = false, head_given_ = false;
};
