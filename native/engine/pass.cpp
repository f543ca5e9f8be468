#include "engine/pass.hpp"
#include "kernels/isa.hpp"

#include <algorithm>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>

namespace paceline {

namespace {

constexpr double kMacsPerMicrosecond = 40e3, kBytesPerMicrosecond = 25e3;
constexpr size_t kMaxTreeNodes = size_t{1} << 16;  // or as many as the context has positions
constexpr size_t kChunks = 8;  // pieces of a phase for each thread
constexpr size_t kGrain = 2;   // panels that stay together; even, for gate and up
constexpr size_t kPiece = 4;   // panels of a piece of a product
constexpr size_t kFetch = 128 << 10;  // bytes that a waiting thread fetches
constexpr size_t kFetchLines = 8;     // cache lines at a time

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

// The first of some matrices that reads its inputs as the i-th does.
size_t same_layout(std::span<const Matrix> matrices, size_t i) {
    size_t first = 0;
    while (matrices[first].product->arrange != matrices[i].product->arrange ||
           matrices[first].order != matrices[i].order)
        ++first;
    return first;
}

// Bytes of the arranged inputs of a matrix, in whole cache lines.
size_t arranged_room(const Matrix& matrix, size_t n) {
    return (matrix.product->arranged_bytes(n, matrix.inputs) + 63) / 64 * 64;
}

}  // namespace

Pass::Pass(Model& model, const std::vector<Branch>& batch, float* logits, const View& view,
           ScreenedRows* screened)
    : model_(model),
      shape_(model.shape),
      kernels_(model.kernels),
      work_(model.work),
      batch_(batch),
      view_(view),
      logits_(logits),
      screened_(screened),
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
    find_closings();
    threads_ = worthwhile_threads();
    model_.memory.check(missing_pages());
    for (const Branch& branch : batch) {
        branch.cache->prepare(branch.nodes);
        branch.cache->reserve_sums(branch.nodes);
        if (reads_few(branch)) branch.cache->prepare_clusters();
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
    if (view_.positions && branch.cache->grouped())
        refuse("positions are rounded in groups, so that a view cannot choose single ones");
    if (shape_.begins == (branch.states != nullptr))
        refuse(shape_.begins ? "the first layers of a model take tokens, not hidden states"
                             : "this part of a model needs the hidden states of the layers before");
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
    check_reach(branch, static_cast<size_t>(deepest_.back()), chain);
    check_blocks(branch, chain);
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
    if (!shape_.ends && (view_.exits || view_.tokens || screened_))
        refuse("this part of a model has no head");
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

// Committed rows that the nodes of a branch see in a layer, in the head with most.
size_t Pass::seen(size_t layer, const Branch& branch) const {
    return view_.positions ? view_.positions->size() : branch.cache->held(layer);
}

// Sequences that share a page each write into a copy, but for the last one to hold it.
size_t Pass::missing_pages() const {
    size_t pages = 0;
    std::map<const Page*, size_t> writers;
    for (const Branch& branch : batch_) {
        pages += branch.cache->missing(branch.nodes);
        if (reads_few(branch)) pages += branch.cache->missing_clusters();
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
            scratch = std::max(scratch, matrices[i].product->scratch_bytes(n_));
            if (same_layout(matrices, i) == i) bytes += arranged_room(matrices[i], n_);
        }
        arranged = std::max(arranged, bytes);
    };
    if (shape_.ends) product(model_.weights.head);
    size_t states = 0;
    if (view_.positions) reserve_view();
    if (closed_blocks_) {
        size_t bytes = 0;
        for (const size_t layer : layers_) bytes = std::max(bytes, batch_[0].cache->stride(layer));
        work_.closed.reserve(closed_blocks_ * bytes);
    }
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
        if (!layer.heads) continue;
        states = std::max(states, before_[i].states.back());
        if (!shared_spans_.empty()) {
            const PackedAttention job = join(i, shared_spans_[0], 0, nullptr);
            const size_t bytes = attention_bytes(job, kMostQueries);
            scratch = std::max(scratch, shared_node_bytes() + bytes);
        }
        for (size_t branch = 0; branch < batch_.size(); ++branch) {
            const size_t last = batch_[branch].nodes - 1;
            if (reads_few(i, batch_[branch])) {
                scratch = std::max(scratch, model_.few_read_kernels->scratch_bytes(
                                                few_read_node(i, branch, 0, last)));
                continue;
            }
            if (reads_blocks(i, batch_[branch])) {
                scratch = std::max(scratch, block_read_bytes(i, branch));
                continue;
            }
            for (size_t head = 0; head < layer.kv_heads; ++head)
                scratch = std::max(scratch, attention_bytes(attention(i, branch, head),
                                                            query_split(i, branch).tile));
        }
    }
    reserve_low_rank();
    scratch = std::max(scratch, low_rank_scratch_);
    if (low_rank_scratch_)
        scratch = std::max(scratch, find_format(kernels_, "fp32").product.scratch_bytes(1));
    arranged = std::max(arranged, low_rank_arranged_ * 3);  // of the parts of one product
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
    const bool alone = chunks == 1 && !steps_.empty() && steps_.back().chunks == 1;
    steps_.push_back({part, work, index, chunks});
    if (alone) {
        ++phases_.back().last;
        return;
    }
    phases_.push_back({steps_.size() - 1, steps_.size(), 0});
    add_phase(chunks);
}

void Pass::add(Stage part, Work work, size_t index, size_t things, size_t least) {
    const size_t most = threads_ == 1 ? 1 : kChunks * threads_;
    add_chunks(part, work, index, std::clamp<size_t>(things / least, 1, most));
}

// Matrices of one product are multiplied in one phase, each with inputs in its own layout.
void Pass::multiply_later(Stage part, std::span<const Matrix> matrices, const Buffer& bias,
                          const Buffer& rows, size_t stride, Product job,
                          std::optional<size_t> count, size_t column) {
    const size_t first = products_.size();
    const bool gate_apart = job.gated && matrices.size() == 2;
    job.n = count.value_or(n_);
    if (gate_apart) job.gated = false;
    size_t panels = 0, arranged = 0;
    for (size_t i = 0; i < matrices.size(); ++i) {
        const Matrix& matrix = matrices[i];
        const size_t like = same_layout(matrices, i), begin = gate_apart ? 0 : panels;
        job.panels = matrix.panels_in(layer_at_);
        job.panel_bytes = matrix.panel_bytes;
        job.group = matrix.group;
        job.inputs = matrix.inputs;
        job.x = rows.floats() + column;
        job.bias = bias ? bias.floats() + panels * kPanel : nullptr;
        const bool arranges = matrix.product->arranged_bytes(job.n, matrix.inputs) > 0;
        if (arranges && like == i) {
            job.x = work_.arranged.bytes() + arranged;
            arranged += arranged_room(matrix, job.n);
        } else if (arranges) {
            job.x = products_[first + like].job.x;
        }
        Product own = job;
        own.out += begin * kPanel;
        own.rows = matrices.size() == 1 ? job.rows : matrix.panels * kPanel;
        products_.push_back(
            {&matrix, rows.floats() + column, stride, own, begin, arranges && like == i});
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
    // One row is arranged sooner by one thread than others are asked to help.
    if (arranged)
        add(Stage::arrange, &Pass::arrange, first, job.n == 1 ? 1 : matrices[0].inputs, 256);
    const size_t chunks = threads_ == 1 ? 1 : whole_chunks(panels);
    products_[first].parts = matrices.size();
    products_[first].panels = panels;
    products_[first].chunks = chunks;
    add_chunks(part, &Pass::multiply, first, chunks);
}

// Pieces of kPiece panels; as many for each thread.
size_t Pass::whole_chunks(size_t panels) const {
    const size_t pieces = (panels + kPiece - 1) / kPiece;
    return (pieces + threads_ - 1) / threads_ * threads_;
}

void Pass::plan() {
    const size_t needed = needed_layers();
    if (model_.stream)
        model_.stream->begin({layers_.begin(), layers_.begin() + static_cast<ptrdiff_t>(needed)});
    add_rows(&Pass::embed, 0, Stage::embed);
    size_t heads = 0;
    for (size_t i = 0; i < needed; ++i) {
        if (logits_ && heads + 1 < view_.heads() &&
            static_cast<size_t>((*view_.exits)[heads]) == i)
            plan_head(layers_[i], heads++);
        model_.stream && model_.stream->streams(layers_[i]) ? plan_streamed(layers_[i])
                                                            : plan_layer(layers_[i]);
    }
    if (logits_) shape_.ends ? plan_head(shape_.layers.size(), heads) : plan_end();
    plan_fetches();
}

// The hidden states behind the last layer, for the next part of the model.
void Pass::plan_end() {
    add(Stage::norm, &Pass::leave, shape_.layers.size(), headed_.size(), 1);
}

// A layer that is in memory only while it runs.
void Pass::plan_streamed(size_t layer) {
    layer_at_ = model_.stream->address(layer);
    add_chunks(Stage::stream, &Pass::wait_for_layer, layer, 1);
    plan_layer(layer);
    add_chunks(Stage::stream, &Pass::release_layer, layer, 1);
    layer_at_ = nullptr;
}

// Tells each phase which product comes next.
void Pass::plan_fetches() {
    fetched_.resize(model_.threads());
    size_t next = steps_.size();
    for (size_t phase = phases_.size(); phase-- > 0;) {
        phases_[phase].next = next;
        for (size_t step = phases_[phase].last; step-- > phases_[phase].first;)
            if (steps_[step].work == &Pass::multiply) next = step;
    }
}

// Panels of a product that a thread owns.
std::pair<size_t, size_t> Pass::owned_panels(size_t product, size_t thread) const {
    const auto& [panels, chunks] = std::pair(products_[product].panels, products_[product].chunks);
    const auto edge = [&](size_t i) {
        return chunk_range(panels, first_owned(chunks, i, threads_), chunks, kGrain).first;
    };
    return {edge(thread), edge(thread + 1)};
}

// Where the weights lie that are read first from a panel of a product on.
const uint8_t* Pass::start_of(size_t product, size_t panel) const {
    for (size_t i = product; i < product + products_[product].parts; ++i) {
        const PendingProduct& linear = products_[i];
        if (panel >= linear.first && panel < linear.first + linear.matrix->panels)
            return linear.job.panels + (panel - linear.first) * linear.matrix->panel_bytes;
    }
    return nullptr;
}

// Fetches what a thread owns of the next product, up to what its cache has room for.
void Pass::wait(size_t phase, size_t thread, size_t) {
    if (phases_[phase].next == steps_.size() || threads_ == 1) return;
    const size_t product = steps_[phases_[phase].next].index;
    Fetched& fetched = fetched_[thread];
    if (fetched.product != product) {
        const auto [first, last] = owned_panels(product, thread);
        const size_t bytes = (last - first) * products_[product].matrix->panel_bytes;
        const uint8_t* from = start_of(product, first);
        fetched = {product, from, from + std::min(bytes, kFetch)};
    }
    for (size_t line = 0; line < kFetchLines && fetched.next < fetched.end; ++line) {
        __builtin_prefetch(fetched.next, 0, 2);
        fetched.next += 64;
    }
}

// The logits of what the layers before `layer` give, behind those of `place` other heads.
void Pass::plan_head(size_t layer, size_t place) {
    add(Stage::norm, &Pass::enter_head, layer, headed_.size(), 1);
    if (screened_) return plan_screen();
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

void Pass::plan_screen() {
    const HeadScreen& screen = *model_.screen;
    work_.screened.reserve(screen.arranged_bytes(headed_.size()));
    screened_->bounded.assign(headed_.size(), 1);
    add(Stage::arrange, &Pass::arrange_screen, 0, headed_.size(), 1);
    add(Stage::head, &Pass::multiply_screen, 0, screen.panels(), kPiece);
}

// Without logits only keys and values are wanted: layers behind the last attention are not run.
size_t Pass::needed_layers() const {
    size_t count = layers_.size();
    while (!logits_ && count && !shape_.layers[layers_[count - 1]].heads) --count;
    return count;
}

void Pass::plan_layer(size_t layer) {
    const LayerShape& shape = shape_.layers[layer];
    if (shape.heads) plan_attention(layer);
    // Without logits the last layer is run for its keys and values only.
    if (!logits_ && layer == layers_[needed_layers() - 1]) return;
    if (shape.intermediate) plan_mlp(layer);
}

void Pass::plan_attention(size_t layer) {
    const LayerWeights& weights = model_.weights.layers[layer];
    const LayerShape& shape = shape_.layers[layer];
    add_rows(&Pass::enter_attention, layer);
    multiply_fused(Stage::qkv, weights.qkv, work_.normed, hidden_,
                   {.out = work_.qkv.floats(), .stride = qkv_, .rows = shape.qkv_size()});
    if (shape_.qkv_clip || (weights.q_norm && shape_.qk_norm == QKNorm::width))
        add_rows(&Pass::bound_qkv, layer);
    add(Stage::rotate, &Pass::rotate, layer, n_ * (shape.heads + shape.kv_heads), 8);
    if (batch_[0].cache->sums_queries())
        add(Stage::attention, &Pass::sum_queries, layer, n_ * shape.kv_heads, 8);
    if (!closings_.empty())
        add(Stage::attention, &Pass::close, layer, closings_.size() * shape.kv_heads, 1);
    if (!logits_ && layer == layers_[needed_layers() - 1]) return;
    if (view_.positions)
        add(Stage::attention, &Pass::select, layer, batch_.size() * shape.kv_heads, 1);
    if (lacks_clusters(layer))
        add(Stage::attention, &Pass::make_clusters, layer, batch_.size() * shape.kv_heads, 1);
    if (summarises(layer))
        add(Stage::attention, &Pass::summarise, layer, batch_.size() * shape.kv_heads, 1);
    add_chunks(Stage::attention, &Pass::attend, layer, before_[layer].calls.back());
    if (before_[layer].states.back())
        add(Stage::attention, &Pass::combine, layer, n_ * shape.heads, 8);
    if (weights.attn_inner_norm) add_rows(&Pass::attention_inner_norm, layer);
    multiply_fused(Stage::output, weights.o, work_.attended, attended_,
                   {.out = work_.y.floats(), .stride = hidden_, .rows = hidden_});
}

void Pass::plan_mlp(size_t layer) {
    const LayerWeights& weights = model_.weights.layers[layer];
    const LayerShape& shape = shape_.layers[layer];
    add_rows(&Pass::enter_mlp, layer);
    multiply_fused(Stage::up, weights.gate_up, work_.normed, hidden_,
                   {.activation = shape_.activation,
                    .gated = shape_.gated,
                    .out = work_.wide.floats(),
                    .stride = wide_,
                    .rows = padded(shape.intermediate)});
    if (weights.mlp_inner_norm) add_rows(&Pass::mlp_inner_norm, layer);
    multiply_fused(Stage::down, weights.down, work_.wide, wide_,
                   {.out = work_.y.floats(), .stride = hidden_, .rows = hidden_});
}

void Pass::work(size_t phase, size_t chunk, size_t thread) {
    for (size_t step = phases_[phase].first; step < phases_[phase].last && !failed(); ++step)
        clock_.starts.empty() ? run(steps_[step], chunk, thread) : run_timed(step, chunk, thread);
}

void Pass::wait_for_layer(size_t layer, size_t, size_t, Buffer&) {
    if (!model_.stream->wait(layer)) failed_ = true;
}

void Pass::release_layer(size_t, size_t, size_t, Buffer&) {
    if (!failed()) model_.stream->release();
}

void Pass::arrange(size_t product, size_t chunk, size_t chunks, Buffer&) {
    for (size_t i = product; i < product + products_[product].parts; ++i) {
        const PendingProduct& linear = products_[i];
        if (!linear.arranges) continue;
        const std::vector<int32_t>& order = linear.matrix->order;
        void* to = const_cast<void*>(linear.job.x);
        linear.matrix->product->arrange(linear.rows, linear.stride, linear.job.n,
                                        linear.matrix->inputs,
                                        order.empty() ? nullptr : order.data(), to, chunk, chunks);
    }
}

void Pass::arrange_screen(size_t, size_t chunk, size_t chunks, Buffer&) {
    const auto [begin, end] = chunk_range(headed_.size(), chunk, chunks);
    for (size_t k = begin; k < end; ++k)
        screened_->bounded[k] = model_.screen->arrange(row(work_.normed, k, hidden_), k,
                                                       headed_.size(), work_.screened.bytes());
}

void Pass::multiply_screen(size_t, size_t chunk, size_t chunks, Buffer&) {
    const auto [begin, end] = chunk_range(model_.screen->panels(), chunk, chunks, kPiece);
    model_.screen->multiply(work_.screened.bytes(), headed_.size(), logits_, screened_->bounds,
                            begin, end);
}

void Pass::multiply(size_t product, size_t chunk, size_t chunks, Buffer& scratch) {
    const size_t parts = products_[product].parts;
    const auto [begin, end] = chunk_range(products_[product].panels, chunk, chunks, kGrain);
    for (size_t i = product; i < product + parts; ++i) {
        const PendingProduct& linear = products_[i];
        const size_t from = std::max(begin, linear.first);
        const size_t to = std::min(end, linear.first + linear.matrix->panels);
        if (from < to)
            linear.matrix->product->multiply(linear.job, from - linear.first, to - linear.first,
                                             scratch.bytes());
    }
}

void run_pass(Model& model, const std::vector<Branch>& batch, float* logits, const View& view,
              ScreenedRows* screened) {
    model.hidden_rows = 0;
    if (batch.empty()) return;
    const auto pass = std::make_shared<Pass>(model, batch, logits, view, screened);
    model.pool().run(pass, pass->threads());
    if (pass->failed())  // what it wrote into caches must not be committed
        for (const Branch& branch : batch) branch.cache->remember(branch.parents, 0, false);
    if (model.stream) model.stream->end();
    if (model.profiling) pass->account(model.profile);
    for (const Branch& branch : batch)
        branch.cache->remember(branch.parents, branch.nodes, view.partial());
    if (!logits || !model.shape.ends) return;
    for (const Branch& branch : batch) model.hidden_rows += branch.rows ? branch.nodes : 0;
}

}  // namespace paceline
