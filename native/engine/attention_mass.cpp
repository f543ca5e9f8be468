#include "engine/attention_mass.hpp"

#include <algorithm>
#include <memory>
#include <numeric>
#include <vector>

namespace paceline {

namespace {

constexpr double kMacsPerMicrosecond = 10e3;  // on one thread

// One phase; a chunk is a kv head of a layer.
class MassTask : public Task {
public:
    MassTask(Model& model, KVCache& cache, size_t nodes)
        : model_(model), cache_(cache), depths_(nodes) {
        std::iota(depths_.begin(), depths_.end(), 0);
        size_t scratch = 0;
        for (size_t layer = 0; layer < model.shape.layers.size(); ++layer) {
            const LayerShape& shape = model.shape.layers[layer];
            for (size_t head = 0; head < shape.kv_heads; ++head) {
                heads_.push_back({layer, head});
                scratch = std::max(scratch, model.kernels.mass_bytes(attention(layer, head)));
            }
            macs_ += static_cast<double>(nodes * cache.held(layer) * shape.query_size());
        }
        model.work.scratch.resize(model.threads());
        for (Buffer& buffer : model.work.scratch) buffer.reserve(scratch);
        add_phase(heads_.size());
    }

    size_t threads() const {
        return macs_ / kMacsPerMicrosecond < model_.worth_waking ? 1 : model_.threads();
    }

protected:
    void work(size_t, size_t chunk, size_t thread) override {
        const auto [layer, head] = heads_[chunk];
        model_.cache_kernels.add_mass(attention(layer, head), cache_.mass(layer, head).data(),
                                      model_.work.scratch[thread].bytes());
    }

private:
    // The committed nodes as a chain behind the rows that were there before.
    Attention attention(size_t layer, size_t head) const {
        const LayerShape& shape = model_.shape.layers[layer];
        const size_t nodes = depths_.size(), group = shape.group();
        Attention job{};
        job.pages = cache_.data();
        job.last_page = (cache_.held(layer, head) - 1) / kCacheBlock;
        job.offset = cache_.offset(layer, head);
        job.head_dim = shape.head_dim;
        job.length = cache_.held(layer, head) - nodes;
        job.seen = cache_.positions(layer, head);
        job.root = cache_.length() - nodes;
        job.depths = depths_.data();
        job.nodes = nodes;
        job.chain = true;
        job.window = shape.window;
        job.sinks = shape.sinks;
        job.softcap = model_.shape.attention_softcap;
        job.queries = cache_.queries(layer);
        job.query_stride = shape.query_size();
        job.first_head = head * group;
        job.group = group;
        job.count = nodes * group;
        return job;
    }

    struct Head {
        size_t layer, head;
    };

    Model& model_;
    KVCache& cache_;
    std::vector<int32_t> depths_;
    std::vector<Head> heads_;
    double macs_ = 0.0;
};

}  // namespace

void commit_path(Model& model, KVCache& cache, const int32_t* path, size_t count) {
    cache.commit(path, count);
    if (!cache.keeps_queries() || !count) return;
    cache.keep_queries(count);
    if (cache.tracks_attention()) {
        const auto task = std::make_shared<MassTask>(model, cache, count);
        model.pool().run(task, task->threads());
    }
    cache.drop_queries();
}

}  // namespace paceline
