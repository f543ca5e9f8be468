// The part of a pass that concerns attention: who computes what, and on which rows of the cache.

#include <algorithm>
#include <map>
#include <tuple>

#include "engine/pass.hpp"

namespace paceline {

namespace {

// Of a branch for a kv head: with more it computes for longer than it reads, and gains nothing by
// reading with others (benchmarks/shared_prefix.py).
constexpr size_t kFewQueries = 16;
constexpr size_t kCallsForEach = 4;  // thread, where the work allows it
constexpr size_t kCallsOfSpans = 8;  // for each thread, where calls take several spans

// Where a view sees no position: an empty list may have no address, and none means all.
constexpr int32_t kNoPositions[1] = {};

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
    const auto [begin, end] = chunk_range(batch_.size() * heads, chunk, chunks);
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

// Spans of that many columns. Of a cache in groups those of rounded ones, and one for the rest.
size_t Pass::span_count(size_t columns) const {
    if (!batch_[0].cache->grouped()) return parts(columns, kSpan);
    return parts((columns - 1) / kCacheGroup * kCacheGroup, kSpan) + 1;
}

// A call takes many queries, so that the cache is read once for them; if that leaves threads
// without work, spans are computed apart, or the queries shared out.
Pass::QuerySplit Pass::query_split(size_t index, size_t branch) const {
    const LayerShape& layer = shape_.layers[index];
    const size_t queries = batch_[branch].nodes * layer.group();
    const size_t columns = seen(index, batch_[branch]) + static_cast<size_t>(deepest_[branch]) + 1;
    const size_t wanted = threads_ == 1 ? 1 : kCallsForEach * threads_;
    const size_t heads = batch_.size() * layer.kv_heads, spans = span_count(columns);
    const size_t shared_span = shared_span_counts_[branch];
    size_t tiles = parts(queries, kMostQueries);
    const bool few = heads * tiles < wanted, apart = shared_span || (few && spans > 1);
    if (few && !apart) tiles = std::min(parts(wanted, heads), parts(queries, 2));
    const size_t tile = parts(queries, tiles);
    const size_t calls = heads * parts(queries, tile) * spans;
    return {tile, parts(queries, tile), spans, shared_span, apart,
            std::max<size_t>(calls / (kCallsOfSpans * threads_), 1)};
}

// Branches whose next span ends in the same page share all pages before it, too: a page is only
// ever shared with those before it. Who has many queries stays alone.
void Pass::find_shared_spans() {
    shared_span_counts_.assign(batch_.size(), 0);
    if (view_.positions || batch_.size() == 1) return;
    size_t group = 0;
    for (const LayerShape& layer : shape_.layers)
        if (layer.heads) group = std::max(group, layer.group());
    for (size_t span = 0, found = 1; found; ++span) {
        std::map<const uint8_t*, SharedSpan> by_page;
        const size_t end = (span + 1) * kSpan;
        for (size_t b = 0; b < batch_.size(); ++b) {
            const KVCache& cache = *batch_[b].cache;
            if (shared_span_counts_[b] < span || cache.length() < end || cache.evicted()) continue;
            if (batch_[b].nodes * group > kFewQueries || reads_few(batch_[b])) continue;
            SharedSpan& shared_span =
                by_page.try_emplace(cache.data()[end / kCacheBlock - 1]).first->second;
            shared_span.span = span;
            shared_span.nodes += batch_[b].nodes;
            shared_span.branches.push_back(b);
        }
        found = 0;
        for (auto& [page, shared_span] : by_page) {
            if (shared_span.branches.size() < 2) continue;
            for (const size_t b : shared_span.branches) shared_span_counts_[b] = span + 1;
            shared_spans_.push_back(std::move(shared_span));
            ++found;
        }
    }
}

size_t Pass::shared_span_calls(const LayerShape& layer, const SharedSpan& shared_span) const {
    return layer.kv_heads * parts(shared_span.nodes * layer.group(), kMostQueries);
}

size_t Pass::shared_node_bytes() const { return padded(n_) * sizeof(SharedNode); }

// All queries that the branches of a joint have for a kv head.
PackedAttention Pass::join(size_t layer, const SharedSpan& shared_span, size_t head,
                     SharedNode* shared_nodes) const {
    const size_t state = kernels_.state_floats(shape_.layers[layer].head_dim);
    PackedAttention job = attention(layer, shared_span.branches[0], head);
    for (size_t b : shared_span.branches) {
        const PackedAttention own = attention(layer, b, head);
        for (size_t i = 0; shared_nodes && i < own.nodes; ++i)
            *shared_nodes++ = {own.queries + i * own.query_stride,
                         own.length + static_cast<size_t>(own.depths[i]),
                         own.states + i * own.group * own.spans * state, own.spans};
    }
    job.last_page = (shared_span.span + 1) * kSpan / kCacheBlock - 1;
    job.length = job.root = job.nodes = 0;
    job.chain = true;
    job.closed_of = nullptr;
    job.count = shared_span.nodes * job.group;
    return job;
}

// How many calls, and floats of states, the branches before each one have.
void Pass::count_calls(size_t layer) {
    const LayerShape& shape = shape_.layers[layer];
    Before& before = before_[layer];
    size_t calls = 0, states = 0;
    if (!shape.heads) return;
    for (const SharedSpan& shared_span : shared_spans_)
        calls += shared_span_calls(shape, shared_span);
    for (size_t branch = 0; branch <= batch_.size(); ++branch) {
        before.calls.push_back(calls);
        before.states.push_back(states);
        if (branch == batch_.size()) break;
        if (reads_few(layer, batch_[branch])) {
            calls += few_read_calls(layer, branch);
            continue;
        }
        if (reads_blocks(layer, batch_[branch])) {
            calls += block_calls(layer, batch_[branch]);
            continue;
        }
        const QuerySplit shared = query_split(layer, branch);
        calls += shape.kv_heads * shared.calls();
        if (shared.apart)
            states += batch_[branch].nodes * shape.heads * shared.spans *
                      kernels_.state_floats(shape.head_dim);
    }
}

// All queries of one kv head of a branch.
PackedAttention Pass::attention(size_t layer, size_t b, size_t head) const {
    const LayerShape& shape = shape_.layers[layer];
    const Branch& branch = batch_[b];
    const KVCache& cache = *branch.cache;
    const size_t group = shape.group();
    const bool part = view_.positions.has_value();
    const int32_t* positions = cache.positions(layer, head);
    if (part) positions = view_.positions->empty() ? kNoPositions : view_.positions->data();
    const size_t length = part ? view_.positions->size() : cache.held(layer, head);
    PackedAttention job{{.pages = part ? view_pages_.data() + b * blocks_of_view() : cache.data(),
                  .last_page = (length + branch.nodes - 1) / kCacheBlock,
                  .offset = part ? head * cache.block_bytes(layer) : cache.offset(layer, head),
                  .head_dim = shape.head_dim,
                  .length = length,
                  .seen = positions,
                  .root = cache.length(),
                  .parents = branch.parents,
                  .depths = depths_.data() + first_[b],
                  .nodes = branch.nodes,
                  .chain = chain_[b],
                  .window = shape.window,
                  .sinks = shape.sinks,
                  .softcap = shape_.attention_softcap,
                  .queries = row(work_.qkv, first_[b], qkv_),
                  .query_stride = qkv_,
                  .out = row(work_.attended, first_[b], attended_),
                  .out_stride = attended_,
                  .first_head = head * group,
                  .group = group,
                  .first = 0,
                  .count = branch.nodes * group,
                  .spans = query_split(layer, b).spans,
                  .states = nullptr,
                  .shared_nodes = nullptr},
                        cache.open()};
    if (cache.grouped() && !closed_[b].of_nodes.empty()) {
        job.closed = closed_[b].blocks.data();
        job.closed_of = closed_[b].of_nodes.data();
        job.closed_stride = cache.stride(layer);
        job.closed_data = work_.closed.bytes() + closed_[b].first * job.closed_stride +
                          head * cache.block_bytes(layer);
    }
    const bool alone = reads_few(layer, branch) || reads_blocks(layer, branch);
    if (alone || !query_split(layer, b).apart) return job;
    job.states = work_.states.floats() + before_[layer].states[b] +
                 head * job.count * job.spans * kernels_.state_floats(shape.head_dim);
    return job;
}

// Chunks are numbered by joint, kv head and tile of queries; those behind them by branch, kv head,
// tile and span.
void Pass::attend(size_t layer, size_t chunk, size_t, Buffer& scratch) {
    const LayerShape& shape = shape_.layers[layer];
    size_t left = chunk;
    for (const SharedSpan& shared_span : shared_spans_) {
        const size_t calls = shared_span_calls(shape, shared_span), tiles = calls / shape.kv_heads;
        if (left >= calls) {
            left -= calls;
            continue;
        }
        auto* shared_nodes = reinterpret_cast<SharedNode*>(scratch.bytes());
        PackedAttention job = join(layer, shared_span, left / tiles, shared_nodes);
        job.shared_nodes = shared_nodes;
        std::tie(job.first, job.count) = chunk_range(job.count, left % tiles, tiles);
        job.count -= job.first;
        return model_.cache_kernels.attend(job, shared_span.span, shared_span.span + 1,
                                           scratch.bytes() + shared_node_bytes());
    }
    const auto& calls = before_[layer].calls;
    const auto behind = std::ranges::upper_bound(calls, chunk);
    const auto b = static_cast<size_t>(behind - calls.begin()) - 1;
    chunk -= calls[b];
    if (reads_few(layer, batch_[b])) return read_few(layer, b, chunk, scratch);
    if (reads_blocks(layer, batch_[b])) return read_blocks(layer, b, chunk, scratch);
    const QuerySplit shared = query_split(layer, b);
    PackedAttention job = attention(layer, b, chunk / shared.calls());
    const size_t call = chunk % shared.calls();
    const size_t tile = shared.apart ? call / shared.runs() : call;
    const size_t run = shared.apart ? call % shared.runs() : 0;
    const size_t span = shared.apart ? shared.shared_span + run * shared.together : 0;
    const size_t last = shared.apart ? std::min(span + shared.together, shared.spans) : shared.spans;
    job.first = tile * shared.tile;
    job.count = std::min(shared.tile, job.count - job.first);
    model_.cache_kernels.attend(job, span, last, scratch.bytes());
}

// Merges the spans of every query where they were computed apart.
void Pass::combine(size_t layer, size_t chunk, size_t chunks, Buffer&) {
    const LayerShape& shape = shape_.layers[layer];
    const size_t group = shape.group();
    const auto [begin, end] = chunk_range(n_ * shape.kv_heads, chunk, chunks);
    for (size_t item = begin; item < end; ++item) {
        const size_t node = item / shape.kv_heads, b = branch_of_[node];
        const PackedAttention job = attention(layer, b, item % shape.kv_heads);
        if (!job.states) continue;
        const size_t query = (node - first_[b]) * group;
        for (size_t head = 0; head < group; ++head) kernels_.combine(job, query + head);
    }
}

}  // namespace paceline
