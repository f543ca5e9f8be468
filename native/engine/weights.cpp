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
constexpr unsigned kEmbed = 1, kHead = 2;
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
void place_bias(Buffer& bias, const Matrix& matrix, const std::string& name,
                const TensorSource& weight, size_t first, size_t every) {
    if (!bias) bias = zeros(matrix.panels * kPanel);
    std::vector<float> from(weight.columns);
    read(name, weight, 0, from.data());
    for (size_t row = 0; row < from.size(); ++row)
        bias.floats()[(first + row / kPanel * every) * kPanel + row % kPanel] = from[row];
}

void set_norm(Norm& norm, const std::string& name, const TensorSource& weight, size_t size,
              bool bias, float offset) {
    expect(name, weight, 1, size, false);
    Buffer& to = bias ? norm.bias : norm.weight;
    to = zeros(padded(size));
    read(name, weight, 0, to.floats());
    for (size_t i = 0; i < size; ++i) to.floats()[i] += bias ? 0.0f : offset;
}

// The norm of a model whose norms have no weights.
Norm plain_norm(size_t size) {
    Norm norm;
    norm.weight = zeros(padded(size));
    std::fill_n(norm.weight.floats(), size, 1.0f);
    return norm;
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

// The panels of one matrix of integers.
class Loading : public Task {
public:
    Loading(Matrix& to, const GroupedRows& rows, size_t first, size_t every)
        : to_(to), rows_(rows), first_(first), every_(every), panels_(padded(rows.rows) / kPanel) {
        chunks_ = padded(rows.rows) * to.inputs / kChunk + 1;
        add_phase(chunks_);
    }

private:
    static constexpr size_t kChunk = size_t{1} << 18;

    void work(size_t, size_t chunk, size_t) override {
        const auto [begin, end] = chunk_range(panels_, chunk, chunks_);
        for (size_t panel = begin; panel < end; ++panel) {
            const size_t row = panel * kPanel;
            GroupedRows part = rows_;
            part.rows = std::min(rows_.rows - row, kPanel);
            part.codes += row * rows_.inputs;
            part.scales += row * rows_.groups;
            if (part.zeros) part.zeros += row * rows_.groups;
            to_.format->load(part, to_.data.bytes() + (first_ + panel * every_) * to_.panel_bytes);
        }
    }

    Matrix& to_;
    const GroupedRows& rows_;
    const size_t first_, every_, panels_;
    size_t chunks_;
};

}  // namespace

Matrix::Matrix(const FormatKernels& format, size_t panels, size_t inputs)
    : format(&format), panels(panels), inputs(inputs), panel_bytes(format.panel_bytes(inputs)) {}

void Matrix::reserve() {
    if (data) return;
    if (panel_bytes && panels > SIZE_MAX / panel_bytes) throw std::bad_alloc();
    data = Buffer(panels * panel_bytes);
}

void Matrix::pack(const std::string& name, const TensorSource& weight, size_t first, size_t every,
                  Pool& pool) {
    if (!order.empty()) refuse("weight '" + name + "' has its inputs in order, others have not");
    loaded = true;
    reserve();
    const auto packing = std::make_shared<Packing>(*this, weight, first, every, pool.size());
    pool.run(packing, pool.size());
    weight.forget(0, weight.rows);
    if (!packing->finite) refuse("weight '" + name + "' holds NaN or infinite values");
    if (!packing->fits)
        throw NotTernary("weight '" + name + "' is not ternary: its rows must hold 0 and one "
                         "number with either sign; choose another format");
}

void Matrix::load(const std::string& name, const GroupedRows& rows,
                  std::span<const int32_t> inputs_order, size_t first, size_t every, Pool& pool) {
    if (!format->holds || !format->holds(rows))
        refuse("weight '" + name + "' cannot be kept as it is in " + format->name);
    if (loaded && !std::ranges::equal(order, inputs_order))
        refuse("weight '" + name + "' has its inputs in another order than others");
    order.assign(inputs_order.begin(), inputs_order.end());
    loaded = true;
    reserve();
    pool.run(std::make_shared<Loading>(*this, rows, first, every), pool.size());
}

Matrix Matrix::gather(std::span<const int32_t> rows) const {
    Matrix part(*format, padded(rows.size()) / kPanel, inputs);
    part.reserve();
    part.data.zero();
    part.order = order;
    for (size_t i = 0; i < rows.size(); ++i) {
        const size_t row = static_cast<size_t>(rows[i]);
        format->copy(data.bytes() + row / kPanel * panel_bytes, row % kPanel, inputs,
                     part.data.bytes() + i / kPanel * panel_bytes, i % kPanel);
    }
    return part;
}

void Matrix::unpack(size_t row, float scale, float* out) const {
    const uint8_t* panel = data.bytes() + row / kPanel * panel_bytes;
    if (order.empty()) return format->unpack(panel, row % kPanel, inputs, scale, out);
    std::vector<float> placed(inputs);
    format->unpack(panel, row % kPanel, inputs, scale, placed.data());
    for (size_t k = 0; k < inputs; ++k) out[order[k]] = placed[k];
}

Weights::Weights(const Shape& shape, const FormatKernels& format, const FormatKernels& head_format)
    : layers(shape.layers.size()), shape_(shape) {
    const size_t panels = padded(shape.vocabulary) / kPanel, hidden = shape.hidden;
    head = Matrix(head_format, panels, hidden);
    if (!shape.weighted_norm) final_norm = plain_norm(hidden);
    if (!shape.tied) untied_embedding = Matrix(head_format, panels, hidden);
    for (size_t i = 0; i < layers.size(); ++i) {
        const LayerShape& layer = shape.layers[i];
        const size_t wide = padded(layer.intermediate) / kPanel;
        if (!shape.weighted_norm) {
            layers[i].attn_norm = plain_norm(hidden);
            layers[i].mlp_norm = plain_norm(hidden);
        }
        layers[i].qkv = Matrix(format, layer.qkv_size() / kPanel, hidden);
        layers[i].o = Matrix(format, padded(hidden) / kPanel, layer.query_size());
        layers[i].gate_up = Matrix(format, (shape.gated ? 2 : 1) * wide, hidden);
        layers[i].down = Matrix(format, padded(hidden) / kPanel, layer.intermediate);
    }
}

std::pair<size_t, std::string> Weights::layer_of(const std::string& name) const {
    const std::string prefix = "layers.";
    size_t index = 0;
    const char *begin = name.data() + prefix.size(), *last = name.data() + name.size();
    const auto [end, error] = std::from_chars(begin, last, index);
    if (error != std::errc() || end == last || *end != '.')
        refuse("weight '" + name + "' is not part of a decoder");
    if (index >= layers.size())
        refuse("weight '" + name + "' belongs to none of the " + std::to_string(layers.size()) +
               " layers");
    return {index, std::string(end + 1)};
}

Weights::Slot Weights::slot_of(const std::string& stem) {
    const size_t vocabulary = shape_.vocabulary;
    if (stem == "embed")
        return {shape_.tied ? &head : &untied_embedding, nullptr, vocabulary, 0, 1, &seen_, kEmbed};
    if (stem == "head")
        return {&head, &head_bias, shape_.tied ? 0 : vocabulary, 0, 1, &seen_, kHead};
    if (!stem.starts_with("layers.")) return {};
    const auto [index, part] = layer_of(stem);
    return layer_slot(index, part);
}

Weights::Slot Weights::layer_slot(size_t index, const std::string& part) {
    const LayerShape& shape = shape_.layers[index];
    LayerWeights& layer = layers[index];
    const size_t hidden = shape_.hidden, wide = shape.intermediate, gates = shape_.gated ? 2 : 1;
    const auto attention = [&](Part which, size_t rows, size_t at) -> Slot {
        return {&layer.qkv, &layer.qkv_bias, rows, at / kPanel, 1, &layer.seen, 1u << which};
    };
    const auto widen = [&](Part which, size_t first) -> Slot {
        return {&layer.gate_up, &layer.gate_up_bias, wide, first, gates, &layer.seen, 1u << which};
    };
    if (part == "q") return attention(Part::q, shape.query_size(), 0);
    if (part == "k") return attention(Part::k, shape.kv_size(), shape.keys_at());
    if (part == "v") return attention(Part::v, shape.kv_size(), shape.values_at());
    if (part == "o") return {&layer.o, &layer.o_bias, hidden, 0, 1, &layer.seen, 1u << Part::o};
    if (part == "gate" && shape_.gated) return widen(Part::gate, 0);
    if (part == "up") return widen(Part::up, gates - 1);
    if (part == "down")
        return {&layer.down, &layer.down_bias, hidden, 0, 1, &layer.seen, 1u << Part::down};
    return {};
}

Norm* Weights::norm_of(const std::string& stem, size_t& size) {
    size = shape_.hidden;
    if (!shape_.weighted_norm) return nullptr;
    if (stem == "final_norm") return &final_norm;
    if (!stem.starts_with("layers.")) return nullptr;
    const auto [index, part] = layer_of(stem);
    LayerWeights& layer = layers[index];
    if (part == "attn_norm" && shape_.pre_norm) return &layer.attn_norm;
    if (part == "attn_post_norm") return &layer.attn_post_norm;
    if (part == "mlp_norm" && shape_.pre_norm) return &layer.mlp_norm;
    if (part == "mlp_post_norm") return &layer.mlp_post_norm;
    const LayerShape& shape = shape_.layers[index];
    const bool width = shape_.qk_norm == QKNorm::width;
    size = width ? shape.query_size() : shape.head_dim;
    if (part == "q_norm") return &layer.q_norm;
    size = width ? shape.kv_size() : shape.head_dim;
    if (part == "k_norm") return &layer.k_norm;
    size = shape.query_size();
    if (part == "attn_inner_norm") return &layer.attn_inner_norm;
    size = shape.intermediate;
    if (part == "mlp_inner_norm") return &layer.mlp_inner_norm;
    return nullptr;
}

void Weights::set(const std::string& name, const TensorSource& weight, Pool& pool) {
    const std::string suffix = ".bias";
    const bool bias = name.size() > suffix.size() && name.ends_with(suffix);
    const std::string stem = bias ? name.substr(0, name.size() - suffix.size()) : name;
    size_t size = 0;
    if (Norm* norm = norm_of(stem, size))
        return set_norm(*norm, name, weight, size, bias, shape_.norm_offset);
    if (name == "positions" && shape_.learned_positions) return set_positions(weight);
    const Slot slot = slot_of(stem);
    if (bias && slot.matrix && !slot.bias) refuse("weight '" + stem + "' takes no bias");
    if (bias && slot.matrix) {
        const size_t rows = slot.matrix == &head ? shape_.vocabulary : slot.rows;
        expect(name, weight, 1, rows, false);
        return place_bias(*slot.bias, *slot.matrix, name, weight, slot.first, slot.every);
    }
    if (!slot.rows) refuse("weight '" + name + "' is not part of this model");
    expect(name, weight, slot.rows, slot.matrix->inputs, true);
    slot.matrix->pack(name, weight, slot.first, slot.every, pool);
    places_[name] = {slot.matrix, slot.rows, slot.first, slot.every};
    *slot.seen |= slot.mark;
}

void Weights::set_positions(const TensorSource& weight) {
    const size_t hidden = shape_.hidden;
    expect("positions", weight, position_rows(), hidden, true);
    positions = Buffer(position_rows() * hidden * sizeof(float));
    for (size_t row = 0; row < position_rows(); ++row)
        read("positions", weight, row, positions.floats() + row * hidden);
}

void Weights::set_format(const std::string& name, const FormatKernels& format) {
    const Slot slot = slot_of(name);
    if (!slot.rows) refuse("weight '" + name + "' is no matrix of this model");
    if (slot.matrix->data) refuse("weight '" + name + "' comes too late to choose a format");
    *slot.matrix = Matrix(format, slot.matrix->panels, slot.matrix->inputs);
}

void Weights::load(const std::string& name, const GroupedRows& rows,
                   std::span<const int32_t> order, Pool& pool) {
    const Slot slot = slot_of(name);
    if (!slot.rows) refuse("weight '" + name + "' is no matrix of this model");
    if (rows.rows != slot.rows || rows.inputs != slot.matrix->inputs)
        refuse("weight '" + name + "' has shape " + extent(rows.rows, rows.inputs, true) +
               ", expected " + extent(slot.rows, slot.matrix->inputs, true));
    slot.matrix->load(name, rows, order, slot.first, slot.every, pool);
    places_[name] = {slot.matrix, slot.rows, slot.first, slot.every};
    *slot.seen |= slot.mark;
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

const Weights::Place& Weights::place_of(const std::string& name) const {
    const auto place = places_.find(name);
    if (place == places_.end()) refuse("no matrix '" + name + "' has been set");
    return place->second;
}

void Weights::check() const {
    const auto need = [](bool given, const std::string& name) {
        if (!given) refuse("weight '" + name + "' is missing");
    };
    need(seen_ & kEmbed, "embed");
    need(shape_.tied || seen_ & kHead, "head");
    need(!shape_.learned_positions || positions, "positions");
    need(bool(final_norm), "final_norm");
    for (size_t i = 0; i < layers.size(); ++i) {
        const LayerWeights& layer = layers[i];
        const std::string prefix = "layers." + std::to_string(i) + ".";
        for (unsigned part = 0; part < parts; ++part)
            need(layer.seen >> part & 1 || (part == gate && !shape_.gated),
                 prefix + kPartNames[part]);
        need(!shape_.pre_norm || layer.attn_norm, prefix + "attn_norm");
        need(!shape_.pre_norm || layer.mlp_norm, prefix + "mlp_norm");
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
