#include "support/bandwidth.hpp"

#include <algorithm>
#include <chrono>
#include <memory>
#include <vector>

#include "kernels/isa.hpp"
#include "support/buffer.hpp"
#include "support/thread_pool.hpp"

namespace paceline {

namespace {

class Read : public Task {
public:
    Read(const Kernels& kernels, const Buffer& buffer, size_t chunks)
        : kernels_(kernels), buffer_(buffer), sums_(chunks) {
        add_phase(chunks);
    }

protected:
    void work(size_t, size_t chunk, size_t) override {
        const auto [begin, end] = chunk_range(buffer_.size(), chunk, sums_.size(), 4096);
        sums_[chunk] = kernels_.read(buffer_.floats() + begin / sizeof(float), end - begin);
    }

private:
    const Kernels& kernels_;
    const Buffer& buffer_;
    std::vector<float> sums_;
};

}  // namespace

double read_bandwidth(size_t threads, size_t megabytes, size_t repeats) {
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

}  // namespace paceline
