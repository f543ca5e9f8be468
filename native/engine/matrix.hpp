// Matrices as the kernels want them, and several of them that one product multiplies with.
#pragma once

#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "engine/tensor_source.hpp"
#include "kernels/kernels.hpp"
#include "support/buffer.hpp"
#include "support/thread_pool.hpp"

namespace paceline {

// Rows of blocks as a GGUF file holds them.
struct StoredRows {
    const uint8_t* data;  // [rows][row_bytes]
    size_t rows, row_bytes, inputs;
    bool mapped = false;  // a read-only view of a file

    // Lets the system reclaim the pages of rows first .. last - 1, if they map a file.
    void forget(size_t first, size_t last) const;
};

// A matrix in panels of sixteen output rows, in one of the formats.
struct Matrix {
    Matrix() = default;
    // `reserve` gives it memory. Throws std::invalid_argument if it was written to a file.
    Matrix(const FormatKernels& format, size_t group, size_t panels, size_t inputs);
    void reserve();

    // Packs a weight into every `every`-th panel from `first` on, a few rows at a time.
    // Throws std::invalid_argument if a value is not finite or the format cannot hold them.
    void pack(const std::string& name, const TensorSource& weight, size_t first, size_t every,
              Pool& pool);
    // Puts integers and scales there as they are; `order` says which input comes at each place.
    // Throws std::invalid_argument if the format cannot hold them, or the order is not that of
    // the other weights in this matrix.
    void load(const std::string& name, const GroupedRows& rows, std::span<const int32_t> order,
              size_t first, size_t every, Pool& pool);
    // Puts rows of a GGUF file there, bit for bit. Throws std::invalid_argument if the format is no
    // GGUF type, the rows have another size than it has, or a scale is not finite.
    void load_blocks(const std::string& name, const StoredRows& rows, size_t first, size_t every,
                     Pool& pool);
    // Lets it be panels of another matrix from `first` on, in the same memory; the other one stays.
    // Throws std::invalid_argument if that has no memory.
    void borrow(const std::string& name, const Matrix& other, size_t first);
    // Some rows of it, bit for bit, in panels of their own.
    Matrix gather(std::span<const int32_t> rows) const;
    // Row `row` times `scale`, `inputs` floats.
    void unpack(size_t row, float scale, float* out) const { unpack(nullptr, row, scale, out); }
    // The same of a matrix in a layer that lies at `layer`; null: it has memory of its own.
    void unpack(const uint8_t* layer, size_t row, float scale, float* out) const;
    // The same of a row of one panel, 0 to 15.
    void unpack_panel(const uint8_t* panel, size_t row, float scale, float* out) const;
    // Where its panels are, likewise.
    const uint8_t* panels_in(const uint8_t* layer) const {
        return streamed ? layer + place : data.bytes();
    }
    size_t bytes() const { return panels * panel_bytes; }

    // Multiplies with activations of 8 bits where the format can, or with those it has otherwise.
    // Whether it does.
    bool set_byte_activations(bool on);

    const FormatKernels* format = nullptr;
    const ProductKernels* product = nullptr;  // how it is multiplied
    size_t group = 1;            // blocks that share a scale, where the format leaves it open
    bool rounded = false;        // whether it was packed
    size_t panels = 0, inputs = 0, panel_bytes = 0;
    Buffer data;                 // empty while `streamed`
    bool streamed = false;       // whether it lies in a file, see WeightStream
    size_t entry = 0, place = 0;  // its entry there (a layer), and its offset in it
    std::vector<int32_t> order;  // the input at each place; empty: they are in order
    bool loaded = false;         // whether a weight set `order`
};

// Weights that the ternary format cannot hold.
struct NotTernary : std::invalid_argument {
    using std::invalid_argument::invalid_argument;
};

// The weights that one product multiplies with, such as queries, keys and values. Neighbours of one
// format lie in one matrix, one behind the other, or alternating panel by panel (gate and up);
// weights of different formats lie in matrices of their own.
struct LowRank;

class FusedMatrix {
public:
    FusedMatrix();
    ~FusedMatrix();
    FusedMatrix(FusedMatrix&&) noexcept;
    FusedMatrix& operator=(FusedMatrix&&) noexcept;
    // `panels` of each weight; if they alternate, all have the same number.
    FusedMatrix(const FormatKernels& format, std::vector<size_t> panels, size_t inputs,
                bool alternating = false);

    // Chooses the format of one weight, and its groups where the format leaves them open. `apart`: the weights lie in matrices of their own though
    // their formats may be the same, because the orders of their inputs differ.
    // Throws std::invalid_argument if a weight or a bias has been stored.
    void set_format(const std::string& name, size_t part, const FormatKernels& format,
                    size_t group, bool apart);

    // Adds to weight `part` of so many rows the product of two matrices; the weights then lie in
    // matrices of their own. Returns the right matrix and the left one, which are to be loaded.
    // Throws std::invalid_argument if a weight has been stored, or has such a product.
    struct Factor {
        const FormatKernels* format;
        size_t group;
    };
    void add_low_rank(const std::string& name, size_t part, size_t rows, size_t rank, Factor right,
                      Factor left);
    // Lets its weights be those of another one, in the same memory; the other one stays. Low-rank
    // terms and biases are its own.
    // Throws std::invalid_argument if a weight has been stored, or the other one has other sizes,
    // no weights or a low-rank term, or alternates where this one has such a term.
    void borrow(const std::string& name, FusedMatrix& other);

    // The factors of a weight; null where it has none.
    Matrix* right_of(size_t part);
    Matrix* left_of(size_t part);

    // Where a weight lies: row r in panel `first + r / 16 * every` of `matrix`, its bias in the
    // panel `bias_first + r / 16 * every`.
    struct Place {
        Matrix* matrix;
        size_t first, every, bias_first;
    };
    Place place(size_t part);

    // See Matrix::set_byte_activations; once the weights are stored. How many matrices do.
    size_t set_byte_activations(bool on) {
        size_t count = 0;
        for (Matrix& matrix : matrices_) count += matrix.set_byte_activations(on);
        return count;
    }

    std::span<const Matrix> matrices() const { return matrices_; }
    std::span<Matrix> matrices() { return matrices_; }
    size_t inputs() const { return inputs_; }
    size_t panels() const;

    Buffer bias;  // one float for each row of all panels; or empty
    std::unique_ptr<LowRank> low_rank;  // or null

private:
    // Throws std::invalid_argument if a weight or a bias has been stored.
    void check_empty(const std::string& name) const;
    bool together() const;
    void build();

    std::vector<size_t> panels_;
    std::vector<std::pair<const FormatKernels*, size_t>> formats_;
    size_t inputs_ = 0;
    bool alternating_ = false, apart_ = false;
    std::vector<Matrix> matrices_;
    std::vector<size_t> holder_;  // the matrix that each weight lies in
};

}  // namespace paceline
