// Compute kernels of stage and expert nodes: linear, grouped gated FFN, paged attention, norm, rope, choice of experts,
// sampling.
//
// The numeric rule: the bits of one output row depend on that row's inputs and the weights, and on nothing else.
// How it holds here, by construction:
//   * one output element is one accumulator lane; its products are added in the order of k (float32: in sections of
//     K_SECTION, whose sums are added in order, for precision), whatever the number of rows, panels or threads.
//     Row blocking only puts several such lanes side by side.
//   * multiply-adds are explicit (`fma_of`), never left to the compiler: build with -ffp-contract=off.
//   * sums across lanes (softmax, norm) are always the same fold over 32 virtual lanes, so they do not depend on the
//     vector width either. (The gate's softmax is the exception: gate.h.)
//   * threads divide panels, rows or heads, never a sum.
// Plain C interface, no Python and no torch: common/compute/native_library.py compiles and loads it.

#include "call_server.h"
#include "gated_ffn.h"
#include "layer_run.h"
#include "rank_words.h"
#include "sampling.h"

extern "C" {

int64_t moemesh_abi_version(void) { return 11; }

const char* moemesh_variant(void) {
#if defined(__AVX512BF16__)
    return "avx512bf16";
#elif defined(__AVX512F__)
    return "avx512";
#elif defined(__AVX2__) && defined(__FMA__)
    return "avx2";
#elif defined(__aarch64__)
    return "neon";
#else
    return "generic";
#endif
}

// Values (not bytes) of the packed form of an [n, k] weight.
int64_t moemesh_packed_values(int64_t n, int64_t k, int64_t is_bf16) {
    int64_t last = (panels_of(n) - 1) * PANEL;
    return (last + panel_width(n - last)) * padded(k, is_bf16 ? 2 : 1);
}

void moemesh_pack(const void* weight, void* packed, int64_t n, int64_t k, int64_t is_bf16) {
    if (is_bf16) pack((const bf16*)weight, (bf16*)packed, n, k);
    else pack((const float*)weight, (float*)packed, n, k);
}

void moemesh_linear(const Linear* l, const void* x, int64_t x_stride, void* y, int64_t rows) {
    if (l->is_bf16)
        linear((const bf16*)x, x_stride, (const bf16*)l->packed, l->bias, (bf16*)y, rows, l->k, l->n, l->threads);
    else
        linear((const float*)x, x_stride, (const float*)l->packed, l->bias, (float*)y, rows, l->k, l->n, l->threads);
}

void moemesh_gated_ffn(const void* x, void* y, const int64_t* groups, int64_t group_count, int64_t d, int64_t is_bf16,
                       int64_t threads) {
    if (is_bf16) grouped_ffn((const bf16*)x, (bf16*)y, (const Group*)groups, group_count, d, threads);
    else grouped_ffn((const float*)x, (float*)y, (const Group*)groups, group_count, d, threads);
}

void moemesh_attention(const Attention* a, int64_t is_bf16) {
    if (is_bf16) attention<bf16>(*a);
    else attention<float>(*a);
}

void moemesh_write_kv(const void* key, int64_t key_stride, const void* value, int64_t value_stride, void* keys,
                      void* values, const int64_t* slots, int64_t tokens, int64_t kv_heads, int64_t cache_heads,
                      int64_t width, int64_t is_bf16) {
    if (is_bf16)
        write_rows((const bf16*)key, key_stride, (const bf16*)value, value_stride, (bf16*)keys, (bf16*)values, slots,
                   tokens, kv_heads, cache_heads, width);
    else
        write_rows((const float*)key, key_stride, (const float*)value, value_stride, (float*)keys, (float*)values,
                   slots, tokens, kv_heads, cache_heads, width);
}

// product[i] = silu(gate[i]) * up[i]: what the gated FFN has between its linears, for a rank that holds a part of them.
void moemesh_gated_product(const void* gate, const void* up, void* product, int64_t n, int64_t is_bf16) {
    if (is_bf16) gated_product((const bf16*)gate, (const bf16*)up, (bf16*)product, n);
    else gated_product((const float*)gate, (const float*)up, (float*)product, n);
}

void moemesh_set_word(void* word, int64_t value) { set_word((RankWord*)word, value); }

int64_t moemesh_await_word(void* word, int64_t value, const void* epoch_word, int64_t epoch, int64_t spin_ns,
                           int64_t timeout_ns) {
    return await_word((RankWord*)word, value, (const RankWord*)epoch_word, epoch, spin_ns, timeout_ns);
}

// `added` and `summed` are both null or both [rows, width].
void moemesh_rms_norm(const void* x, int64_t x_stride, const void* added, void* summed, const void* weight, void* y,
                      int64_t rows, int64_t width, float epsilon, int64_t is_bf16) {
    if (is_bf16)
        norm_rows((const bf16*)x, x_stride, (const bf16*)added, (bf16*)summed, (const bf16*)weight, (bf16*)y, rows,
                  width, epsilon);
    else
        norm_rows((const float*)x, x_stride, (const float*)added, (float*)summed, (const float*)weight, (float*)y, rows,
                  width, epsilon);
}

void moemesh_rope(const void* x, int64_t x_stride, const void* cosine, const void* sine, const void* weight,
                  int64_t weight_stride, void* y, int64_t tokens, int64_t heads, int64_t width, int64_t turned,
                  float epsilon, int64_t is_bf16) {
    if (is_bf16)
        rope_rows((const bf16*)x, x_stride, (const bf16*)cosine, (const bf16*)sine, (const bf16*)weight, weight_stride,
                  (bf16*)y, tokens, heads, width, turned, epsilon);
    else
        rope_rows((const float*)x, x_stride, (const float*)cosine, (const float*)sine, (const float*)weight,
                  weight_stride, (float*)y, tokens, heads, width, turned, epsilon);
}

// Sets the token of each row; -1 where it must be computed by the rules.
void moemesh_choose_tokens(const void* logits, int64_t stride, SamplingRow* rows, int64_t count, int64_t size,
                           int64_t is_bf16, int64_t threads) {
    if (is_bf16) choose_tokens((const bf16*)logits, stride, rows, count, size, threads);
    else choose_tokens((const float*)logits, stride, rows, count, size, threads);
}

// Calls through rings and links, of the expert node: one server a process, with the shards of one store.
void* moemesh_start_call_server(int64_t layers, int64_t shards, const RingShape* shape, int64_t is_bf16,
                                int64_t threads, int64_t bell) {
    try {
        return new CallServer(layers, shards, *shape, is_bf16, threads, bell);
    } catch (const std::system_error&) {
        return nullptr;  // there can be no more threads
    }
}
void moemesh_end_call_server(void* server) { delete (CallServer*)server; }
void moemesh_open_links(void* server, const NodeLinks* links) { ((CallServer*)server)->open_links(*links); }
void moemesh_add_ring(void* server, int64_t number, void* memory, int64_t stage_bell) {
    ((CallServer*)server)->add_ring(number, (uint8_t*)memory, stage_bell);
}
void moemesh_remove_ring(void* server, int64_t number) { ((CallServer*)server)->remove_ring(number); }
// `changes` [count]: place, gate, up, down, width; all null: it goes.
void moemesh_set_held_shards(void* server, const int64_t* changes, int64_t count) {
    ((CallServer*)server)->set_shards((const ShardChange*)changes, count);
}
void moemesh_read_call_counts(void* server, int64_t* numbers) {
    const CallCounts& counts = ((CallServer*)server)->counts;
    const std::atomic<int64_t>* all[] = {&counts.steps,        &counts.rows,    &counts.busy_ns,
                                         &counts.answer_bytes, &counts.refused, &counts.in_hand};
    for (int i = 0; i < 6; i++) numbers[i] = *all[i];
}

// Of both: what the checksums of a link begin with.
uint64_t moemesh_link_seal(int64_t incarnation, int64_t shards, const RingShape* shape) {
    return link_seal(incarnation, shards, *shape);
}

// The same of the stage.
void moemesh_receive_answers(const void* peer, const RingShape* shape) {
    receive_answers(*(const RingPeer*)peer, *shape);
}
int64_t moemesh_ask_experts(const void* question, void* peers, int64_t num_peers, const RingShape* shape,
                            int64_t* pairs, void* parts) {
    return ask_experts(*(const ExpertQuestion*)question, (RingPeer*)peers, num_peers, *shape, pairs,
                       (AskedPart*)parts);
}
int64_t moemesh_await_answers(const void* question, void* parts, int64_t num_parts, void* peers,
                              const RingShape* shape, const int64_t* pairs, void* rows, int64_t bell,
                              int64_t timeout_ns) {
    return await_answers(*(const ExpertQuestion*)question, (AskedPart*)parts, num_parts, (RingPeer*)peers, *shape,
                         pairs, (uint8_t*)rows, bell, timeout_ns);
}
void moemesh_take_call_back(void* part, void* peer, const RingShape* shape) {
    take_back(*(AskedPart*)part, *(RingPeer*)peer, *shape);
}
void moemesh_sum_experts(const void* rows, const float* weights, int64_t tokens, int64_t choices, int64_t slices,
                         int64_t width, int64_t is_bf16, void* out) {
    if (is_bf16) sum_experts((const bf16*)rows, weights, tokens, choices, slices, width, (bf16*)out);
    else sum_experts((const float*)rows, weights, tokens, choices, slices, width, (float*)out);
}

// logits [rows, experts] -> experts and weights [rows, experts_per_token].
void moemesh_choose_experts(const Choice* c, const void* logits, int64_t rows, int64_t* experts, float* weights,
                            int64_t is_bf16) {
    if (is_bf16) choose_experts(*c, (const bf16*)logits, rows, experts, weights);
    else choose_experts(*c, (const float*)logits, rows, experts, weights);
}

void moemesh_layer_half(const LayerHalf* l, const LayerBatch* b, void* keys, void* values, int64_t cache_heads,
                        const void* x, const void* fed, void* residual, void* normed, int64_t* experts,
                        float* weights) {
    const LayerTensors tensors{keys, values, cache_heads, x, fed, residual, normed, experts, weights};
    if (l->is_bf16) layer_half<bf16>(*l, *b, tensors);
    else layer_half<float>(*l, *b, tensors);
}

int64_t moemesh_run_layers(void* run, void* steps, void* question, void* parts, void* peers, int64_t num_peers,
                           const RingShape* shape, int64_t* pairs, void* rows, int64_t bell, int64_t is_bf16) {
    LayerRun& r = *(LayerRun*)run;
    RunSteps& s = *(RunSteps*)steps;
    ExpertQuestion& q = *(ExpertQuestion*)question;
    AskedPart* p = (AskedPart*)parts;
    RingPeer* nodes = (RingPeer*)peers;
    if (is_bf16) return run_layers(r, s, q, p, nodes, num_peers, *shape, pairs, (bf16*)rows, bell);
    return run_layers(r, s, q, p, nodes, num_peers, *shape, pairs, (float*)rows, bell);
}

}  // extern "C"
