// Threads that share the work of a task.
//
// A task is a sequence of phases; a phase is a number of chunks that may run at the same time.
// Every thread owns an equal range of a phase's chunks and takes them in order, so that it reads
// memory as one stream; one that is done takes chunks from the end of another's range (Blumofe and
// Leiserson 1999, "Scheduling multithreaded computations by work stealing"). So a thread that loses
// its core delays nobody, and one that wakes late finds nothing to do. The result must not depend
// on which thread runs a chunk.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace paceline {

// Return the range of `count` items that chunk `index` of `chunks` covers, in multiples of `grain`.
inline std::pair<size_t, size_t> chunk_range(size_t count, size_t index, size_t chunks,
                                             size_t grain = 1) {
    const size_t grains = (count + grain - 1) / grain;
    const auto edge = [&](size_t i) {
        const size_t at = grains * i / chunks * grain;
        return at < count ? at : count;
    };
    return {edge(index), edge(index + 1)};
}

// Return the first of `chunks` that thread `thread` of `threads` owns; all come first where there
// are fewer chunks than threads.
inline size_t first_owned(size_t chunks, size_t thread, size_t threads) {
    return (chunks * thread + threads - 1) / threads;
}

class Task {
public:
    virtual ~Task() = default;

protected:
    friend class Pool;
    // Runs one chunk on thread `thread`. Must not throw.
    virtual void work(size_t phase, size_t chunk, size_t thread) = 0;
    // Called again and again, `turn` = 0, 1, 2, ..., while a thread waits for the end of a phase:
    // to fetch what it will need. Must be short.
    virtual void wait(size_t /*phase*/, size_t /*thread*/, size_t /*turn*/) {}
    // Throws std::length_error beyond what a queue can count.
    void add_phase(size_t chunks);
    size_t phases() const { return ends_.size(); }

private:
    // The chunks of a thread's range that nobody has taken: phase + 1, first, last + 1.
    struct alignas(64) Queue {
        std::atomic<uint64_t> left{0};
    };
    static constexpr int kChunkBits = 24;
    static constexpr uint64_t kMaxChunks = (uint64_t{1} << kChunkBits) - 1;
    static constexpr uint64_t kMaxPhases = (uint64_t{1} << (64 - 2 * kChunkBits)) - 2;

    uint32_t total() const { return ends_.empty() ? 0 : ends_.back(); }
    bool take(size_t phase, size_t chunks, size_t thread, size_t* chunk);
    bool take_from(size_t owner, bool own, size_t phase, size_t chunks, size_t* chunk);

    std::vector<uint32_t> ends_;  // chunks are numbered through all phases; where each phase ends
    std::vector<Queue> queues_;   // of each thread, from `Pool::run` on
    alignas(64) std::atomic<uint32_t> done_{0};
};

class Pool {
public:
    explicit Pool(size_t threads);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    size_t size() const { return workers_.size() + 1; }

    // Run a task; returns when every chunk is done. Other threads are woken if `threads` > 1; the
    // calling thread is number 0. Threads that wake late may hold the task a little longer, but do
    // not touch what it refers to.
    void run(const std::shared_ptr<Task>& task, size_t threads);

private:
    void serve(size_t thread);
    void stop();
    static void drive(Task& task, size_t thread);

    std::vector<std::thread> workers_;
    std::shared_ptr<Task> task_;  // guarded by `guard_`
    std::mutex guard_;
    std::atomic<uint32_t> round_{0};
    std::atomic<bool> closing_{false};
};

}  // namespace paceline
