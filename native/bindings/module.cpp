// The Python module `paceline._native`: one `bind_*` for each source file that offers something.

#include <nanobind/nanobind.h>

namespace nb = nanobind;

void bind_bandwidth(nb::module_& m);
void bind_drafting(nb::module_& m);
void bind_engine(nb::module_& m);
void bind_governor(nb::module_& m);
void bind_guesses(nb::module_& m);
void bind_mask(nb::module_& m);
void bind_noise(nb::module_& m);
void bind_rank(nb::module_& m);
void bind_tournament(nb::module_& m);

NB_MODULE(_native, m) {
    m.doc() = "Paceline's native kernels.";
    bind_bandwidth(m);
    bind_drafting(m);
    bind_engine(m);
    bind_governor(m);
    bind_guesses(m);
    bind_mask(m);
    bind_noise(m);
    bind_rank(m);
    bind_tournament(m);
}
