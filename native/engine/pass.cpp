#include "engine/pass.hpp"

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>

namespace paceline {

namespace {

constexpr double kMacsPerMicrosecond = 40e3, kBytesPerMicrosecond = 25e3;
constexpr size_t kMaxTreeNodes = size_t{1} << 16;  // or as many as the context has positions
constexpr size_t kChunks = 8;  // pieces of a phase for each thread
constexpr size_t kGrain = 4;   // panels that stay together; even, for gate and up

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

// The first `dim` values of a head, rotated in halves.
void rotate_halves(float* head, const float* cosines, const float* sines, size_t dim) {
    const size_t half = dim / 2;
    for (size_t i = 0; i < half; ++i) {
        const float a = head[i], b = head[i + half];
        head[i] = a * cosines[i] - b * sines[i];
        head[i + half] = b * cosines[i] + a * sines[i];
    }
}

// The first `dim` values of a head, rotated in adjacent pairs.
void rotate_pairs(float* head, const float* cosines, const float* sines, size_t dim) {
    for (size_t i = 0; i < dim / 2; ++i) {
        const float a = head[2 * i], b = head[2 * i + 1];
        head[2 * i] = a * cosines[i] - b * sines[i];
        head[2 * i + 1] = b * cosines[i] + a * sines[i];
    }
}

// What queries at a position are multiplied by.
float query_scale(const LayerShape& shape, float scale, size_t position) {
    if (shape.rope < 0 || !shape.query_growth) return scale;
    const auto periods = static_cast<float>(position / shape.query_length);
    return scale * (1.0f + shape.query_growth * std::log(1.0f + periods));
}

void scale_row(float* row, float scale, size_t size) {
    if (scale == 1.0f) return;
    for (size_t i = 0; i < size; ++i) row[i] *= scale;
}

// The first of some matrices that reads its inputs as the i-th does.
size_t same_layout(std::span<const Matrix> matrices, size_t i) {
    size_t first = 0;
    while (matrices[first].format->arrange != matrices[i].format->arrange ||
           matrices[first].order != matrices[i].order)
        ++first;
    return first;
}

// Bytes of the arranged inputs of a matrix, in whole cache lines.
size_t arranged_room(const Matrix& matrix, size_t n) {
    return (matrix.format->arranged_bytes(n, matrix.inputs) + 63) / 64 * 64;
}

}  // namespace

Pass::Pass(Model& model, const std::vector<Branch>& batch, float* logits, const View& view)
    : model_(model),
      shape_(model.shape),
      kernels_(model.kernels),
      work_(model.work),
      batch_(batch),
      view_(view),
      logits_(logits),
      hidden_(padded(model.shape.hidden)) {
    choose_layers();
    choose_tokens();
    check_exits();
    for (const Branch& branch : batch) {
        first_.push_back(n_);
        check(branch);
        for (size_t i = 0; logits && branch.rows && i < branch.nodes; ++i)
            headed_.push_back(n_ + i);
        n_ += branch.nodes;
    }
    if (headed_.empty()) logits_ = nullptr;
    find_shared_spans();
    threads_ = worthwhile_threads();
    model_.memory.check(missing_pages());
    for (const Branch& branch : batch) {
        branch.cache->prepare(branch.nodes);
        for (size_t i = 0; keeps_queries(branch) && i < shape_.layers.size(); ++i)
            branch.cache->reserve_queries(i, branch.nodes, shape_.layers[i].query_size());
    }
    reserve();
    plan();
    if (model.profiling) start_clock();
}

void Pass::check(const Branch& branch) {
    const size_t first = depths_.size(), length = branch.cache->length();
    const size_t limit = std::min(shape_.context, model_.rope_positions());
    bool chain = true;
    check_positions(length);
    if (view_.positions && branch.cache->evicted())
        refuse("rows of this sequence were evicted, so that a view cannot choose positions");
    if (!branch.nodes) refuse("a tree needs a root");
    if (branch.nodes > std::max(shape_.context, kMaxTreeNodes))
        refuse("a tree has " + std::to_string(branch.nodes) + " nodes, expected at most " +
               std::to_string(std::max(shape_.context, kMaxTreeNodes)));
    for (size_t i = 0; i < branch.nodes; ++i) {
        const int32_t parent = branch.parents[i];
        for (const int32_t token : std::span(branch.tokens + i * branch.mixed, branch.mixed))
            if (token < 0 || static_cast<size_t>(token) >= shape_.vocabulary)
                refuse("token " + std::to_string(token) + " is outside the vocabulary of " +
                       std::to_string(shape_.vocabulary));
        if (i ? parent < 0 || static_cast<size_t>(parent) >= i : parent != -1)
            refuse("node " + std::to_string(i) + " has parent " + std::to_string(parent));
        depths_.push_back(i ? depths_[first + parent] + 1 : 0);
        branch_of_.push_back(first_.size() - 1);
        chain = chain && parent == static_cast<int32_t>(i) - 1;
        if (length + depths_.back() >= limit)
            refuse("position " + std::to_string(length + depths_.back() + 1) +
                   " is beyond the context of " + std::to_string(limit));
    }
    chain_.push_back(chain);
    deepest_.push_back(*std::max_element(depths_.begin() + first, depths_.end()));
}

void Pass::choose_layers() {
    const size_t count = shape_.layers.size();
    if (!view_.layers) {
        for (size_t layer = 0; layer < count; ++layer) layers_.push_back(layer);
        return;
    }
    int32_t last = -1;
    for (const int32_t layer : *view_.layers) {
        if (layer <= last || static_cast<size_t>(layer) >= count)
            refuse("the layers of a view must increase and lie below " + std::to_string(count));
        layers_.push_back(static_cast<size_t>(last = layer));
    }
}

void Pass::check_positions(size_t length) const {
    int32_t last = -1;
    if (!view_.positions) return;
    for (const int32_t position : *view_.positions) {
        if (position <= last || static_cast<size_t>(position) >= length)
            refuse("the positions of a view must increase and lie below the " +
                   std::to_string(length) + " committed ones");
        last = position;
    }
}

void Pass::choose_tokens() {
    int32_t last = -1;
    if (!view_.tokens) return;
    if (view_.tokens->empty()) refuse("a view needs a token that gets logits");
    for (const int32_t token : *view_.tokens) {
        if (token <= last || static_cast<size_t>(token) >= shape_.vocabulary)
            refuse("the tokens of a view must increase and lie below " +
                   std::to_string(shape_.vocabulary));
        last = token;
    }
    model_.weights.choose(*view_.tokens);
}

void Pass::check_exits() const {
    int32_t last = -1;
    if (!view_.exits) return;
    for (const int32_t exit : *view_.exits) {
        if (exit <= last || static_cast<size_t>(exit) >= layers_.size())
            refuse("the exits of a view must increase and lie below the " +
                   std::to_string(layers_.size()) + " layers that are run");
        last = exit;
    }
}

// Committed rows that the nodes of a branch see in a layer.
size_t Pass::seen(size_t layer, const Branch& branch) const {
    return view_.positions ? view_.positions->size() : branch.cache->held(layer);
}

// Sequences that share a page each write into a copy, but for the last one to hold it.
size_t Pass::missing_pages() const {
    size_t pages = 0;
    std::map<const Page*, size_t> writers;
    for (const Branch& branch : batch_) {
        pages += branch.cache->missing(branch.nodes);
        for (const Page* page : branch.cache->copied_first()) ++writers[page];
    }
    for (const auto& [page, count] : writers)
        pages += std::min<size_t>(count, model_.memory.holders(page) - 1);
    return pages;
}

size_t Pass::worthwhile_threads() const {
    const double part =
        static_cast<double>(layers_.size()) / static_cast<double>(shape_.layers.size());
    const double macs = static_cast<double>(n_) * static_cast<double>(model_.parameters) * part;
    const double bytes = static_cast<double>(model_.bytes) * part;
    const double time = std::max(macs / kMacsPerMicrosecond, bytes / kBytesPerMicrosecond);
    return time < model_.worth_waking ? 1 : model_.threads();
}

void Pass::reserve() {
    size_t scratch = 2 * hidden_ * sizeof(float), arranged = 0;
    const auto product = [&](const FusedMatrix& fused) {
        const std::span<const Matrix> matrices = fused.matrices();
        size_t bytes = 0;
        for (size_t i = 0; i < matrices.size(); ++i) {
            scratch = std::max(scratch, matrices[i].format->scratch_bytes(n_));
            if (same_layout(matrices, i) == i) bytes += arranged_room(matrices[i], n_);
        }
        arranged = std::max(arranged, bytes);
    };
    product(model_.weights.head);
    size_t states = 0;
    if (view_.positions) reserve_view();
    before_.resize(shape_.layers.size());
    for (const size_t i : layers_) {
        count_calls(i);
        const LayerShape& layer = shape_.layers[i];
        wide_ = std::max(wide_, padded(layer.intermediate));
        qkv_ = std::max(qkv_, layer.qkv_size());
        attended_ = std::max(attended_, padded(layer.query_size()));
        const LayerWeights& weights = model_.weights.layers[i];
        for (const FusedMatrix* fused :
             {&weights.qkv, &weights.o, &weights.gate_up, &weights.down})
            product(*fused);
        states = std::max(states, before_[i].states.back());
        if (!shared_spans_.empty()) {
            const Attention job = join(i, shared_spans_[0], 0, nullptr);
            const size_t bytes = kernels_.attention_bytes(job, kMostQueries);
            scratch = std::max(scratch, shared_node_bytes() + bytes);
        }
        for (size_t branch = 0; branch < batch_.size(); ++branch)
            scratch = std::max(scratch, kernels_.attention_bytes(attention(i, branch, 0),
                                                                 query_split(i, branch).tile));
    }
    // Padding is read by norms: it must be zero, and nothing else is ever written there.
    const auto rows = [&](Buffer& buffer, size_t stride) {
        if (buffer.size() >= n_ * stride * sizeof(float)) return;
        buffer.reserve(n_ * stride * sizeof(float));
        buffer.zero();
    };
    rows(work_.x, hidden_);
    rows(work_.normed, hidden_);
    rows(work_.y, hidden_);
    rows(work_.qkv, qkv_);
    rows(work_.attended, attended_);
    rows(work_.wide, wide_);
    work_.arranged.reserve(arranged);
    work_.states.reserve(states * sizeof(float));
    work_.scratch.resize(model_.threads());
    for (Buffer& buffer : work_.scratch) buffer.reserve(scratch);
}

void Pass::add_chunks(Stage part, Work work, size_t index, size_t chunks) {
    phases_.push_back({part, work, index, chunks});
    add_phase(chunks);
}

void Pass::add(Stage part, Work work, size_t index, size_t things, size_t least) {
    const size_t most = threads_ == 1 ? 1 : kChunks * threads_;
    add_chunks(part, work, index, std::clamp<size_t>(things / least, 1, most));
}

// Matrices of one product are multiplied in one phase, each with inputs in its own layout.
void Pass::multiply_later(Stage part, std::span<const Matrix> matrices, const Buffer& bias,
                          const Buffer& rows, size_t stride, Product job,
                          std::optional<size_t> count) {
    const size_t first = products_.size();
    const bool gate_apart = job.gated && matrices.size() == 2;
    job.n = count.value_or(n_);
    if (gate_apart) job.gated = false;
    size_t panels = 0, arranged = 0;
    for (size_t i = 0; i < matrices.size(); ++i) {
        const Matrix& matrix = matrices[i];
        const FormatKernels& format = *matrix.format;
        const size_t like = same_layout(matrices, i), begin = gate_apart ? 0 : panels;
        job.panels = matrix.data.bytes();
        job.panel_bytes = matrix.panel_bytes;
        job.inputs = matrix.inputs;
        job.x = rows.floats();
        job.bias = bias ? bias.floats() + panels * kPanel : nullptr;
        const bool arranges = format.arranged_bytes(job.n, matrix.inputs) > 0;
        if (arranges && like == i) {
            job.x = work_.arranged.bytes() + arranged;
            arranged += arranged_room(matrix, job.n);
        } else if (arranges) {
            job.x = products_[first + like].job.x;
        }
        Product own = job;
        own.out += begin * kPanel;
        own.rows = matrices.size() == 1 ? job.rows : matrix.panels * kPanel;
        products_.push_back({&matrix, rows.floats(), stride, own, begin, arranges && like == i, 0});
        panels += matrix.panels;
    }
    // The gate multiplies what `up` has left, so it comes behind it.
    if (gate_apart) {
        products_[first].job.activation = job.activation;
        products_[first].job.times_out = true;
        products_[first + 1].job.activation = Activation::none;
        std::swap(products_[first], products_[first + 1]);
        panels /= 2;
    }
    products_[first].parts = matrices.size();
    if (arranged) add(Stage::arrange, &Pass::arrange, first, matrices[0].inputs, 256);
    add(part, &Pass::multiply, first, panels, kGrain);
}

void Pass::plan() {
    add_rows(&Pass::embed, 0, Stage::embed);
    size_t heads = 0;
    for (size_t i = 0; i < layers_.size(); ++i) {
        if (logits_ && heads + 1 < view_.heads() &&
            static_cast<size_t>((*view_.exits)[heads]) == i)
            plan_head(layers_[i], heads++);
        plan_layer(layers_[i]);
    }
    if (logits_) plan_head(shape_.layers.size(), heads);
}

// The logits of what the layers before `layer` give, behind those of `place` other heads.
void Pass::plan_head(size_t layer, size_t place) {
    add(Stage::norm, &Pass::enter_head, layer, headed_.size(), 1);
    const Weights& weights = model_.weights;
    const auto& tokens = view_.tokens;
    const size_t size = tokens ? tokens->size() : shape_.vocabulary;
    const auto matrices = tokens ? std::span(&weights.part_of_head, 1) : weights.head.matrices();
    multiply_later(Stage::head, matrices, tokens ? weights.part_of_head_bias : weights.head.bias,
                   work_.normed, hidden_,
                   {.softcap = shape_.logit_softcap,
                    .out = logits_ + place * headed_.size() * size,
                    .stride = size,
                    .rows = size},
                   headed_.size());
}

void Pass::plan_layer(size_t layer) {
    const LayerWeights& weights = model_.weights.layers[layer];
    const LayerShape& shape = shape_.layers[layer];
    add_rows(&Pass::enter_attention, layer);
    multiply_later(Stage::qkv, weights.qkv.matrices(), weights.qkv.bias, work_.normed, hidden_,
                   {.out = work_.qkv.floats(), .stride = qkv_, .rows = shape.qkv_size()});
    if (shape_.qkv_clip || (weights.q_norm && shape_.qk_norm == QKNorm::width))
        add_rows(&Pass::bound_qkv, layer);
    add(Stage::rotate, &Pass::rotate, layer, n_ * (shape.heads + shape.kv_heads), 8);
    // Without logits the last layer is run for its keys and values only.
    if (!logits_ && layer == layers_.back()) return;
    if (view_.positions)
        add(Stage::attention, &Pass::select, layer, batch_.size() * shape.kv_heads, 1);
    add_chunks(Stage::attention, &Pass::attend, layer, before_[layer].calls.back());
    if (before_[layer].states.back())
        add(Stage::attention, &Pass::combine, layer, n_ * shape.heads, 8);
    if (weights.attn_inner_norm) add_rows(&Pass::attention_inner_norm, layer);
    multiply_later(Stage::output, weights.o.matrices(), weights.o.bias, work_.attended, attended_,
                   {.out = work_.y.floats(), .stride = hidden_, .rows = hidden_});
    add_rows(&Pass::enter_mlp, layer);
    multiply_later(Stage::up, weights.gate_up.matrices(), weights.gate_up.bias, work_.normed, hidden_,
                   {.activation = shape_.activation,
                    .gated = shape_.gated,
                    .out = work_.wide.floats(),
                    .stride = wide_,
                    .rows = padded(shape.intermediate)});
    if (weights.mlp_inner_norm) add_rows(&Pass::mlp_inner_norm, layer);
    multiply_later(Stage::down, weights.down.matrices(), weights.down.bias, work_.wide, wide_,
                   {.out = work_.y.floats(), .stride = hidden_, .rows = hidden_});
}

void Pass::work(size_t phase, size_t chunk, size_t thread) {
    if (!clock_.starts.empty()) return work_timed(phase, chunk, thread);
    run(phases_[phase], chunk, thread);
}

void Pass::arrange(size_t product, size_t chunk, size_t chunks, Buffer&) {
    for (size_t i = product; i < product + products_[product].parts; ++i) {
        const PendingProduct& linear = products_[i];
        if (!linear.arranges) continue;
        const std::vector<int32_t>& order = linear.matrix->order;
        void* to = const_cast<void*>(linear.job.x);
        linear.matrix->format->arrange(linear.rows, linear.stride, linear.job.n,
                                       linear.matrix->inputs,
                                       order.empty() ? nullptr : order.data(), to, chunk, chunks);
    }
}

void Pass::multiply(size_t product, size_t chunk, size_t chunks, Buffer& scratch) {
    const size_t parts = products_[product].parts;
    size_t panels = 0;
    for (size_t i = product; i < product + parts; ++i)
        panels = std::max(panels, products_[i].first + products_[i].matrix->panels);
    const auto [begin, end] = chunk_range(panels, chunk, chunks, kGrain);
    for (size_t i = product; i < product + parts; ++i) {
        const PendingProduct& linear = products_[i];
        const size_t from = std::max(begin, linear.first);
        const size_t to = std::min(end, linear.first + linear.matrix->panels);
        if (from < to)
            linear.matrix->format->multiply(linear.job, from - linear.first, to - linear.first,
                                            scratch.bytes());
    }
}

// A weight of 0 adds nothing, and a single weight of 1 changes no bit.
void Pass::mix(const Branch& branch, size_t node, float* x, float* other) const {
    bool first = true;
    for (size_t i = node * branch.mixed; i < (node + 1) * branch.mixed; ++i) {
        const float weight = branch.weights ? branch.weights[i] : 1.0f;
        if (weight == 0.0f) continue;
        float* to = first ? x : other;
        model_.weights.embedding().unpack(branch.tokens[i], shape_.embedding_scale * weight, to);
        if (!first)
            for (size_t k = 0; k < shape_.hidden; ++k) x[k] += other[k];
        first = false;
    }
    if (first) std::fill_n(x, shape_.hidden, 0.0f);
}

void Pass::embed(size_t, size_t chunk, size_t chunks, Buffer& scratch) {
    const Weights& weights = model_.weights;
    const auto [begin, end] = chunk_range(n_, chunk, chunks);
    for (size_t i = begin; i < end; ++i) {
        const Branch& branch = batch_[branch_of_[i]];
        float* x = row(work_.x, i, hidden_);
        mix(branch, i - first_[branch_of_[i]], x, scratch.floats());
        if (!shape_.learned_positions) continue;
        const size_t position = branch.cache->length() + depths_[i] + shape_.position_offset;
        const float* from = weights.positions.floats() + position * shape_.hidden;
        for (size_t k = 0; k < shape_.hidden; ++k) x[k] += from[k];
    }
}

void Pass::norm_row(const Norm& norm, const float* row, float* out, size_t size) const {
    kernels_.norm({norm.weight.floats(), norm.bias.floats(), size, shape_.norm_eps,
                   shape_.centred_norm},
                  row, out);
}

// The norm behind the layer that ran before `layer`; null if it is the first.
const Norm* Pass::norm_before(size_t layer) const {
    const auto at = std::lower_bound(layers_.begin(), layers_.end(), layer);
    return at == layers_.begin() ? nullptr : &model_.weights.layers[at[-1]].mlp_post_norm;
}

// Adds a row y, normed and scaled if the model says so, to the residual stream.
void Pass::merge(const Norm& post, float* x, float* y) const {
    if (post) norm_row(post, y, y, shape_.hidden);
    scale_row(y, shape_.residual_scale, hidden_);
    kernels_.add(x, y, hidden_);
}

// The input of attention or of the MLP; a model with norms behind them only has none before.
void Pass::enter(const Norm& norm, const float* x, float* out) const {
    if (norm)
        norm_row(norm, x, out, shape_.hidden);
    else
        std::copy_n(x, hidden_, out);
}

void Pass::enter_attention(size_t layer, size_t chunk, size_t chunks, Buffer&) {
    const Norm* before = norm_before(layer);
    const auto [begin, end] = chunk_range(n_, chunk, chunks);
    for (size_t i = begin; i < end; ++i) {
        float* x = row(work_.x, i, hidden_);
        if (before) merge(*before, x, row(work_.y, i, hidden_));
        enter(model_.weights.layers[layer].attn_norm, x, row(work_.normed, i, hidden_));
    }
}

void Pass::attention_inner_norm(size_t layer, size_t chunk, size_t chunks, Buffer&) {
    const auto [begin, end] = chunk_range(n_, chunk, chunks);
    for (size_t i = begin; i < end; ++i)
        norm_row(model_.weights.layers[layer].attn_inner_norm, row(work_.attended, i, attended_),
                 row(work_.attended, i, attended_), shape_.layers[layer].query_size());
}

void Pass::enter_mlp(size_t layer, size_t chunk, size_t chunks, Buffer&) {
    const LayerWeights& weights = model_.weights.layers[layer];
    const auto [begin, end] = chunk_range(n_, chunk, chunks);
    for (size_t i = begin; i < end; ++i) {
        float* x = row(work_.x, i, hidden_);
        float* normed = row(work_.normed, i, hidden_);
        if (shape_.parallel) enter(weights.mlp_norm, x, normed);
        merge(weights.attn_post_norm, x, row(work_.y, i, hidden_));
        if (!shape_.parallel) enter(weights.mlp_norm, x, normed);
    }
}

void Pass::mlp_inner_norm(size_t layer, size_t chunk, size_t chunks, Buffer&) {
    const auto [begin, end] = chunk_range(n_, chunk, chunks);
    for (size_t i = begin; i < end; ++i)
        norm_row(model_.weights.layers[layer].mlp_inner_norm, row(work_.wide, i, wide_),
                 row(work_.wide, i, wide_), shape_.layers[layer].intermediate);
}

// Leaves x and y as they are: behind an exit, the next layer goes on from them.
void Pass::enter_head(size_t layer, size_t chunk, size_t chunks, Buffer& scratch) {
    const Norm* before = norm_before(layer);
    const auto [begin, end] = chunk_range(headed_.size(), chunk, chunks);
    for (size_t k = begin; k < end; ++k) {
        float* x = row(work_.x, headed_[k], hidden_);
        if (before) {
            float *merged = scratch.floats(), *y = merged + hidden_;
            std::copy_n(x, hidden_, merged);
            std::copy_n(row(work_.y, headed_[k], hidden_), hidden_, y);
            merge(*before, merged, y);
            x = merged;
        }
        float* out = row(work_.normed, k, hidden_);
        norm_row(model_.weights.final_norm, x, out, shape_.hidden);
        scale_row(out, shape_.logit_scale, hidden_);
    }
}

void Pass::norm_head(const Norm& norm, float* head, size_t dim) const {
    if (!norm) return;
    alignas(64) float row[kLargestHead] = {};
    std::copy_n(head, dim, row);
    norm_row(norm, row, row, dim);
    std::copy_n(row, dim, head);
}

// Clips queries, keys and values, and norms queries and keys over all heads at once.
void Pass::bound_qkv(size_t layer, size_t chunk, size_t chunks, Buffer&) {
    const LayerShape& shape = shape_.layers[layer];
    const LayerWeights& weights = model_.weights.layers[layer];
    const float clip = shape_.qkv_clip;
    const auto [begin, end] = chunk_range(n_, chunk, chunks);
    for (size_t i = begin; i < end; ++i) {
        float* qkv = row(work_.qkv, i, qkv_);
        for (size_t d = 0; clip && d < shape.qkv_size(); ++d)
            qkv[d] = std::clamp(qkv[d], -clip, clip);
        if (shape_.qk_norm != QKNorm::width) continue;
        float* keys = qkv + shape.keys_at();
        if (weights.q_norm) norm_row(weights.q_norm, qkv, qkv, shape.query_size());
        if (weights.k_norm) norm_row(weights.k_norm, keys, keys, shape.kv_size());
    }
}

// Norms and rotates queries and keys, and puts keys and values into the caches.
void Pass::rotate(size_t layer, size_t chunk, size_t chunks, Buffer&) {
    const LayerShape& shape = shape_.layers[layer];
    const LayerWeights& weights = model_.weights.layers[layer];
    const size_t dim = shape.head_dim, heads = shape.heads + shape.kv_heads;
    const auto [begin, end] = chunk_range(n_ * heads, chunk, chunks);
    for (size_t item = begin; item < end; ++item) {
        const size_t node = item / heads, head = item % heads;
        const Branch& branch = batch_[branch_of_[node]];
        const size_t position = branch.cache->length() + depths_[node];
        const bool query = head < shape.heads;
        float* qkv = row(work_.qkv, node, qkv_);
        float* values = query ? qkv + head * dim
                              : qkv + shape.keys_at() + (head - shape.heads) * dim;
        const Norm& norm = query ? weights.q_norm : weights.k_norm;
        if (shape_.qk_norm == QKNorm::head) norm_head(norm, values, dim);
        if (shape.rope >= 0) {
            const RopeTable& rope = model_.ropes[shape.rope];
            const size_t at = position * (shape.rope_dim / 2);
            (shape.rope_adjacent ? rotate_pairs : rotate_halves)(
                values, rope.cosines.data() + at, rope.sines.data() + at, shape.rope_dim);
        }
        if (shape_.qk_norm == QKNorm::rotated) norm_head(norm, values, dim);
        if (query) {
            const float scale = query_scale(shape, shape_.attention_scale, position);
            for (size_t d = 0; d < dim; ++d) values[d] *= scale;
            if (!keeps_queries(branch)) continue;
            const size_t at = (node - first_[branch_of_[node]]) * shape.query_size() + head * dim;
            std::copy_n(values, dim, branch.cache->queries(layer) + at);
        } else {
            const size_t kv = head - shape.heads;
            branch.cache->put(layer, kv,
                              branch.cache->held(layer) + node - first_[branch_of_[node]], values,
                              qkv + shape.values_at() + kv * dim);
        }
    }
}

void run_pass(Model& model, const std::vector<Branch>& batch, float* logits, const View& view) {
    model.hidden_rows = 0;
    if (batch.empty()) return;
    const auto pass = std::make_shared<Pass>(model, batch, logits, view);
    model.pool().run(pass, pass->threads());
    if (model.profiling) pass->account(model.profile);
    for (const Branch& branch : batch)
        branch.cache->remember(branch.parents, branch.nodes, view.partial());
    if (!logits) return;
    for (const Branch& branch : batch) model.hidden_rows += branch.rows ? branch.nodes : 0;
}

}  // namespace paceline
