// A stage's side of rings and links: deals the pairs of an expert call out to nodes, writes what they are asked, takes
// in what comes back, and adds it up.
//
// A pair is (token, k, slice), numbered (t * K + k) * S + s; a shard is expert * S + slice, as in experts/dispatch.py,
// whose choices these are.

#pragma once

#include <algorithm>
#include <vector>

#include "call_link.h"

namespace {

struct StageLink {  // mirrored by LinkState in services/stage/experts/peers.py
    const Zmq* zmq;
    void* socket;  // null once it was given up
    uint64_t seal;
    int64_t sent_bytes, dropped;  // dropped: what nobody waited for any more, or made no sense
};
struct RingPeer {  // one node; mirrored by PeerEntry in services/stage/experts/peers.py
    uint8_t* memory;
    StageLink* link;  // null: the node has mapped the memory too
    int64_t bell;     // of a ring
    int64_t owed_rows;  // what it has been asked for and has not answered, in pairs
};
struct ExpertQuestion {  // mirrored by _Question there
    const uint8_t* hidden;   // [tokens][width]
    const int64_t* experts;  // [tokens][choices]
    int64_t tokens, choices, slices, layer, deadline_ns, first_number;
    const int32_t* holders;  // [shards][copies]: peers that hold it, first choice first; -1 where there is none
    int64_t shards, copies;
};
struct AskedPart {  // of one piece, what one node is asked; mirrored by _Part there
    int64_t peer;
    int64_t slot;  // NO_SLOT: it is not written yet; those that are written come first
    int64_t number, first, pairs;
    int64_t state;  // WAITING, TAKEN_IN, or minus the outcome that is not an answer
};
constexpr int64_t WAITING = 0, TAKEN_IN = 1, NO_SLOT = -1;
constexpr int64_t PIECES_AT_A_TIME = 2;  // of a call, in one ring; the second one leaves a slot to other calls
constexpr int64_t LOOKING_NS = 200'000;  // as long as a few rows take; a core that sleeps takes 20 to 50 us to wake up
constexpr int ANSWERS_AT_A_TIME = 64;  // of one link; mirrored by FLOOD in services/stage/experts/peers.py
constexpr int64_t WEIGHT_READ_ROWS = 8;  // as in dispatch.py

struct Dealer {  // memory that the stage's thread keeps
    std::vector<int64_t> rows_of_shard, load, order, row_of_token;
    std::vector<int32_t> node_of_shard;
    std::vector<Routing> routing;
    std::vector<uint8_t> rows, answer;
    std::vector<ZmqPollItem> waited_for;
};
thread_local Dealer dealer;

INLINE int64_t shard_of(const ExpertQuestion& q, int64_t pair) {
    return q.experts[pair / q.slices] * q.slices + pair % q.slices;
}

// Chooses a node for every shard of the call, the busiest shard first. Returns false where one has no node.
bool deal(const ExpertQuestion& q, const RingPeer* peers, int64_t num_peers) {
    const int64_t pairs = q.tokens * q.choices * q.slices;
    dealer.rows_of_shard.assign(q.shards, 0);
    for (int64_t i = 0; i < pairs; i++) {
        const int64_t shard = shard_of(q, i);
        if (shard < 0 || shard >= q.shards) return false;
        dealer.rows_of_shard[shard]++;
    }
    dealer.order.clear();
    for (int64_t shard = 0; shard < q.shards; shard++)
        if (dealer.rows_of_shard[shard]) dealer.order.push_back(shard);
    std::stable_sort(dealer.order.begin(), dealer.order.end(), [](int64_t a, int64_t b) {
        return dealer.rows_of_shard[a] > dealer.rows_of_shard[b];
    });
    dealer.load.resize(num_peers);
    for (int64_t peer = 0; peer < num_peers; peer++) dealer.load[peer] = peers[peer].owed_rows;
    dealer.node_of_shard.assign(q.shards, -1);
    for (int64_t shard : dealer.order) {
        int32_t best = -1;
        for (int64_t copy = 0; copy < q.copies; copy++) {
            const int32_t peer = q.holders[shard * q.copies + copy];
            if (peer >= 0 && (best < 0 || dealer.load[peer] < dealer.load[best])) best = peer;
        }
        if (best < 0) return false;
        dealer.load[best] += dealer.rows_of_shard[shard] + WEIGHT_READ_ROWS;
        dealer.node_of_shard[shard] = best;
    }
    return true;
}

// Returns the first free slot, where so many others are free, too.
INLINE int64_t free_slot(const RingPeer& peer, const RingShape& shape, int64_t others = 0) {
    int64_t first = NO_SLOT, free = 0;
    for (int64_t slot = 0; slot < shape.slots; slot++)
        if (state_of(slot_of(peer.memory, shape, slot).head) == FREE && free++ == 0) first = slot;
    return free > others ? first : NO_SLOT;
}

// Copies what is asked to its place. Returns the checksum of all of it, which is of memory of our own: what changes in
// the shared one from here on is noticed.
uint64_t put_question(const Slot& slot, const SlotHead& head, const uint8_t* rows, int64_t row_bytes, uint64_t seal) {
    uint64_t sum = checksum_of_head(head, seal);
    sum = copied(slot.routing, dealer.routing.data(), head.pairs * (int64_t)sizeof(Routing), sum);
    return copied(slot.rows, rows, head.rows * row_bytes, sum);
}

// Returns false where the link does not take it now.
bool send_question(StageLink& link, SlotHead& head, const uint8_t* rows, int64_t row_bytes) {
    if (!link.socket) return false;
    Frame frame(*link.zmq);
    if (!frame.make(question_bytes(head, row_bytes))) return false;
    head.deadline_ns -= monotonic_ns();
    const Slot place = question_in(frame.data(), head.pairs);
    head.asked_checksum = put_question(place, head, rows, row_bytes, link.seal);
    memcpy((void*)place.head, &head, sizeof head);
    const int64_t bytes = frame.size();
    if (!frame.send(link.socket)) return false;
    link.sent_bytes += bytes;
    return true;
}

// Returns false where it could not be.
bool write_part(const ExpertQuestion& q, const RingPeer& peer, const RingShape& shape, const AskedPart& part,
                const int64_t* pairs, bool takes_all_tokens) {
    const Slot slot = slot_of(peer.memory, shape, part.slot);
    const int64_t pairs_of_token = q.choices * q.slices, row_bytes = shape.width * shape.value_bytes;
    SlotHead head = {};
    head.number = part.number;
    head.layer = q.layer;
    head.deadline_ns = q.deadline_ns;
    head.pairs = part.pairs;
    dealer.row_of_token.assign(q.tokens, -1);
    if (takes_all_tokens) {
        head.rows = q.tokens;
        for (int64_t token = 0; token < q.tokens; token++) dealer.row_of_token[token] = token;
    } else {
        for (int64_t i = 0; i < part.pairs; i++) dealer.row_of_token[pairs[i] / pairs_of_token] = 0;
        for (int64_t& row : dealer.row_of_token)
            if (row == 0) row = head.rows++;
    }
    dealer.routing.resize(part.pairs);
    for (int64_t i = 0; i < part.pairs; i++)
        dealer.routing[i] = {(int32_t)dealer.row_of_token[pairs[i] / pairs_of_token],
                             (int32_t)shard_of(q, pairs[i])};
    const uint8_t* rows = q.hidden;
    if (head.rows < q.tokens) {
        dealer.rows.resize(head.rows * row_bytes);
        for (int64_t token = 0; token < q.tokens; token++)
            if (dealer.row_of_token[token] >= 0)
                memcpy(&dealer.rows[dealer.row_of_token[token] * row_bytes], q.hidden + token * row_bytes, row_bytes);
        rows = dealer.rows.data();
    }
    head.state = FREE;
    if (!peer.link)
        head.asked_checksum = put_question(slot, head, rows, row_bytes, 0);
    else if (!send_question(*peer.link, head, rows, row_bytes))
        return false;
    *slot.head = head;
    set_state(slot.head, ASKED);
    return true;
}

// Writes what is not written yet, as far as there are slots. Bells are rung last: a node that finds two pieces reads its
// weights once for both.
void write_parts(const ExpertQuestion& q, AskedPart* parts, int64_t num_parts, RingPeer* peers, const RingShape& shape,
                 const int64_t* pairs) {
    int64_t first = 0;
    while (first < num_parts && parts[first].slot != NO_SLOT) first++;
    int64_t next = first;
    for (; next < num_parts; next++) {
        AskedPart& part = parts[next];
        int64_t under_way = 0;
        for (int64_t i = 0; i < next; i++) under_way += parts[i].peer == part.peer && parts[i].state == WAITING;
        if (under_way < PIECES_AT_A_TIME) part.slot = free_slot(peers[part.peer], shape, under_way);
        if (part.slot == NO_SLOT) break;
        if (!write_part(q, peers[part.peer], shape, part, pairs + part.first, q.tokens == 1)) {
            part.slot = NO_SLOT;
            break;
        }
        peers[part.peer].owed_rows += part.pairs;
    }
    for (int64_t i = first; i < next; i++)
        if (!peers[parts[i].peer].link) ring_bell(peers[parts[i].peer].bell);
}

INLINE int64_t pieces_of(int64_t tokens, const RingShape& shape) {
    return (tokens + shape.max_rows - 1) / shape.max_rows;
}

// Asks for all pairs of a call, in as few pieces as rings have room for, of equally many tokens; later ones are written
// by await_answers. `pairs` [T*K*S] becomes their numbers, piece by piece, node by node, sorted by shard within each;
// `parts` [pieces * peers] says what each node was asked in each piece. Returns the number of parts; 0 where a shard is
// held by nobody; -1: a node has no free slot, or takes nothing now. In both cases nobody was asked.
int64_t ask_experts(const ExpertQuestion& q, RingPeer* peers, int64_t num_peers, const RingShape& shape, int64_t* pairs,
                    AskedPart* parts) {
    if (!deal(q, peers, num_peers)) return 0;
    const int64_t pairs_of_token = q.choices * q.slices, pieces = pieces_of(q.tokens, shape);
    int64_t num_parts = 0, first = 0;
    for (int64_t piece = 0; piece < pieces; piece++) {
        const int64_t begin = q.tokens * piece / pieces * pairs_of_token;
        const int64_t end = q.tokens * (piece + 1) / pieces * pairs_of_token;
        for (int64_t peer = 0; peer < num_peers; peer++) {
            AskedPart part = {peer, NO_SLOT, q.first_number + num_parts, first, 0, WAITING};
            for (int64_t i = begin; i < end; i++)
                if (dealer.node_of_shard[shard_of(q, i)] == peer) pairs[first + part.pairs++] = i;
            if (!part.pairs) continue;
            if (free_slot(peers[peer], shape) == NO_SLOT) return -1;
            std::stable_sort(pairs + first, pairs + first + part.pairs,
                             [&](int64_t a, int64_t b) { return shard_of(q, a) < shard_of(q, b); });
            first += part.pairs;
            parts[num_parts++] = part;
        }
    }
    write_parts(q, parts, num_parts, peers, shape, pairs);
    return num_parts && parts[0].slot == NO_SLOT ? -1 : num_parts;
}

// Takes one answer off a link, to the slot of its number. What was not wanted any more frees its slot.
void put_answer(const RingPeer& peer, const RingShape& shape, const uint8_t* frame, int64_t size) {
    SlotHead head;
    memcpy(&head, frame, sizeof head);
    for (int64_t index = 0; index < shape.slots; index++) {
        const Slot slot = slot_of(peer.memory, shape, index);
        if (state_of(slot.head) == FREE || slot.head->number != head.number) continue;
        if (state_of(slot.head) == UNWANTED) {
            set_state(slot.head, FREE);
            peer.link->dropped += head.outcome == GIVEN;
            return;
        }
        if (state_of(slot.head) != ASKED) return;  // said twice
        const int64_t bytes = head.outcome == GIVEN ? slot.head->pairs * shape.width * shape.value_bytes : 0;
        const bool fits = size == (int64_t)sizeof head + bytes;
        if (fits) memcpy(slot.answer, frame + sizeof head, bytes);
        slot.head->outcome = fits ? head.outcome : DAMAGED;
        slot.head->answered_checksum =
            fits ? head.answered_checksum : checksum_of_outcome(head.number, DAMAGED, peer.link->seal);
        set_state(slot.head, ANSWERED);
        return;
    }
    peer.link->dropped++;
}

// Takes off a link what has come.
void receive_answers(const RingPeer& peer, const RingShape& shape) {
    if (!peer.link || !peer.link->socket) return;
    Frame frame(*peer.link->zmq);
    for (int i = 0; i < ANSWERS_AT_A_TIME && frame.receive(peer.link->socket); i++) {
        if (is_last_part(frame, peer.link->socket) && frame.size() >= (int64_t)sizeof(SlotHead))
            put_answer(peer, shape, frame.data(), frame.size());
        else
            peer.link->dropped++;
    }
}

// Takes in what has come for one part: each row goes to the place of its pair in `rows` [T*K*S][width].
void take_in(AskedPart& part, RingPeer& peer, const RingShape& shape, const int64_t* pairs, uint8_t* rows) {
    if (part.state != WAITING || part.slot == NO_SLOT) return;
    const Slot slot = slot_of(peer.memory, shape, part.slot);
    if (state_of(slot.head) != ANSWERED) return;
    const SlotHead head = *slot.head;
    const int64_t row_bytes = shape.width * shape.value_bytes;
    uint64_t sum = checksum_of_outcome(part.number, head.outcome, peer.link ? peer.link->seal : 0);
    if (head.outcome == GIVEN) {
        dealer.answer.resize(part.pairs * row_bytes);
        sum = copied(dealer.answer.data(), slot.answer, part.pairs * row_bytes, sum);
    }
    const bool is_whole = head.number == part.number && sum == head.answered_checksum && head.outcome <= DAMAGED;
    for (int64_t i = 0; is_whole && head.outcome == GIVEN && i < part.pairs; i++)
        memcpy(rows + pairs[part.first + i] * row_bytes, dealer.answer.data() + i * row_bytes, row_bytes);
    part.state = !is_whole ? -(int64_t)DAMAGED : head.outcome == GIVEN ? TAKEN_IN : -(int64_t)head.outcome;
    peer.owed_rows -= part.pairs;
    set_state(slot.head, FREE);
}

// Returns how many parts are still to come.
int64_t take_in_all(AskedPart* parts, int64_t num_parts, RingPeer* peers, const RingShape& shape, const int64_t* pairs,
                    uint8_t* rows) {
    int64_t waiting = 0;
    for (int64_t i = 0; i < num_parts; i++) {
        if (parts[i].state == WAITING) receive_answers(peers[parts[i].peer], shape);
        take_in(parts[i], peers[parts[i].peer], shape, pairs, rows);
        waiting += parts[i].state == WAITING;
    }
    return waiting;
}

void look_for_answers(const AskedPart* parts, int64_t num_parts, const RingPeer* peers, bool looks) {
    for (int64_t i = 0; i < num_parts; i++) set_looking(peers[parts[i].peer].memory, looks);
}

// Waits for a bell, or for a link that owes something.
void await_something(const AskedPart* parts, int64_t num_parts, const RingPeer* peers, int64_t bell,
                     int64_t timeout_ns) {
    const Zmq* zmq = nullptr;
    dealer.waited_for.assign(1, {nullptr, (int)bell, CAN_RECEIVE, 0});
    for (int64_t i = 0; i < num_parts; i++) {
        const StageLink* link = peers[parts[i].peer].link;
        if (parts[i].state != WAITING || !link || !link->socket) continue;
        zmq = link->zmq;
        dealer.waited_for.push_back({link->socket, 0, CAN_RECEIVE, 0});
    }
    if (!zmq) return await_bell(bell, timeout_ns);
    zmq->poll(dealer.waited_for.data(), (int)dealer.waited_for.size(), (long)((timeout_ns + 999'999) / 1'000'000));
    if (dealer.waited_for[0].happened) await_bell(bell, 0);
}

// Returns how many parts are still to come after so long. For a moment it looks all the time, then it waits for a bell.
int64_t await_answers(const ExpertQuestion& q, AskedPart* parts, int64_t num_parts, RingPeer* peers,
                      const RingShape& shape, const int64_t* pairs, uint8_t* rows, int64_t bell, int64_t timeout_ns) {
    const int64_t began_ns = monotonic_ns(), until_ns = began_ns + timeout_ns;
    bool looks = timeout_ns > 0;
    if (looks) look_for_answers(parts, num_parts, peers, true);
    for (;;) {
        const int64_t waiting = take_in_all(parts, num_parts, peers, shape, pairs, rows);
        if (waiting && parts[num_parts - 1].slot == NO_SLOT) write_parts(q, parts, num_parts, peers, shape, pairs);
        const int64_t now_ns = monotonic_ns();
        const bool is_over = !waiting || now_ns >= until_ns;
        if (looks && !is_over && now_ns - began_ns < LOOKING_NS) {
            sched_yield();
        } else if (looks) {
            look_for_answers(parts, num_parts, peers, looks = false);
            if (!waiting) return 0;  // else it looks once more: what came just now has rung no bell
        } else if (is_over) {
            return waiting;
        } else {
            await_something(parts, num_parts, peers, bell, until_ns - now_ns);
        }
    }
}

// Says that a call is not wanted any more: a head without pairs. One that does not arrive costs the node a call.
void send_cancel(const StageLink& link, int64_t number) {
    if (!link.socket) return;
    SlotHead head = {};
    head.number = number;
    head.asked_checksum = checksum_of_head(head, link.seal);
    Frame frame(*link.zmq);
    if (!frame.make(sizeof head)) return;
    memcpy(frame.data(), &head, sizeof head);
    frame.send(link.socket);
}

// Takes a part back that is not wanted any more; its slot is free now, or once the node has finished.
void take_back(AskedPart& part, RingPeer& peer, const RingShape& shape) {
    if (part.state != WAITING) return;
    SlotHead* head = slot_of(peer.memory, shape, part.slot).head;
    if (peer.link && change_state(head, ASKED, UNWANTED))
        send_cancel(*peer.link, part.number);
    else if (!change_state(head, ASKED, FREE) && !change_state(head, TAKEN, UNWANTED))
        set_state(head, FREE);
    part.state = -(int64_t)OUT_OF_TIME;
    peer.owed_rows -= part.pairs;
}

INLINE void add_weighted(float* total, const float* expert, float weight, bool is_first, int64_t width) {
    for (int64_t i = 0; i < width; i++) total[i] = is_first ? expert[i] * weight : total[i] + expert[i] * weight;
}
INLINE void widen(const float* from, float* to, int64_t n) { memcpy(to, from, n * sizeof(float)); }
INLINE void widen(const bf16* from, float* to, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        const uint32_t bits = (uint32_t)from[i] << 16;
        memcpy(to + i, &bits, sizeof bits);
    }
}

// out[t] = sum over k, in the gate's order, of weights[t][k] * (sum over slices of the pair's row), in float32: the
// bits of `ExactSum` in dispatch.py.
template <class T>
void sum_experts(const T* rows, const float* weights, int64_t tokens, int64_t choices, int64_t slices, int64_t width,
                 T* out) {
    std::vector<float> expert(padded(width, LANES)), slice(padded(width, LANES)), total(padded(width, LANES));
    for (int64_t token = 0; token < tokens; token++) {
        for (int64_t choice = 0; choice < choices; choice++) {
            const T* row = rows + (token * choices + choice) * slices * width;
            widen(row, expert.data(), width);
            for (int64_t s = 1; s < slices; s++) {
                widen(row + s * width, slice.data(), width);
                for (int64_t i = 0; i < width; i++) expert[i] += slice[i];
            }
            add_weighted(total.data(), expert.data(), weights[token * choices + choice], choice == 0, width);
        }
        for (int64_t i = 0; i < width; i += LANES)
            put(out + token * width + i, load(total.data() + i), std::min<int64_t>(width - i, LANES));
    }
}

}  // namespace
