#include "engine/weights.hpp"

#include "engine/low_rank.hpp"

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

// Puts a bias beside the panels that it belongs to; see FusedMatrix::place.
void place_bias(FusedMatrix& fused, size_t part, const std::string& name,
                const TensorSource& weight) {
    const FusedMatrix::Place place = fused.place(part);
    if (!fused.bias) fused.bias = zeros(fused.panels() * kPanel);
    std::vector<float> from(weight.columns);
    read(name, weight, 0, from.data());
    for (size_t row = 0; row < from.size(); ++row) {
        const size_t panel = place.bias_first + row / kPanel * place.every;
        fused.bias.floats()[panel * kPanel + row % kPanel] = from[row];
    }
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

}  // namespace

Weights::Weights(const Shape& shape, const FormatKernels& format, const FormatKernels& head_format)
    : layers(shape.layers.size()), shape_(shape) {
    const auto panels = [](size_t rows) { return padded(rows) / kPanel; };
    const size_t vocabulary = panels(shape.vocabulary), hidden = shape.hidden;
    if (shape.ends || (shape.begins && shape.tied))
        head = FusedMatrix(head_format, {vocabulary}, hidden);
    if (!shape.weighted_norm) final_norm = plain_norm(hidden);
    if (!shape.tied && shape.begins) untied_embedding = FusedMatrix(head_format, {vocabulary}, hidden);
    for (size_t i = 0; i < layers.size(); ++i) {
        const LayerShape& layer = shape.layers[i];
        const size_t wide = panels(layer.intermediate), keys = layer.keys_at() / kPanel;
        const size_t values = layer.values_at() / kPanel, end = layer.qkv_size() / kPanel;
        if (!shape.weighted_norm) {
            layers[i].attn_norm = plain_norm(hidden);
            layers[i].mlp_norm = plain_norm(hidden);
        }
        if (layer.heads) {
            layers[i].qkv = FusedMatrix(format, {keys, values - keys, end - values}, hidden);
            layers[i].o = FusedMatrix(format, {panels(hidden)}, layer.query_size());
        }
        if (!layer.intermediate) continue;
        layers[i].gate_up = FusedMatrix(format, std::vector(shape.gated ? 2 : 1, wide), hidden, true);
        layers[i].down = FusedMatrix(format, {panels(hidden)}, layer.intermediate);
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
        return {shape_.tied ? &head : &untied_embedding, 0, vocabulary, &seen_, kEmbed, false};
    if (stem == "head") return {&head, 0, shape_.tied ? 0 : vocabulary, &seen_, kHead};
    if (!stem.starts_with("layers.")) return {};
    const auto [index, part] = layer_of(stem);
    return layer_slot(index, part);
}

Weights::Slot Weights::layer_slot(size_t index, const std::string& part) {
    const LayerShape& shape = shape_.layers[index];
    LayerWeights& layer = layers[index];
    const size_t hidden = shape_.hidden, wide = shape.intermediate;
    const auto slot = [&](Part which, FusedMatrix& fused, size_t place, size_t rows) -> Slot {
        return {&fused, place, rows, &layer.seen, 1u << which};
    };
    if (part == "q") return slot(Part::q, layer.qkv, 0, shape.query_size());
    if (part == "k") return slot(Part::k, layer.qkv, 1, shape.kv_size());
    if (part == "v") return slot(Part::v, layer.qkv, 2, shape.kv_size());
    if (part == "o" && shape.heads) return slot(Part::o, layer.o, 0, hidden);
    if (part == "gate" && shape_.gated) return slot(Part::gate, layer.gate_up, 0, wide);
    if (part == "up") return slot(Part::up, layer.gate_up, shape_.gated ? 1 : 0, wide);
    if (part == "down" && wide) return slot(Part::down, layer.down, 0, hidden);
    return {};
}

Norm* Weights::norm_of(const std::string& stem, size_t& size) {
    size = shape_.hidden;
    if (!shape_.weighted_norm) return nullptr;
    if (stem == "final_norm") return &final_norm;
    if (!stem.starts_with("layers.")) return nullptr;
    const auto [index, part] = layer_of(stem);
    LayerWeights& layer = layers[index];
    const LayerShape& shape = shape_.layers[index];
    if (part.starts_with("mlp_") ? !shape.intermediate : !shape.heads) return nullptr;
    if (part == "attn_norm" && shape_.pre_norm) return &layer.attn_norm;
    if (part == "attn_post_norm") return &layer.attn_post_norm;
    if (part == "mlp_norm" && shape_.pre_norm) return &layer.mlp_norm;
    if (part == "mlp_post_norm") return &layer.mlp_post_norm;
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
    if (bias && slot.fused && !slot.takes_bias) refuse("weight '" + stem + "' takes no bias");
    if (bias && slot.fused) {
        const size_t rows = slot.fused == &head ? shape_.vocabulary : slot.rows;
        expect(name, weight, 1, rows, false);
        return place_bias(*slot.fused, slot.part, name, weight);
    }
    if (!slot.rows) refuse("weight '" + name + "' is not part of this model");
    expect(name, weight, slot.rows, slot.fused->inputs(), true);
    const auto place = slot.fused->place(slot.part);
    place.matrix->pack(name, weight, place.first, place.every, pool);
    remember(name, slot);
}

void Weights::remember(const std::string& name, const Slot& slot) {
    const auto place = slot.fused->place(slot.part);
    places_[name] = {place.matrix, slot.rows, place.first, place.every};
    *slot.seen |= slot.mark;
}

void Weights::set_positions(const TensorSource& weight) {
    const size_t hidden = shape_.hidden;
    expect("positions", weight, position_rows(), hidden, true);
    positions = Buffer(position_rows() * hidden * sizeof(float));
    for (size_t row = 0; row < position_rows(); ++row)
        read("positions", weight, row, positions.floats() + row * hidden);
}

Weights::Slot Weights::matrix_slot(const std::string& name) {
    const Slot slot = slot_of(name);
    if (!slot.rows) refuse("weight '" + name + "' is no matrix of this model");
    return slot;
}

void Weights::set_format(const std::string& name, const FormatKernels& format, size_t group,
                         bool apart) {
    const Slot slot = matrix_slot(name);
    slot.fused->set_format(name, slot.part, format, group, apart);
}

void Weights::add_low_rank(const std::string& name, size_t rank, FusedMatrix::Factor right,
                           FusedMatrix::Factor left) {
    const Slot slot = matrix_slot(name);
    if (!layer_index(name)) refuse("weight '" + name + "' belongs to no layer: it takes no low-rank term");
    slot.fused->add_low_rank(name, slot.part, slot.rows, rank, right, left);
}

void Weights::share(const std::string& name, const std::string& other) {
    const Slot slot = matrix_slot(name), from = matrix_slot(other);
    const std::optional<size_t> layer = layer_index(name);
    if (!layer || !layer_index(other) || slot.fused == from.fused || slot.mark != from.mark)
        refuse("weight '" + name + "' cannot be that of '" + other + "'");
    slot.fused->borrow(name, *from.fused);
    for (const char* part : kPartNames)
        if (const Slot beside = layer_slot(*layer, part); beside.fused == slot.fused)
            remember("layers." + std::to_string(*layer) + "." + part, beside);
}

std::pair<Matrix*, size_t> Weights::factor_of(const std::string& name) {
    const bool right = name.ends_with(".right");
    if (!right && !name.ends_with(".left")) return {nullptr, 0};
    const Slot slot = matrix_slot(name.substr(0, name.rfind('.')));
    Matrix* matrix = right ? slot.fused->right_of(slot.part) : slot.fused->left_of(slot.part);
    if (!matrix) refuse("weight '" + name + "' is no part of this model: add its low-rank term first");
    return {matrix, right ? slot.fused->left_of(slot.part)->inputs : slot.rows};
}

void Weights::load(const std::string& name, const GroupedRows& rows,
                   std::span<const int32_t> order, Pool& pool) {
    if (const auto [factor, count] = factor_of(name); factor) {
        if (rows.rows != count || rows.inputs != factor->inputs)
            refuse("weight '" + name + "' has shape " + extent(rows.rows, rows.inputs, true) +
                   ", expected " + extent(count, factor->inputs, true));
        factor->load(name, rows, order, 0, 1, pool);
        places_[name] = {factor, count, 0, 1};
        return;
    }
    const Slot slot = matrix_slot(name);
    expect_extent(name, rows.rows, rows.inputs, slot);
    const auto place = slot.fused->place(slot.part);
    place.matrix->load(name, rows, order, place.first, place.every, pool);
    remember(name, slot);
}

void Weights::load_blocks(const std::string& name, const StoredRows& rows, Pool& pool) {
    const Slot slot = matrix_slot(name);
    expect_extent(name, rows.rows, rows.inputs, slot);
    const auto place = slot.fused->place(slot.part);
    place.matrix->load_blocks(name, rows, place.first, place.every, pool);
    remember(name, slot);
}

void Weights::expect_extent(const std::string& name, size_t rows, size_t inputs,
                            const Slot& slot) const {
    if (rows == slot.rows && inputs == slot.fused->inputs()) return;
    refuse("weight '" + name + "' has shape " + extent(rows, inputs, true) + ", expected " +
           extent(slot.rows, slot.fused->inputs(), true));
}

void Weights::choose(std::span<const int32_t> tokens) {
    if (std::ranges::equal(tokens, chosen_)) return;
    chosen_.clear();
    part_of_head = head.matrices()[0].gather(tokens);
    if (head.bias) {
        part_of_head_bias = zeros(part_of_head.panels * kPanel);
        for (size_t i = 0; i < tokens.size(); ++i)
            part_of_head_bias.floats()[i] = head.bias.floats()[tokens[i]];
    }
    chosen_.assign(tokens.begin(), tokens.end());
}

size_t Weights::set_byte_activations(const ByteKinds& kinds) {
    size_t count = head.set_byte_activations(kinds.head);
    for (LayerWeights& layer : layers)
        count += layer.qkv.set_byte_activations(kinds.qkv) +
                 layer.o.set_byte_activations(kinds.output) +
                 layer.gate_up.set_byte_activations(kinds.up) +
                 layer.down.set_byte_activations(kinds.down);
    chosen_.clear();  // its rows would be multiplied as before
    return count;
}

std::optional<size_t> Weights::layer_index(const std::string& name) const {
    if (!name.starts_with("layers.")) return std::nullopt;
    return layer_of(name).first;
}

bool Weights::complete(size_t layer) const {
    unsigned absent = shape_.gated ? 0 : 1u << gate;
    for (unsigned part = 0; part < parts; ++part)
        if (!(part < gate ? shape_.layers[layer].heads : shape_.layers[layer].intermediate))
            absent |= 1u << part;
    return (layers[layer].seen | absent) == (1u << parts) - 1;
}

std::vector<Matrix*> Weights::matrices_of(size_t layer) {
    std::vector<Matrix*> matrices;
    LayerWeights& weights = layers[layer];
    for (FusedMatrix* fused : {&weights.qkv, &weights.o, &weights.gate_up, &weights.down})
        for (Matrix& matrix : fused->matrices()) matrices.push_back(&matrix);
    return matrices;
}

size_t Weights::other_bytes() const {
    size_t total = positions.size() + head.bias.size();
    for (const FusedMatrix* fused : {&head, &untied_embedding})
        for (const Matrix& matrix : fused->matrices()) total += matrix.streamed ? 0 : matrix.bytes();
    const auto add = [&](const Norm& norm) { total += norm.weight.size() + norm.bias.size(); };
    add(final_norm);
    for (const LayerWeights& layer : layers) {
        for (const FusedMatrix* fused : {&layer.qkv, &layer.o, &layer.gate_up, &layer.down})
            total += fused->bias.size() + (fused->low_rank ? fused->low_rank->bytes() : 0);
        for (const Norm* norm : {&layer.attn_norm, &layer.q_norm, &layer.k_norm,
                                 &layer.attn_inner_norm, &layer.attn_post_norm, &layer.mlp_norm,
                                 &layer.mlp_inner_norm, &layer.mlp_post_norm})
            add(*norm);
    }
    return total;
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
    const bool tied = shape_.tied;
    need(seen_ & kEmbed || !(shape_.begins || (shape_.ends && tied)), "embed");
    need(tied || seen_ & kHead || !shape_.ends, "head");
    need(!shape_.learned_positions || positions || !shape_.begins, "positions");
    need(final_norm || !shape_.ends, "final_norm");
    for (size_t i = 0; i < layers.size(); ++i) {
        const LayerWeights& layer = layers[i];
        const std::string prefix = "layers." + std::to_string(i) + ".";
        const bool attends = shape_.layers[i].heads, widens = shape_.layers[i].intermediate;
        for (unsigned part = 0; part < parts; ++part)
            need(layer.seen >> part & 1 || (part == gate && !shape_.gated) ||
                     !(part < gate ? attends : widens),
                 prefix + kPartNames[part]);
        need(!shape_.pre_norm || !attends || layer.attn_norm, prefix + "attn_norm");
        need(!shape_.pre_norm || !widens || layer.mlp_norm, prefix + "mlp_norm");
        const std::pair<const Norm*, const char*> norms[] = {
            {&layer.q_norm, "q_norm"},
            {&layer.k_norm, "k_norm"},
            {&layer.attn_inner_norm, "attn_inner_norm"},
            {&layer.attn_post_norm, "attn_post_norm"},
            {&layer.mlp_inner_norm, "mlp_inner_norm"},
            {&layer.mlp_post_norm, "mlp_post_norm"}};
        for (const auto& [norm, name] : norms) need(norm->weight || !norm->bias, prefix + name);
        for (const FusedMatrix* fused : {&layer.qkv, &layer.o, &layer.gate_up, &layer.down}) {
            if (!fused->low_rank) continue;
            for (const Matrix& matrix : fused->low_rank->right)
                need(bool(matrix.data), prefix + "right factor of a low-rank term");
            for (const Matrix& matrix : fused->low_rank->left)
                need(bool(matrix.data), prefix + "left factor of a low-rank term");
        }
    }
}

template <class Use>
void Weights::each_matrix(Use use) const {
    const auto all = [&](const FusedMatrix& fused) {
        for (const Matrix& matrix : fused.matrices()) use(matrix);
        if (!fused.low_rank) return;
        for (const Matrix& matrix : fused.low_rank->right) use(matrix);
        for (const Matrix& matrix : fused.low_rank->left) use(matrix);
    };
    if (shape_.ends) all(head);
    for (const LayerWeights& layer : layers)
        for (const FusedMatrix* fused : {&layer.qkv, &layer.o, &layer.gate_up, &layer.down})
            all(*fused);
}

size_t Weights::bytes() const {
    size_t total = 0;
    each_matrix([&](const Matrix& matrix) { total += matrix.bytes(); });
    return total;
}

size_t Weights::shared_bytes() const {
    size_t total = 0;
    each_matrix([&](const Matrix& matrix) { total += matrix.data.owned() ? 0 : matrix.bytes(); });
    return total;
}

size_t Weights::parameters() const {
    size_t total = 0;
    each_matrix([&](const Matrix& matrix) { total += matrix.panels * kPanel * matrix.inputs; });
    return total;
}

}  // namespace paceline
