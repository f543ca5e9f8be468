#include "pool.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int kSpins = 4000;  // some tens of microseconds

void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Returns when `value` is no longer `old`.
void wait_for_change(std::atomic<uint32_t>& value, uint32_t old) {
    for (int spin = 0; spin < kSpins; ++spin) {
        if (value.load(std::memory_order_acquire) != old) return;
        pause();
    }
    while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

}  // namespace

Pool::Pool(size_t threads) {
    try {
        for (size_t index = 1; index < threads; ++index)
            workers_.emplace_back([this, index] { serve(index); });
    } catch (...) {  // no more threads: those that were started must end before we leave
        closing_ = true;
        rounds_.fetch_add(1);
        rounds_.notify_all();
        for (auto& worker : workers_) worker.join();
        throw;
    }
}

Pool::~Pool() {
    closing_ = true;
    rounds_.fetch_add(1, std::memory_order_release);
    rounds_.notify_all();
    for (auto& worker : workers_) worker.join();
}

void Pool::run(const std::function<void(size_t)>& work) {
    if (workers_.empty()) return work(0);
    work_ = &work;
    rounds_.fetch_add(1, std::memory_order_release);
    rounds_.notify_all();
    work(0);
    meet();
}

void Pool::serve(size_t index) {
    for (uint32_t round = 0;; ++round) {
        wait_for_change(rounds_, round);
        if (closing_) return;
        (*work_)(index);
        meet();
    }
}

void Pool::meet() {
    if (workers_.empty()) return;
    const uint32_t generation = generation_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == workers_.size()) {
        arrived_.store(0, std::memory_order_relaxed);
        generation_.store(generation + 1, std::memory_order_release);
        generation_.notify_all();
    } else {
        wait_for_change(generation_, generation);
    }
}
