#include "engine/weights.hpp"

#include <algorithm>
#include <atomic>
#include <charconv>
#include <memory>
#include <stdexcept>

namespace paceline {

namespace {

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

enum Part : unsigned { q, k, v, o, gate, up, down, parts };
constexpr const char* kPartNames[parts] = {"q", "k", "v", "o", "gate", "up", "down"};

std::string extent(size_t rows, size_t columns, bool matrix) {
    std::string text = "[";
    if (matrix) text += std::to_string(rows) + ", ";
    return text += std::to_string(columns) + "]";
}

void expect(const std::string& name, const TensorSource& weight, size_t rows, size_t columns,
            bool matrix) {
    if (weight.matrix == matrix && weight.rows == rows && weight.columns == columns) return;
    refuse("weight '" + name + "' has shape " +
           extent(weight.rows, weight.columns, weight.matrix) + ", expected " +
           extent(rows, columns, matrix));
}

Buffer zeros(size_t floats) {
    Buffer buffer(floats * sizeof(float));
    buffer.zero();
    return buffer;
}

void read(const std::string& name, const TensorSource& weight, size_t row, float* out) {
    if (!weight.read(row, out)) refuse("weight '" + name + "' holds NaN or infinite values");
}

// Puts a bias beside the panels that it belongs to; see Matrix::pack.
void place_bias(Buffer& bias, const Matrix& matrix, const std::string& name, const TensorSource& weight,
                size_t first, size_t every) {
    if (!bias) bias = zeros(matrix.panels * kPanel);
    std::vector<float> from(weight.columns);
    read(name, weight, 0, from.data());
    for (size_t row = 0; row < from.size(); ++row)
        bias.floats()[(first + row / kPanel * every) * kPanel + row % kPanel] = from[row];
}

void set_norm(Norm& norm, const std::string& name, const TensorSource& weight, size_t size, bool bias,
              float offset) {
    expect(name, weight, 1, size, false);
    Buffer& to = bias ? norm.bias : norm.weight;
    to = zeros(padded(size));
    read(name, weight, 0, to.floats());
    for (size_t i = 0; i < size; ++i) to.floats()[i] += bias ? 0.0f : offset;
}

// The panels of one weight, each thread with room for sixteen rows as floats.
class Packing : public Task {
public:
    Packing(Matrix& to, const TensorSource& weight, size_t first, size_t every, size_t threads)
        : to_(to), weight_(weight), first_(first), every_(every) {
        const size_t floats = padded(weight.rows) * to.inputs;
        chunks_ = floats / kChunk + 1;
        add_phase(chunks_);
        for (size_t i = 0; i < threads; ++i)
            rows_.emplace_back(kPanel * to.inputs * sizeof(float));
    }

    std::atomic<bool> finite{true}, fits{true};

private:
    static constexpr size_t kChunk = size_t{1} << 18;

    void work(size_t, size_t chunk, size_t thread) override {
        const size_t panels = padded(weight_.rows) / kPanel;
        const auto [begin, end] = chunk_range(panels, chunk, chunks_);
        const size_t last = std::min(end * kPanel, weight_.rows);
        for (size_t panel = begin; panel < end; ++panel) pack(panel, rows_[thread].floats());
        if (begin < end) weight_.forget(begin * kPanel, last);
    }

    void pack(size_t panel, float* rows) {
        const size_t row = panel * kPanel, count = std::min(weight_.rows - row, kPanel);
        for (size_t i = 0; i < count; ++i)
            if (!weight_.read(row + i, rows + i * to_.inputs)) finite = false;
        uint8_t* panels = to_.data.bytes() + (first_ + panel * every_) * to_.panel_bytes;
        if (!to_.format->pack(rows, count, to_.inputs, panels)) fits = false;
    }

    Matrix& to_;
    const TensorSource& weight_;
    const size_t first_, every_;
    size_t chunks_;
    std::vector<Buffer> rows_;
};

}  // namespace

Matrix::Matrix(const FormatKernels& format, size_t panels, size_t inputs)
    : format(&format), panels(panels), inputs(inputs), panel_bytes(format.panel_bytes(inputs)) {
    if (panel_bytes && panels > SIZE_MAX / panel_bytes) throw std::bad_alloc();
    data = Buffer(panels * panel_bytes);
}

void Matrix::pack(const std::string& name, const TensorSource& weight, size_t first, size_t every,
                  Pool& pool) {
    const auto packing = std::make_shared<Packing>(*this, weight, first, every, pool.size());
    pool.run(packing, pool.size());
    weight.forget(0, weight.rows);
    if (!packing->finite) refuse("weight '" + name + "' holds NaN or infinite values");
    if (!packing->fits)
        throw NotTernary("weight '" + name + "' is not ternary: its rows must hold 0 and one "
                         "number with either sign; choose another format");
}

Matrix Matrix::gather(std::span<const int32_t> rows) const {
    Matrix part(*format, padded(rows.size()) / kPanel, inputs);
    part.data.zero();
    for (size_t i = 0; i < rows.size(); ++i) {
        const size_t row = static_cast<size_t>(rows[i]);
        format->copy(data.bytes() + row / kPanel * panel_bytes, row % kPanel, inputs,
                     part.data.bytes() + i / kPanel * panel_bytes, i % kPanel);
    }
    return part;
}

void Matrix::unpack(size_t row, float scale, float* out) const {
    format->unpack(data.bytes() + row / kPanel * panel_bytes, row % kPanel, inputs, scale, out);
}

Weights::Weights(const Shape& shape, const FormatKernels& format, const FormatKernels& head_format)
    : layers(shape.layers.size()), shape_(shape), format_(format) {
    head = Matrix(head_format, padded(shape.vocabulary) / kPanel, shape.hidden);
    if (!shape.tied) untied_embedding = Matrix(head_format, head.panels, head.inputs);
}

void Weights::set(const std::string& name, const TensorSource& weight, Pool& pool) {
    const std::string suffix = ".bias", prefix = "layers.";
    const bool bias = name.size() > suffix.size() && name.ends_with(suffix);
    const std::string stem = bias ? name.substr(0, name.size() - suffix.size()) : name;
    if (!stem.starts_with(prefix)) return set_global(stem, weight, bias, pool);
    size_t index = 0;
    const char* begin = stem.data() + prefix.size();
    const auto [end, error] = std::from_chars(begin, stem.data() + stem.size(), index);
    if (error != std::errc() || end == stem.data() + stem.size() || *end != '.')
        refuse("weight '" + name + "' is not part of a decoder");
    if (index >= layers.size())
        refuse("weight '" + name + "' belongs to none of the " + std::to_string(layers.size()) +
               " layers");
    set_layer(index, std::string(end + 1), weight, bias, pool);
}

void Weights::set_global(const std::string& name, const TensorSource& weight, bool bias,
                         Pool& pool) {
    const size_t vocabulary = shape_.vocabulary, hidden = shape_.hidden;
    if (name == "final_norm")
        return set_norm(final_norm, name, weight, hidden, bias, shape_.norm_offset);
    if (name == "head" && bias) {
        expect("head.bias", weight, 1, vocabulary, false);
        return place_bias(head_bias, head, "head.bias", weight, 0, 1);
    }
    if (bias) refuse("weight '" + name + "' takes no bias");
    if (name == "embed") {
        expect(name, weight, vocabulary, hidden, true);
        embedding_given_ = true;
        pack(name, weight, shape_.tied ? head : untied_embedding, 0, 1, pool);
    } else if (name == "head" && !shape_.tied) {
        expect(name, weight, vocabulary, hidden, true);
        pack(name, weight, head, 0, 1, pool);
        head_given_ = true;
    } else if (name == "positions" && shape_.learned_positions) {
        expect(name, weight, position_rows(), hidden, true);
        positions = Buffer(position_rows() * hidden * sizeof(float));
        for (size_t row = 0; row < position_rows(); ++row)
            read(name, weight, row, positions.floats() + row * hidden);
    } else {
        refuse("weight '" + name + "' is not part of this model");
    }
}

void Weights::set_layer(size_t index, const std::string& part, const TensorSource& weight, bool bias,
                        Pool& pool) {
    const LayerShape& shape = shape_.layers[index];
    LayerWeights& layer = layers[index];
    const std::string name =
        "layers." + std::to_string(index) + "." + part + (bias ? ".bias" : "");
    const size_t hidden = shape_.hidden, wide = shape.intermediate;

    const auto linear = [&](Part which, Matrix& matrix, Buffer& biases, size_t panels, size_t rows,
                            size_t inputs, size_t first, size_t every) {
        if (!matrix.format) matrix = Matrix(format_, panels, inputs);
        if (bias) {
            expect(name, weight, 1, rows, false);
            return place_bias(biases, matrix, name, weight, first, every);
        }
        expect(name, weight, rows, inputs, true);
        pack(name, weight, matrix, first, every, pool);
        layer.seen |= 1u << which;
    };
    const auto attention = [&](Part which, size_t rows, size_t at) {
        linear(which, layer.qkv, layer.qkv_bias, shape.qkv_size() / kPanel, rows, hidden,
               at / kPanel, 1);
    };
    const auto norm = [&](Norm& to, size_t size) {
        set_norm(to, name, weight, size, bias, shape_.norm_offset);
    };
    const size_t gates = shape_.gated ? 2 : 1, wide_panels = padded(wide) / kPanel;
    const auto widen = [&](Part which, size_t first) {
        linear(which, layer.gate_up, layer.gate_up_bias, gates * wide_panels, wide, hidden, first,
               gates);
    };

    if (part == "q") return attention(Part::q, shape.query_size(), 0);
    if (part == "k") return attention(Part::k, shape.kv_size(), shape.keys_at());
    if (part == "v") return attention(Part::v, shape.kv_size(), shape.values_at());
    if (part == "o")
        return linear(Part::o, layer.o, layer.o_bias, padded(hidden) / kPanel, hidden,
                      shape.query_size(), 0, 1);
    if (part == "gate" && shape_.gated) return widen(Part::gate, 0);
    if (part == "up") return widen(Part::up, gates - 1);
    if (part == "down")
        return linear(Part::down, layer.down, layer.down_bias, padded(hidden) / kPanel, hidden,
                      wide, 0, 1);
    if (part == "q_norm") return norm(layer.q_norm, shape.head_dim);
    if (part == "k_norm") return norm(layer.k_norm, shape.head_dim);
    if (part == "attn_inner_norm") return norm(layer.attn_inner_norm, shape.query_size());
    if (part == "attn_post_norm") return norm(layer.attn_post_norm, hidden);
    if (part == "mlp_inner_norm") return norm(layer.mlp_inner_norm, wide);
    if (part == "mlp_post_norm") return norm(layer.mlp_post_norm, hidden);
    if (part == "attn_norm") return norm(layer.attn_norm, hidden);
    if (part == "mlp_norm") return norm(layer.mlp_norm, hidden);
    refuse("weight '" + name + "' is not part of this model");
}

void Weights::pack(const std::string& name, const TensorSource& weight, Matrix& matrix, size_t first,
                   size_t every, Pool& pool) {
    matrix.pack(name, weight, first, every, pool);
    places_[name] = {&matrix, weight.rows, first, every};
}

void Weights::choose(std::span<const int32_t> tokens) {
    if (std::ranges::equal(tokens, chosen_)) return;
    chosen_.clear();
    part_of_head = head.gather(tokens);
    if (head_bias) {
        part_of_head_bias = zeros(part_of_head.panels * kPanel);
        for (size_t i = 0; i < tokens.size(); ++i)
            part_of_head_bias.floats()[i] = head_bias.floats()[tokens[i]];
    }
    chosen_.assign(tokens.begin(), tokens.end());
}

std::vector<std::vector<float>> Weights::get(const std::string& name) const {
    const auto found = places_.find(name);
    if (found == places_.end()) refuse("no matrix '" + name + "' has been set");
    const auto& [matrix, rows, first, every] = found->second;
    std::vector<std::vector<float>> out(rows, std::vector<float>(matrix->inputs));
    for (size_t row = 0; row < rows; ++row)
        matrix->unpack((first + row / kPanel * every) * kPanel + row % kPanel, 1.0f,
                       out[row].data());
    return out;
}

void Weights::check() const {
    const auto need = [](bool given, const std::string& name) {
        if (!given) refuse("weight '" + name + "' is missing");
    };
    need(embedding_given_, "embed");
    need(shape_.tied || head_given_, "head");
    need(!shape_.learned_positions || positions, "positions");
    need(bool(final_norm), "final_norm");
    for (size_t i = 0; i < layers.size(); ++i) {
        const LayerWeights& layer = layers[i];
        const std::string prefix = "layers." + std::to_string(i) + ".";
        for (unsigned part = 0; part < parts; ++part)
            need(layer.seen >> part & 1 || (part == gate && !shape_.gated),
                 prefix + kPartNames[part]);
        need(bool(layer.attn_norm), prefix + "attn_norm");
        need(bool(layer.mlp_norm), prefix + "mlp_norm");
        const std::pair<const Norm*, const char*> norms[] = {
            {&layer.q_norm, "q_norm"},
            {&layer.k_norm, "k_norm"},
            {&layer.attn_inner_norm, "attn_inner_norm"},
            {&layer.attn_post_norm, "attn_post_norm"},
            {&layer.mlp_inner_norm, "mlp_inner_norm"},
            {&layer.mlp_post_norm, "mlp_post_norm"}};
        for (const auto& [norm, name] : norms) need(norm->weight || !norm->bias, prefix + name);
    }
}

template <class Use>
void Weights::each_matrix(Use use) const {
    use(head);
    for (const LayerWeights& layer : layers)
        for (const Matrix* matrix : {&layer.qkv, &layer.o, &layer.gate_up, &layer.down})
            use(*matrix);
}

size_t Weights::bytes() const {
    size_t total = 0;
    each_matrix([&](const Matrix& matrix) { total += matrix.data.size(); });
    return total;
}

size_t Weights::parameters() const {
    size_t total = 0;
    each_matrix([&](const Matrix& matrix) { total += matrix.panels * kPanel * matrix.inputs; });
    return total;
}

}  // namespace paceline
