#include "support/thread_pool.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace paceline {

namespace {

constexpr int kSpins = 2000;  // some tens of microseconds, then the core is given up

void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Returns the first value of `counter` for which `enough` holds.
template <class Enough>
uint32_t wait_until(const std::atomic<uint32_t>& counter, Enough enough) {
    uint32_t value = counter.load(std::memory_order_acquire);
    for (int spin = 0; spin < kSpins && !enough(value); ++spin) {
        pause();
        value = counter.load(std::memory_order_acquire);
    }
    while (!enough(value)) {
        counter.wait(value, std::memory_order_acquire);
        value = counter.load(std::memory_order_acquire);
    }
    return value;
}

}  // namespace

Pool::Pool(size_t threads) {
    try {
        for (size_t thread = 1; thread < threads; ++thread)
            workers_.emplace_back([this, thread] { serve(thread); });
    } catch (...) {  // the system gives no more: those that run must end first
        stop();
        throw;
    }
}

Pool::~Pool() { stop(); }

void Pool::stop() {
    closing_ = true;
    round_.fetch_add(1, std::memory_order_release);
    round_.notify_all();
    for (auto& worker : workers_) worker.join();
}

void Pool::run(const std::shared_ptr<Task>& task, size_t threads) {
    const bool shared = threads > 1 && !workers_.empty();
    if (shared) {
        {
            std::lock_guard lock(guard_);
            task_ = task;
        }
        round_.fetch_add(1, std::memory_order_release);
        round_.notify_all();
    }
    drive(*task, 0);
    if (shared) {
        std::lock_guard lock(guard_);
        task_.reset();
    }
}

void Pool::serve(size_t thread) {
    for (uint32_t round = 0; !closing_;) {
        round = wait_until(round_, [&](uint32_t now) { return now != round; });
        std::shared_ptr<Task> task;
        {
            std::lock_guard lock(guard_);
            task = task_;
        }
        if (task) drive(*task, thread);
    }
}

void Pool::drive(Task& task, size_t thread) {
    uint32_t begin = 0;
    for (size_t phase = 0; phase < task.ends_.size(); ++phase) {
        const uint32_t end = task.ends_[phase];
        uint32_t next = task.next_.load(std::memory_order_relaxed);
        while (next < end) {
            // Phases before this one are done, so `next` lies in this one or behind it.
            if (!task.next_.compare_exchange_weak(next, next + 1, std::memory_order_relaxed))
                continue;
            task.work(phase, next - begin, thread);
            if (task.done_.fetch_add(1, std::memory_order_acq_rel) + 1 == end)
                task.done_.notify_all();
            next = task.next_.load(std::memory_order_relaxed);
        }
        wait_until(task.done_, [&](uint32_t done) { return done >= end; });
        begin = end;
    }
}

}  // namespace paceline
