// Calls of a stage to an expert node that shares no memory with it, over a ZeroMQ connection: the link of one such pair.
//
// What lies in a slot of a ring travels here as one frame: the head, the pairs and the rows one way, the head and the
// answer the other way. The stage keeps a ring of its own beside it, which no one else has mapped: its slots say what is
// under way, and answers are put there. Of a state only the stage knows:
//
//     FREE -> ASKED       the stage has sent a call
//     ASKED -> ANSWERED   an answer of that number has come: -> FREE
//     ASKED -> UNWANTED   the stage does not wait any more, and has said so; an answer of that number has come: -> FREE
//
// So a node owes a stage no more than there are slots, and refuses what a stage asks beyond that. A frame is a peer's input: its size must be what its head says,
// and its checksum begins with a seal that both sides compute from what they must agree about. A frame that was meant
// for another life of a node, another model or another version is a damaged one. In a frame `deadline_ns` is the time
// that is left, since clocks of two hosts do not agree.
//
// libzmq is the one that pyzmq has loaded: Python makes the sockets and hands over its functions.

#pragma once

#include <errno.h>
#include <stddef.h>

#include <utility>

#include "call_ring.h"

namespace {

struct ZmqMessage {  // zmq_msg_t
    alignas(8) unsigned char opaque[64];
};
struct ZmqPollItem {  // zmq_pollitem_t
    void* socket;
    int descriptor;
    short events, happened;
};
struct Zmq {  // libzmq's functions; mirrored by ZmqFunctions in common/wire/zmq_functions.py
    int (*msg_init)(ZmqMessage*);
    int (*msg_init_size)(ZmqMessage*, size_t);
    void* (*msg_data)(ZmqMessage*);
    size_t (*msg_size)(const ZmqMessage*);
    int (*msg_more)(const ZmqMessage*);
    int (*msg_move)(ZmqMessage*, ZmqMessage*);
    int (*msg_close)(ZmqMessage*);
    int (*msg_send)(ZmqMessage*, void*, int);
    int (*msg_recv)(ZmqMessage*, void*, int);
    int (*poll)(ZmqPollItem*, int, long);
};
constexpr int DO_NOT_WAIT = 1, MORE_FOLLOW = 2;  // ZMQ_DONTWAIT, ZMQ_SNDMORE
constexpr short CAN_RECEIVE = 1;                 // ZMQ_POLLIN
constexpr int64_t LINK_VERSION = 1;

// One frame, sent or received; it is let go with this object.
class Frame {
  public:
    Frame() = default;
    explicit Frame(const Zmq& zmq) : zmq_(&zmq) { zmq.msg_init(&message_); }
    Frame(Frame&& other) noexcept { take(other); }
    Frame& operator=(Frame&& other) noexcept {
        if (this != &other) {
            close();
            take(other);
        }
        return *this;
    }
    ~Frame() { close(); }
    // Makes it one of so many bytes. Returns false for want of memory.
    bool make(int64_t bytes) {
        zmq_->msg_close(&message_);
        if (zmq_->msg_init_size(&message_, (size_t)bytes) == 0) return true;
        zmq_->msg_init(&message_);
        return false;
    }
    // Returns whether one has come.
    bool receive(void* socket) {
        return uninterrupted([&] { return zmq_->msg_recv(&message_, socket, DO_NOT_WAIT); });
    }
    // Returns whether it is on its way; it is empty then.
    bool send(void* socket, int flags = 0) {
        return uninterrupted([&] { return zmq_->msg_send(&message_, socket, DO_NOT_WAIT | flags); });
    }
    uint8_t* data() { return (uint8_t*)zmq_->msg_data(&message_); }
    int64_t size() const { return (int64_t)zmq_->msg_size(&message_); }
    bool has_more() const { return zmq_->msg_more(&message_) != 0; }

  private:
    // A signal must not part the frames of one message.
    template <class Call> static bool uninterrupted(const Call& call) {
        int result;
        do result = call();
        while (result < 0 && errno == EINTR);
        return result >= 0;
    }
    void take(Frame& other) {
        zmq_ = other.zmq_;
        if (!zmq_) return;
        zmq_->msg_init(&message_);
        zmq_->msg_move(&message_, &other.message_);
    }
    void close() {
        if (zmq_) zmq_->msg_close(&message_);
        zmq_ = nullptr;
    }
    const Zmq* zmq_ = nullptr;  // null: it is none
    ZmqMessage message_;
};

// Takes in the rest of a message of which `frame` is the last part so far. Returns whether there was none.
INLINE bool is_last_part(Frame& frame, void* socket) {
    if (!frame.has_more()) return true;
    while (frame.has_more() && frame.receive(socket)) {}
    return false;
}

INLINE int64_t question_bytes(const SlotHead& head, int64_t row_bytes) {
    return (int64_t)sizeof(SlotHead) + head.pairs * (int64_t)sizeof(Routing) + head.rows * row_bytes;
}
// Where things lie in a frame. It may lie anywhere in memory: what these point to is copied, not read.
INLINE Slot question_in(uint8_t* frame, int64_t pairs) {
    uint8_t* routing = frame + sizeof(SlotHead);
    return {(SlotHead*)frame, (Routing*)routing, routing + pairs * sizeof(Routing), nullptr};
}

uint64_t link_seal(int64_t incarnation, int64_t shards, const RingShape& shape) {
    const int64_t agreed[] = {LINK_VERSION,    incarnation, shards,          shape.slots,
                              shape.max_rows, shape.max_pairs, shape.width, shape.value_bytes};
    return checksum(agreed, sizeof agreed, 0);
}

}  // namespace
