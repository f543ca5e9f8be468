// A model's weights as the kernels want them.
#pragma once

#include <map>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "engine/matrix.hpp"
#include "engine/shape.hpp"

namespace paceline {

struct Norm {
    Buffer weight, bias;
    explicit operator bool() const { return bool(weight); }
};

struct LayerWeights {
    FusedMatrix qkv, o, gate_up, down;
    Norm attn_norm, q_norm, k_norm, attn_inner_norm, attn_post_norm;
    Norm mlp_norm, mlp_inner_norm, mlp_post_norm;
    unsigned seen = 0;  // which of the required parts have been given
};

// Kinds of products, each of all layers.
struct ByteKinds {
    bool qkv, output, up, down, head;
};

class Weights {
public:
    // `head_format` is that of the embedding, too.
    Weights(const Shape& shape, const FormatKernels& format, const FormatKernels& head_format);

    // Takes one weight under its canonical name, e.g. `layers.3.q` or `layers.3.q.bias`.
    // Throws std::invalid_argument for a name or shape that does not belong to the model, and for
    // values that cannot be stored.
    void set(const std::string& name, const TensorSource& weight, Pool& pool);
    // Chooses the format of the matrix `name`; see FusedMatrix::set_format.
    // Throws std::invalid_argument if there is none, too.
    void set_format(const std::string& name, const FormatKernels& format, size_t group,
                    bool apart);
    // Adds a product of two matrices to the matrix `name`; see FusedMatrix::add_low_rank. They are
    // loaded as `NAME.right` and `NAME.left`.
    void add_low_rank(const std::string& name, size_t rank, FusedMatrix::Factor right,
                      FusedMatrix::Factor left);
    // Lets the matrix `name`, and those that one product multiplies with it, be those of another
    // layer; see FusedMatrix::borrow.
    void share(const std::string& name, const std::string& other);
    bool has_low_rank(const std::string& name) const { return places_.contains(name + ".left"); }
    // Takes one matrix as integers; see Matrix::load.
    void load(const std::string& name, const GroupedRows& rows, std::span<const int32_t> order,
              Pool& pool);
    // Takes one matrix in blocks; see Matrix::load_blocks.
    void load_blocks(const std::string& name, const StoredRows& rows, Pool& pool);
    // The matrix `name` as it is stored, in floats, row by row: `use(row, values)`. `layer`: where
    // its layer lies, if it is streamed.
    // Throws std::invalid_argument if no such matrix has been set.
    template <class Use>
    void get(const std::string& name, const uint8_t* layer, Use use) const {
        const auto& [matrix, rows, first, every] = place_of(name);
        std::vector<float> values(matrix->inputs);
        for (size_t row = 0; row < rows; ++row) {
            matrix->unpack(layer, (first + row / kPanel * every) * kPanel + row % kPanel, 1.0f,
                           values.data());
            use(row, values);
        }
    }
    // Throws std::invalid_argument if no such matrix has been set.
    const Matrix& matrix(const std::string& name) const { return *place_of(name).matrix; }
    // Rows and inputs of the matrix `name`.
    std::pair<size_t, size_t> extent_of(const std::string& name) const {
        const Place& place = place_of(name);
        return {place.rows, place.matrix->inputs};
    }
    // Throws std::invalid_argument with the name of a missing weight.
    void check() const;
    // Lets products of these kinds use activations of 8 bits where their formats can, all others
    // those of their formats; once all weights are set. Returns how many matrices do.
    size_t set_byte_activations(const ByteKinds& kinds);
    // Of the matrices that every pass multiplies with, padding included.
    size_t bytes() const;
    // Those of them that are another layer's, and take no memory of their own.
    size_t shared_bytes() const;
    size_t parameters() const;

    // Whether no matrix has been given.
    bool empty() const { return places_.empty(); }
    // The layer that a weight belongs to, if any. Throws std::invalid_argument if there is none.
    std::optional<size_t> layer_index(const std::string& name) const;
    // Whether all matrices of a layer have been given.
    bool complete(size_t layer) const;
    std::vector<Matrix*> matrices_of(size_t layer);
    // In memory, of everything but the matrices of layers.
    size_t other_bytes() const;

    // Lets `part_of_head` and its bias hold the head's rows of `tokens`, each in the vocabulary; at
    // once if they do already.
    void choose(std::span<const int32_t> tokens);

    const Matrix& embedding() const {
        return (shape_.tied ? head : untied_embedding).matrices()[0];
    }

    std::vector<LayerWeights> layers;
    FusedMatrix head, untied_embedding;
    Buffer positions;
    Matrix part_of_head;
    Buffer part_of_head_bias;
    Norm final_norm;

private:
    // A weight's place among those that are multiplied together; `rows` is 0 if it is no matrix.
    struct Slot {
        FusedMatrix* fused = nullptr;
        size_t part = 0, rows = 0;
        unsigned* seen = nullptr;
        unsigned mark = 0;
        bool takes_bias = true;
    };
    Slot slot_of(const std::string& stem);
    Slot layer_slot(size_t index, const std::string& part);
    // The layer that a name begins with, and the rest of the name.
    std::pair<size_t, std::string> layer_of(const std::string& name) const;
    // Throws std::invalid_argument where `name` is no matrix.
    Slot matrix_slot(const std::string& name);
    // The factor that a name means, with its rows; null where it means none.
    std::pair<Matrix*, size_t> factor_of(const std::string& name);
    void expect_extent(const std::string& name, size_t rows, size_t inputs, const Slot& slot) const;
    void remember(const std::string& name, const Slot& slot);
    Norm* norm_of(const std::string& stem, size_t& size);
    void set_positions(const TensorSource& weight);
    template <class Use>
    void each_matrix(Use use) const;
    size_t position_rows() const { return shape_.context + shape_.position_offset; }

    // Where the rows of a matrix lie among panels.
    struct Place {
        const Matrix* matrix;
        size_t rows, first, every;
    };
    const Place& place_of(const std::string& name) const;

    const Shape& shape_;
    std::map<std::string, Place> places_;
    std::vector<int32_t> chosen_;  // rows of `part_of_head`
    unsigned seen_ = 0;            // embedding and head
};

}  // namespace paceline
