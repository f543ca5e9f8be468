// How fast this machine reads memory: the ceiling of plain decoding.

#include <nanobind/nanobind.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <stdexcept>
#include <vector>

#include "support/buffer.hpp"
#include "kernels/isa.hpp"
#include "support/thread_pool.hpp"

namespace nb = nanobind;

namespace {

class Read : public Task {
public:
    Read(const Kernels& kernels, const Buffer& buffer, size_t chunks)
        : kernels_(kernels), buffer_(buffer), sums_(chunks) {
        add_phase(chunks);
    }

protected:
    void work(size_t, size_t chunk, size_t) override {
        const auto [begin, end] = share(buffer_.size(), chunk, sums_.size(), 4096);
        sums_[chunk] = kernels_.read(buffer_.floats() + begin / sizeof(float), end - begin);
    }

private:
    const Kernels& kernels_;
    const Buffer& buffer_;
    std::vector<float> sums_;
};

// Bytes per second of the median of `repeats` reads of one buffer by all threads.
double read_bandwidth(size_t threads, size_t megabytes, size_t repeats) {
    if (!threads || threads > 1024 || !megabytes || megabytes > (size_t{1} << 20) || !repeats)
        throw std::invalid_argument("threads, megabytes and repeats must be positive and sane");
    nb::gil_scoped_release unlocked;
    const Kernels& kernels = choose("");
    const size_t bytes = megabytes << 20;
    Buffer buffer(bytes);
    buffer.zero();
    Pool pool(threads);
    std::vector<double> seconds;
    for (size_t repeat = 0; repeat < repeats; ++repeat) {
        const auto start = std::chrono::steady_clock::now();
        pool.run(std::make_shared<Read>(kernels, buffer, 8 * threads), threads);
        const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
        seconds.push_back(taken.count());
    }
    std::sort(seconds.begin(), seconds.end());
    return static_cast<double>(bytes) / seconds[repeats / 2];
}

}  // namespace

void bind_bandwidth(nb::module_& m) {
    m.def("read_bandwidth", &read_bandwidth, nb::arg("threads"), nb::arg("megabytes") = 256,
          nb::arg("repeats") = 8,
          "Bytes per second at which `threads` threads read memory that no cache holds.");
}
