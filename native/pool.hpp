// Threads that run one function together and meet at barriers inside it.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <thread>
#include <utility>
#include <vector>

// A share of `count` things for thread `index` of `threads`: the same one every time.
inline std::pair<size_t, size_t> share(size_t count, size_t index, size_t threads,
                                       size_t grain = 1) {
    const size_t grains = (count + grain - 1) / grain;
    const auto edge = [&](size_t i) {
        const size_t at = grains * i / threads * grain;
        return at < count ? at : count;
    };
    return {edge(index), edge(index + 1)};
}

class Pool {
public:
    explicit Pool(size_t threads);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    size_t size() const { return workers_.size() + 1; }

    // Runs work(index) on every thread, the calling one being index 0. `work` must not throw.
    void run(const std::function<void(size_t)>& work);

    // Inside `run`: waits for all threads. Spins briefly, then sleeps, so that a thread which was
    // left without a core is not kept from it.
    void meet();

private:
    void serve(size_t index);

    std::vector<std::thread> workers_;
    const std::function<void(size_t)>* work_ = nullptr;
    std::atomic<uint32_t> rounds_{0};
    std::atomic<bool> closing_{false};
    alignas(64) std::atomic<uint32_t> arrived_{0};
    alignas(64) std::atomic<uint32_t> generation_{0};
};
