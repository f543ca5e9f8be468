// One forward pass as a task: phases of chunks, in the order in which they depend on each other.
#pragma once

#include <atomic>
#include <optional>
#include <vector>

#include "engine/low_rank.hpp"
#include "engine/model.hpp"

namespace paceline {

constexpr size_t kMostQueries = 96;  // of a call: as many as share what it reads of the cache

class Pass : public Task {
public:
    // Checks the batch, makes room in the caches and in the workspace, plans the phases.
    // Throws std::invalid_argument, MemoryFull or std::bad_alloc; then nothing has been done.
    Pass(Model& model, const std::vector<Branch>& batch, float* logits, const View& view,
         ScreenedRows* screened);

    // How many threads are worth waking for so much work.
    size_t threads() const { return threads_; }

    // After the pass: whether weights could not be read, so that its results mean nothing.
    bool failed() const { return failed_.load(std::memory_order_relaxed); }

    // After the pass, if the model is profiling: adds where its time went.
    void account(Profile& profile) const;

protected:
    void work(size_t phase, size_t chunk, size_t thread) override;
    void wait(size_t phase, size_t thread, size_t turn) override;

private:
    using Work = void (Pass::*)(size_t index, size_t chunk, size_t chunks, Buffer& scratch);
    // `index` is a layer, or a product's place in `products_`.
    struct Step {
        Stage part;
        Work work;
        size_t index, chunks;
    };
    // Steps that follow each other without a wait: one, or several that one thread does alone.
    struct Phase {
        size_t first, last;  // steps first .. last - 1
        size_t next;         // the first step behind them that is a product, or as many as there are
    };
    // What a thread that waits has fetched so far of what it will read next.
    struct alignas(64) Fetched {
        size_t product = SIZE_MAX;
        const uint8_t *next = nullptr, *end = nullptr;
    };
    // Kept only while the model is profiling.
    struct Clock {
        std::vector<std::vector<double>> starts;  // [thread][step], 0: the thread took no part
        std::vector<std::vector<double>> busy;  // [thread][step]
    };
    // How the queries of one kv head are divided into kernel calls.
    struct QuerySplit {
        size_t tile, tiles, spans;
        size_t shared_span;  // spans, the first ones, that others compute, too
        bool apart;       // calls take some spans each
        size_t together;  // as many
        size_t runs() const { return (spans - shared_span + together - 1) / together; }
        size_t calls() const { return apart ? tiles * runs() : tiles; }
    };
    // Calls and floats of states that the branches before each one have, and all of them.
    struct Before {
        std::vector<size_t> calls, states;
    };
    // A span of cached positions that several branches hold in the same pages; it is read once for
    // all.
    struct SharedSpan {
        size_t span, nodes;
        std::vector<size_t> branches;
    };
    // A group of positions that is filled in a pass over a cache in groups, and then rounded.
    struct Closing {
        size_t branch, position;  // the first of the group
        size_t closed;            // the block of `closed_` that it goes to; of a tree only
        // Of the rows of its block that are not rounded; of a tree only.
        std::vector<int32_t> slots;
    };
    // Blocks that paths of a tree fill: of each branch those in `closed_` from `first` on.
    struct ClosedTree {
        size_t first = 0;
        std::vector<ClosedBlock> blocks;
        std::vector<int32_t> of_nodes;  // empty: none
    };
    // A matrix, the rows that it multiplies, and what becomes of the results. Those that are
    // multiplied in one phase lie side by side.
    struct PendingProduct {
        const Matrix* matrix;
        const float* rows;
        size_t stride;
        Product job;
        size_t first;   // panel of all that it begins with
        bool arranges;  // whether it lays its inputs out; else others do, or nobody
        // Matrices that are multiplied in one phase, their panels, and its chunks; at the first.
        size_t parts = 0, panels = 0, chunks = 0;
    };

    // What follows a product whose matrices have low-rank terms: they are added to the rows at `to`;
    // behind activation and gate, those go to `out` then, if it is not null.
    struct LowRankSum {
        const FusedMatrix* fused;
        Activation activation;
        bool gated;
        float* to;
        size_t stride;
        float* out = nullptr;
    };

    void check(const Branch& branch);
    void choose_layers();
    void check_positions(size_t length) const;
    void choose_tokens();
    void check_exits() const;
    size_t missing_pages() const;
    size_t worthwhile_threads() const;
    void reserve();
    void plan();
    void plan_layer(size_t layer);
    void plan_streamed(size_t layer);
    void plan_attention(size_t layer);
    void plan_mlp(size_t layer);
    size_t needed_layers() const;
    void plan_head(size_t layer, size_t place);
    void plan_end();
    void add_chunks(Stage part, Work work, size_t index, size_t chunks);
    void add(Stage part, Work work, size_t index, size_t things, size_t least);
    void plan_fetches();
    size_t whole_chunks(size_t panels) const;
    const uint8_t* start_of(size_t product, size_t panel) const;
    std::pair<size_t, size_t> owned_panels(size_t product, size_t thread) const;
    void add_rows(Work work, size_t layer, Stage part = Stage::norm) {
        add(part, work, layer, n_, 1);
    }
    void multiply_later(Stage part, std::span<const Matrix> matrices, const Buffer& bias,
                        const Buffer& rows, size_t stride, Product job,
                        std::optional<size_t> count = {}, size_t column = 0);
    void multiply_fused(Stage part, const FusedMatrix& fused, const Buffer& rows, size_t stride,
                        Product job);
    void reserve_low_rank();
    void reserve_product(const Matrix& matrix);
    void add_low_rank(size_t index, size_t chunk, size_t chunks, Buffer& scratch);
    void activate_row(const LowRankSum& sum, const float* plain, float* out, Buffer& scratch) const;
    size_t arranged_bytes(const Matrix& matrix) const {
        return (matrix.product->arranged_bytes(n_, matrix.inputs) + 63) / 64 * 64;
    }
    void run(const Step& step, size_t chunk, size_t thread) {
        (this->*step.work)(step.index, chunk, step.chunks, work_.scratch[thread]);
    }
    void start_clock();
    void run_timed(size_t step, size_t chunk, size_t thread);
    double start_of_step(size_t step) const;
    Spent moved(const Step& step) const;

    void embed(size_t, size_t chunk, size_t chunks, Buffer& scratch);
    void enter_attention(size_t layer, size_t chunk, size_t chunks, Buffer&);
    void bound_qkv(size_t layer, size_t chunk, size_t chunks, Buffer&);
    void rotate(size_t layer, size_t chunk, size_t chunks, Buffer&);
    void select(size_t layer, size_t chunk, size_t chunks, Buffer&);
    void attend(size_t layer, size_t chunk, size_t chunks, Buffer& scratch);
    void combine(size_t layer, size_t chunk, size_t chunks, Buffer&);
    void attention_inner_norm(size_t layer, size_t chunk, size_t chunks, Buffer&);
    void enter_mlp(size_t layer, size_t chunk, size_t chunks, Buffer&);
    void mlp_inner_norm(size_t layer, size_t chunk, size_t chunks, Buffer&);
    void enter_head(size_t layer, size_t chunk, size_t chunks, Buffer& scratch);
    void leave(size_t layer, size_t chunk, size_t chunks, Buffer& scratch);
    const float* merged_state(const Norm* before, size_t node, Buffer& scratch) const;
    void arrange(size_t product, size_t chunk, size_t chunks, Buffer&);
    void multiply(size_t product, size_t chunk, size_t chunks, Buffer& scratch);
    void plan_screen();
    void arrange_screen(size_t, size_t chunk, size_t chunks, Buffer&);
    void multiply_screen(size_t, size_t chunk, size_t chunks, Buffer&);
    void wait_for_layer(size_t layer, size_t, size_t, Buffer&);
    void release_layer(size_t layer, size_t, size_t, Buffer&);

    void mix(const Branch& branch, size_t node, float* x, float* other);
    void norm_row(const Norm& norm, const float* row, float* out, size_t size) const;
    void norm_head(const Norm& norm, float* head, size_t dim) const;
    const Norm* norm_before(size_t layer) const;
    void merge(const Norm& post, float* x, float* y) const;
    void enter(const Norm& norm, const float* x, float* out) const;
    size_t seen(size_t layer, const Branch& branch) const;
    bool keeps_queries(const Branch& branch) const {
        return branch.cache->keeps_queries() && !view_.partial();
    }
    size_t blocks_of_view() const;
    void reserve_view();
    size_t span_count(size_t columns) const;
    QuerySplit query_split(size_t layer, size_t branch) const;
    void find_closings();
    void find_closings_of_tree(size_t branch);
    void close(size_t layer, size_t chunk, size_t chunks, Buffer&);
    void find_shared_spans();
    size_t shared_span_calls(const LayerShape& layer, const SharedSpan& shared_span) const;
    PackedAttention join(size_t layer, const SharedSpan& shared_span, size_t head,
                   SharedNode* shared_nodes) const;
    size_t shared_node_bytes() const;
    void count_calls(size_t layer);
    size_t attention_bytes(const PackedAttention& job, size_t queries) const {
        return model_.packed ? model_.packed->attention_bytes(job, queries)
                             : kernels_.attention_bytes(job, queries);
    }
    PackedAttention attention(size_t layer, size_t branch, size_t head) const;
    bool reads_few(size_t layer, const Branch& branch) const;
    bool reads_few(const Branch& branch) const;
    void check_reach(const Branch& branch, size_t deepest, bool chain) const;
    void sum_queries(size_t layer, size_t chunk, size_t chunks, Buffer&);
    bool lacks_clusters(size_t layer, size_t branch, size_t head) const;
    bool lacks_clusters(size_t layer) const;
    void make_clusters(size_t layer, size_t chunk, size_t chunks, Buffer&);
    bool summarises(size_t layer) const;
    size_t few_read_calls(size_t layer, size_t branch) const;
    FewReadNode few_read_node(size_t layer, size_t branch, size_t head, size_t node) const;
    void read_few(size_t layer, size_t branch, size_t call, Buffer& scratch) const;
    void summarise(size_t layer, size_t chunk, size_t chunks, Buffer&);
    size_t sparse_end(const Branch& branch) const;
    bool reads_blocks(const Branch& branch) const;
    bool reads_blocks(size_t layer, const Branch& branch) const;
    void check_blocks(const Branch& branch, bool chain) const;
    size_t block_calls(size_t layer, const Branch& branch) const;
    size_t block_read_bytes(size_t layer, size_t branch) const;
    void read_blocks(size_t layer, size_t branch, size_t call, Buffer& scratch) const;
    float* row(const Buffer& rows, size_t index, size_t stride) const {
        return rows.floats() + index * stride;
    }

    Model& model_;
    const Shape& shape_;
    const Kernels& kernels_;
    Workspace& work_;
    const std::vector<Branch> batch_;
    const View view_;
    std::vector<size_t> layers_;  // those that are run
    float* logits_;  // or hidden states, of a part that does not end the decoder
    ScreenedRows* screened_;  // or null
    size_t n_ = 0, threads_ = 1;
    size_t hidden_, wide_ = 0, qkv_ = 0, attended_ = 0;  // strides of the workspace's rows
    size_t thin_ = 0, added_ = 0, plain_ = 0;             // likewise
    size_t low_rank_scratch_ = 0, low_rank_arranged_ = 0;  // bytes that low-rank terms need
    std::vector<int32_t> depths_;                         // of all nodes
    std::vector<size_t> branch_of_;                       // of all nodes
    std::vector<size_t> first_;                           // first node of each branch
    std::vector<size_t> headed_;                          // nodes whose logits are wanted
    std::vector<bool> chain_;                             // of each branch
    std::vector<int32_t> deepest_;                        // of each branch
    std::vector<SharedSpan> shared_spans_;
    std::vector<Before> before_;                          // of each layer
    std::vector<size_t> shared_span_counts_;                     // of each branch
    std::vector<Closing> closings_;
    std::vector<ClosedTree> closed_;                      // of each branch of a cache in groups
    size_t closed_blocks_ = 0;
    std::vector<uint8_t*> view_pages_;                    // what a view sees, [branch][page]
    std::vector<Step> steps_;
    std::vector<Phase> phases_;
    std::vector<Fetched> fetched_;  // of each thread
    std::vector<PendingProduct> products_;
    std::vector<LowRankSum> sums_;
    const uint8_t* layer_at_ = nullptr;  // while planning: where the layer lies, if it is streamed
    std::atomic<bool> failed_{false};
    Clock clock_;
};

// Runs every node of every branch and writes logits [nodes][V], or of the view's tokens only;
// `logits` may be null; a part of a model that lacks the last layers writes its hidden states
// [nodes][hidden] there. Commits nothing. Throws std::invalid_argument for bad tokens, parents,
// positions or views, and MemoryFull, before any work is done.
//
// With `screened`, logits and its bounds [nodes][V] are those of the model's coarse head; the view
// must then name no tokens and no exits.
void run_pass(Model& model, const std::vector<Branch>& batch, float* logits, const View& view,
              ScreenedRows* screened = nullptr);

}  // namespace paceline
