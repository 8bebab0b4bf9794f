// The expert node's side of rings and links: a thread that takes calls, computes those of one layer together, and
// answers. What comes over links waits here until the turn of its layer.
//
// It needs no interpreter. Python gives it rings and shards, and reads what it counts. Both change only between two
// batches: whoever changes them waits for the one under way, so that the weights of a shard that was let go are in no
// use any more.

#pragma once

#include <atomic>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "call_link.h"
#include "gated_ffn.h"

namespace {

struct CallCounts {  // mirrored by RingCounts in services/expert/ring_server.py
    std::atomic<int64_t> steps{0}, rows{0}, busy_ns{0}, answer_bytes{0}, refused{0}, in_hand{0};
};

struct ShardChange {  // mirrored by CallThread._changed there
    int64_t place;  // layer * shards of a layer + shard
    const void *gate, *up, *down;
    int64_t width;
};

struct NodeLinks {  // where links come in; mirrored by NodeLinks there
    const Zmq* zmq;
    void* socket;  // a ROUTER, of the thread alone as long as there is one; null: there are no links
    int64_t incarnation;
};

class CallServer {
  public:
    CallServer(int64_t layers, int64_t shards, const RingShape& shape, bool is_bf16, int64_t threads, int64_t bell)
        : shape_(shape), shards_(shards), is_bf16_(is_bf16), threads_(threads), bell_(bell), held_(layers * shards) {
        thread_ = std::thread([this] { serve(); });
    }
    ~CallServer() {
        stop_ = true;
        ring_bell(bell_);
        thread_.join();
    }
    void add_ring(int64_t id, uint8_t* memory, int64_t stage_bell) {
        const Change change(*this);
        rings_.push_back({id, memory, stage_bell});
    }
    void remove_ring(int64_t id) {
        const Change change(*this);
        for (size_t i = 0; i < rings_.size(); i++)
            if (rings_[i].id == id) rings_.erase(rings_.begin() + i--);
    }
    // Calls may be waiting there: shards come first.
    void open_links(const NodeLinks& links) {
        const Change change(*this);
        links_ = links;
        seal_ = link_seal(links.incarnation, shards_, shape_);
        ring_bell(bell_);
    }
    void set_shards(const ShardChange* changes, int64_t count) {
        const Change change(*this);
        for (int64_t i = 0; i < count; i++) {
            const ShardChange& shard = changes[i];
            held_[shard.place] = {shard.gate, shard.up, shard.down, shard.width, 0, 0};
        }
    }
    CallCounts counts;

  private:
    struct Ring {
        int64_t id;
        uint8_t* memory;
        int64_t stage_bell;
    };
    struct Call {
        Ring ring;  // without memory: it has come over a link
        Slot slot;
        SlotHead head;  // as it was when the call was taken
        int64_t deadline_ns;  // on this host's clock
        std::vector<Routing> routing;
        Outcome outcome;
        const uint8_t* answer;  // in memory of our own
        Frame sender, frame;    // of a link: who asks, and what
    };
    // The lock between two batches. The thread lets those that wait for it go first.
    struct Change {
        explicit Change(CallServer& server) : server(server) {
            server.waiting_++;
            server.guard_.lock();
            server.waiting_--;
        }
        ~Change() { server.guard_.unlock(); }
        CallServer& server;
    };

    void serve() {
        while (!stop_) {
            while (waiting_) std::this_thread::yield();
            bool has_worked;
            NodeLinks links;
            {
                std::lock_guard<std::mutex> lock(guard_);
                has_worked = answer_next_layer();
                links = links_;  // they may be opened while it waits
            }
            if (!has_worked) await_call(links);
        }
    }

    void await_call(const NodeLinks& links) {
        if (!links.socket) return await_bell(bell_, LONGEST_WAIT_NS);
        ZmqPollItem items[] = {{links.socket, 0, CAN_RECEIVE, 0}, {nullptr, (int)bell_, CAN_RECEIVE, 0}};
        links.zmq->poll(items, 2, LONGEST_WAIT_NS / 1'000'000);
        if (items[1].happened) await_bell(bell_, 0);
    }

    // Takes all calls of one layer, beginning with another ring each time, or with the links, and answers them.
    bool answer_next_layer() {
        calls_.clear();
        pairs_ = 0;
        receive_calls();
        const bool links_first = first_ring_ % ((int64_t)rings_.size() + 1) == (int64_t)rings_.size();
        if (links_first) take_received();
        const int64_t count = (int64_t)rings_.size() * shape_.slots;
        for (int64_t i = 0; i < count; i++) {
            const Ring& ring = rings_[(first_ring_ + i / shape_.slots) % rings_.size()];
            const Slot slot = slot_of(ring.memory, shape_, i % shape_.slots);
            if (state_of(slot.head) != ASKED || !change_state(slot.head, ASKED, TAKEN)) continue;
            const SlotHead head = *slot.head;  // once: a peer may change it at any time
            if (is_next(head))
                begin({ring, slot, head, head.deadline_ns, {}, GIVEN, nullptr, {}, {}});
            else if (!change_state(slot.head, TAKEN, ASKED))
                set_state(slot.head, FREE);  // nobody wants it any more
        }
        if (!links_first) take_received();
        first_ring_++;
        if (calls_.empty()) return false;
        counts.in_hand = (int64_t)(calls_.size() + received_.size());
        const int64_t began_ns = monotonic_ns();
        const int64_t rows = is_bf16_ ? compute<bf16>(began_ns) : compute<float>(began_ns);
        for (Call& call : calls_) give(call);
        counts.rows += rows;
        counts.steps += (int64_t)calls_.size();
        counts.busy_ns += monotonic_ns() - began_ns;
        counts.in_hand = (int64_t)received_.size();
        return true;
    }

    // Whether a call may be computed with those that are begun: of one layer, and only so many that memory suffices.
    bool is_next(const SlotHead& head) const {
        return calls_.empty() || (head.layer == calls_[0].head.layer &&
                                  (pairs_ + pairs_of(head)) * row_bytes() <= MAX_BATCH_BYTES);
    }
    void begin(Call&& call) {
        pairs_ += pairs_of(call.head);
        calls_.push_back(std::move(call));
    }
    int64_t pairs_of(const SlotHead& head) const { return fits(head) ? head.pairs : 0; }
    int64_t row_bytes() const { return shape_.width * shape_.value_bytes; }

    // Takes in what has come over links. What makes no sense, and what would be too much, is answered at once: nothing
    // that has come stays in the socket, whose memory has no bound in bytes.
    void receive_calls() {
        for (int i = 0; links_.socket && i < MAX_FRAMES; i++) {
            Call call = {{0, nullptr, -1}, {}, {}, 0, {}, GIVEN, nullptr, Frame(*links_.zmq), Frame(*links_.zmq)};
            if (!call.sender.receive(links_.socket)) return;
            const bool is_one = call.sender.has_more() && call.frame.receive(links_.socket) &&
                                is_last_part(call.frame, links_.socket);
            if (!is_one || call.frame.size() < (int64_t)sizeof(SlotHead)) {
                counts.refused++;  // nobody can be told
                continue;
            }
            memcpy(&call.head, call.frame.data(), sizeof(SlotHead));
            if (call.head.pairs == 0) {
                cancel(call);
                continue;
            }
            call.deadline_ns = monotonic_ns() + std::clamp<int64_t>(call.head.deadline_ns, 0, LONGEST_CALL_NS);
            const bool is_whole = fits(call.head) && call.frame.size() == question_bytes(call.head, row_bytes());
            if (is_whole && has_room(call)) {
                received_bytes_ += call.frame.size();
                received_.push_back(std::move(call));
                continue;
            }
            call.outcome = is_whole ? OUT_OF_TIME : MALFORMED;
            give(call);
        }
    }

    // A stage has no more calls under way than slots.
    bool has_room(Call& call) {
        int64_t waiting = 0;
        for (Call& other : received_) waiting += is_same_sender(other, call);
        return waiting < shape_.slots && received_.size() < MAX_RECEIVED &&
               received_bytes_ + call.frame.size() <= MAX_RECEIVED_BYTES;
    }

    // A call that has not been begun, and is not wanted any more, frees its slot by an answer, as all do.
    void cancel(Call& wish) {
        if (checksum_of_head(wish.head, seal_) != wish.head.asked_checksum) {
            counts.refused++;
            return;
        }
        for (auto call = received_.begin(); call != received_.end(); call++) {
            if (call->head.number != wish.head.number || !is_same_sender(*call, wish)) continue;
            call->outcome = OUT_OF_TIME;
            give(*call);
            received_bytes_ -= call->frame.size();
            received_.erase(call);
            return;
        }
    }

    static bool is_same_sender(Call& one, Call& other) {
        return one.sender.size() == other.sender.size() &&
               !memcmp(one.sender.data(), other.sender.data(), one.sender.size());
    }

    // Takes those of the layer whose turn it is; that of the first one where no layer has its turn yet.
    void take_received() {
        size_t kept = 0;
        for (Call& call : received_) {
            if (is_next(call.head)) {
                received_bytes_ -= call.frame.size();
                call.slot = question_in(call.frame.data(), call.head.pairs);
                begin(std::move(call));
            } else if (&received_[kept++] != &call) {
                received_[kept - 1] = std::move(call);
            }
        }
        received_.resize(kept);
    }

    bool fits(const SlotHead& head) const {
        return head.rows >= 1 && head.rows <= shape_.max_rows && head.pairs >= 1 && head.pairs <= shape_.max_pairs;
    }

    // Reads what is asked, into memory of our own. Rows go to `x`, one a pair.
    template <class T> Outcome read_call(Call& call, std::vector<T>& x, int64_t now_ns) {
        const SlotHead& head = call.head;
        const int64_t width = shape_.width, layers = (int64_t)held_.size() / shards_;
        if (!fits(head) || head.layer < 0 || head.layer >= layers) return MALFORMED;
        call.routing.resize(head.pairs);
        rows_.resize(head.rows * width * sizeof(T));
        uint64_t sum = checksum_of_head(head, seal_of(call));
        sum = copied(call.routing.data(), call.slot.routing, head.pairs * (int64_t)sizeof(Routing), sum);
        sum = copied(rows_.data(), call.slot.rows, head.rows * width * (int64_t)sizeof(T), sum);
        if (sum != head.asked_checksum) return DAMAGED;
        if (now_ns >= call.deadline_ns) return OUT_OF_TIME;
        int32_t last = 0;
        for (const Routing& pair : call.routing) {
            if (pair.row < 0 || pair.row >= head.rows || pair.shard < last || pair.shard >= shards_) return MALFORMED;
            if (!held_[head.layer * shards_ + pair.shard].gate) return NOT_HELD;
            last = pair.shard;
        }
        const size_t first = x.size();
        x.resize(first + head.pairs * width);
        for (int64_t i = 0; i < head.pairs; i++)
            memcpy(&x[first + i * width], rows_.data() + call.routing[i].row * width * sizeof(T), width * sizeof(T));
        return GIVEN;
    }

    // Computes all calls that make sense; a shard's weights are read once for all of them. Returns the routed rows.
    template <class T> int64_t compute(int64_t now_ns) {
        std::vector<T>& x = values(asked_f32_, asked_bf16_, (T*)nullptr);
        x.clear();
        order_.clear();
        for (Call& call : calls_) {
            call.outcome = read_call(call, x, now_ns);
            if (call.outcome != GIVEN) continue;
            for (const Routing& pair : call.routing) order_.push_back({pair.shard, (int64_t)order_.size()});
        }
        const int64_t width = shape_.width, rows = (int64_t)order_.size();
        if (!rows) return 0;
        // Each call is in order already: only several of them have to be merged.
        std::stable_sort(order_.begin(), order_.end(), [](const Pair& a, const Pair& b) { return a.shard < b.shard; });
        std::vector<T>&sorted = values(sorted_f32_, sorted_bf16_, (T*)nullptr),
        &y = values(answers_f32_, answers_bf16_, (T*)nullptr);
        sorted.resize(rows * width);
        y.resize(rows * width);
        groups_.clear();
        for (int64_t i = 0; i < rows; i++) {
            memcpy(&sorted[i * width], &x[order_[i].row * width], width * sizeof(T));
            if (i == 0 || order_[i].shard != order_[i - 1].shard) {
                groups_.push_back(held_[calls_[0].head.layer * shards_ + order_[i].shard]);
                groups_.back().begin = i;
            }
            groups_.back().end = i + 1;
        }
        grouped_ffn(sorted.data(), y.data(), groups_.data(), (int64_t)groups_.size(), width, threads_);
        // In the order in which it was asked, call by call: `x` is not needed any more.
        for (int64_t i = 0; i < rows; i++) memcpy(&x[order_[i].row * width], &y[i * width], width * sizeof(T));
        int64_t first = 0;
        for (Call& call : calls_) {
            if (call.outcome != GIVEN) continue;
            call.answer = (const uint8_t*)&x[first];
            first += call.head.pairs * width;
        }
        return rows;
    }

    // Says how a call has ended. Its slot is the next call's as soon as its state has changed.
    void give(Call& call) {
        uint64_t sum = checksum_of_outcome(call.head.number, call.outcome, seal_of(call));
        const int64_t bytes = call.outcome == GIVEN ? call.head.pairs * shape_.width * shape_.value_bytes : 0;
        counts.answer_bytes += bytes;
        if (call.outcome != GIVEN) counts.refused++;
        if (!call.ring.memory) return send(call, bytes, sum);
        if (bytes) sum = copied(call.slot.answer, call.answer, bytes, sum);
        SlotHead* head = call.slot.head;
        head->number = call.head.number;
        head->outcome = call.outcome;
        head->answered_checksum = sum;
        if (!change_state(head, TAKEN, ANSWERED)) set_state(head, FREE);
        if (!is_stage_looking(call.ring.memory)) ring_bell(call.ring.stage_bell);
    }

    // A stage that is gone, or takes nothing, does without.
    void send(Call& call, int64_t bytes, uint64_t sum) {
        SlotHead head = {};
        head.number = call.head.number;
        head.outcome = call.outcome;
        Frame answer(*links_.zmq);
        if (!answer.make((int64_t)sizeof head + bytes)) return;
        head.answered_checksum = bytes ? copied(answer.data() + sizeof head, call.answer, bytes, sum) : sum;
        memcpy(answer.data(), &head, sizeof head);
        if (call.sender.send(links_.socket, MORE_FOLLOW)) answer.send(links_.socket);
    }

    uint64_t seal_of(const Call& call) const { return call.ring.memory ? 0 : seal_; }

    static std::vector<float>& values(std::vector<float>& f32, std::vector<bf16>&, float*) { return f32; }
    static std::vector<bf16>& values(std::vector<float>&, std::vector<bf16>& b16, bf16*) { return b16; }

    static constexpr int64_t LONGEST_WAIT_NS = 50'000'000;  // a bell may be lost
    static constexpr int64_t LONGEST_CALL_NS = 3'600'000'000'000;
    static constexpr int MAX_FRAMES = 1024;  // that are taken in before a layer: more than come while it is computed
    static constexpr size_t MAX_RECEIVED = 1024;  // calls that wait; what comes beyond that is refused
    static constexpr int64_t MAX_RECEIVED_BYTES = 256 << 20;
    static constexpr int64_t MAX_BATCH_BYTES = 64 << 20;  // of the answers that are computed at a time
    struct Pair {
        int64_t shard, row;
    };
    const RingShape shape_;
    const int64_t shards_;
    const bool is_bf16_;
    const int64_t threads_, bell_;
    NodeLinks links_ = {};
    uint64_t seal_ = 0;
    std::vector<Group> held_;  // by layer and shard; gate is null where it is not held
    std::vector<Ring> rings_;
    int64_t first_ring_ = 0;
    std::vector<Call> calls_;
    int64_t pairs_ = 0;  // of these
    std::deque<Call> received_;  // over links, not begun yet
    int64_t received_bytes_ = 0;
    std::vector<Pair> order_;
    std::vector<Group> groups_;
    std::vector<uint8_t> rows_;
    std::vector<float> asked_f32_, sorted_f32_, answers_f32_;
    std::vector<bf16> asked_bf16_, sorted_bf16_, answers_bf16_;
    std::mutex guard_;
    std::atomic<int64_t> waiting_{0};
    std::atomic<bool> stop_{false};
    std::thread thread_;
};

}  // namespace
