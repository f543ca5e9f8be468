// Bindings of the native engine: models and their sequences.

#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <deque>
#include <memory>
#include <numeric>
#include <optional>

#include "bindings/engine.hpp"
#include "bindings/pass_input.hpp"
#include "bindings/model_config.hpp"
#include "engine/attention_mass.hpp"
#include "engine/pass.hpp"
#include "kernels/isa.hpp"

namespace paceline {

namespace nb = nanobind;

namespace {

constexpr size_t kMaxThreads = 1024;

constexpr const char* kCacheFormats[] = {"fp32", "fp16", "int8", "int4", "int3"};

template <class Kind, size_t N>
Kind kind_of(const char* what, const std::string& name, const char* const (&names)[N]) {
    std::string known;
    for (size_t i = 0; i < N; ++i) {
        if (name == names[i]) return static_cast<Kind>(i);
        known += (i ? ", " : "") + std::string(names[i]);
    }
    refuse(std::string(what) + " '" + name + "' is unknown; choose one of " + known);
}

size_t threads_of(int64_t threads) {
    return static_cast<size_t>(
        in_range<int64_t>("threads", threads, 1, static_cast<int64_t>(kMaxThreads)));
}

CacheChoice cache_of(const Kernels& kernels, const std::string& format) {
    const auto kind = kind_of<size_t>("kv format", format, kCacheFormats);
    if (kind < static_cast<size_t>(CacheFormat::count))
        return {kernels.caches[kind], nullptr, find_few_read(kernels) + kind};
    const PackedKernels& packed = packed_kernels(kernels, format == "int4" ? 4 : 3);
    return {&packed.cache, &packed};
}

// The attributes of a Python object `FewRead`.
FewRead few_read_of(nb::handle object) {
    constexpr const char* kSummaries[] = {"none",   "mean",           "bounds",
                                          "spread", "representatives", "centroids"};
    const auto size = [&](const char* name, int64_t low) {
        return static_cast<size_t>(in_range<int64_t>(name, nb::cast<int64_t>(object.attr(name)),
                                                     low, int64_t{1} << 31));
    };
    FewRead rule;
    rule.summary = kind_of<Summary>("summary", nb::cast<std::string>(object.attr("summary")),
                                    kSummaries);
    rule.top_k = nb::cast<bool>(object.attr("top_k"));
    rule.sinks = size("sinks", 0);
    rule.local = size("local", 1);
    rule.least = size("least", 0);
    rule.share = nb::cast<double>(object.attr("share"));
    if (!(rule.share >= 0.0 && rule.share <= 1.0)) refuse("share must be between 0 and 1");
    if (rule.summary == Summary::representatives) {
        rule.representatives = size("representatives", 1);
        rule.following = size("following", 1);
        if (rule.representatives > kPanel || rule.following >= rule.local)
            refuse("a run has at most 16 representatives, and fewer runs follow it than are local");
    }
    if (rule.summary == Summary::centroids) {
        rule.levels = size("levels", 1);
        rule.clusters = nb::cast<double>(object.attr("clusters"));
        if (!(rule.clusters > 0.0 && rule.clusters <= 1.0))
            refuse("clusters must be above 0 and at most 1");
    }
    return rule;
}

std::shared_ptr<Engine> make_engine(nb::handle config, const std::string& storage,
                                    const std::string& head, const std::string& kv_format,
                                    const std::string& isa, int64_t threads,
                                    nb::handle few_read, bool begins, bool ends) {
    std::vector<nb::object> ropes;
    Shape shape = shape_of(config, ropes);
    shape.begins = begins;
    shape.ends = ends;
    const Kernels& kernels = choose(isa);
    const CacheChoice cache = cache_of(kernels, kv_format);
    std::optional<FewRead> rule;
    if (!few_read.is_none()) {
        if (!cache.few_read)
            refuse("attention patterns cannot read keys in the kv format '" + kv_format + "'");
        rule = few_read_of(few_read);
    }
    return std::make_shared<Engine>(std::move(shape), kernels, storage, head, cache,
                                    threads_of(threads), std::move(ropes), rule ? &*rule : nullptr);
}

// How each kv head of each layer reads: numbers of HeadRead, [layers][kv heads].
void set_head_reads(Engine& engine, const std::vector<std::vector<int64_t>>& reads) {
    const Shape& shape = engine.model.shape;
    if (!engine.model.few_read_kernels) refuse("this model was made without an attention pattern");
    if (!reads.empty() && reads.size() != shape.layers.size()) refuse("each layer needs its heads");
    std::vector<std::vector<HeadRead>> own(reads.size());
    for (size_t layer = 0; layer < reads.size(); ++layer) {
        if (reads[layer].size() != shape.layers[layer].kv_heads)
            refuse("each kv head of a layer needs to know what it reads");
        for (const int64_t read : reads[layer])
            own[layer].push_back(static_cast<HeadRead>(in_range<int64_t>(
                "what a head reads", read, 0, static_cast<int64_t>(HeadRead::count) - 1)));
    }
    locked(engine, [&] { engine.model.head_reads = std::move(own); });
}

void set_sparse_prefill(Engine& engine, int64_t samples, double threshold, int64_t sinks,
                        int64_t local, int64_t dense,
                        const std::vector<std::vector<std::array<int64_t, 3>>>& heads) {
    const auto size = [](const char* name, int64_t value, int64_t low, int64_t high) {
        return static_cast<size_t>(in_range<int64_t>(name, value, low, high));
    };
    if (!(threshold >= 0.0 && threshold <= 1.0)) refuse("threshold must be between 0 and 1");
    if (engine.model.packed) refuse("blocks cannot be chosen in a cache that is rounded in groups");
    SparsePrefill rule{size("samples", samples, 1, kCacheBlock), threshold,
                       size("sinks", sinks, 0, int64_t{1} << 31),
                       size("local", local, 1, int64_t{1} << 31),
                       size("dense", dense, 0, int64_t{1} << 31), {}};
    const Shape& shape = engine.model.shape;
    if (!heads.empty() && heads.size() != shape.layers.size())
        refuse("each layer needs rules for its heads, or none");
    for (size_t layer = 0; layer < heads.size(); ++layer) {
        if (heads[layer].size() != shape.layers[layer].heads)
            refuse("each head of a layer needs to know how it chooses");
        std::vector<PrefillHead>& own = rule.heads.emplace_back();
        for (const auto& [kind, first, second] : heads[layer])
            own.push_back({static_cast<PrefillRule>(in_range<int64_t>(
                               "how a head chooses", kind, 0,
                               static_cast<int64_t>(PrefillRule::count) - 1)),
                           size("first", first, 0, int64_t{1} << 31),
                           size("second", second, 0, int64_t{1} << 31)});
    }
    locked(engine, [&] { engine.model.sparse_prefill = std::move(rule); });
}

// An array [rows, columns] of floats in a shared buffer.
Logits as_array(const std::shared_ptr<Buffer>& buffer, size_t rows, size_t columns) {
    auto* held = new std::shared_ptr<Buffer>(buffer);
    nb::capsule owner(
        held, [](void* p) noexcept { delete static_cast<std::shared_ptr<Buffer>*>(p); });
    return Logits(buffer->floats(), {rows, columns}, owner);
}

std::optional<std::vector<int32_t>> optional_ints(nb::handle object) {
    if (object.is_none()) return std::nullopt;
    return ints_of(object);
}

Logits run(Engine& engine, const PassInput& input) {
    size_t nodes = 0;
    for (const auto& entry : input.entries) nodes += entry.rows ? entry.nodes : 0;
    const View view = input.view();
    const size_t rows = nodes * view.heads();
    const Shape& shape = engine.model.shape;
    const size_t columns = !shape.ends    ? shape.hidden
                           : view.tokens ? view.tokens->size()
                                         : shape.vocabulary;
    std::shared_ptr<Buffer> logits;
    locked(engine, [&] {
        if (!engine.ready) refuse("the model is not loaded");
        ++engine.passes;
        if (engine.logits->size() < rows * columns * sizeof(float))
            engine.logits = std::make_shared<Buffer>(rows * columns * sizeof(float));
        logits = engine.logits;
        run_pass(engine.model, input.branches(), nodes ? logits->floats() : nullptr, view);
    });
    return as_array(logits, rows, columns);
}

Logits forward_mixed(Engine& engine, nb::object sequence, arrays::Input<int32_t, 2> tokens,
                     Matrix32 weights) {
    const size_t nodes = tokens.shape(0), mixed = tokens.shape(1);
    if (weights.shape(0) != nodes || weights.shape(1) != mixed)
        refuse("tokens and weights differ in size");
    std::vector<int32_t> parents(nodes);
    std::iota(parents.begin(), parents.end(), -1);
    PassInput input;
    Sequence* of = &sequence_of(engine, sequence);
    input.entries.push_back({sequence,
                             of,
                             {tokens.data(), tokens.data() + tokens.size()},
                             std::move(parents),
                             nodes,
                             true,
                             mixed,
                             {weights.data(), weights.data() + weights.size()},
                             {}});
    for (const float weight : input.entries[0].weights)
        if (!std::isfinite(weight)) refuse("weights of a mixture must be finite");
    return run(engine, input);
}

// Gives each entry of a batch its rows of `states` [N, hidden].
void set_states(PassInput& input, const Matrix32& states, size_t hidden) {
    size_t nodes = 0;
    for (const auto& entry : input.entries) nodes += entry.nodes;
    if (states.shape(0) != nodes || states.shape(1) != hidden)
        refuse("states need a row of the hidden size for each node");
    const float* from = states.data();
    for (auto& entry : input.entries) {
        entry.states.assign(from, from + entry.nodes * hidden);
        from += entry.nodes * hidden;
    }
}

Logits forward(Engine& engine, nb::list batch, const std::vector<bool>& rows, nb::object layers,
               nb::object positions, nb::object tokens, nb::object exits,
               std::optional<Matrix32> states) {
    PassInput input = read_batch(engine, batch, rows);
    if (states) set_states(input, *states, engine.model.shape.hidden);
    input.layers = optional_ints(layers);
    input.positions = optional_ints(positions);
    input.tokens = optional_ints(tokens);
    input.exits = optional_ints(exits);
    return run(engine, input);
}

Logits hidden(Engine& engine) {
    const size_t width = engine.model.shape.hidden;
    std::shared_ptr<Buffer> states;
    size_t rows = 0;
    locked(engine, [&] {
        rows = engine.model.hidden_rows;
        if (!rows) refuse("the last pass made no logits, so that it has no hidden states");
        states = std::make_shared<Buffer>(rows * width * sizeof(float));
        engine.model.hidden(states->floats());
    });
    return as_array(states, rows, width);
}

nb::dict profile_of(Engine& engine) {
    const auto [profile, streams] =
        locked(engine, [&] { return std::pair(engine.model.profile, bool(engine.model.stream)); });
    nb::dict stages;
    for (size_t i = 0; i < kStageCount; ++i) {
        if (!streams && i == static_cast<size_t>(Stage::stream)) continue;
        const Spent& spent = profile[i];
        stages[kStageNames[i]] = nb::make_tuple(spent.seconds, spent.busy, spent.bytes, spent.macs);
    }
    return stages;
}

void set_profiling(Engine& engine, bool on) {
    locked(engine, [&] {
        engine.model.profiling = on;
        if (on) engine.model.profile = {};
    });
}

nb::tuple count_pages(Engine& engine) {
    const PagePool::Count count = engine.model.memory.count();
    nb::object limit = count.limit == SIZE_MAX ? nb::none() : nb::object(nb::int_(count.limit));
    return nb::make_tuple(count.used, count.shared, count.reserved, limit);
}

nb::tuple count_streamed(Engine& engine) {
    const WeightStream* stream = engine.ready ? engine.model.stream.get() : nullptr;
    if (!stream) return nb::make_tuple(0, 0, -1);
    return nb::make_tuple(stream->streamed_layers(), stream->streamed_bytes(),
                          stream->descriptor());
}

void set_page_limit(Engine& engine, std::optional<size_t> pages) {
    locked(engine, [&] { engine.model.memory.set_limit(pages.value_or(SIZE_MAX)); });
}

void set_threads(Engine& engine, int64_t threads) {
    const size_t count = threads_of(threads);
    locked(engine, [&] { engine.model.set_threads(count); });
}

// The addresses of a sequence's pages, which tell them from all others.
std::vector<uintptr_t> pages_of(Sequence& sequence) {
    std::vector<uintptr_t> pages;
    locked(*sequence.engine, [&] {
        if (!sequence.cache) return;
        for (const Page* page : sequence.cache->all_pages())
            pages.push_back(reinterpret_cast<uintptr_t>(page));
    });
    return pages;
}

void commit(Sequence& sequence, Ints path) {
    const std::vector<int32_t> nodes(path.data(), path.data() + path.size());
    locked(sequence, [&](KVCache& cache) {
        commit_path(sequence.engine->model, cache, nodes.data(), nodes.size());
    });
}

size_t layer_of(Sequence& sequence, int64_t layer) {
    const size_t count = sequence.engine->model.shape.layers.size();
    if (layer < 0 || static_cast<size_t>(layer) >= count)
        refuse("layer " + std::to_string(layer) + " is outside the " + std::to_string(count) +
               " layers");
    return static_cast<size_t>(layer);
}

// One value for each row of each head of a layer: `get(cache, layer, head, row)`; before those of
// heads with fewer rows than another comes `padding`.
template <class T, class Get>
arrays::Array2<T> each_row(Sequence& sequence, int64_t index, T padding, Get get) {
    const size_t layer = layer_of(sequence, index);
    const size_t heads = sequence.engine->model.shape.layers[layer].kv_heads;
    size_t rows = 0;
    std::unique_ptr<T[]> values;
    locked(sequence, [&](KVCache& cache) {
        rows = cache.held(layer);
        values = std::make_unique<T[]>(heads * rows);
        for (size_t head = 0; head < heads; ++head) {
            const size_t missing = rows - cache.held(layer, head);
            std::fill_n(values.get() + head * rows, missing, padding);
            for (size_t row = missing; row < rows; ++row)
                values[head * rows + row] = get(cache, layer, head, row - missing);
        }
    });
    return arrays::owned(std::move(values), heads, rows);
}

arrays::Array2<int32_t> rows_of(Sequence& sequence, int64_t index) {
    return each_row<int32_t>(sequence, index, -1, [](KVCache& cache, size_t layer, size_t head,
                                                     size_t row) {
        const int32_t* positions = cache.positions(layer, head);
        return positions ? positions[row] : static_cast<int32_t>(row);
    });
}

arrays::Array2<double> attention_mass(Sequence& sequence, int64_t index) {
    return each_row<double>(sequence, index, 0.0, [](KVCache& cache, size_t layer, size_t head,
                                                     size_t row) {
        if (!cache.tracks_attention())
            refuse("this sequence does not track attention; `track_attention` does");
        return cache.mass(layer, head)[row];
    });
}

// A copy of all blocks that hold a layer's committed rows, head by head.
arrays::Array2<uint8_t> read_blocks(Sequence& sequence, int64_t index) {
    const size_t layer = layer_of(sequence, index);
    const size_t heads = sequence.engine->model.shape.layers[layer].kv_heads;
    size_t blocks = 0, size = 0;
    std::unique_ptr<uint8_t[]> bytes;
    locked(sequence, [&](KVCache& cache) {
        blocks = (cache.held(layer) + kCacheBlock - 1) / kCacheBlock;
        size = cache.block_bytes(layer);
        bytes = std::make_unique<uint8_t[]>(heads * blocks * size);
        for (size_t head = 0; head < heads; ++head)
            for (size_t block = 0; block < blocks; ++block)
                std::memcpy(bytes.get() + (head * blocks + block) * size,
                            cache.data()[block] + cache.offset(layer, head), size);
    });
    return arrays::owned(std::move(bytes), heads * blocks, size);
}

// The rows of a layer as its kernels see them, in a cache in groups: keys of all heads, then values.
arrays::Array2<float> read_rows(Sequence& sequence, int64_t index) {
    const size_t layer = layer_of(sequence, index);
    const LayerShape& shape = sequence.engine->model.shape.layers[layer];
    size_t rows = 0;
    std::unique_ptr<float[]> values;
    locked(sequence, [&](KVCache& cache) {
        if (!cache.grouped()) refuse("this cache has blocks, which `read_blocks` gives");
        rows = shape.kv_heads * cache.held(layer);
        values = std::make_unique<float[]>(2 * rows * shape.head_dim);
        float* to = values.get();
        for (size_t head = 0; head < shape.kv_heads; ++head)
            for (size_t row = 0; row < cache.held(layer); ++row, to += shape.head_dim)
                cache.read_row(layer, head, row, to, to + rows * shape.head_dim);
    });
    return arrays::owned(std::move(values), 2 * rows, shape.head_dim);
}

void track_queries(Sequence& sequence, int64_t window) {
    if (window < 1 || window > static_cast<int64_t>(sequence.engine->model.shape.context))
        refuse("the window of queries is " + std::to_string(window) + ", expected 1 to " +
               std::to_string(sequence.engine->model.shape.context));
    size_t size = 0;
    for (const LayerShape& layer : sequence.engine->model.shape.layers)
        size = std::max(size, layer.query_size());
    locked(sequence,
           [&](KVCache& cache) { cache.track_queries(static_cast<size_t>(window), size); });
}

arrays::Array2<float> recent_queries(Sequence& sequence, int64_t index) {
    const size_t layer = layer_of(sequence, index);
    const size_t size = sequence.engine->model.shape.layers[layer].query_size();
    size_t rows = 0;
    std::unique_ptr<float[]> values;
    locked(sequence, [&](KVCache& cache) {
        if (!cache.tracks_queries())
            refuse("this sequence does not track queries; `track_queries` does");
        const std::vector<float> queries = cache.recent_queries(layer, size);
        rows = size ? queries.size() / size : 0;
        values = std::make_unique<float[]>(queries.size());
        std::copy(queries.begin(), queries.end(), values.get());
    });
    return arrays::owned(std::move(values), rows, size);
}

using Rows = arrays::Input<int32_t, 2>;

void evict(Sequence& sequence, const std::vector<Rows>& kept) {
    const Shape& shape = sequence.engine->model.shape;
    if (kept.size() != shape.layers.size()) refuse("each layer needs rows to keep");
    locked(sequence, [&](KVCache& cache) {
        KeptLayers layers;
        std::deque<std::vector<int32_t>> indices;  // other threads may change the arrays
        for (size_t layer = 0; layer < kept.size(); ++layer) {
            const size_t heads = kept[layer].shape(0), count = kept[layer].shape(1);
            if (heads != shape.layers[layer].kv_heads) refuse("each head needs rows to keep");
            std::vector<KeptRows>& own = layers.emplace_back();
            for (size_t head = 0; head < heads; ++head) {
                const int32_t* given = kept[layer].data() + head * count;
                const auto missing =
                    static_cast<int32_t>(cache.held(layer) - cache.held(layer, head));
                std::vector<int32_t>& rows = indices.emplace_back(given, given + count);
                std::erase(rows, -1);
                for (size_t i = 0; i < rows.size(); ++i) {
                    const int32_t low = i ? rows[i - 1] + missing + 1 : missing;
                    if (rows[i] < low || static_cast<size_t>(rows[i]) >= cache.held(layer))
                        refuse("rows to keep must increase and lie below " +
                               std::to_string(cache.held(layer)));
                    rows[i] -= missing;
                }
                own.push_back({rows.data(), rows.size()});
            }
        }
        cache.evict(layers);
    });
}

arrays::Array1<uint8_t> read_page(Sequence& sequence, size_t page) {
    const size_t size = sequence.engine->model.memory.page_bytes();
    auto bytes = std::make_unique<uint8_t[]>(size);
    locked(sequence, [&](KVCache& cache) { cache.read_page(page, bytes.get()); });
    return arrays::owned(std::move(bytes), size);
}

void append_page(Sequence& sequence, arrays::Input<uint8_t, 1> data) {
    const Model& model = sequence.engine->model;
    if (data.size() != model.memory.page_bytes())
        refuse("a page has " + std::to_string(model.memory.page_bytes()) + " bytes, found " +
               std::to_string(data.size()));
    locked(sequence, [&](KVCache& cache) {
        if (cache.length() + kCacheBlock > model.shape.context)
            refuse("a page ends beyond the context of " + std::to_string(model.shape.context));
        cache.append_page(data.data());
    });
}

using HeadRows = arrays::Input<float, 3>;

void append_rows(Sequence& sequence, const std::vector<HeadRows>& keys,
                 const std::vector<HeadRows>& values) {
    const Shape& shape = sequence.engine->model.shape;
    if (keys.size() != shape.layers.size() || values.size() != shape.layers.size())
        refuse("each layer needs keys and values");
    const size_t count = keys[0].shape(1);
    std::vector<NewRows> rows;
    for (size_t layer = 0; layer < keys.size(); ++layer) {
        const LayerShape& own = shape.layers[layer];
        for (const HeadRows* each : {&keys[layer], &values[layer]})
            if (each->shape(0) != own.kv_heads || each->shape(1) != count ||
                each->shape(2) != own.head_dim)
                refuse("rows of layer " + std::to_string(layer) + " have the wrong shape");
        rows.push_back({keys[layer].data(), values[layer].data()});
    }
    locked(sequence, [&](KVCache& cache) {
        if (cache.length() + count > shape.context)
            refuse("rows end beyond the context of " + std::to_string(shape.context));
        cache.append_rows(rows, count);
    });
}

void bind_sequence(nb::module_& m) {
    nb::class_<Sequence>(m, "NativeSequence", nb::is_weak_referenceable(),
                         "Keys and values of one sequence.")
        .def_prop_ro(
            "length", [](Sequence& s) { return s.cache ? s.cache->length() : 0; },
            "Committed positions; 0 once it is released.")
        .def_prop_ro(
            "bytes", [](Sequence& s) { return s.cache ? s.cache->bytes() : 0; },
            "Memory of its pages, those shared with other sequences included.")
        .def_prop_ro("pages", &pages_of, "Identities of its pages, in order of position.")
        .def_prop_ro("row_count", [](Sequence& s) { return s.cache ? s.cache->row_count() : 0; },
                     "Rows of the layer that holds most.")
        .def_prop_ro(
            "query_window", [](Sequence& s) { return s.cache ? s.cache->query_window() : 0; },
            "Positions whose queries are kept; 0: queries are not tracked.")
        .def("rows", &rows_of, nb::arg("layer"),
             nb::sig("def rows(self, layer: int) -> Tokens"),
             "Return the positions of the rows that a layer holds, [heads, rows], after -1 where a\n"
             "head holds fewer.")
        .def("attention_mass", &attention_mass, nb::arg("layer"),
             nb::sig("def attention_mass(self, layer: int) -> NDArray[np.float64]"),
             "Return the attention that each row of a layer received, [heads, rows], after 0 where\n"
             "a head holds fewer.")
        .def(
            "track_attention",
            [](Sequence& s) { locked(s, [](KVCache& cache) { cache.track_attention(); }); },
            "Sum the attention that each row receives. The sequence must be empty.")
        .def("track_queries", &track_queries, nb::arg("window"),
             nb::sig("def track_queries(self, window: int) -> None"),
             "Keep the queries of the last positions. The sequence must be empty.")
        .def("recent_queries", &recent_queries, nb::arg("layer"),
             nb::sig("def recent_queries(self, layer: int) -> Floats"),
             "Return scaled queries of a layer's last positions, [positions, heads * dim].")
        .def("read_blocks", &read_blocks, nb::arg("layer"),
             nb::sig("def read_blocks(self, layer: int) -> NDArray[np.uint8]"),
             "Return a copy of the blocks of a layer's rows, [heads * blocks, bytes].")
        .def("read_rows", &read_rows, nb::arg("layer"),
             nb::sig("def read_rows(self, layer: int) -> Floats"),
             "Return a layer's keys and values in a cache in groups, [2 * heads * rows, dim].")
        .def(
            "cut_point",
            [](Sequence& s, size_t length) {
                return locked(s, [&](KVCache& cache) { return cache.cut_point(length); });
            },
            nb::arg("length"), "Return the largest length up to `length` that `truncate` takes.")
        .def("evict", &evict, nb::arg("kept"),
             nb::sig("def evict(self, kept: list[Tokens]) -> None"),
             "Drop all rows but those of these indices, as `rows` counts them, [heads, kept] for each\n"
             "layer; -1 keeps none.")
        .def("read_page", &read_page, nb::arg("page"),
             nb::sig("def read_page(self, page: int) -> NDArray[np.uint8]"),
             "Return a copy of a page whose positions are all committed.")
        .def("append_page", &append_page, nb::arg("data").noconvert(),
             nb::sig("def append_page(self, data: NDArray[np.uint8]) -> None"),
             "Commit a page that `read_page` gave, behind whole pages.")
        .def("append_rows", &append_rows, nb::arg("keys"), nb::arg("values"),
             nb::sig("def append_rows(self, keys: list[Floats], values: list[Floats]) -> None"),
             "Commit positions by their rotated keys and their values, [heads, N, dim] for each\n"
             "layer.")
        .def("commit", &commit, nb::arg("path"),
             nb::sig("def commit(self, path: Tokens) -> None"),
             "Keep the nodes of `path` of the last pass, root first; forget the others.")
        .def(
            "truncate",
            [](Sequence& s, size_t length) {
                locked(s, [&](KVCache& cache) { cache.truncate(length); });
            },
            nb::arg("length"), "Keep the first `length` committed positions.")
        .def_prop_rw(
            "prompt", [](Sequence& s) { return s.cache ? s.cache->prompt() : 0; },
            [](Sequence& s, size_t length) {
                locked(s, [&](KVCache& cache) { cache.set_prompt(length); });
            },
            "Positions below it are a prompt's, which read everything.")
        .def(
            "fork",
            [](Sequence& s) {
                return Sequence{s.engine, locked(s, [](KVCache& cache) { return cache.fork(); })};
            },
            "Return a sequence with the same committed positions, which shares their pages.")
        .def(
            "release", [](Sequence& s) { locked(*s.engine, [&] { s.cache.reset(); }); },
            "Give the memory back. The sequence cannot be used any more.");
}

void bind_passes(nb::class_<Engine>& model) {
    model
        .def("forward", &forward, nb::arg("batch"), nb::arg("rows"), nb::arg("layers") = nb::none(),
             nb::arg("positions") = nb::none(), nb::arg("tokens") = nb::none(),
             nb::arg("exits") = nb::none(), nb::arg("states") = nb::none(),
             nb::sig("def forward(self, batch: list[Any], rows: Items[bool], "
                     "layers: Tokens | None = None, positions: Tokens | None = None, "
                     "tokens: Tokens | None = None, exits: Tokens | None = None, "
                     "states: Floats | None = None) -> Floats"),
             "Run (sequence, tokens, parents) entries and return the logits, float32 [N, V], of\n"
             "those entries whose `rows` is true. The other arguments are those of a `View`, and\n"
             "the hidden states [N, hidden] that a part without the first layers begins with; one\n"
             "without the last layers returns hidden states. The next pass overwrites the array.")
        .def("forward_mixed", &forward_mixed, nb::arg("sequence"), nb::arg("tokens").noconvert(),
             nb::arg("weights").noconvert(),
             nb::sig("def forward_mixed(self, sequence: NativeSequence, tokens: Tokens, "
                     "weights: Floats) -> Floats"),
             "Run a chain of nodes, each the sum of the embeddings of `tokens` [N, M] times\n"
             "`weights` [N, M], and return its logits, float32 [N, V].")
        .def("hidden", &hidden, nb::sig("def hidden(self) -> Floats"),
             "Return a copy of the head's input in the last pass, float32 [N, hidden].")
        .def(
            "open",
            [](std::shared_ptr<Engine> engine) { return Sequence{engine, engine->model.open()}; },
            nb::sig("def open(self) -> NativeSequence"), "Return a new, empty sequence.")
        .def("profile", &profile_of,
             nb::sig("def profile(self) -> dict[str, tuple[float, float, float, float]]"),
             "Return seconds, busy seconds, bytes and multiply-adds of each stage of the passes\n"
             "since profiling was switched on; those of `stream` are waits for the disk.")
        .def_prop_rw(
            "profiling", [](Engine& e) { return e.model.profiling; }, &set_profiling,
            "Whether passes are timed; switching it on forgets the profile so far.");
}

void bind_properties(nb::class_<Engine>& model) {
    model
        .def_prop_ro(
            "ropes", [](Engine& e) { return e.ropes; }, nb::sig("def ropes(self) -> list[Rope]"),
            "The distinct rotary embeddings of the layers.")
        .def_prop_ro(
            "rope_positions",
            [](Engine& e) { return locked(e, [&] { return e.model.rope_positions(); }); },
            "Positions that every rotary embedding covers.")
        .def_prop_ro(
            "isa", [](Engine& e) { return std::string(e.model.kernels.isa); },
            "The instruction set of the kernels.")
        .def_prop_ro(
            "bytes", [](Engine& e) { return e.model.bytes; },
            "Bytes of the matrices that every pass reads.")
        .def_prop_ro(
            "shared_bytes", [](Engine& e) { return e.model.weights.shared_bytes(); },
            "Those of them that are another layer's, and take no memory of their own.")
        .def_prop_ro(
            "streamed", &count_streamed, nb::sig("def streamed(self) -> tuple[int, int, int]"),
            "Layers that each pass reads from a file, their bytes, and the file's descriptor or -1.")
        .def_prop_ro(
            "page_bytes", [](Engine& e) { return e.model.memory.page_bytes(); },
            "Bytes of a page of keys and values.")
        .def_prop_ro(
            "pages", &count_pages, nb::sig("def pages(self) -> tuple[int, int, int, int | None]"),
            "Pages in use, pages that several sequences share, pages in memory, the limit.")
        .def("set_head_reads", &set_head_reads, nb::arg("reads"),
             nb::sig("def set_head_reads(self, reads: list[list[int]]) -> None"),
             "Say what each kv head of each layer reads: 0 all, 1 what is chosen, 2 the first and\n"
             "the last positions. An empty list: all.")
        .def("set_sparse_prefill", &set_sparse_prefill, nb::arg("samples"), nb::arg("threshold"),
             nb::arg("sinks"), nb::arg("local"), nb::arg("dense"), nb::arg("heads"),
             nb::sig("def set_sparse_prefill(self, samples: int, threshold: float, sinks: int, "
                     "local: int, dense: int, heads: list[list[tuple[int, int, int]]]) -> None"),
             "Let prompts read those blocks of 64 positions that hold `threshold` of the attention\n"
             "of `samples` queries of each block, the first `sinks` and the last `local` blocks;\n"
             "the first `dense` layers read everything. `heads` say for each query head of each\n"
             "layer how it chooses (0 as said, 1 A-shape, 2 vertical lines and slashes, 3 blocks by\n"
             "their means, 4 tree search) and two numbers; an empty list: all as said.")
        .def("set_page_limit", &set_page_limit, nb::arg("pages").none(),
             nb::sig("def set_page_limit(self, pages: int | None) -> None"),
             "Limit the pages in memory; None: no limit.")
        .def_prop_ro(
            "position_bytes", [](Engine& e) { return e.model.position_bytes(); },
            "Bytes of keys and values of one position.")
        .def_prop_rw(
            "worth_waking", [](Engine& e) { return e.model.worth_waking; },
            [](Engine& e, double microseconds) { e.model.worth_waking = microseconds; },
            "A pass of fewer estimated microseconds stays on the calling thread.")
        .def_prop_ro(
            "parameters", [](Engine& e) { return e.model.parameters; },
            "Numbers in the matrices that every pass reads.")
        .def_prop_rw(
            "threads", [](Engine& e) { return locked(e, [&] { return e.model.threads(); }); },
            &set_threads, "Threads of a pass, 1 to 1024.");
}

}  // namespace

void bind_engine(nb::module_& m) {
    nb::exception<MemoryFull>(m, "MemoryFullError", PyExc_ValueError);
    nb::exception<NotTernary>(m, "NotTernaryError", PyExc_ValueError);
    nb::exception<FileError>(m, "WeightFileError", PyExc_RuntimeError);
    bind_formats(m);
    bind_sequence(m);
    nb::class_<Engine> model(
        m, "NativeModel",
        "Weights, kernels and threads. Methods raise ValueError for what they cannot use.");
    model.def(nb::new_(&make_engine), nb::arg("config"), nb::arg("storage"), nb::arg("head"),
              nb::arg("kv_format"), nb::arg("isa"), nb::arg("threads"),
              nb::arg("few_read") = nb::none(), nb::arg("begins") = true,
              nb::arg("ends") = true);
    bind_loading(model);
    bind_passes(model);
    bind_screen(m, model);
    bind_properties(model);
}

}  // namespace paceline
