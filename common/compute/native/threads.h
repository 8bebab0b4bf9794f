// Memory that a thread keeps for its next call, and the sharing of parts among threads.

#pragma once

#include <sched.h>
#include <stdint.h>
#include <stdlib.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "vectors.h"

namespace {

struct Buffer {  // grows, is kept for the thread's life: a call must not pay for fresh pages
    void* memory = nullptr;
    size_t bytes = 0;
    ~Buffer() { free(memory); }
    template <class T> T* of(size_t count) {
        size_t wanted = (count * sizeof(T) + 4095) / 4096 * 4096;
        if (wanted > bytes) {
            free(memory);
            memory = aligned_alloc(4096, wanted);
            if (!memory) abort();
            bytes = wanted;
        }
        return (T*)memory;
    }
};

// Worker threads, made when a call first asks for them. One call at a time uses them; another one computes alone. A call
// waits for no worker that has not begun: where all cores are busy, those that ask compute as if they were alone.
class Pool {
  public:
    template <class Work> bool run(int64_t threads, int64_t parts, const Work& work) {
        std::unique_lock<std::mutex> only(calls_, std::try_to_lock);
        if (!only.owns_lock()) return false;
        const int64_t helpers = std::min(threads, parts) - 1;
        while ((int64_t)workers_.size() < helpers) workers_.emplace_back([this] { serve(); });
        std::unique_lock<std::mutex> lock(state_);
        job_ = {[](const void* context, int64_t part) { (*(const Work*)context)(part); }, &work, parts};
        next_part_ = 0;
        free_places_ = helpers;
        lock.unlock();
        for (int64_t helper = 0; helper < helpers; helper++) wake_.notify_one();
        take_parts();
        lock.lock();
        free_places_ = 0;  // all parts have begun: whoever comes now would find nothing to do
        done_.wait(lock, [this] { return busy_ == 0; });
        return true;
    }
    ~Pool() {
        { std::lock_guard<std::mutex> lock(state_); stop_ = true; }
        wake_.notify_all();
        for (std::thread& worker : workers_) worker.join();
    }

  private:
    struct Job {
        void (*work)(const void*, int64_t);
        const void* context;
        int64_t parts;
    };
    void take_parts() {
        for (int64_t part; (part = next_part_.fetch_add(1)) < job_.parts;) job_.work(job_.context, part);
    }
    void serve() {
#ifdef SCHED_BATCH
        const sched_param normal{};
        sched_setscheduler(0, SCHED_BATCH, &normal);  // on waking it takes no core from a thread that computes
#endif
        for (std::unique_lock<std::mutex> lock(state_);;) {
            wake_.wait(lock, [this] { return stop_ || free_places_ > 0; });
            if (stop_) return;
            free_places_--;
            busy_++;
            lock.unlock();
            take_parts();
            lock.lock();
            if (--busy_ == 0) done_.notify_one();
        }
    }
    std::mutex calls_, state_;
    std::condition_variable wake_, done_;
    std::vector<std::thread> workers_;
    Job job_{};
    std::atomic<int64_t> next_part_{0};
    int64_t free_places_ = 0, busy_ = 0;
    bool stop_ = false;
};

constexpr double WORTH_SHARING = 4e6;  // multiply-adds; waking a thread costs about as much as half of these
INLINE int64_t worth(int64_t threads, double multiply_adds) {
    return std::min(threads, 1 + (int64_t)(multiply_adds / WORTH_SHARING));
}
// A few rows wait for the weights to come from memory, of which one thread gets nearly as much as several, while other
// processes compute on other cores: so their waiting does not count as work.
INLINE double linear_work(int64_t rows, int64_t k, int64_t n) { return (double)rows * (double)k * (double)n; }

// Outside of templates, which would have one of each for every type that they are made for.
INLINE Pool& pool_of_process() {
    static Pool pool;
    return pool;
}
thread_local bool is_in_part = false;

// Does parts [0, parts) in any order, on up to `threads` threads; a part that shares its own work does it alone.
template <class Work> void share(int64_t threads, int64_t parts, const Work& work) {
    if (threads > 1 && parts > 1 && !is_in_part) {
        const auto part_of = [&](int64_t part) {
            is_in_part = true;
            work(part);
            is_in_part = false;
        };
        if (pool_of_process().run(threads, parts, part_of)) return;
    }
    for (int64_t part = 0; part < parts; part++) work(part);
}

}  // namespace
