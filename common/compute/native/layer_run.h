// A stage's way through its layers while nothing is out of the ordinary: the answers of one layer's experts, their sum,
// the half of the next layer, and the call to its experts, without the interpreter.
//
// A run begins with a call that was asked through rings. It ends where its caller has to look: at an answer that does
// not come soon, or is none, at a layer of another kind, at a call that cannot go through rings, at its time, and after
// the last layer.

#pragma once

#include "call_client.h"
#include "layer_half.h"

namespace {

struct RunLayer {  // mirrored by _RunLayer in services/stage/model/layer_half/run.py
    const LayerHalf* half;  // null: the layer is of another kind
    void *keys, *values;
    int64_t cache_heads, index;
};
struct Holders {  // of one layer's shards; mirrored by _Holders in services/stage/experts/rings.py
    const int32_t* table;  // as in ExpertQuestion; null: a shard has none
    int64_t shards, copies;
};
struct LayerRun {  // mirrored by RunDescriptor in run.py
    const RunLayer* layers;
    int64_t count, place;  // the layer whose experts have been asked
    const LayerBatch* batch;
    void* residual;  // [T, D]
};
struct RunSteps {  // mirrored by _RunSteps in rings.py
    const Holders* holders;      // of each layer of the run
    void* normed;                // [T, D], [T, K], [T, K]: what later calls ask
    int64_t* experts;
    float* weights;
    void* answer;                // [T, D]
    const float* asked_weights;  // those of the call that has been asked
    int64_t parts;               // of that call
    int64_t began_ns;            // when it was asked
    int64_t soon_ns;             // how long an answer may take
    int64_t until_ns;            // when the next layer is not begun any more
    int64_t *call_ns, *call_parts;  // [layers of the run]: how long each call has taken, and of how many parts it was
    int64_t* heard;                 // [peers]: 1 for those that have answered
    int64_t busy_ns;                // how long it has computed: halves of layers
};
enum RunEnd : int64_t { ANSWERED_LAST, NOT_YET_ANSWERED, NOT_ASKED };  // mirrored by RunEnd in rings.py

bool is_given(const AskedPart* parts, int64_t count) {
    return std::all_of(parts, parts + count, [](const AskedPart& part) { return part.state == TAKEN_IN; });
}

// ANSWERED_LAST: `answer` is that of the layer at `place`. NOT_YET_ANSWERED: parts of that layer's call are to come, or
// are refused. NOT_ASKED: its call has not been asked of anybody.
template <class T>
RunEnd run_layers(LayerRun& run, RunSteps& steps, ExpertQuestion& question, AskedPart* parts, RingPeer* peers,
                  int64_t num_peers, const RingShape& shape, int64_t* pairs, T* rows, int64_t bell) {
    for (steps.busy_ns = 0;;) {
        if (await_answers(question, parts, steps.parts, peers, shape, pairs, (uint8_t*)rows, bell, steps.soon_ns) ||
            !is_given(parts, steps.parts))
            return NOT_YET_ANSWERED;
        sum_experts(rows, steps.asked_weights, question.tokens, question.choices, question.slices, shape.width,
                    (T*)steps.answer);
        const int64_t now_ns = monotonic_ns(), next = run.place + 1;
        steps.call_ns[run.place] = now_ns - steps.began_ns;
        steps.call_parts[run.place] = steps.parts;
        for (int64_t i = 0; i < steps.parts; i++) steps.heard[parts[i].peer] = 1;
        if (next == run.count || !run.layers[next].half || !steps.holders[next].table || now_ns >= steps.until_ns)
            return ANSWERED_LAST;
        const RunLayer& layer = run.layers[run.place = next];
        layer_half<T>(*layer.half, *run.batch,
                      {layer.keys, layer.values, layer.cache_heads, run.residual, steps.answer, run.residual,
                       steps.normed, steps.experts, steps.weights});
        question.hidden = (const uint8_t*)steps.normed;
        question.experts = steps.experts;
        question.layer = layer.index;
        question.first_number += num_peers * pieces_of(question.tokens, shape);
        question.holders = steps.holders[next].table;
        question.shards = steps.holders[next].shards;
        question.copies = steps.holders[next].copies;
        steps.asked_weights = steps.weights;
        steps.began_ns = monotonic_ns();
        steps.busy_ns += steps.began_ns - now_ns;
        steps.parts = ask_experts(question, peers, num_peers, shape, pairs, parts);
        if (steps.parts <= 0) return NOT_ASKED;
    }
}

}  // namespace
