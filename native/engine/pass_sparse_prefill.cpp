// The part of a pass that concerns prompts which read some blocks of the cache only.
//
// The 64 queries of an aligned block, in one query head, read the same blocks of keys: the first
// ones, the last ones, and between them those that hold most of the attention of a few of these
// queries, which are computed against all keys. A block of queries is run in one pass, so that
// chunks, batches and threads change nothing. Heads may choose otherwise, see prefill_choice.hpp.
// What is chosen is given to the dense kernel as if it lay side by side: a list of pages, with the
// block's own page behind them.

#include <algorithm>
#include <array>
#include <numeric>
#include <stdexcept>
#include <string>

#include "engine/pass.hpp"
#include "engine/prefill_choice.hpp"

namespace paceline {

namespace {

size_t parts(size_t things, size_t size) { return (things + size - 1) / size; }

std::array<int32_t, kCacheBlock> counted_from(int32_t first) {
    std::array<int32_t, kCacheBlock> numbers;
    std::iota(numbers.begin(), numbers.end(), first);
    return numbers;
}

// Of the chain that a block of queries is.
const std::array<int32_t, kCacheBlock> kParents = counted_from(-1), kDepths = counted_from(0);

// Working memory of a call, for `blocks` blocks of keys.
struct Scratch {
    double* mass;           // [blocks][64], what the samples give to each position
    double* shares;         // [blocks]
    const uint8_t** pages;  // [blocks]
    int32_t* order;         // [blocks]
    uint8_t* rest;          // for kernels

    Scratch(uint8_t* at, size_t blocks) {
        mass = reinterpret_cast<double*>(at);
        shares = mass + blocks * kCacheBlock;
        pages = reinterpret_cast<const uint8_t**>(shares + blocks);
        order = reinterpret_cast<int32_t*>(pages + blocks);
        rest = at + bytes(blocks);
    }

    static size_t bytes(size_t blocks) {
        const size_t each = (kCacheBlock + 1) * sizeof(double) + sizeof(uint8_t*) + sizeof(int32_t);
        return parts(blocks * each, 64) * 64;
    }
};

// Chooses among the blocks before block `own`; returns how many, in `order`, increasing.
size_t choose_blocks(const SparsePrefill& rule, size_t own, const Scratch& scratch) {
    const double wanted = rule.threshold * static_cast<double>(rule.samples);
    double held = 0.0;
    for (size_t block = 0; block <= own; ++block) {
        const double* mass = scratch.mass + block * kCacheBlock;
        scratch.shares[block] = std::accumulate(mass, mass + kCacheBlock, 0.0);
    }
    const auto always = [&](size_t block) {
        return block < rule.sinks || block + rule.local > own;
    };
    const auto first = std::stable_partition(
        scratch.order, scratch.order + own, [&](int32_t block) { return always(block); });
    for (int32_t* block = scratch.order; block < first; ++block) held += scratch.shares[*block];
    held += scratch.shares[own];
    std::stable_sort(first, scratch.order + own, [&](int32_t one, int32_t other) {
        return scratch.shares[one] > scratch.shares[other];
    });
    int32_t* end = first;
    for (; end < scratch.order + own && held < wanted; ++end) held += scratch.shares[*end];
    std::sort(scratch.order, end);
    return static_cast<size_t>(end - scratch.order);
}

}  // namespace

// Where the whole blocks of a prompt end. What a view leaves is not committed, so it has no prompt.
size_t Pass::sparse_end(const Branch& branch) const {
    if (!model_.sparse_prefill.samples || view_.partial()) return 0;
    return branch.cache->prompt() / kCacheBlock * kCacheBlock;
}

bool Pass::reads_blocks(const Branch& branch) const {
    return branch.cache->length() < sparse_end(branch);
}

// Layers with a window read all of it.
bool Pass::reads_blocks(size_t layer, const Branch& branch) const {
    return layer >= model_.sparse_prefill.dense && !shape_.layers[layer].window &&
           reads_blocks(branch);
}

void Pass::check_blocks(const Branch& branch, bool chain) const {
    if (!reads_blocks(branch)) return;
    const size_t begin = branch.cache->length(), end = begin + branch.nodes;
    const bool whole = begin % kCacheBlock == 0 &&
                       (end % kCacheBlock == 0 || end >= sparse_end(branch));
    if (!chain || !whole)
        throw std::invalid_argument(
            "a prompt that reads some blocks only is run in whole blocks of 64 positions; found "
            "positions " + std::to_string(begin) + " to " + std::to_string(end) +
            (chain ? "" : " as a tree"));
}

size_t Pass::block_calls(size_t layer, const Branch& branch) const {
    return shape_.layers[layer].heads * parts(branch.nodes, kCacheBlock);
}

size_t Pass::block_read_bytes(size_t layer, size_t branch) const {
    const PackedAttention job = attention(layer, branch, 0);
    PackedAttention part = job;
    part.length = 0;
    part.nodes = kCacheBlock;
    const size_t blocks = parts(job.length + job.nodes, kCacheBlock);
    const size_t choice = model_.sparse_prefill.heads.empty()
                              ? 0
                              : PrefillChoice::bytes(model_.cache_kernels, blocks, job.head_dim);
    return Scratch::bytes(blocks) + choice +
           std::max(kernels_.mass_bytes(job), kernels_.attention_bytes(part, kCacheBlock));
}

// Calls are numbered by block of queries and query head.
void Pass::read_blocks(size_t layer, size_t b, size_t call, Buffer& buffer) const {
    const LayerShape& shape = shape_.layers[layer];
    const SparsePrefill& rule = model_.sparse_prefill;
    const Branch& branch = batch_[b];
    const size_t head = call % shape.heads, first = call / shape.heads * kCacheBlock;
    PackedAttention job = attention(layer, b, head / (shape.heads / shape.kv_heads));
    job.first_head = head;
    job.group = 1;
    const size_t own = (job.length + first) / kCacheBlock;
    const Scratch scratch(buffer.bytes(), parts(job.length + job.nodes, kCacheBlock));
    std::iota(scratch.order, scratch.order + own, 0);
    size_t chosen = own;
    uint8_t* rest = scratch.rest;
    const PrefillHead of_head = rule.head(layer, head);
    const bool free = own + 1 > rule.sinks + rule.local &&
                      (own + 1) * kCacheBlock <= sparse_end(branch);
    const bool by_mass = of_head.rule == PrefillRule::mass;
    if (free && by_mass && rule.threshold < 1.0) {
        std::fill_n(scratch.mass, (own + 1) * kCacheBlock, 0.0);
        job.count = 1;
        for (size_t sample = 0; sample < rule.samples; ++sample) {
            job.first = first + (sample + 1) * kCacheBlock / rule.samples - 1;
            model_.cache_kernels.add_mass(job, scratch.mass, scratch.rest);
        }
        chosen = choose_blocks(rule, own, scratch);
    }
    if (free && !by_mass) {
        Attention block = job;
        block.queries += first * job.query_stride;
        block.length = own * kCacheBlock;
        block.root = block.length;
        block.nodes = kCacheBlock;
        block.parents = kParents.data();
        block.depths = kDepths.data();
        PrefillChoice choice(rule, model_.cache_kernels, block, own, rest);
        choice.choose(of_head);
        chosen = choice.list(scratch.pages);
        rest = choice.rest();
    } else {
        for (size_t i = 0; i < chosen; ++i)
            scratch.pages[i] = job.pages[scratch.order[i]] + job.offset;
    }
    scratch.pages[chosen] = job.pages[own] + job.offset;
    job.pages = scratch.pages;
    job.offset = 0;
    job.last_page = chosen;
    job.length = chosen * kCacheBlock;
    job.root = own * kCacheBlock;
    job.parents = kParents.data();
    job.depths = kDepths.data();
    job.nodes = std::min(kCacheBlock, branch.nodes - first);
    job.queries += first * job.query_stride;
    job.out += first * job.out_stride;
    job.first = 0;
    job.count = job.nodes;
    job.spans = parts(job.length + job.nodes, kSpan);
    model_.cache_kernels.attend(job, 0, job.spans, rest);
}

}  // namespace paceline
