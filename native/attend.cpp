// The part of a pass that concerns attention: who computes what, and on which rows of the cache.

#include <algorithm>

#include "pass.hpp"

namespace {

constexpr size_t kMostQueries = 96;  // of a call: as many as share what it reads of the cache
constexpr size_t kCallsForEach = 4;  // thread, where the work allows it

size_t parts(size_t things, size_t size) { return (things + size - 1) / size; }

}  // namespace

size_t Pass::blocks_of_view() const {
    size_t most = 0;
    for (const Branch& branch : batch_) most = std::max(most, branch.nodes);
    return parts(view_.positions->size() + most, kCacheBlock);
}

// Pages for what a view sees, of one layer at a time.
void Pass::reserve_view() {
    size_t bytes = 0;
    for (const size_t layer : layers_) bytes = std::max(bytes, batch_[0].cache->stride(layer));
    const size_t pages = batch_.size() * blocks_of_view();
    work_.seen.reserve(pages * bytes);
    for (size_t page = 0; page < pages; ++page)
        view_pages_.push_back(work_.seen.bytes() + page * bytes);
}

// Puts what a view sees, and the nodes behind it, side by side.
void Pass::select(size_t layer, size_t chunk, size_t chunks, Buffer&) {
    const size_t heads = shape_.layers[layer].kv_heads, count = view_.positions->size();
    const auto [begin, end] = share(batch_.size() * heads, chunk, chunks);
    for (size_t item = begin; item < end; ++item) {
        const size_t b = item / heads, head = item % heads;
        const Branch& branch = batch_[b];
        const auto row = [&](size_t place) {
            return place < count ? static_cast<size_t>((*view_.positions)[place])
                                 : branch.cache->length() + place - count;
        };
        for (size_t to = 0, run; to < count + branch.nodes; to += run) {
            const size_t from = row(to), most = kPanel - std::max(to % kPanel, from % kPanel);
            for (run = 1; run < most && to + run < count + branch.nodes; ++run)
                if (row(to + run) != from + run) break;
            const size_t page = b * blocks_of_view() + to / kCacheBlock;
            branch.cache->copy(layer, head, from,
                               view_pages_[page] + head * branch.cache->block_bytes(layer),
                               to % kCacheBlock, run);
        }
    }
}

// A call takes many queries, so that the cache is read once for them; if that leaves threads
// without work, spans are computed apart, or the queries shared out.
Pass::Sharing Pass::sharing(const LayerShape& layer, size_t branch) const {
    const size_t queries = batch_[branch].nodes * (layer.heads / layer.kv_heads);
    const size_t columns = seen(batch_[branch]) + static_cast<size_t>(deepest_[branch]) + 1;
    const size_t wanted = threads_ == 1 ? 1 : kCallsForEach * threads_;
    const size_t heads = batch_.size() * layer.kv_heads, spans = parts(columns, kSpan);
    size_t tiles = parts(queries, kMostQueries);
    const bool few = heads * tiles < wanted, apart = few && spans > 1;
    if (few && !apart) tiles = std::min(parts(wanted, heads), parts(queries, 2));
    const size_t tile = parts(queries, tiles);
    return {tile, parts(queries, tile), spans, apart};
}

size_t Pass::floats_of_states(size_t layer) const {
    const LayerShape& shape = shape_.layers[layer];
    size_t queries = 0;
    for (size_t branch = 0; branch < batch_.size(); ++branch) {
        const Sharing shared = sharing(shape, branch);
        if (shared.apart) queries += batch_[branch].nodes * shape.heads * shared.spans;
    }
    return queries * kernels_.state_floats(shape.head_dim);
}

// All queries of one kv head of a branch.
Attention Pass::attention(size_t layer, size_t b, size_t head) const {
    const LayerShape& shape = shape_.layers[layer];
    const Branch& branch = batch_[b];
    const Cache& cache = *branch.cache;
    const size_t group = shape.heads / shape.kv_heads;
    const bool part = view_.positions.has_value();
    Attention job{.pages = part ? view_pages_.data() + b * blocks_of_view() : cache.data(),
                  .last_page = (seen(branch) + branch.nodes - 1) / kCacheBlock,
                  .offset = part ? head * cache.block_bytes(layer) : cache.offset(layer, head),
                  .head_dim = shape.head_dim,
                  .length = seen(branch),
                  .seen = part ? view_.positions->data() : nullptr,
                  .root = cache.length(),
                  .parents = branch.parents,
                  .depths = depths_.data() + first_[b],
                  .nodes = branch.nodes,
                  .chain = chain_[b],
                  .window = shape.window,
                  .softcap = shape_.attention_softcap,
                  .queries = row(work_.qkv, first_[b], qkv_),
                  .query_stride = qkv_,
                  .out = row(work_.attended, first_[b], attended_),
                  .out_stride = attended_,
                  .first_head = head * group,
                  .group = group,
                  .first = 0,
                  .count = branch.nodes * group,
                  .spans = sharing(shape, b).spans,
                  .states = nullptr};
    if (!sharing(shape, b).apart) return job;
    size_t queries = head * job.count * job.spans;  // that have their states before these
    for (size_t other = 0; other < b; ++other) {
        const Sharing shared = sharing(shape, other);
        if (shared.apart) queries += batch_[other].nodes * shape.heads * shared.spans;
    }
    job.states = work_.states.floats() + queries * kernels_.state_floats(shape.head_dim);
    return job;
}

// Chunks are numbered by branch, kv head, tile of queries and span.
void Pass::attend(size_t layer, size_t chunk, size_t, Buffer& scratch) {
    const LayerShape& shape = shape_.layers[layer];
    size_t b = 0;
    for (size_t calls; chunk >= (calls = shape.kv_heads * sharing(shape, b).calls()); ++b)
        chunk -= calls;
    const Sharing shared = sharing(shape, b);
    Attention job = attention(layer, b, chunk / shared.calls());
    const size_t call = chunk % shared.calls();
    const size_t tile = shared.apart ? call / shared.spans : call;
    const size_t span = shared.apart ? call % shared.spans : 0;
    job.first = tile * shared.tile;
    job.count = std::min(shared.tile, job.count - job.first);
    model_.cache_kernels.attend(job, span, shared.apart ? span + 1 : shared.spans,
                                scratch.bytes());
}

// Merges the spans of every query where they were computed apart.
void Pass::combine(size_t layer, size_t chunk, size_t chunks, Buffer&) {
    const LayerShape& shape = shape_.layers[layer];
    const size_t group = shape.heads / shape.kv_heads;
    const auto [begin, end] = share(n_ * shape.kv_heads, chunk, chunks);
    for (size_t item = begin; item < end; ++item) {
        const size_t node = item / shape.kv_heads, b = branch_of_[node];
        const Attention job = attention(layer, b, item % shape.kv_heads);
        if (!job.states) continue;
        const size_t query = (node - first_[b]) * group;
        for (size_t head = 0; head < group; ++head) kernels_.combine(job, query + head);
    }
}
