// The half of a layer that lies between two feed-forward networks, and the choice of experts: one call a layer.
//
// It is the other headers' functions one after another, on the memory that they have there as tensors, so that its bits
// are theirs.

#pragma once

#include "attention.h"
#include "gate.h"
#include "linear.h"
#include "norm_rope.h"

namespace {

struct LayerHalf {  // what a layer has; mirrored by _LayerDescriptor in services/stage/model/layer_half/native.py
    const void *input_norm, *post_attention_norm;  // [D]
    const void* query_key_norm;                    // [H + Hkv, N]; null: no such norm
    const Linear *qkv, *output;
    const Linear* gate;  // null: what follows is no experts
    Choice choice;
    int64_t heads, kv_heads, head_width, window, threads, is_bf16;
    double scale, input_epsilon, query_key_epsilon, post_attention_epsilon;
};

struct LayerBatch {  // what all layers get alike; mirrored by _BatchDescriptor
    const void *cosine, *sine;   // [all positions, turned]
    const int32_t* tables;       // [S, max_blocks]
    const int32_t* sequences;    // [T], a row of tables
    const int32_t* positions;    // [T]
    const int64_t* slots;        // [T]
    int64_t tokens, max_blocks, turned;
};

struct LayerTensors {  // of one call; mirrored by the arguments of moemesh_layer_half
    void *keys, *values;  // of the layer's cache
    int64_t cache_heads;  // from one block of the cache to the next
    const void *x, *fed;  // [T, D]; fed null: there is no network before
    void *residual;       // [T, D]; it may be x
    void *normed;         // [T, D]
    int64_t* experts;     // [T, experts_per_token]
    float* weights;       // [T, experts_per_token]
};

thread_local Buffer half_buffer, logits_buffer;

// Norm and rotation of what of qkv [T, (H + 2 Hkv) * N] is not value: query [T, H * N] and key [T, Hkv * N].
template <class T>
INLINE void turn_heads(const LayerHalf& l, const LayerBatch& b, const T* qkv, T* query, T* key) {
    const int64_t width = l.head_width, query_width = l.heads * width, key_width = l.kv_heads * width;
    const T *query_norm = (const T*)l.query_key_norm, *key_norm = query_norm ? query_norm + query_width : nullptr;
    const float epsilon = (float)l.query_key_epsilon;
    for (int64_t t = 0; t < b.tokens; t++, qkv += l.qkv->n) {
        const T* cosine = (const T*)b.cosine + b.positions[t] * b.turned;
        const T* sine = (const T*)b.sine + b.positions[t] * b.turned;
        rope_rows(qkv, 0, cosine, sine, query_norm, width, query + t * query_width, 1, l.heads, width, b.turned,
                  epsilon);
        rope_rows(qkv + query_width, 0, cosine, sine, key_norm, width, key + t * key_width, 1, l.kv_heads, width,
                  b.turned, epsilon);
    }
}

// Attention in place: each part reads its rows of the query before it writes them.
template <class T>
INLINE void attend_in_place(const LayerHalf& l, const LayerBatch& b, const LayerTensors& tensors, T* query) {
    attention<T>({query, tensors.keys, tensors.values, b.tables, b.sequences, b.positions, query, b.tokens, l.heads,
                  l.kv_heads, tensors.cache_heads, l.head_width, b.max_blocks, l.window, l.threads, l.scale});
}

template <class T> INLINE void apply(const Linear& l, const T* x, T* y, int64_t rows) {
    linear(x, l.k, (const T*)l.packed, l.bias, y, rows, l.k, l.n, l.threads);
}

template <class T> void layer_half(const LayerHalf& l, const LayerBatch& b, const LayerTensors& tensors) {
    const int64_t tokens = b.tokens, width = l.qkv->k, query_width = l.heads * l.head_width;
    const int64_t key_width = l.kv_heads * l.head_width;
    const T *x = (const T*)tensors.x, *fed = (const T*)tensors.fed;
    T *residual = (T*)tensors.residual, *normed = (T*)tensors.normed;
    // The output of attention lies where queries, keys and values are before.
    const int64_t row = padded(std::max(l.qkv->n, width), LANES);
    T* qkv = half_buffer.of<T>(tokens * (row + query_width + key_width));
    T *output = qkv, *query = qkv + tokens * row, *key = query + tokens * query_width;

    norm_rows(x, width, fed, residual, (const T*)l.input_norm, normed, tokens, width, (float)l.input_epsilon);
    apply(*l.qkv, normed, qkv, tokens);
    turn_heads(l, b, qkv, query, key);
    write_rows(key, key_width, qkv + query_width + key_width, l.qkv->n, (T*)tensors.keys, (T*)tensors.values, b.slots,
               tokens, l.kv_heads, tensors.cache_heads, l.head_width);
    attend_in_place(l, b, tensors, query);
    apply(*l.output, query, output, tokens);
    norm_rows(fed ? residual : x, width, output, residual, (const T*)l.post_attention_norm, normed, tokens, width,
              (float)l.post_attention_epsilon);
    if (!l.gate) return;
    T* logits = logits_buffer.of<T>(tokens * l.gate->n);
    apply(*l.gate, normed, logits, tokens);
    choose_experts(l.choice, logits, tokens, tensors.experts, tensors.weights);
}

}  // namespace
