#include "support/thread_pool.hpp"

#include <stdexcept>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace paceline {

namespace {

constexpr size_t kSpins = 2000;  // some tens of microseconds, then the core is given up

void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Returns the first value of `counter` for which `enough` holds; `meanwhile(turn)` is called until
// the core is given up.
template <class Enough, class Meanwhile>
uint32_t wait_until(const std::atomic<uint32_t>& counter, Enough enough, Meanwhile meanwhile) {
    uint32_t value = counter.load(std::memory_order_acquire);
    for (size_t turn = 0; turn < kSpins && !enough(value); ++turn) {
        meanwhile(turn);
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

void Task::add_phase(size_t chunks) {
    if (chunks > kMaxChunks || phases() >= kMaxPhases)
        throw std::length_error("a task has too many phases or chunks");
    ends_.push_back(total() + static_cast<uint32_t>(chunks));
}

// Takes the first of the chunks that the owner has left, or the last if another thread asks.
bool Task::take_from(size_t owner, bool own, size_t phase, size_t chunks, size_t* chunk) {
    std::atomic<uint64_t>& left = queues_[owner].left;
    const uint64_t tag = phase + 1;
    uint64_t word = left.load(std::memory_order_relaxed);
    while (true) {
        if (word >> 2 * kChunkBits > tag) return false;  // the phase is over
        uint64_t first = word >> kChunkBits & kMaxChunks, last = word & kMaxChunks;
        if (word >> 2 * kChunkBits < tag) {
            first = first_owned(chunks, owner, queues_.size());
            last = first_owned(chunks, owner + 1, queues_.size());
        }
        if (first == last) return false;
        *chunk = own ? first++ : --last;
        const uint64_t next = tag << 2 * kChunkBits | first << kChunkBits | last;
        if (left.compare_exchange_weak(word, next, std::memory_order_relaxed)) return true;
    }
}

bool Task::take(size_t phase, size_t chunks, size_t thread, size_t* chunk) {
    for (size_t i = 0; i < queues_.size(); ++i)
        if (take_from((thread + i) % queues_.size(), i == 0, phase, chunks, chunk)) return true;
    return false;
}

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
    task->queues_ = std::vector<Task::Queue>(shared ? size() : 1);
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
        round = wait_until(round_, [&](uint32_t now) { return now != round; }, [](size_t) {});
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
        uint32_t count = 0;
        for (size_t chunk; task.take(phase, end - begin, thread, &chunk); ++count)
            task.work(phase, chunk, thread);
        // Chunks are reported together: the counter's cache line is one that all threads wait for.
        if (count && task.done_.fetch_add(count, std::memory_order_acq_rel) + count == end)
            task.done_.notify_all();
        wait_until(
            task.done_, [&](uint32_t done) { return done >= end; },
            [&](size_t turn) { task.wait(phase, thread, turn); });
        begin = end;
    }
}

}  // namespace paceline
