// Bindings that say what this machine can do.

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "bindings/checks.hpp"
#include "kernels/isa.hpp"
#include "support/bandwidth.hpp"
#include "support/memory.hpp"

namespace paceline {

namespace nb = nanobind;

namespace {

constexpr size_t kMaxThreads = 1024, kMaxRepeats = 1000, kMaxMegabytes = size_t{1} << 20;

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (const Kernels* kernels : runnable()) names.emplace_back(kernels->isa);
    return names;
}

double bound_read_bandwidth(size_t threads, size_t megabytes, size_t repeats) {
    size_in_range("threads", threads, 1, kMaxThreads);
    size_in_range("megabytes", megabytes, 1, kMaxMegabytes);
    size_in_range("repeats", repeats, 1, kMaxRepeats);
    check_memory("the buffer", static_cast<double>(megabytes << 20));
    nb::gil_scoped_release unlocked;
    return read_bandwidth(threads, megabytes, repeats);
}

}  // namespace

void bind_machine(nb::module_& m) {
    m.def("isas", &isas,
          "Return the instruction sets whose kernels run on this machine, the fastest first.");
    m.def(
        "read_bandwidth", &bound_read_bandwidth, nb::arg("threads"), nb::arg("megabytes") = 256,
        nb::arg("repeats") = 8,
        "Return the bytes per second at which `threads` threads read memory that no cache holds.");
}

}  // namespace paceline
