// Bindings of the native engine: models and their sequences.

#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <deque>
#include <memory>
#include <mutex>
#include <numeric>
#include <optional>

#include "bindings/arrays.hpp"
#include "bindings/checks.hpp"
#include "bindings/model_config.hpp"
#include "engine/attention_mass.hpp"
#include "engine/pass.hpp"
#include "kernels/isa.hpp"
#include "support/file_mapping.hpp"

namespace paceline {

namespace nb = nanobind;

namespace {

using Ints = arrays::Input<int32_t, 1>;
using Matrix32 = arrays::Input<float, 2>;
using Codes = arrays::Input<uint8_t, 2>;
using Zeros = arrays::Input<uint16_t, 2>;
using Weight = nb::ndarray<nb::ro, nb::device::cpu>;
using Logits = arrays::Array2<float>;

constexpr size_t kMaxThreads = 1024;
constexpr size_t kMappedBytes = size_t{1} << 16;  // smaller weights are not worth giving back

constexpr const char* kCacheFormats[] = {"fp32", "fp16", "int8"};

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

// A model and what its sequences share. One call at a time holds `busy`; others wait, without the
// interpreter's lock.
struct Engine {
    Engine(Shape shape, const Kernels& kernels, const std::string& format, const std::string& head,
           CacheFormat cache_format, size_t threads, std::vector<nb::object> ropes)
        : model(std::move(shape), kernels, find_format(kernels, format),
                find_format(kernels, head), cache_format, threads),
          ropes(std::move(ropes)) {}

    Model model;
    std::vector<nb::object> ropes;
    std::mutex busy;
    std::shared_ptr<Buffer> logits = std::make_shared<Buffer>();
    bool ready = false;
};

struct Sequence {
    std::shared_ptr<Engine> engine;
    std::optional<KVCache> cache;

    Sequence(std::shared_ptr<Engine> engine, KVCache cache)
        : engine(std::move(engine)), cache(std::move(cache)) {}
    Sequence(Sequence&&) = default;

    KVCache& open() {
        if (!cache) refuse("this sequence has been released");
        return *cache;
    }
};

// Run `use` alone, while other Python threads go on.
template <class Use>
auto locked(Engine& engine, Use use) {
    nb::gil_scoped_release unlocked;
    std::lock_guard lock(engine.busy);
    return use();
}

template <class Use>
auto locked(Sequence& sequence, Use use) {
    return locked(*sequence.engine, [&] { return use(sequence.open()); });
}

std::shared_ptr<Engine> make_engine(nb::handle config, const std::string& storage,
                                    const std::string& head, const std::string& kv_format,
                                    const std::string& isa, int64_t threads) {
    std::vector<nb::object> ropes;
    Shape shape = shape_of(config, ropes);
    return std::make_shared<Engine>(
        std::move(shape), choose(isa), storage, head,
        kind_of<CacheFormat>("kv format", kv_format, kCacheFormats), threads_of(threads),
        std::move(ropes));
}

// bf16 comes as its bits, uint16.
TensorSource::Type type_of(const std::string& name, const Weight& weight) {
    if (weight.dtype() == nb::dtype<float>()) return TensorSource::Type::fp32;
    if (weight.dtype() == nb::dtype<uint16_t>()) return TensorSource::Type::bf16;
    if (weight.dtype().code == static_cast<uint8_t>(nb::dlpack::dtype_code::Float) &&
        weight.dtype().bits == 16 && weight.dtype().lanes == 1)
        return TensorSource::Type::fp16;
    refuse("weight '" + name + "' has an unknown type, expected float32, float16 or uint16");
}

// Only pages of a file that nobody writes may be given back: others would lose what they hold.
bool shows_a_file(const Weight& weight) {
    ptrdiff_t first = 0, last = weight.itemsize();
    if (!weight.size()) return false;
    for (size_t axis = 0; axis < weight.ndim(); ++axis) {
        const ptrdiff_t reach = (static_cast<ptrdiff_t>(weight.shape(axis)) - 1) *
                                weight.stride(axis) * static_cast<ptrdiff_t>(weight.itemsize());
        (reach < 0 ? first : last) += reach;
    }
    const auto* data = static_cast<const uint8_t*>(weight.data());
    return first == 0 && static_cast<size_t>(last) >= kMappedBytes &&
           is_read_only_file(data, static_cast<size_t>(last));
}

void set_weight(Engine& engine, const std::string& name, Weight weight, bool mapped) {
    if (weight.ndim() != 1 && weight.ndim() != 2)
        refuse("weight '" + name + "' has " + std::to_string(weight.ndim()) +
               " axes, expected 1 or 2");
    const bool matrix = weight.ndim() == 2;
    const ptrdiff_t size = weight.itemsize();
    const TensorSource source{.data = static_cast<const uint8_t*>(weight.data()),
                              .type = type_of(name, weight),
                              .rows = matrix ? weight.shape(0) : 1,
                              .columns = weight.shape(matrix),
                              .row_step = matrix ? weight.stride(0) * size : 0,
                              .column_step = weight.stride(matrix) * size,
                              .matrix = matrix,
                              .mapped = mapped && shows_a_file(weight)};
    locked(engine, [&] {
        if (engine.ready) refuse("the model is already loaded");
        engine.model.set(name, source);
    });
}

// Arrays that describe integers with scales; `codes` may be null where they are not read.
GroupedRows grouped_rows(int bits, const uint8_t* codes, size_t inputs, const Matrix32& scales,
                         const std::optional<Zeros>& zeros, const Ints* block_groups) {
    const size_t rows = scales.shape(0), groups = scales.shape(1);
    if (bits < 1 || bits > 8) refuse("codes have " + std::to_string(bits) + " bits, expected 1 to 8");
    if (zeros && (zeros->shape(0) != rows || zeros->shape(1) != groups))
        refuse("zero points and scales differ in size");
    if (block_groups) {
        if (block_groups->size() != (inputs + kBlockInputs - 1) / kBlockInputs)
            refuse("block_groups has " + std::to_string(block_groups->size()) +
                   " entries, expected one for every " + std::to_string(kBlockInputs) + " inputs");
        for (size_t i = 0; i < block_groups->size(); ++i)
            if (block_groups->data()[i] < 0 || static_cast<size_t>(block_groups->data()[i]) >= groups)
                refuse("a block belongs to none of the groups");
    }
    return {.rows = rows,
            .inputs = inputs,
            .groups = groups,
            .bits = bits,
            .codes = codes,
            .scales = scales.data(),
            .zeros = zeros ? zeros->data() : nullptr,
            .block_groups = block_groups ? block_groups->data() : nullptr};
}

bool format_holds(const std::string& format, int bits, Matrix32 scales,
                  std::optional<Zeros> zeros) {
    const FormatKernels& kernels = find_format(*runnable().back(), format);
    const GroupedRows rows = grouped_rows(bits, nullptr, 0, scales, zeros, nullptr);
    nb::gil_scoped_release unlocked;
    return kernels.holds && kernels.holds(rows);
}

void load_weight(Engine& engine, const std::string& name, int bits, Codes codes, Matrix32 scales,
                 std::optional<Zeros> zeros, Ints block_groups, std::optional<Ints> order) {
    const size_t inputs = codes.shape(1);
    if (codes.shape(0) != scales.shape(0)) refuse("codes and scales differ in rows");
    const GroupedRows rows =
        grouped_rows(bits, codes.data(), inputs, scales, zeros, &block_groups);
    std::vector<int32_t> places;
    if (order) {
        places.assign(order->data(), order->data() + order->size());
        std::vector<bool> taken(inputs);
        for (const int32_t k : places) {
            if (k < 0 || static_cast<size_t>(k) >= inputs || taken[static_cast<size_t>(k)])
                refuse("order names no input, or one twice");
            taken[static_cast<size_t>(k)] = true;
        }
        if (places.size() != inputs) refuse("order and codes differ in inputs");
    }
    locked(engine, [&] {
        if (engine.ready) refuse("the model is already loaded");
        for (size_t i = 0; i < codes.size(); ++i)
            if (codes.data()[i] >> bits) refuse("a code has more than its bits");
        engine.model.load(name, rows, places);
    });
}

void set_format(Engine& engine, const std::string& name, const std::string& format) {
    locked(engine, [&] {
        engine.model.weights.set_format(name, find_format(engine.model.kernels, format));
    });
}

Logits get_weight(Engine& engine, const std::string& name) {
    const auto [rows, inputs] = locked(engine, [&] { return engine.model.weights.extent_of(name); });
    auto values = std::make_unique<float[]>(rows * inputs);
    locked(engine, [&, width = inputs] {
        engine.model.weights.get(name, [&](size_t row, const std::vector<float>& from) {
            std::copy(from.begin(), from.end(), values.get() + row * width);
        });
    });
    return arrays::owned(std::move(values), rows, inputs);
}

// Name, format of the head beside it, whether a head may have it, and bits of a weight.
std::vector<std::tuple<std::string, std::string, bool, double>> weight_formats() {
    constexpr size_t kInputs = 4096;
    std::vector<std::tuple<std::string, std::string, bool, double>> formats;
    for (const FormatKernels* const* at = runnable().back()->formats; *at; ++at) {
        const double bytes = static_cast<double>((*at)->panel_bytes(kInputs));
        formats.emplace_back((*at)->name, (*at)->head, (*at)->for_heads,
                             8 * bytes / static_cast<double>(kPanel * kInputs));
    }
    return formats;
}

void finish_loading(Engine& engine) {
    locked(engine, [&] {
        engine.model.finish();
        engine.ready = true;
    });
}

void extend_rope(Engine& engine, size_t index, Matrix32 cosines, Matrix32 sines) {
    const bool same = cosines.shape(0) == sines.shape(0) && cosines.shape(1) == sines.shape(1);
    const auto uses = [&](const LayerShape& layer) {
        return layer.rope >= 0 && static_cast<size_t>(layer.rope) == index &&
               layer.rope_dim / 2 == cosines.shape(1);
    };
    const auto& layers = engine.model.shape.layers;
    if (!same || std::none_of(layers.begin(), layers.end(), uses))
        refuse("cosines and sines must both be [positions, dim / 2]");
    locked(engine, [&] {
        engine.model.extend_rope(index, cosines.data(), sines.data(), cosines.size());
    });
}

// An array [rows, columns] of floats in a shared buffer.
Logits as_array(const std::shared_ptr<Buffer>& buffer, size_t rows, size_t columns) {
    auto* held = new std::shared_ptr<Buffer>(buffer);
    nb::capsule owner(
        held, [](void* p) noexcept { delete static_cast<std::shared_ptr<Buffer>*>(p); });
    return Logits(buffer->floats(), {rows, columns}, owner);
}

// What a pass reads: copies, because other Python threads could change the arrays meanwhile.
struct PassInput {
    struct Entry {
        nb::object owner;  // keeps `sequence` alive
        Sequence* sequence;
        std::vector<int32_t> tokens, parents;
        size_t nodes;
        bool rows;               // whether its logits are wanted
        size_t mixed = 1;        // tokens that each node mixes
        std::vector<float> weights;  // [nodes, mixed]; empty: each is 1
    };
    std::vector<Entry> entries;
    std::optional<std::vector<int32_t>> layers, positions, tokens, exits;

    View view() const {
        const auto part = [](const auto& values) -> std::optional<std::span<const int32_t>> {
            if (!values) return std::nullopt;
            return std::span<const int32_t>(*values);
        };
        return {part(layers), part(positions), part(tokens), part(exits)};
    }

    std::vector<Branch> branches() const {
        std::vector<Branch> branches;
        for (const Entry& entry : entries)
            branches.push_back({&entry.sequence->open(), entry.tokens.data(), entry.parents.data(),
                                entry.nodes, entry.rows, entry.mixed,
                                entry.weights.empty() ? nullptr : entry.weights.data()});
        return branches;
    }
};

// The values of an int32 array. It is not converted: that would hide a mistake, and cost time.
std::vector<int32_t> ints_of(nb::handle object) {
    Ints array;
    if (!nb::try_cast(object, array, false))
        refuse("tokens, parents and what a view has must be int32 arrays");
    return {array.data(), array.data() + array.size()};
}

std::optional<std::vector<int32_t>> optional_ints(nb::handle object) {
    if (object.is_none()) return std::nullopt;
    return ints_of(object);
}

Sequence& sequence_of(Engine& engine, nb::handle object) {
    Sequence* sequence = nullptr;
    if (!nb::try_cast(object, sequence) || !sequence)
        refuse("a batch has (sequence, tokens, parents) entries");
    if (sequence->engine.get() != &engine) refuse("a sequence belongs to another engine");
    return *sequence;
}

Logits run(Engine& engine, const PassInput& input) {
    size_t nodes = 0;
    for (const auto& entry : input.entries) nodes += entry.rows ? entry.nodes : 0;
    const View view = input.view();
    const size_t rows = nodes * view.heads();
    const size_t columns = view.tokens ? view.tokens->size() : engine.model.shape.vocabulary;
    std::shared_ptr<Buffer> logits;
    locked(engine, [&] {
        if (!engine.ready) refuse("the model is not loaded");
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
                             {weights.data(), weights.data() + weights.size()}});
    for (const float weight : input.entries[0].weights)
        if (!std::isfinite(weight)) refuse("weights of a mixture must be finite");
    return run(engine, input);
}

Logits forward(Engine& engine, nb::list batch, const std::vector<bool>& rows, nb::object layers,
               nb::object positions, nb::object tokens, nb::object exits) {
    PassInput input;
    if (rows.size() != batch.size())
        refuse("a batch needs to know of each entry if its rows are wanted");
    for (nb::handle item : batch) {
        if (!nb::isinstance<nb::tuple>(item) || nb::len(item) != 3)
            refuse("a batch has (sequence, tokens, parents) entries");
        const auto entry = nb::borrow<nb::tuple>(item);
        Sequence* sequence = &sequence_of(engine, entry[0]);
        for (const auto& other : input.entries)
            if (other.sequence == sequence) refuse("a sequence appears twice in the batch");
        std::vector<int32_t> ids = ints_of(entry[1]), parents = ints_of(entry[2]);
        if (ids.size() != parents.size()) refuse("tokens and parents differ in size");
        const size_t nodes = ids.size();
        input.entries.push_back({nb::object(entry[0]), sequence, std::move(ids),
                                 std::move(parents), nodes, rows[input.entries.size()], 1, {}});
    }
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
    const Profile profile = locked(engine, [&] { return engine.model.profile; });
    nb::dict stages;
    for (size_t i = 0; i < kStageCount; ++i) {
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
        for (const Page* page : sequence.cache->pages())
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

// One value for each row of each head of a layer: `get(cache, layer, head, row)`.
template <class T, class Get>
arrays::Array2<T> each_row(Sequence& sequence, int64_t index, Get get) {
    const size_t layer = layer_of(sequence, index);
    const size_t heads = sequence.engine->model.shape.layers[layer].kv_heads;
    size_t rows = 0;
    std::unique_ptr<T[]> values;
    locked(sequence, [&](KVCache& cache) {
        rows = cache.held(layer);
        values = std::make_unique<T[]>(heads * rows);
        for (size_t head = 0; head < heads; ++head)
            for (size_t row = 0; row < rows; ++row)
                values[head * rows + row] = get(cache, layer, head, row);
    });
    return arrays::owned(std::move(values), heads, rows);
}

arrays::Array2<int32_t> rows_of(Sequence& sequence, int64_t index) {
    return each_row<int32_t>(sequence, index, [](KVCache& cache, size_t layer, size_t head,
                                                 size_t row) {
        const int32_t* positions = cache.positions(layer, head);
        return positions ? positions[row] : static_cast<int32_t>(row);
    });
}

arrays::Array2<double> attention_mass(Sequence& sequence, int64_t index) {
    return each_row<double>(sequence, index, [](KVCache& cache, size_t layer, size_t head,
                                                size_t row) {
        if (!cache.tracks_attention())
            refuse("this sequence does not track attention; `track_attention` does");
        return cache.mass(layer, head)[row];
    });
}

using Rows = arrays::Input<int32_t, 2>;

void evict(Sequence& sequence, const std::vector<Rows>& kept) {
    const Shape& shape = sequence.engine->model.shape;
    if (kept.size() != shape.layers.size()) refuse("each layer needs rows to keep");
    locked(sequence, [&](KVCache& cache) {
        std::vector<KeptRows> layers;
        for (size_t layer = 0; layer < kept.size(); ++layer) {
            const size_t heads = kept[layer].shape(0), count = kept[layer].shape(1);
            const int32_t* rows = kept[layer].data();
            if (heads != shape.layers[layer].kv_heads) refuse("each head needs rows to keep");
            for (size_t i = 0; i < heads * count; ++i) {
                const int32_t low = i % count ? rows[i - 1] + 1 : 0;
                if (rows[i] < low || static_cast<size_t>(rows[i]) >= cache.held(layer))
                    refuse("rows to keep must increase and lie below " +
                           std::to_string(cache.held(layer)));
            }
            layers.push_back({rows, count});
        }
        cache.evict(layers);
    });
}

void bind_sequence(nb::module_& m) {
    nb::class_<Sequence>(m, "NativeSequence", "Keys and values of one sequence.")
        .def_prop_ro("length", [](Sequence& s) { return s.cache ? s.cache->length() : 0; },
                     "Committed positions; 0 once it is released.")
        .def_prop_ro("bytes", [](Sequence& s) { return s.cache ? s.cache->bytes() : 0; },
                     "Memory of its pages, those shared with other sequences included.")
        .def_prop_ro("pages", &pages_of, "Identities of its pages, in order of position.")
        .def_prop_ro("row_count", [](Sequence& s) { return s.cache ? s.cache->row_count() : 0; },
                     "Rows of the layer that holds most.")
        .def("rows", &rows_of, nb::arg("layer"),
             nb::sig("def rows(self, layer: int) -> Tokens"),
             "Return the positions of the rows that a layer holds, [heads, rows].")
        .def("attention_mass", &attention_mass, nb::arg("layer"),
             nb::sig("def attention_mass(self, layer: int) -> NDArray[np.float64]"),
             "Return the attention that each row of a layer received, [heads, rows].")
        .def(
            "track_attention",
            [](Sequence& s) { locked(s, [](KVCache& cache) { cache.track_attention(); }); },
            "Sum the attention that each row receives. The sequence must be empty.")
        .def("evict", &evict, nb::arg("kept"),
             nb::sig("def evict(self, kept: list[Tokens]) -> None"),
             "Drop all rows but those of these indices, [heads, kept] for each layer.")
        .def("commit", &commit, nb::arg("path"),
             nb::sig("def commit(self, path: Tokens) -> None"),
             "Keep the nodes of `path` of the last pass, root first; forget the others.")
        .def(
            "truncate",
            [](Sequence& s, size_t length) {
                locked(s, [&](KVCache& cache) { cache.truncate(length); });
            },
            nb::arg("length"), "Keep the first `length` committed positions.")
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
        .def("forward", &forward, nb::arg("batch"), nb::arg("rows"),
             nb::arg("layers") = nb::none(), nb::arg("positions") = nb::none(),
             nb::arg("tokens") = nb::none(), nb::arg("exits") = nb::none(),
             nb::sig("def forward(self, batch: list[Any], rows: Items[bool], "
                     "layers: Tokens | None = None, positions: Tokens | None = None, "
                     "tokens: Tokens | None = None, exits: Tokens | None = None) -> Floats"),
             "Run (sequence, tokens, parents) entries and return the logits, float32 [N, V], of\n"
             "those entries whose `rows` is true. The other arguments are those of a `View`. The\n"
             "next pass overwrites the array.")
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
             "since profiling was switched on.")
        .def_prop_rw("profiling", [](Engine& e) { return e.model.profiling; }, &set_profiling,
                     "Whether passes are timed; switching it on forgets the profile so far.");
}

void bind_loading(nb::class_<Engine>& model) {
    model
        .def(nb::new_(&make_engine), nb::arg("config"), nb::arg("storage"), nb::arg("head"),
             nb::arg("kv_format"), nb::arg("isa"), nb::arg("threads"))
        .def("set", &set_weight, nb::arg("name"), nb::arg("weight").noconvert(),
             nb::arg("mapped") = false,
             nb::sig("def set(self, name: str, weight: NDArray[Any], mapped: bool = False) -> None"),
             "Store a weight under its canonical name, e.g. `layers.3.q`. `mapped`: it shows a\n"
             "file, whose pages may be given back to the system once they are read.")
        .def("get", &get_weight, nb::arg("name"),
             nb::sig("def get(self, name: str) -> Floats"),
             "Return a matrix as it is stored, float32 [out, in].")
        .def("set_format", &set_format, nb::arg("name"), nb::arg("weight_format"),
             nb::sig("def set_format(self, name: str, weight_format: str) -> None"),
             "Choose the format of the matrix that a weight is part of, before it has values.")
        .def("load", &load_weight, nb::arg("name"), nb::arg("bits"), nb::arg("codes").noconvert(),
             nb::arg("scales").noconvert(), nb::arg("zeros").noconvert().none(),
             nb::arg("block_groups").noconvert(), nb::arg("order").noconvert().none(),
             nb::sig("def load(self, name: str, bits: int, codes: NDArray[np.uint8], "
                     "scales: Floats, zeros: NDArray[np.uint16] | None, block_groups: Tokens, "
                     "order: Tokens | None) -> None"),
             "Store a matrix of integers as it is: codes [out, in] with scales and zero points\n"
             "[out, groups], the group of every `BLOCK_INPUTS` inputs, and which input comes at\n"
             "each place.")
        .def("finish", &finish_loading, "Check that no weight is missing; then passes can run.")
        .def("extend_rope", &extend_rope, nb::arg("index"), nb::arg("cosines"), nb::arg("sines"),
             nb::sig("def extend_rope(self, index: int, cosines: Floats, sines: Floats) -> None"),
             "Append angles [positions, dim / 2] to a rotary embedding of `ropes`.");
}

void bind_properties(nb::class_<Engine>& model) {
    model
        .def_prop_ro("ropes", [](Engine& e) { return e.ropes; },
                     nb::sig("def ropes(self) -> list[Rope]"),
                     "The distinct rotary embeddings of the layers.")
        .def_prop_ro("rope_positions",
                     [](Engine& e) { return locked(e, [&] { return e.model.rope_positions(); }); },
                     "Positions that every rotary embedding covers.")
        .def_prop_ro("isa", [](Engine& e) { return std::string(e.model.kernels.isa); },
                     "The instruction set of the kernels.")
        .def_prop_ro("bytes", [](Engine& e) { return e.model.bytes; },
                     "Bytes of the matrices that every pass reads.")
        .def_prop_ro("page_bytes", [](Engine& e) { return e.model.memory.page_bytes(); },
                     "Bytes of a page of keys and values.")
        .def_prop_ro("pages", &count_pages,
                     nb::sig("def pages(self) -> tuple[int, int, int, int | None]"),
                     "Pages in use, pages that several sequences share, pages in memory, the limit.")
        .def("set_page_limit", &set_page_limit, nb::arg("pages").none(),
             nb::sig("def set_page_limit(self, pages: int | None) -> None"),
             "Limit the pages in memory; None: no limit.")
        .def_prop_ro("position_bytes", [](Engine& e) { return e.model.position_bytes(); },
                     "Bytes of keys and values of one position.")
        .def_prop_rw("worth_waking", [](Engine& e) { return e.model.worth_waking; },
                     [](Engine& e, double microseconds) { e.model.worth_waking = microseconds; },
                     "A pass of fewer estimated microseconds stays on the calling thread.")
        .def_prop_ro("parameters", [](Engine& e) { return e.model.parameters; },
                     "Numbers in the matrices that every pass reads.")
        .def_prop_rw("threads",
                     [](Engine& e) { return locked(e, [&] { return e.model.threads(); }); },
                     &set_threads, "Threads of a pass, 1 to 1024.");
}

}  // namespace

void bind_engine(nb::module_& m) {
    nb::exception<MemoryFull>(m, "MemoryFullError", PyExc_ValueError);
    nb::exception<NotTernary>(m, "NotTernaryError", PyExc_ValueError);
    m.attr("BLOCK_INPUTS") = kBlockInputs;
    m.def("weight_formats", &weight_formats,
          nb::sig("def weight_formats() -> list[tuple[str, str, bool, float]]"),
          "Return the formats of weights: name, format of embedding and head where none is named,\n"
          "whether these may have it, and bits of a weight.");
    m.def("format_holds", &format_holds, nb::arg("name"), nb::arg("bits"),
          nb::arg("scales").noconvert(), nb::arg("zeros").noconvert().none(),
          nb::sig("def format_holds(name: str, bits: int, scales: Floats, "
                  "zeros: NDArray[np.uint16] | None) -> bool"),
          "Return whether a format keeps integers with scales and zero points [out, groups] as\n"
          "they are.");
    bind_sequence(m);
    nb::class_<Engine> model(
        m, "NativeModel",
        "Weights, kernels and threads. Methods raise ValueError for what they cannot use.");
    bind_loading(model);
    bind_passes(model);
    bind_properties(model);
}

}  // namespace paceline
