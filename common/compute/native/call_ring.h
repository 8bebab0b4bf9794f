// Calls of a stage to an expert node of the same host, in memory that both have mapped: the ring of one such pair.
//
// A ring is a row of slots, each for one call: a head, what is asked (for each pair of a token and a shard its row and
// its shard, then the rows), and the answer, one row a pair. The state of a slot says whose turn it is:
//
//     FREE -> ASKED       the stage has written a call
//     ASKED -> FREE       the stage takes it back before anybody has begun it
//     ASKED -> TAKEN      the expert node has begun it
//     TAKEN -> ANSWERED   it has written the answer, or why there is none; the stage reads it: -> FREE
//     TAKEN -> UNWANTED   the stage does not wait any more; the expert node has finished: -> FREE
//
// So no answer is ever written into the slot of a later call. A bell (an eventfd) of each side tells the other to look.
// What stands in the memory is a peer's input: sizes are those that a side has itself, descriptors are copied before
// they are checked, and what was asked and answered has a checksum that the number of the call is part of.

#pragma once

#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "vectors.h"

namespace {

enum SlotState : uint32_t { FREE, ASKED, TAKEN, ANSWERED, UNWANTED };
enum Outcome : uint32_t { GIVEN, MALFORMED, NOT_HELD, OUT_OF_TIME, DAMAGED };  // mirrored in call_ring.py

struct RingShape {  // mirrored by RingShape in call_ring.py
    int64_t slots, max_rows, max_pairs, width, value_bytes;
};

struct SlotHead {
    uint32_t state, outcome;
    int64_t number, layer, deadline_ns, rows, pairs;
    uint64_t asked_checksum, answered_checksum;
};
constexpr int64_t HEAD_BYTES = 128;
static_assert(sizeof(SlotHead) <= HEAD_BYTES - sizeof(uint32_t), "the head has a place of its own");

struct Routing {  // of one pair
    int32_t row, shard;
};

INLINE int64_t whole_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

struct Slot {
    SlotHead* head;
    Routing* routing;
    uint8_t *rows, *answer;
};

INLINE int64_t slot_bytes(const RingShape& shape) {
    return HEAD_BYTES + whole_lines(shape.max_pairs * (int64_t)sizeof(Routing)) +
           whole_lines(shape.max_rows * shape.width * shape.value_bytes) +
           whole_lines(shape.max_pairs * shape.width * shape.value_bytes);
}
INLINE Slot slot_of(uint8_t* memory, const RingShape& shape, int64_t index) {
    Slot slot;
    uint8_t* place = memory + index * slot_bytes(shape);
    slot.head = (SlotHead*)place;
    slot.routing = (Routing*)(place += HEAD_BYTES);
    slot.rows = place += whole_lines(shape.max_pairs * (int64_t)sizeof(Routing));
    slot.answer = place + whole_lines(shape.max_rows * shape.width * shape.value_bytes);
    return slot;
}

// In one order with the word for looking: either the node sees that the stage has stopped to look, or the stage sees
// the answer.
INLINE uint32_t state_of(const SlotHead* head) { return __atomic_load_n(&head->state, __ATOMIC_SEQ_CST); }
INLINE void set_state(SlotHead* head, uint32_t state) { __atomic_store_n(&head->state, state, __ATOMIC_RELEASE); }
INLINE bool change_state(SlotHead* head, uint32_t from, uint32_t to) {
    return __atomic_compare_exchange_n(&head->state, &from, to, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}

// A checksum: each step is a bijection of what was before and of the word, so that no single changed word goes unseen.
// Four lanes at a time, for speed; `copied` also copies, so that what was summed is what is used.
constexpr uint64_t MULTIPLIERS[4] = {0x9E3779B185EBCA87ull, 0xC2B2AE3D27D4EB4Full, 0x165667B19E3779F9ull,
                                     0x27D4EB2F165667C5ull};
INLINE uint64_t mixed(uint64_t sum, uint64_t word, int lane) {
    sum = (sum ^ word) * MULTIPLIERS[lane];
    return sum ^ (sum >> 29);
}
INLINE uint64_t word_at(const uint8_t* place, int64_t bytes = 8) {
    uint64_t word = 0;
    memcpy(&word, place, bytes);
    return word;
}
template <class Take> INLINE uint64_t checksum_of_words(int64_t bytes, uint64_t sum, const Take& take) {
    uint64_t lanes[4] = {sum, sum + 1, sum + 2, sum + 3};
    int64_t at = 0;
    for (; at + 32 <= bytes; at += 32)
        for (int lane = 0; lane < 4; lane++) lanes[lane] = mixed(lanes[lane], take(at + 8 * lane, 8), lane);
    for (int lane = 0; at < bytes; at += 8, lane++)
        lanes[lane & 3] = mixed(lanes[lane & 3], take(at, std::min<int64_t>(8, bytes - at)), lane & 3);
    for (int lane = 0; lane < 4; lane++) sum = mixed(sum, lanes[lane], lane);
    return mixed(sum, (uint64_t)bytes, 0);
}
INLINE uint64_t checksum(const void* data, int64_t bytes, uint64_t sum) {
    const uint8_t* from = (const uint8_t*)data;
    return checksum_of_words(bytes, sum, [&](int64_t at, int64_t n) { return word_at(from + at, n); });
}
INLINE uint64_t copied(void* target, const void* data, int64_t bytes, uint64_t sum) {
    const uint8_t* from = (const uint8_t*)data;
    uint8_t* to = (uint8_t*)target;
    return checksum_of_words(bytes, sum, [&](int64_t at, int64_t n) {
        const uint64_t word = word_at(from + at, n);
        memcpy(to + at, &word, n);
        return word;
    });
}
// `seal`: of a link (call_link.h); 0 in a ring.
INLINE uint64_t checksum_of_head(const SlotHead& head, uint64_t seal) {
    const int64_t told[5] = {head.number, head.layer, head.deadline_ns, head.rows, head.pairs};
    return checksum(told, sizeof told, seal);
}
INLINE uint64_t checksum_of_outcome(int64_t number, uint32_t outcome, uint64_t seal) {
    return mixed((uint64_t)number ^ seal, outcome, 1);
}

// Whether the stage looks at its slots all the time for now: then it needs no bell, which costs the node a call of the
// kernel and the stage a core that has to wake up. A word behind the head of the first slot. It is a hint: what it says
// wrongly costs a wait that ends by itself, and the stage's next call sets it right.
INLINE uint32_t* looking_word(uint8_t* memory) { return (uint32_t*)(memory + HEAD_BYTES) - 1; }
INLINE void set_looking(uint8_t* memory, bool looks) {
    __atomic_store_n(looking_word(memory), (uint32_t)looks, __ATOMIC_SEQ_CST);
}
INLINE bool is_stage_looking(uint8_t* memory) { return __atomic_load_n(looking_word(memory), __ATOMIC_SEQ_CST) == 1; }

INLINE int64_t monotonic_ns() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1'000'000'000LL + now.tv_nsec;
}
INLINE void ring_bell(int64_t descriptor) {
    const uint64_t one = 1;
    if (write((int)descriptor, &one, sizeof one) < 0) return;  // it is at its limit, and so rings, or its owner is gone
}
INLINE void await_bell(int64_t descriptor, int64_t timeout_ns) {
    pollfd bell = {(int)descriptor, POLLIN, 0};
    const timespec limit = {timeout_ns / 1'000'000'000LL, timeout_ns % 1'000'000'000LL};
    uint64_t count;
    if (ppoll(&bell, 1, &limit, nullptr) > 0 && read((int)descriptor, &count, sizeof count) < 0) return;
}

}  // namespace
