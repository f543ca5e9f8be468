// A model that runs: weights, kernels, threads and the working memory of a pass.
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "engine/head_screen.hpp"
#include "engine/kv_cache.hpp"
#include "support/thread_pool.hpp"
#include "engine/profile.hpp"
#include "engine/shape.hpp"
#include "engine/weight_stream.hpp"
#include "engine/weights.hpp"

namespace paceline {

// Angles of one kind of rotary embedding, [positions][dim / 2].
struct RopeTable {
    std::vector<float> cosines, sines;
};

// One sequence of a batch and the nodes to run for it.
struct Branch {
    KVCache* cache;
    const int32_t* tokens;  // [nodes][mixed]
    const int32_t* parents;
    size_t nodes;
    bool rows = true;                // whether logits of its nodes are wanted
    size_t mixed = 1;                // tokens whose embeddings a node mixes
    const float* weights = nullptr;  // [nodes][mixed]; null: each is 1
    const float* states = nullptr;   // [nodes][hidden], of the layers before; null: embeddings
};

// The part of a model that a pass for drafting uses; what is absent is whole. What `partial` passes
// leave behind cannot be committed.
struct View {
    std::optional<std::span<const int32_t>> layers;     // increasing: those that are run
    std::optional<std::span<const int32_t>> positions;  // increasing: committed ones that are seen
    std::optional<std::span<const int32_t>> tokens;     // increasing: those that get logits
    // Increasing: behind so many of the layers that are run logits are made, too; they come first.
    std::optional<std::span<const int32_t>> exits;

    size_t heads() const { return 1 + (exits ? exits->size() : 0); }
    bool partial() const { return layers || positions; }
};

// What a pass with the coarse head leaves beside its logits.
struct ScreenedRows {
    uint16_t* bounds;              // [nodes][V]
    std::vector<uint8_t> bounded;  // [nodes]: whether the bounds hold
};

// Working memory, rows of n tokens each; kept between passes.
struct Workspace {
    Buffer x;         // the residual stream, [n][hidden]
    Buffer normed;    // [n][hidden]
    Buffer y;         // [n][hidden]
    Buffer qkv;       // [n][queries, keys, values]
    Buffer attended;  // [n][heads * D]
    Buffer wide;      // [n][intermediate]
    Buffer arranged;  // the input of a product, as its kernel wants it
    Buffer seen;      // the rows that a view sees, in blocks as in a cache
    Buffer closed;    // blocks that paths of a tree fill, of a cache in groups
    Buffer states;    // of the spans of attention
    Buffer screened;  // the input of the coarse head
    Buffer found;     // tokens that may win a draw
    Buffer thin;      // between the factors of low-rank terms, [n][ranks]
    Buffer added;     // low-rank terms, [n][rows]
    Buffer plain;     // products before activation and gate, [n][gate, up]
    std::vector<Buffer> scratch;  // one for each thread
};

// How keys and values are kept; `packed` where they are rounded in groups.
struct CacheChoice {
    const CacheKernels* kernels;
    const PackedKernels* packed = nullptr;
    const FewReadKernels* few_read = nullptr;  // where few positions can be read
};

// How a query head chooses what a block of a prompt's queries reads; see prefill_choice.hpp.
enum class PrefillRule : uint8_t { mass, a_shape, vertical_slash, mean_blocks, tree, count };

struct PrefillHead {
    PrefillRule rule = PrefillRule::mass;
    size_t first = 0, second = 0;  // its numbers
};

// How prompts are read in blocks of 64 positions; see pass_sparse_prefill.cpp.
struct SparsePrefill {
    size_t samples = 0;      // queries of a block that choose for all; 0: everything is read
    double threshold = 1.0;  // share of the samples' attention that chosen blocks must hold
    size_t sinks = 0;        // first blocks that are always read
    size_t local = 1;        // last blocks that are always read, the query's own included
    size_t dense = 0;        // first layers that read everything
    std::vector<std::vector<PrefillHead>> heads;  // [layer][query head]; empty: all by mass

    PrefillHead head(size_t layer, size_t head) const {
        return heads.empty() ? PrefillHead{} : heads[layer][head];
    }
};

class Model {
public:
    // `head` is the format of the embedding and of the head.
    Model(Shape shape, const Kernels& kernels, const FormatKernels& format,
          const FormatKernels& head, CacheChoice cache, size_t threads,
          const FewRead* few_read = nullptr);

    // Bytes that one position takes in the cache.
    double position_bytes() const {
        return static_cast<double>(layout.bytes) / kCacheBlock;
    }
    // A new, empty sequence.
    KVCache open() { return KVCache(layout, memory); }

    // Lets layers beyond so many bytes of weights lie in a file; before any weight is given.
    // See WeightStream.
    void stream_weights(const std::string& path, size_t budget);

    // See Weights::set. These throw FileError where weights are streamed, too.
    void set(const std::string& name, const TensorSource& weight) {
        weights.set(name, weight, *pool_);
        place(name);
    }

    // See Weights::load.
    void load(const std::string& name, const GroupedRows& rows, std::span<const int32_t> order) {
        weights.load(name, rows, order, *pool_);
        place(name);
    }
    void load_blocks(const std::string& name, const StoredRows& rows) {
        weights.load_blocks(name, rows, *pool_);
        place(name);
    }

    // See Weights::get. Throws FileError, too.
    template <class Use>
    void get(const std::string& name, Use use) const {
        const Matrix& matrix = weights.matrix(name);
        const AlignedBuffer memory = matrix.streamed ? stream->read(matrix) : AlignedBuffer();
        weights.get(name, memory.bytes(), use);
    }

    // All weights have been set. Throws std::invalid_argument if one is missing.
    void finish();

    // Copies the head to screen it; false where that cannot be done.
    bool make_screen();

    // Copies what the head was given in the last pass with logits, [hidden_rows][hidden].
    void hidden(float* out) const;

    void set_threads(size_t threads);
    size_t threads() const { return pool_->size(); }
    // Positions that every rotary table covers.
    size_t rope_positions() const;
    void extend_rope(size_t index, const float* cosines, const float* sines, size_t count);

    const Shape shape;
    const Kernels& kernels;
    const CacheKernels& cache_kernels;
    const PackedKernels* const packed;  // of a cache in groups, or null
    const FewReadKernels* const few_read_kernels;  // null: every position is read
    const PageLayout layout;
    PagePool memory;  // of all sequences
    Weights weights;
    std::unique_ptr<WeightStream> stream;  // or null: all weights are in memory
    std::unique_ptr<HeadScreen> screen;  // or null
    // A pass of fewer estimated microseconds runs on the calling thread alone: to wake others
    // would cost more than it gives.
    double worth_waking = 60.0;
    size_t bytes = 0, parameters = 0;  // of the matrices, once the model is finished
    bool profiling = false;
    Profile profile{};  // of the passes that were run while `profiling`
    std::vector<RopeTable> ropes;
    Workspace work;
    FewRead few_read;                             // how much is read, where some heads read few
    std::vector<std::vector<HeadRead>> head_reads;  // [layer][kv head]; without entries, all
    SparsePrefill sparse_prefill;
    size_t hidden_rows = 0;  // that `hidden` can give; 0 after a pass without logits

    Pool& pool() const { return *pool_; }

private:
    void place(const std::string& name);

    std::unique_ptr<Pool> pool_;  // last: its threads end before what they use
};

}  // namespace paceline
