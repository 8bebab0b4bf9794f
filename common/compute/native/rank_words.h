// Words in memory that the ranks of a stage share: one rank stores a number that only grows, others wait until it is
// high enough. They spin for a moment, since the other is often only microseconds away, and then sleep in the kernel.

#pragma once

#include <limits.h>
#include <stdint.h>
#include <time.h>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

struct RankWord {  // a cache line of its own; mirrored by WORD_BYTES in services/stage/ranks/shared_channel.py
    int64_t value;
    int64_t sleepers;
    int64_t unused[6];
};

constexpr int64_t LONGEST_SLEEP_NS = 20'000'000;  // then the epoch is looked at again

inline int64_t now_ns() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1'000'000'000LL + now.tv_nsec;
}

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

inline void sleep_on(RankWord* word, int64_t seen, int64_t most_ns) {
    timespec limit = {most_ns / 1'000'000'000LL, most_ns % 1'000'000'000LL};
#if defined(__linux__)
    // The count goes up before the value is compared: a rank that stores after that sees it, and wakes us.
    __atomic_add_fetch(&word->sleepers, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&word->value, __ATOMIC_SEQ_CST) == seen)  // the low half is the futex; only growing, it differs
        syscall(SYS_futex, (uint32_t*)&word->value, FUTEX_WAIT, (uint32_t)seen, &limit, nullptr, 0);
    __atomic_sub_fetch(&word->sleepers, 1, __ATOMIC_SEQ_CST);
#else
    limit = {0, 50'000};
    nanosleep(&limit, nullptr);
#endif
}

void set_word(RankWord* word, int64_t value) {
    __atomic_store_n(&word->value, value, __ATOMIC_SEQ_CST);
#if defined(__linux__)
    if (__atomic_load_n(&word->sleepers, __ATOMIC_SEQ_CST))
        syscall(SYS_futex, (uint32_t*)&word->value, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
#endif
}

// -1: the word is at least `value`. -2: the epoch is not `epoch` any more. 0: the time is up.
int64_t await_word(RankWord* word, int64_t value, const RankWord* epoch_word, int64_t epoch, int64_t spin_ns,
                   int64_t timeout_ns) {
    const int64_t began_ns = now_ns();
    int64_t seen;
    for (int turn = 0; (seen = __atomic_load_n(&word->value, __ATOMIC_ACQUIRE)) < value; turn++) {
        if (__atomic_load_n(&epoch_word->value, __ATOMIC_ACQUIRE) != epoch) return -2;
        if (turn % 32 != 31) {  // the clock costs as much as some turns
            relax();
            continue;
        }
        const int64_t spent_ns = now_ns() - began_ns;
        if (spent_ns >= timeout_ns) return 0;
        if (spent_ns < spin_ns) continue;
        const int64_t left_ns = timeout_ns - spent_ns;
        sleep_on(word, seen, left_ns < LONGEST_SLEEP_NS ? left_ns : LONGEST_SLEEP_NS);
    }
    return -1;
}

}  // namespace
