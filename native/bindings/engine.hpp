// What the bindings of the engine share: a model with its lock, and sequences.

#pragma once

#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings/arrays.hpp"
#include "bindings/checks.hpp"
#include "engine/model.hpp"
#include "kernels/isa.hpp"
#include "support/file_mapping.hpp"

namespace paceline {

using Ints = arrays::Input<int32_t, 1>;
using Matrix32 = arrays::Input<float, 2>;
using Logits = arrays::Array2<float>;

// A model and what its sequences share. One call at a time holds `busy`; others wait, without the
// interpreter's lock.
struct Engine {
    Engine(Shape shape, const Kernels& kernels, const std::string& format, const std::string& head,
           CacheChoice cache, size_t threads, std::vector<nanobind::object> ropes,
           const FewRead* few_read)
        : model(std::move(shape), kernels, find_format(kernels, format), find_format(kernels, head),
                cache, threads, few_read),
          ropes(std::move(ropes)) {}

    Model model;
    std::vector<nanobind::object> ropes;
    std::mutex busy;
    std::shared_ptr<Buffer> logits = std::make_shared<Buffer>();
    std::shared_ptr<Buffer> bounds = std::make_shared<Buffer>();  // of coarse logits
    size_t passes = 0;
    bool ready = false;
    AddressRange mapped_file;  // that weights showed, while they are loaded
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
    nanobind::gil_scoped_release unlocked;
    std::lock_guard lock(engine.busy);
    return use();
}

template <class Use>
auto locked(Sequence& sequence, Use use) {
    return locked(*sequence.engine, [&] { return use(sequence.open()); });
}

// Methods of `NativeModel` for the coarse head, and what its passes return.
void bind_screen(nanobind::module_& m, nanobind::class_<Engine>& model);

// Methods of `NativeModel` that give it weights.
void bind_loading(nanobind::class_<Engine>& model);

// Functions that say what weight formats there are.
void bind_formats(nanobind::module_& m);

}  // namespace paceline
