// The native engine as Python sees it: models and sequences.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <numeric>
#include <optional>
#include <stdexcept>

#include "kernels/isa.hpp"
#include "engine/model.hpp"

namespace nb = nanobind;

using Ints = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Weight = nb::ndarray<nb::ro, nb::device::cpu>;
using Mixed = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Weighting = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Angles = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Logits = nb::ndarray<nb::numpy, float, nb::ndim<2>>;

namespace {

constexpr size_t kMostThreads = 1024;

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

size_t size_of(nb::handle object, const char* name, size_t low = 1, size_t high = size_t{1} << 31) {
    const auto value = nb::cast<int64_t>(object.attr(name));
    if (value < static_cast<int64_t>(low) || value > static_cast<int64_t>(high))
        refuse(std::string(name) + " is " + std::to_string(value) + ", expected " +
               std::to_string(low) + " to " + std::to_string(high));
    return static_cast<size_t>(value);
}

float cap_of(nb::handle object, const char* name) {
    nb::object value = object.attr(name);
    return value.is_none() ? 0.0f : nb::cast<float>(value);
}

Activation activation_of(const std::string& name) {
    const std::pair<const char*, Activation> known[] = {{"silu", Activation::silu},
                                                        {"gelu", Activation::gelu},
                                                        {"gelu_tanh", Activation::gelu_tanh},
                                                        {"relu", Activation::relu},
                                                        {"relu2", Activation::relu2}};
    for (const auto& [text, activation] : known)
        if (name == text) return activation;
    refuse("activation '" + name + "' has no kernel");
}

LayerShape layer_of(nb::handle layer, std::vector<nb::object>& ropes) {
    LayerShape shape{};
    shape.heads = size_of(layer, "heads");
    shape.kv_heads = size_of(layer, "kv_heads");
    shape.head_dim = size_of(layer, "head_dim", 1, kLargestHead);
    shape.intermediate = size_of(layer, "intermediate");
    if (shape.heads % shape.kv_heads) refuse("heads must be a multiple of kv_heads");
    if (!layer.attr("window").is_none()) shape.window = size_of(layer, "window");
    nb::object rope = layer.attr("rope");
    shape.rope = -1;
    if (rope.is_none()) return shape;
    shape.rope_dim = size_of(rope, "dim", 2, shape.head_dim);
    if (shape.rope_dim % 2) refuse("the rotated part of a head must be even");
    const auto found = std::find_if(ropes.begin(), ropes.end(),
                                    [&](const nb::object& other) { return other.equal(rope); });
    shape.rope = static_cast<int>(found - ropes.begin());
    if (found == ropes.end()) ropes.push_back(rope);
    return shape;
}

Shape shape_of(nb::handle config, std::vector<nb::object>& ropes) {
    Shape shape{};
    shape.vocabulary = size_of(config, "vocab_size");
    shape.hidden = size_of(config, "hidden_size");
    shape.context = size_of(config, "context");
    for (nb::handle layer : config.attr("layers")) shape.layers.push_back(layer_of(layer, ropes));
    const auto norm = nb::cast<std::string>(config.attr("norm"));
    if (norm != "rms" && norm != "layer") refuse("norm '" + norm + "' has no kernel");
    shape.centred_norm = norm == "layer";
    shape.norm_eps = nb::cast<float>(config.attr("norm_eps"));
    shape.norm_offset = nb::cast<float>(config.attr("norm_offset"));
    shape.activation = activation_of(nb::cast<std::string>(config.attr("activation")));
    shape.gated = nb::cast<bool>(config.attr("gated"));
    shape.parallel = nb::cast<bool>(config.attr("parallel"));
    shape.tied = nb::cast<bool>(config.attr("tied"));
    shape.learned_positions = nb::cast<bool>(config.attr("learned_positions"));
    shape.position_offset = size_of(config, "position_offset", 0);
    shape.attention_scale = nb::cast<float>(config.attr("attention_scale"));
    shape.embedding_scale = nb::cast<float>(config.attr("embedding_scale"));
    shape.attention_softcap = cap_of(config, "attention_softcap");
    shape.logit_softcap = cap_of(config, "logit_softcap");
    shape.ropes = ropes.size();
    return shape;
}

constexpr const char* kFormats[] = {"fp32", "bf16", "fp16", "int8", "int4", "ternary"};
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
    if (threads < 1 || threads > static_cast<int64_t>(kMostThreads))
        refuse("threads is " + std::to_string(threads) + ", expected 1 to " +
               std::to_string(kMostThreads));
    return static_cast<size_t>(threads);
}

// A model and what its sequences share. One call at a time; others wait.
struct Engine {
    Engine(Shape shape, const Kernels& kernels, Format format, Format head,
           CacheFormat cache_format, size_t threads, std::vector<nb::object> ropes)
        : model(std::move(shape), kernels, format, head, cache_format, threads),
          ropes(std::move(ropes)) {}

    Model model;
    std::vector<nb::object> ropes;
    std::mutex busy;
    std::shared_ptr<Buffer> logits = std::make_shared<Buffer>();
    bool ready = false;
};

struct Sequence {
    std::shared_ptr<Engine> engine;
    std::optional<Cache> cache;

    Sequence(std::shared_ptr<Engine> engine, Cache cache)
        : engine(std::move(engine)), cache(std::move(cache)) {}
    Sequence(Sequence&&) = default;

    Cache& open() {
        if (!cache) refuse("this sequence has been released");
        return *cache;
    }
};

std::shared_ptr<Engine> make_engine(nb::handle config, const std::string& format,
                                    const std::string& head, const std::string& kv_format,
                                    const std::string& isa, int64_t threads) {
    std::vector<nb::object> ropes;
    Shape shape = shape_of(config, ropes);
    return std::make_shared<Engine>(
        std::move(shape), choose(isa), kind_of<Format>("format", format, kFormats),
        kind_of<Format>("format", head, kFormats),
        kind_of<CacheFormat>("kv format", kv_format, kCacheFormats), threads_of(threads),
        std::move(ropes));
}

// Bits of bf16 come as uint16.
Given::Type type_of(const std::string& name, const Weight& weight) {
    if (weight.dtype() == nb::dtype<float>()) return Given::Type::fp32;
    if (weight.dtype() == nb::dtype<uint16_t>()) return Given::Type::bf16;
    if (weight.dtype().code == static_cast<uint8_t>(nb::dlpack::dtype_code::Float) &&
        weight.dtype().bits == 16)
        return Given::Type::fp16;
    refuse("weight '" + name + "' has an unknown type, expected float32, float16 or uint16");
}

void set_weight(Engine& engine, const std::string& name, Weight weight, bool mapped) {
    if (weight.ndim() != 1 && weight.ndim() != 2)
        refuse("weight '" + name + "' has " + std::to_string(weight.ndim()) +
               " axes, expected 1 or 2");
    const bool matrix = weight.ndim() == 2;
    const ptrdiff_t size = weight.itemsize();
    const Given given{.data = static_cast<const uint8_t*>(weight.data()),
                      .type = type_of(name, weight),
                      .rows = matrix ? weight.shape(0) : 1,
                      .columns = weight.shape(matrix),
                      .row_step = matrix ? weight.stride(0) * size : 0,
                      .column_step = weight.stride(matrix) * size,
                      .matrix = matrix,
                      .mapped = mapped};
    nb::gil_scoped_release unlocked;
    std::lock_guard lock(engine.busy);
    if (engine.ready) refuse("the model is already loaded");
    engine.model.set(name, given);
}

void finish_loading(Engine& engine) {
    engine.model.finish();
    engine.ready = true;
}

void extend_rope(Engine& engine, size_t index, Angles cosines, Angles sines) {
    const bool same = cosines.shape(0) == sines.shape(0) && cosines.shape(1) == sines.shape(1);
    const auto uses = [&](const LayerShape& layer) {
        return layer.rope == static_cast<int>(index) && layer.rope_dim / 2 == cosines.shape(1);
    };
    const auto& layers = engine.model.shape.layers;
    if (!same || std::none_of(layers.begin(), layers.end(), uses))
        refuse("cosines and sines must both be [positions, dim / 2]");
    nb::gil_scoped_release unlocked;
    std::lock_guard lock(engine.busy);
    engine.model.extend_rope(index, cosines.data(), sines.data(), cosines.size());
}

Logits as_array(const std::shared_ptr<Buffer>& buffer, size_t rows, size_t vocabulary) {
    auto* held = new std::shared_ptr<Buffer>(buffer);
    nb::capsule owner(
        held, [](void* p) noexcept { delete static_cast<std::shared_ptr<Buffer>*>(p); });
    return Logits(buffer->floats(), {rows, vocabulary}, owner);
}

// An array as it is: a copy in another type would hide a mistake, and cost time.
Ints ints_of(nb::handle object) {
    Ints array;
    if (!nb::try_cast(object, array, false))
        refuse("tokens, parents and what a view has must be int32 arrays");
    return array;
}

Cache& cache_of(Engine& engine, Sequence& sequence) {
    if (sequence.engine.get() != &engine) refuse("a sequence belongs to another engine");
    return sequence.open();
}

Logits run(Engine& engine, const std::vector<Branch>& branches, const View& view) {
    size_t nodes = 0;
    for (const Branch& branch : branches) nodes += branch.rows ? branch.nodes : 0;
    const size_t rows = nodes * view.heads();
    const size_t columns = view.tokens ? view.tokens->size() : engine.model.shape.vocabulary;
    std::shared_ptr<Buffer> logits;
    {
        nb::gil_scoped_release unlocked;
        std::lock_guard lock(engine.busy);
        if (engine.logits->size() < rows * columns * sizeof(float))
            engine.logits = std::make_shared<Buffer>(rows * columns * sizeof(float));
        logits = engine.logits;
        engine.model.forward(branches, nodes ? logits->floats() : nullptr, view);
    }
    return as_array(logits, rows, columns);
}

// A chain of nodes, each a weighted sum of the embeddings of some tokens.
Logits forward_mixed(Engine& engine, Sequence& sequence, Mixed tokens, Weighting weights) {
    const size_t nodes = tokens.shape(0);
    if (!engine.ready) refuse("the model is not loaded");
    if (weights.shape(0) != nodes || weights.shape(1) != tokens.shape(1))
        refuse("tokens and weights differ in size");
    std::vector<int32_t> parents(nodes);
    std::iota(parents.begin(), parents.end(), -1);
    Cache& cache = cache_of(engine, sequence);
    return run(engine,
               {{&cache, tokens.data(), parents.data(), nodes, true, tokens.shape(1),
                 weights.data()}},
               {});
}

// `rows` says of each entry whether its logits are wanted.
Logits forward(Engine& engine, nb::list batch, const std::vector<bool>& rows, nb::object layers,
               nb::object positions, nb::object tokens, nb::object exits) {
    std::vector<Ints> arrays;  // keep the memory that the branches point to
    std::vector<Branch> branches;
    arrays.reserve(2 * batch.size() + 4);
    if (!engine.ready) refuse("the model is not loaded");
    if (rows.size() != batch.size()) refuse("a batch needs to know of each entry if its rows are wanted");
    for (nb::handle item : batch) {
        const auto entry = nb::cast<nb::tuple>(item);
        if (entry.size() != 3) refuse("a batch has (sequence, tokens, parents) entries");
        Cache* cache = &cache_of(engine, nb::cast<Sequence&>(entry[0]));
        for (const Branch& other : branches)
            if (other.cache == cache) refuse("a sequence appears twice in the batch");
        arrays.push_back(ints_of(entry[1]));
        arrays.push_back(ints_of(entry[2]));
        const Ints &ids = arrays[arrays.size() - 2], &parents = arrays.back();
        if (ids.size() != parents.size()) refuse("tokens and parents differ in size");
        branches.push_back({cache, ids.data(), parents.data(), ids.size(), rows[branches.size()]});
    }
    const auto part = [&](nb::handle object) -> std::optional<std::span<const int32_t>> {
        if (object.is_none()) return std::nullopt;
        const Ints& array = arrays.emplace_back(ints_of(object));
        return std::span(array.data(), array.size());
    };
    return run(engine, branches, {part(layers), part(positions), part(tokens), part(exits)});
}

// What the head was given in the last pass with logits, a copy.
Logits hidden(Engine& engine) {
    const size_t width = engine.model.shape.hidden;
    std::shared_ptr<Buffer> states;
    size_t rows = 0;
    {
        nb::gil_scoped_release unlocked;
        std::lock_guard lock(engine.busy);
        rows = engine.model.hidden_rows();
        if (rows) {
            states = std::make_shared<Buffer>(rows * width * sizeof(float));
            engine.model.hidden(states->floats());
        }
    }
    if (!rows) refuse("the last pass made no logits, so that it has no hidden states");
    return as_array(states, rows, width);
}

// Part of a pass -> seconds, busy seconds, bytes, multiply-adds, since profiling was switched on.
nb::dict profile_of(Engine& engine) {
    nb::dict parts;
    for (size_t i = 0; i < kPartCount; ++i) {
        const Spent& spent = engine.model.profile[i];
        parts[kPartNames[i]] = nb::make_tuple(spent.seconds, spent.busy, spent.bytes, spent.macs);
    }
    return parts;
}

void set_profiling(Engine& engine, bool on) {
    std::lock_guard lock(engine.busy);
    engine.model.profiling = on;
    if (on) engine.model.profile = {};
}

// Pages that are used, those with several holders, those in memory, and how many there may be.
nb::tuple count_pages(Engine& engine) {
    const Pages::Count count = engine.model.memory.count();
    nb::object limit = count.limit == SIZE_MAX ? nb::none() : nb::object(nb::int_(count.limit));
    return nb::make_tuple(count.used, count.shared, count.reserved, limit);
}

void set_page_limit(Engine& engine, std::optional<size_t> pages) {
    nb::gil_scoped_release unlocked;
    std::lock_guard lock(engine.busy);
    engine.model.memory.set_limit(pages.value_or(SIZE_MAX));
}

// What tells the pages of a sequence from all others.
std::vector<uintptr_t> pages_of(Sequence& sequence) {
    std::vector<uintptr_t> pages;
    nb::gil_scoped_release unlocked;
    std::lock_guard lock(sequence.engine->busy);
    if (sequence.cache)
        for (const Page* page : sequence.cache->pages())
            pages.push_back(reinterpret_cast<uintptr_t>(page));
    return pages;
}

template <class Use>
auto locked(Sequence& sequence, Use use) {
    nb::gil_scoped_release unlocked;
    std::lock_guard lock(sequence.engine->busy);
    return use(sequence.open());
}

}  // namespace

void bind_engine(nb::module_& m) {
    nb::exception<MemoryFull>(m, "MemoryFullError", PyExc_ValueError);
    nb::exception<NotTernary>(m, "NotTernaryError", PyExc_ValueError);
    m.def("isas", [] {
        std::vector<std::string> names;
        for (const Kernels* kernels : runnable()) names.emplace_back(kernels->isa);
        return names;
    }, "Instruction sets whose kernels run on this machine, the fastest first.");

    nb::class_<Sequence>(m, "Sequence")
        .def_prop_ro("length", [](Sequence& s) { return s.cache ? s.cache->length() : 0; })
        .def_prop_ro("bytes", [](Sequence& s) { return s.cache ? s.cache->bytes() : 0; })
        .def_prop_ro("pages", &pages_of)
        .def("commit", [](Sequence& s, Ints path) {
            locked(s, [&](Cache& cache) { cache.commit(path.data(), path.size()); });
        })
        .def("truncate", [](Sequence& s, size_t length) {
            locked(s, [&](Cache& cache) { cache.truncate(length); });
        })
        .def("fork", [](Sequence& s) {
            return Sequence{s.engine, locked(s, [](Cache& cache) { return cache.fork(); })};
        })
        .def("release", [](Sequence& s) {
            std::lock_guard lock(s.engine->busy);
            s.cache.reset();
        }, nb::call_guard<nb::gil_scoped_release>());

    nb::class_<Engine>(m, "Model")
        .def(nb::new_(&make_engine), nb::arg("config"), nb::arg("storage"), nb::arg("head"),
             nb::arg("kv_format"), nb::arg("isa"), nb::arg("threads"))
        .def("set", &set_weight, nb::arg("name"), nb::arg("weight").noconvert(),
             nb::arg("mapped") = false)
        .def("get", [](Engine& e, const std::string& name) { return e.model.weights.get(name); },
             nb::arg("name"))
        .def("finish", &finish_loading)
        .def("extend_rope", &extend_rope)
        .def("forward", &forward, nb::arg("batch"), nb::arg("rows"),
             nb::arg("layers") = nb::none(), nb::arg("positions") = nb::none(),
             nb::arg("tokens") = nb::none(), nb::arg("exits") = nb::none())
        .def("forward_mixed", &forward_mixed, nb::arg("sequence"),
             nb::arg("tokens").noconvert(), nb::arg("weights").noconvert())
        .def("hidden", &hidden)
        .def("open", [](std::shared_ptr<Engine> engine) {
            return Sequence{engine, engine->model.open()};
        })
        .def("profile", &profile_of)
        .def_prop_rw("profiling", [](Engine& e) { return e.model.profiling; }, &set_profiling,
                     nb::call_guard<nb::gil_scoped_release>())
        .def_prop_ro("ropes", [](Engine& e) { return e.ropes; })
        .def_prop_ro("rope_positions", [](Engine& e) { return e.model.rope_positions(); })
        .def_prop_ro("isa", [](Engine& e) { return std::string(e.model.kernels.isa); })
        .def_prop_ro("bytes", [](Engine& e) { return e.model.bytes; })
        .def_prop_ro("page_bytes", [](Engine& e) { return e.model.memory.page_bytes(); })
        .def_prop_ro("pages", &count_pages)
        .def("set_page_limit", &set_page_limit, nb::arg("pages").none())
        .def_prop_ro("position_bytes", [](Engine& e) { return e.model.position_bytes(); })
        .def_prop_rw("worth_waking", [](Engine& e) { return e.model.worth_waking; },
                     [](Engine& e, double microseconds) { e.model.worth_waking = microseconds; })
        .def_prop_ro("parameters", [](Engine& e) { return e.model.parameters; })
        .def_prop_rw("threads", [](Engine& e) { return e.model.threads(); },
                     [](Engine& e, int64_t threads) {
                         const size_t wished = threads_of(threads);
                         nb::gil_scoped_release unlocked;
                         std::lock_guard lock(e.busy);
                         e.model.set_threads(wished);
                     });
}
