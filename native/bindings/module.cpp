// The Python module `paceline._native`.

#include <nanobind/nanobind.h>

namespace paceline {

void bind_corpora(nanobind::module_& m);
void bind_drafting(nanobind::module_& m);
void bind_engine(nanobind::module_& m);
void bind_governor(nanobind::module_& m);
void bind_machine(nanobind::module_& m);
void bind_sampling(nanobind::module_& m);
void bind_storage(nanobind::module_& m);
void bind_text(nanobind::module_& m);

}  // namespace paceline

NB_MODULE(_native, m) {
    m.doc() =
        "The compiled part of Paceline: engine, drafters, sampling; `native/` holds its source.";
    paceline::bind_machine(m);
    paceline::bind_sampling(m);
    paceline::bind_storage(m);
    paceline::bind_text(m);
    paceline::bind_drafting(m);
    paceline::bind_corpora(m);
    paceline::bind_governor(m);
    paceline::bind_engine(m);
}
