// Bindings of passes with a coarse head.

#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <memory>
#include <optional>

#include "bindings/pass_input.hpp"
#include "engine/screened_logits.hpp"

namespace paceline {

namespace nb = nanobind;

namespace {

// Coarse logits as Python holds them; good until the engine's next pass.
struct Screened {
    std::shared_ptr<Engine> engine;
    std::shared_ptr<Buffer> values, bounds;
    std::unique_ptr<ScreenedLogits> logits;
    size_t pass;

    // Calls `use` alone, while no later pass has begun, for a row that exists.
    template <class Use>
    auto with_row(int64_t row, Use use) {
        if (row < 0 || static_cast<size_t>(row) >= logits->rows())
            refuse("row " + std::to_string(row) + " is outside the " +
                   std::to_string(logits->rows()) + " rows of the pass");
        return locked(*engine, [&] {
            if (engine->passes != pass) refuse("a later pass has overwritten these logits");
            return use(*logits, static_cast<size_t>(row));
        });
    }
};

Screened forward_screened(std::shared_ptr<Engine> engine, nb::list batch,
                          const std::vector<bool>& rows) {
    const PassInput input = read_batch(*engine, batch, rows);
    size_t nodes = 0;
    for (const auto& entry : input.entries) nodes += entry.rows ? entry.nodes : 0;
    if (!nodes) refuse("a screened pass needs rows of logits");
    Screened screened;
    screened.engine = engine;
    const size_t size = nodes * engine->model.shape.vocabulary;
    locked(*engine, [&] {
        Model& model = engine->model;
        if (!engine->ready) refuse("the model is not loaded");
        if (!model.screen) refuse("the model has no coarse head");
        const auto room = [](std::shared_ptr<Buffer>& buffer, size_t bytes) {
            if (buffer->size() < bytes) buffer = std::make_shared<Buffer>(bytes);
            return buffer;
        };
        screened.values = room(engine->logits, size * sizeof(float));
        screened.bounds = room(engine->bounds, size * sizeof(uint16_t));
        auto* bounds = reinterpret_cast<uint16_t*>(screened.bounds->bytes());
        ScreenedRows out{bounds, {}};
        screened.pass = ++engine->passes;
        run_pass(model, input.branches(), screened.values->floats(), {}, &out);
        screened.logits = std::make_unique<ScreenedLogits>(
            model, nodes, model.work.normed.floats(), padded(model.shape.hidden),
            screened.values->floats(), bounds, std::move(out.bounded));
    });
    return screened;
}

nb::object as_tuple(const std::optional<ExactLogits>& found) {
    if (!found) return nb::none();
    return nb::make_tuple(arrays::copied(found->tokens), arrays::copied(found->logits));
}

nb::object contenders(Screened& screened, int64_t row, double temperature,
                      std::optional<uint64_t> noise) {
    if (!(temperature > 0 && temperature < HUGE_VAL)) refuse("the temperature must be above 0");
    const DrawRule rule{static_cast<float>(temperature), noise};
    return as_tuple(screened.with_row(
        row, [&](ScreenedLogits& logits, size_t at) { return logits.contenders(at, rule); }));
}

nb::object at_least(Screened& screened, int64_t row, float least) {
    return as_tuple(screened.with_row(
        row, [&](ScreenedLogits& logits, size_t at) { return logits.at_least(at, least); }));
}

void complete(Screened& screened, int64_t row) {
    screened.with_row(row, [](ScreenedLogits& logits, size_t at) {
        logits.complete(at);
        return true;
    });
}

// [N, V]; exact where it has been asked for.
Logits values_of(Screened& screened) {
    auto* held = new std::shared_ptr<Buffer>(screened.values);
    nb::capsule owner(
        held, [](void* p) noexcept { delete static_cast<std::shared_ptr<Buffer>*>(p); });
    return Logits(screened.values->floats(),
                  {screened.logits->rows(), screened.engine->model.shape.vocabulary}, owner);
}

// [N, V]; what each of `values` may differ by.
arrays::Array2<float> bounds_of(Screened& screened) {
    const size_t rows = screened.logits->rows(), size = screened.engine->model.shape.vocabulary;
    auto bounds = std::make_unique<float[]>(rows * size);
    screened.with_row(0, [&](ScreenedLogits&, size_t) {
        const ScreenRow row{nullptr, reinterpret_cast<uint16_t*>(screened.bounds->bytes()),
                            1.0f,    0.0f,
                            false,   0};
        for (size_t i = 0; i < rows * size; ++i) bounds[i] = row.bound(i);
        return true;
    });
    return arrays::owned(std::move(bounds), rows, size);
}

}  // namespace

void bind_screen(nb::module_& m, nb::class_<Engine>& model) {
    nb::class_<Screened>(m, "NativeScreenedLogits",
                         "Coarse logits of a pass; exact ones are computed when asked for.")
        .def_prop_ro("values", &values_of, nb::rv_policy::automatic, nb::sig("def values(self) -> Floats"),
                     "The coarse logits, float32 [N, V]; exact where they have been computed.")
        .def_prop_ro("bounds", &bounds_of, nb::rv_policy::automatic, nb::sig("def bounds(self) -> Floats"),
                     "Bounds of what `values` differ from the logits, float32 [N, V], copied.")
        .def_prop_ro("panels_read", [](Screened& s) { return s.logits->panels_read(); },
                     "Groups of sixteen rows of the head that were read so far.")
        .def("contenders", &contenders, nb::arg("row"), nb::arg("temperature"),
             nb::arg("noise").none(),
             nb::sig("def contenders(self, row: int, temperature: float, noise: int | None) -> "
                     "tuple[Tokens, Floats] | None"),
             "Return all tokens, ascending, that may have the largest logit / temperature + noise,\n"
             "and their logits. None: too many; `complete` the row.")
        .def("at_least", &at_least, nb::arg("row"), nb::arg("least"),
             nb::sig("def at_least(self, row: int, least: float) -> tuple[Tokens, Floats] | None"),
             "Return all tokens, ascending, whose logit is `least` or more, and their logits.")
        .def("complete", &complete, nb::arg("row"), "Make all `values` of a row exact.");
    model
        .def("forward_screened", &forward_screened, nb::arg("batch"), nb::arg("rows"),
             nb::sig("def forward_screened(self, batch: list[Any], rows: Items[bool]) -> "
                     "NativeScreenedLogits"),
             "Run a pass as `forward` does, with the coarse head that `make_screen` has made.")
        .def(
            "make_screen",
            [](Engine& e) {
                return locked(e, [&] { return e.ready && e.model.make_screen(); });
            },
            "Make a coarse copy of the head; return False where the head is too small, too coarse\n"
            "itself, or cannot be bounded.")
        .def(
            "drop_screen", [](Engine& e) { locked(e, [&] { ++e.passes; e.model.screen.reset(); }); },
            "Free the coarse copy.")
        .def_prop_ro(
            "screen_bytes",
            [](Engine& e) {
                return locked(e, [&] { return e.model.screen ? e.model.screen->bytes() : 0; });
            },
            "Bytes of the coarse copy of the head; 0 without one.")
        .def_prop_ro(
            "head_bytes",
            [](Engine& e) {
                size_t bytes = 0;
                for (const Matrix& matrix : e.model.weights.head.matrices())
                    bytes += matrix.data.size();
                return bytes;
            },
            "Bytes of the head, which may be the embedding, too.")
        .def_prop_ro(
            "head_panels",
            [](Engine& e) {
                size_t panels = 0;
                for (const Matrix& matrix : e.model.weights.head.matrices())
                    panels += matrix.panels;
                return panels;
            },
            "Groups of sixteen rows that the head has.");
}

}  // namespace paceline
