// Attention over every kind of cache: trees, chains, windows, evicted rows, spans, shared nodes' sums.
#include "checks.hpp"

namespace check {

namespace {

using paceline::Attention;
using paceline::CacheKernels;
using paceline::Kernels;
using paceline::kCacheBlock;

struct Nodes {
    std::vector<int32_t> parents, depths;
};

Nodes random_tree(size_t count, bool chain, Random& random) {
    Nodes tree;
    for (size_t i = 0; i < count; ++i) {
        const bool root = i == 0;
        const size_t parent = root ? 0 : chain ? i - 1 : random.below(i);
        tree.parents.push_back(root ? -1 : static_cast<int32_t>(parent));
        tree.depths.push_back(root ? 0 : tree.depths[parent] + 1);
    }
    return tree;
}

// Two kv heads, in pages of 64 positions.
struct Cache {
    size_t dim, block;
    std::vector<Memory<uint8_t>> pages;
    std::vector<const uint8_t*> at;
};

Cache fill(const CacheKernels& kernels, size_t rows, size_t dim, Random& random) {
    Cache cache{dim, kernels.block_bytes(dim), {}, {}};
    cache.block = (cache.block + 63) / 64 * 64;
    const size_t floats = paceline::padded(dim);
    for (size_t row = 0; row < rows; ++row) {
        if (row % kCacheBlock == 0) cache.pages.emplace_back(2 * cache.block);
        const Kind kind = random.one_in(20) ? Kind::outliers : Kind::plain;
        for (size_t head = 0; head < 2; ++head) {
            const Memory<float> both = random_rows(random, 2, dim, floats, kind);
            kernels.put(cache.pages.back().data() + head * cache.block, row % kCacheBlock, dim,
                        both.data(), both.data() + floats);
        }
    }
    for (auto& page : cache.pages) cache.at.push_back(page.data());
    return cache;
}

void attend(const Kernels& kernels, const CacheKernels& cached, const std::string& name,
            Random random, Record& record) {
    const size_t dims[] = {16, 24, 64, 80, 128};
    const size_t dim = dims[random.below(5)], group = 1 + random.below(4);
    const size_t lengths[] = {0, 1, 63, 64, 100, 255, 256, 300, 520};
    const size_t length = lengths[random.below(9)], count = 1 + random.below(20);
    const bool chain = random.one_in(2);
    const Nodes tree = random_tree(count, chain, random);
    const Cache cache = fill(cached, length + count, dim, random);
    const size_t stride = 2 * group * dim;
    const Memory<float> queries = random_rows(random, count, stride, stride, Kind::plain);
    Memory<float> out(count * stride);

    Attention job{};
    job.pages = cache.at.data();
    job.last_page = cache.at.size() - 1;
    job.head_dim = dim;
    job.length = job.root = length;
    std::vector<int32_t> seen;
    if (length && random.one_in(4)) {  // rows were evicted between those that are held
        for (size_t i = 0; i < length; ++i) seen.push_back(static_cast<int32_t>(2 * i));
        job.seen = seen.data();
        job.root = 2 * length;
    }
    job.parents = tree.parents.data();
    job.depths = tree.depths.data();
    job.nodes = count;
    job.chain = chain;
    job.window = random.one_in(3) ? 1 + random.below(150) : 0;
    job.softcap = random.one_in(4) ? 20.0f : 0.0f;
    job.queries = queries.data();
    job.query_stride = job.out_stride = stride;
    job.out = out.data();
    job.group = group;
    job.spans = (length + count) / paceline::kSpan + 1;
    std::vector<double> mass(length + count);
    const size_t tile = 1 + random.below(count * group);
    const bool apart = random.one_in(2);
    Memory<float> states(count * group * job.spans * kernels.state_floats(dim));
    for (size_t head = 0; head < 2; ++head) {
        job.offset = head * cache.block;
        job.first_head = head * group;
        for (job.first = 0; job.first < count * group; job.first += tile) {
            job.count = std::min(tile, count * group - job.first);
            Memory<uint8_t> scratch(kernels.attention_bytes(job, job.count) + 64, 0x55);
            job.states = apart ? states.data() : nullptr;
            cached.attend(job, 0, job.spans, scratch.data());
            if (!chain) continue;
            Memory<uint8_t> room(kernels.mass_bytes(job) + 64, 0x55);
            cached.add_mass(job, mass.data(), room.data());
        }
        for (size_t query = 0; apart && query < count * group; ++query)
            kernels.combine(job, query);
    }
    record.floats(name, out.data(), out.size());
    record.bytes(name + " mass", mass.data(), mass.size() * sizeof(double));
}

void copy(const CacheKernels& cached, const std::string& name, Random random, Record& record) {
    const size_t dim = 8 * (1 + random.below(16));
    const Cache from = fill(cached, kCacheBlock, dim, random);
    Memory<uint8_t> to(from.block);
    for (size_t place = 0; place < kCacheBlock; place += 16) {
        const size_t count = random.one_in(2) ? 16 : 1 + random.below(8);
        const size_t shift = count == 16 ? 0 : random.below(8);
        cached.copy(from.at[0], place, to.data(), (place + 16) % kCacheBlock + shift, count, dim);
    }
    record.bytes(name + " block", from.at[0], cached.block_bytes(dim));
    record.bytes(name + " copied", to.data(), cached.block_bytes(dim));
}

}  // namespace

void check_attention(const Tables& tables, uint64_t seed, Record& record) {
    const Kernels& kernels = *tables.kernels;
    const char* names[] = {"fp32 cache", "fp16 cache", "int8 cache"};
    for (size_t i = 0; i < 3; ++i) {
        attend(kernels, *kernels.caches[i], names[i], Random(seed * 1000003 + 1), record);
        copy(*kernels.caches[i], names[i], Random(seed * 1000003 + 2), record);
    }
}

}  // namespace check
