// Compute kernels of stage and expert nodes: linear, grouped gated FFN, paged attention, norm, rope.
//
// The numeric rule: the bits of one output row depend on that row's inputs and the weights, and on nothing else.
// How it holds here, by construction:
//   * one output element is one accumulator lane; its products are added in the order of k, whatever the number of
//     rows, panels or threads. Row blocking only puts several such lanes side by side.
//   * multiply-adds are explicit (`fma_of`), never left to the compiler: build with -ffp-contract=off.
//   * sums across lanes (softmax, norm) are always the same fold over 32 virtual lanes, so they do not depend on the
//     vector width either.
//   * threads divide panels, rows or heads, never a sum.
// Plain C interface, no Python and no torch: common/compute/native_library.py compiles and loads it.

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <memory>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")

namespace {

// ---------------------------------------------------------------------------------------------------- vectors

#if defined(__AVX512F__)
constexpr int LANES = 16, PANEL_VECTORS = 4, TILE_ROWS = 6, SCORE_ROWS = 12;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int LANES = 8, PANEL_VECTORS = 2, TILE_ROWS = 6, SCORE_ROWS = 3;
#elif defined(__aarch64__)
constexpr int LANES = 4, PANEL_VECTORS = 4, TILE_ROWS = 5, SCORE_ROWS = 2;
#else
constexpr int LANES = 4, PANEL_VECTORS = 2, TILE_ROWS = 4, SCORE_ROWS = 1;
#endif

constexpr int PANEL = LANES * PANEL_VECTORS;
constexpr int KV_BLOCK = 32;  // tokens of a KV block, the tile of attention; KV_BLOCK_TOKENS in Python
constexpr int KV_VECTORS = KV_BLOCK / LANES;

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(LANES * 4)));
typedef uint16_t vh __attribute__((vector_size(LANES * 2)));
typedef uint16_t bf16;

INLINE vf load(const float* p) { vf v; memcpy(&v, p, sizeof v); return v; }
INLINE void store(float* p, vf v) { memcpy(p, &v, sizeof v); }
INLINE vf all(float x) {
#if defined(__AVX512F__)
    return (vf)_mm512_set1_ps(x);
#else
    return x - (vf){};
#endif
}
INLINE vi all_int(int32_t x) { return x - (vi){}; }

INLINE vf fma_of(vf a, vf b, vf c) {
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;  // two roundings; -ffp-contract=off keeps it so everywhere
#endif
}

INLINE vf select(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }

INLINE float float_of(bf16 x) { uint32_t bits = (uint32_t)x << 16; float y; memcpy(&y, &bits, 4); return y; }
INLINE bf16 bf16_of(float x) {
    uint32_t bits; memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (bf16)((bits >> 16) | 0x40);
    return (bf16)((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}
INLINE vu rounded_bits(vf x) {  // nearest even, the bf16 in the upper half
    vu bits = (vu)x, r = bits + 0x7fffu + ((bits >> 16) & 1u);
    vi nan = (vi)((bits & 0x7fffffffu) > 0x7f800000u);
    return (((vu)nan & (bits | 0x400000u)) | (~(vu)nan & r)) & 0xffff0000u;
}
INLINE vf rounded(vf x) { return (vf)rounded_bits(x); }
INLINE vf load(const bf16* p) {
    vh h; memcpy(&h, p, sizeof h);
    return (vf)(__builtin_convertvector(h, vu) << 16);
}
INLINE void store(bf16* p, vf v) { vh h = __builtin_convertvector(rounded_bits(v) >> 16, vh); memcpy(p, &h, sizeof h); }

template <class T> INLINE vf load_part(const T* p, int n) {
    T whole[LANES] = {};
    memcpy(whole, p, n * sizeof(T));
    return load(whole);
}
template <class T> INLINE void store_part(T* p, vf v, int n) {
    T whole[LANES];
    store(whole, v);
    memcpy(p, whole, n * sizeof(T));
}

// exp with Cody-Waite reduction and Cephes' polynomial, about 1 ulp; exp_of(0) is exactly 1; under -87.3 exactly 0.
INLINE vf exp_of(vf x) {
    const vf low = all(-87.33654f), high = all(88.37626f);
    vi under = (vi)(x < low);
    vf y = select((vi)(x > high), high, select(under, low, x));
    const vf shift = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    vf n = fma_of(y, all(1.44269504f), shift) - shift;
    vf r = fma_of(n, all(-0.693359375f), y);
    r = fma_of(n, all(2.12194440e-4f), r);
    vf p = all(1.9875691500e-4f);
    p = fma_of(p, r, all(1.3981999507e-3f));
    p = fma_of(p, r, all(8.3334519073e-3f));
    p = fma_of(p, r, all(4.1665795894e-2f));
    p = fma_of(p, r, all(1.6666665459e-1f));
    p = fma_of(p, r, all(5.0000001201e-1f));
    p = fma_of(p * r, r, r) + all(1.0f);
    vi exponent = (__builtin_convertvector(n, vi) + 127) << 23;
    return select(under, (vf){}, p * (vf)exponent);
}

INLINE vf silu_of(vf x) { return x / (all(1.0f) + exp_of(-x)); }

// Sum and maximum of 32 virtual lanes; the sum is the same fold (halves onto each other) at any vector width.
INLINE float fold_sum(const vf v[KV_VECTORS]) {
    float lanes[KV_BLOCK];
    for (int i = 0; i < KV_VECTORS; i++) store(lanes + i * LANES, v[i]);
    for (int half = KV_BLOCK / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}
INLINE float fold_max(const vf v[KV_VECTORS]) {
    float lanes[KV_BLOCK];
    for (int i = 0; i < KV_VECTORS; i++) store(lanes + i * LANES, v[i]);
    for (int half = KV_BLOCK / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
    return lanes[0];
}

// ---------------------------------------------------------------------------------------------------- scratch, threads

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

template <class Work> void share(int64_t threads, int64_t parts, const Work& work) {
    (void)threads;
    for (int64_t part = 0; part < parts; part++) work(part);
}

// ---------------------------------------------------------------------------------------------------- the tile

// acc[r][v] += sum over k of x[r][k] * w[k][v], k ascending: the only place where products are added.
template <int ROWS, int VECTORS>
INLINE void accumulate(vf (&acc)[ROWS][VECTORS], const float* x, int64_t x_stride, const float* w, int64_t w_stride,
                       int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; k++) {
        vf column[VECTORS];
        UNROLL for (int v = 0; v < VECTORS; v++) column[v] = load(w + k * w_stride + v * LANES);
        UNROLL for (int r = 0; r < ROWS; r++) {
            vf value = all(x[r * x_stride + k]);
            UNROLL for (int v = 0; v < VECTORS; v++) acc[r][v] = fma_of(value, column[v], acc[r][v]);
        }
    }
}

// The same for bf16 weights: w holds pairs (k even in the low half, k odd in the high half of each 32-bit lane).
#if defined(__AVX512BF16__)
typedef bf16 pair_input;  // x stays bf16; dpbf16ps multiplies the pair and adds both products
template <int ROWS, int VECTORS>
INLINE void accumulate_pairs(vf (&acc)[ROWS][VECTORS], const bf16* x, int64_t x_stride, const bf16* w,
                             int64_t w_stride, int64_t pairs) {
    for (int64_t k = 0; k < pairs; k++) {
        __m512i column[VECTORS];
        UNROLL for (int v = 0; v < VECTORS; v++) column[v] = _mm512_loadu_si512(w + k * w_stride + v * 2 * LANES);
        UNROLL for (int r = 0; r < ROWS; r++) {
            int32_t pair;
            memcpy(&pair, x + r * x_stride + 2 * k, 4);
            __m512i value = _mm512_set1_epi32(pair);
            UNROLL for (int v = 0; v < VECTORS; v++)
                acc[r][v] = (vf)_mm512_dpbf16_ps((__m512)acc[r][v], (__m512bh)value, (__m512bh)column[v]);
        }
    }
}
#else
typedef float pair_input;
template <int ROWS, int VECTORS>
INLINE void accumulate_pairs(vf (&acc)[ROWS][VECTORS], const float* x, int64_t x_stride, const bf16* w,
                             int64_t w_stride, int64_t pairs) {
    for (int64_t k = 0; k < pairs; k++) {
        vu column[VECTORS];
        UNROLL for (int v = 0; v < VECTORS; v++) memcpy(&column[v], w + k * w_stride + v * 2 * LANES, sizeof(vu));
        UNROLL for (int r = 0; r < ROWS; r++) {
            vf even = all(x[r * x_stride + 2 * k]), odd = all(x[r * x_stride + 2 * k + 1]);
            UNROLL for (int v = 0; v < VECTORS; v++)
                acc[r][v] = fma_of(odd, (vf)(column[v] & 0xffff0000u), fma_of(even, (vf)(column[v] << 16), acc[r][v]));
        }
    }
}
#endif

// ---------------------------------------------------------------------------------------------------- linear

// Packed weights: panels of PANEL columns (the last one narrower, a multiple of LANES), each [K][width] float32 or
// [ceil(K/2)][width][2] bf16, zero padded.
INLINE int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <int ROWS, int VECTORS, class Out>
INLINE void finish(vf (&acc)[ROWS][VECTORS], const float* bias, Out* y, int64_t y_stride, int64_t columns) {
    UNROLL for (int v = 0; v < VECTORS; v++) {
        int64_t left = columns - v * LANES;
        if (left <= 0) continue;
        int n = left < LANES ? (int)left : LANES;
        vf b = bias ? (n == LANES ? load(bias + v * LANES) : load_part(bias + v * LANES, n)) : (vf){};
        UNROLL for (int r = 0; r < ROWS; r++) {
            vf value = bias ? acc[r][v] + b : acc[r][v];
            Out* to = y + r * y_stride + v * LANES;
            if (n == LANES) store(to, value); else store_part(to, value, n);
        }
    }
}

template <int ROWS, int VECTORS, class Out>
__attribute__((noinline)) void tile(const float* x, int64_t x_stride, const float* panel, const float* bias, Out* y,
                                    int64_t y_stride, int64_t k, int64_t columns) {
    vf acc[ROWS][VECTORS] = {};
    accumulate<ROWS, VECTORS>(acc, x, x_stride, panel, VECTORS * LANES, 0, k);
    finish<ROWS, VECTORS, Out>(acc, bias, y, y_stride, columns);
}

struct PairRows { const pair_input* x; };  // tells the overloads apart where pair_input is float
template <int ROWS, int VECTORS, class Out>
__attribute__((noinline)) void tile(PairRows x, int64_t x_stride, const bf16* panel, const float* bias, Out* y,
                                    int64_t y_stride, int64_t k, int64_t columns) {
    vf acc[ROWS][VECTORS] = {};
    accumulate_pairs<ROWS, VECTORS>(acc, x.x, x_stride, panel, 2 * VECTORS * LANES, (k + 1) / 2);
    finish<ROWS, VECTORS, Out>(acc, bias, y, y_stride, columns);
}

INLINE const float* row_at(const float* x, int64_t offset) { return x + offset; }
INLINE PairRows row_at(PairRows x, int64_t offset) { return {x.x + offset}; }

template <int VECTORS, class In, class Weight, class Out>
void panel_rows(In x, int64_t x_stride, const Weight* panel, const float* bias, Out* y, int64_t y_stride, int64_t rows,
                int64_t k, int64_t columns) {
    int64_t r = 0;
    for (; r + TILE_ROWS <= rows; r += TILE_ROWS)
        tile<TILE_ROWS, VECTORS, Out>(row_at(x, r * x_stride), x_stride, panel, bias, y + r * y_stride, y_stride, k, columns);
    In rest = row_at(x, r * x_stride);
    Out* to = y + r * y_stride;
    switch (rows - r) {
        case 5: tile<5, VECTORS, Out>(rest, x_stride, panel, bias, to, y_stride, k, columns); break;
        case 4: tile<4, VECTORS, Out>(rest, x_stride, panel, bias, to, y_stride, k, columns); break;
        case 3: tile<3, VECTORS, Out>(rest, x_stride, panel, bias, to, y_stride, k, columns); break;
        case 2: tile<2, VECTORS, Out>(rest, x_stride, panel, bias, to, y_stride, k, columns); break;
        case 1: tile<1, VECTORS, Out>(rest, x_stride, panel, bias, to, y_stride, k, columns); break;
    }
}

// y[rows][n] = x[rows][k] @ weights + bias, panel by panel.
template <class In, class Weight, class Out>
void linear_panel(In x, int64_t x_stride, const Weight* packed, int64_t k_stored, const float* bias, Out* y,
                  int64_t y_stride, int64_t rows, int64_t k, int64_t n, int64_t p) {
    const Weight* panel = packed + p * PANEL * k_stored;
    int64_t first = p * PANEL, columns = std::min<int64_t>(PANEL, n - first);
    const float* b = bias ? bias + first : nullptr;
    Out* to = y + first;
    switch ((columns + LANES - 1) / LANES) {
        case 1: panel_rows<1>(x, x_stride, panel, b, to, y_stride, rows, k, columns); break;
        case 2: panel_rows<2>(x, x_stride, panel, b, to, y_stride, rows, k, columns); break;
#if !defined(__AVX2__) || defined(__AVX512F__)
        case 3: panel_rows<3>(x, x_stride, panel, b, to, y_stride, rows, k, columns); break;
        case 4: panel_rows<4>(x, x_stride, panel, b, to, y_stride, rows, k, columns); break;
#endif
    }
}

INLINE int64_t panels_of(int64_t n) { return (n + PANEL - 1) / PANEL; }

// What accumulate_pairs reads: rows of an even number of values (bf16 as they are, or widened to float).
INLINE PairRows pair_rows(const bf16* x, int64_t& x_stride, int64_t rows, int64_t k, Buffer& buffer) {
    int64_t even = padded(k, 2);
#if defined(__AVX512BF16__)
    if (even == k) return {x};
    bf16* copy = buffer.of<bf16>(rows * even);
    for (int64_t r = 0; r < rows; r++) {
        memcpy(copy + r * even, x + r * x_stride, k * sizeof(bf16));
        copy[r * even + k] = 0;
    }
#else
    float* copy = buffer.of<float>(rows * even);
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t i = 0; i < k; i++) copy[r * even + i] = float_of(x[r * x_stride + i]);
        if (even != k) copy[r * even + k] = 0;
    }
#endif
    x_stride = even;
    return {copy};
}

thread_local Buffer input_buffer, gate_buffer, up_buffer, product_buffer;

void linear(const float* x, int64_t x_stride, const float* packed, const float* bias, float* y, int64_t rows,
            int64_t k, int64_t n, int64_t threads) {
    share(threads, panels_of(n), [&](int64_t p) { linear_panel(x, x_stride, packed, k, bias, y, n, rows, k, n, p); });
}
void linear(const bf16* x, int64_t x_stride, const bf16* packed, const float* bias, bf16* y, int64_t rows, int64_t k,
            int64_t n, int64_t threads) {
    PairRows pairs = pair_rows(x, x_stride, rows, k, input_buffer);
    share(threads, panels_of(n),
          [&](int64_t p) { linear_panel(pairs, x_stride, packed, padded(k, 2), bias, y, n, rows, k, n, p); });
}

// ---------------------------------------------------------------------------------------------------- gated FFN

struct Group {  // one expert's rows; mirrored by GROUP_FIELDS in gated_ffn.py
    const void *gate, *up, *down;
    int64_t width, begin, end;
};

INLINE void activate(const float* gate, const float* up, float* product, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES) store(product + i, silu_of(load(gate + i)) * load(up + i));
}
INLINE void activate(const float* gate, const float* up, bf16* product, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES)  // rounded where the reference materialises a bf16 tensor
        store(product + i, rounded(silu_of(rounded(load(gate + i)))) * rounded(load(up + i)));
}

void gated_ffn(const float* x, float* y, const Group& g, int64_t d, int64_t threads) {
    int64_t rows = g.end - g.begin, width = g.width, all_values = padded(rows * width, LANES);
    float *gate = gate_buffer.of<float>(all_values), *up = up_buffer.of<float>(all_values);
    float* product = product_buffer.of<float>(all_values);
    int64_t panels = panels_of(width);
    share(threads, 2 * panels, [&](int64_t p) {
        bool is_up = p >= panels;
        linear_panel(x + g.begin * d, d, (const float*)(is_up ? g.up : g.gate), d, nullptr, is_up ? up : gate, width,
                     rows, d, width, is_up ? p - panels : p);
    });
    activate(gate, up, product, all_values);
    linear(product, width, (const float*)g.down, nullptr, y + g.begin * d, rows, width, d, threads);
}
void gated_ffn(const bf16* x, bf16* y, const Group& g, int64_t d, int64_t threads) {
    int64_t rows = g.end - g.begin, width = g.width, all_values = padded(rows * width, LANES);
    float *gate = gate_buffer.of<float>(all_values), *up = up_buffer.of<float>(all_values);
    bf16* product = product_buffer.of<bf16>(all_values);
    int64_t panels = panels_of(width), x_stride = d;
    PairRows pairs = pair_rows(x + g.begin * d, x_stride, rows, d, input_buffer);
    share(threads, 2 * panels, [&](int64_t p) {
        bool is_up = p >= panels;
        linear_panel(pairs, x_stride, (const bf16*)(is_up ? g.up : g.gate), padded(d, 2), nullptr, is_up ? up : gate,
                     width, rows, d, width, is_up ? p - panels : p);
    });
    activate(gate, up, product, all_values);
    linear(product, width, (const bf16*)g.down, nullptr, y + g.begin * d, rows, width, d, threads);
}

// ---------------------------------------------------------------------------------------------------- attention

constexpr int BLOCK_ROWS = 24;  // (token, head) rows that share a KV head and go over its tiles together

struct Attention {  // mirrored by services/stage/attention_kernel.py
    const void* query;          // [T, H, d]
    const void* keys;           // [blocks, Hkv, d, 32]
    const void* values;         // [blocks, Hkv, 32, d]
    const int32_t* tables;      // [S, max_blocks]
    const int32_t* sequences;   // [T], a row of tables
    const int32_t* positions;   // [T]
    void* output;               // [T, H, d]
    int64_t tokens, heads, kv_heads, width, max_blocks, window, threads;
    double scale;
};

thread_local Buffer attention_buffer;

template <int VECTORS>
INLINE void weigh_values(float* out, int64_t out_stride, const float* weights, const float* corrections,
                         const float* values, int64_t v_stride, int rows, int begin, int end) {
    int r = 0;
    for (; r + TILE_ROWS <= rows; r += TILE_ROWS) {
        vf acc[TILE_ROWS][VECTORS];
        UNROLL for (int i = 0; i < TILE_ROWS; i++)
            UNROLL for (int v = 0; v < VECTORS; v++)
                acc[i][v] = load(out + (r + i) * out_stride + v * LANES) * all(corrections[r + i]);
        accumulate<TILE_ROWS, VECTORS>(acc, weights + r * KV_BLOCK, KV_BLOCK, values, v_stride, begin, end);
        UNROLL for (int i = 0; i < TILE_ROWS; i++)
            UNROLL for (int v = 0; v < VECTORS; v++) store(out + (r + i) * out_stride + v * LANES, acc[i][v]);
    }
    for (; r < rows; r++) {
        vf acc[1][VECTORS];
        UNROLL for (int v = 0; v < VECTORS; v++) acc[0][v] = load(out + r * out_stride + v * LANES) * all(corrections[r]);
        accumulate<1, VECTORS>(acc, weights + r * KV_BLOCK, KV_BLOCK, values, v_stride, begin, end);
        UNROLL for (int v = 0; v < VECTORS; v++) store(out + r * out_stride + v * LANES, acc[0][v]);
    }
}

// One tile of keys and values for `rows` rows, of which keys [begin, end) are seen by all of them.
INLINE void attend_tile(const float* query, float* out, float* maxima, float* sums, float* scores, float* corrections,
                        const float* keys, const float* values, int64_t width, int64_t wide, float scale, int rows,
                        int begin, int end) {
    int r = 0;
    for (; r + SCORE_ROWS <= rows; r += SCORE_ROWS) {
        vf acc[SCORE_ROWS][KV_VECTORS] = {};
        accumulate<SCORE_ROWS, KV_VECTORS>(acc, query + r * width, width, keys, KV_BLOCK, 0, width);
        UNROLL for (int i = 0; i < SCORE_ROWS; i++)
            UNROLL for (int v = 0; v < KV_VECTORS; v++) store(scores + (r + i) * KV_BLOCK + v * LANES, acc[i][v]);
    }
    for (; r < rows; r++) {
        vf acc[1][KV_VECTORS] = {};
        accumulate<1, KV_VECTORS>(acc, query + r * width, width, keys, KV_BLOCK, 0, width);
        UNROLL for (int v = 0; v < KV_VECTORS; v++) store(scores + r * KV_BLOCK + v * LANES, acc[0][v]);
    }
    vi lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    for (r = 0; r < rows; r++) {
        float* row = scores + r * KV_BLOCK;
        vf score[KV_VECTORS];
        vi seen[KV_VECTORS];
        UNROLL for (int v = 0; v < KV_VECTORS; v++) {
            vi key = lane + v * LANES;
            seen[v] = (vi)(key >= begin) & (vi)(key < end);
            score[v] = select(seen[v], load(row + v * LANES) * all(scale), all(-INFINITY));
        }
        float best = std::max(maxima[r], fold_max(score));
        float correction = exp_of(all(maxima[r] - best))[0];
        UNROLL for (int v = 0; v < KV_VECTORS; v++) {
            score[v] = select(seen[v], exp_of(score[v] - all(best)), (vf){});
            store(row + v * LANES, score[v]);
        }
        sums[r] = sums[r] * correction + fold_sum(score);
        maxima[r] = best;
        corrections[r] = correction;
    }
    int64_t c = 0;
    for (; c + PANEL <= wide; c += PANEL)
        weigh_values<PANEL_VECTORS>(out + c, wide, scores, corrections, values + c, wide, rows, begin, end);
    for (; c < wide; c += LANES)
        weigh_values<1>(out + c, wide, scores, corrections, values + c, wide, rows, begin, end);
}

// Rows [first, first + tokens) belong to one sequence; all heads of one KV head; at most BLOCK_ROWS (token, head) rows.
template <class T>
void attend_rows(const Attention& a, int64_t first_row, int rows, int64_t first_token, int64_t kv_head) {
    const int64_t width = a.width, wide = padded(width, LANES), share_of = a.heads / a.kv_heads;
    float* memory = attention_buffer.of<float>((size_t)BLOCK_ROWS * (width + wide + KV_BLOCK + 4) +
                                               (size_t)KV_BLOCK * (width + wide) + 64 * LANES);
    float* query = memory;
    float* out = query + padded(BLOCK_ROWS * width, LANES);
    float* scores = out + BLOCK_ROWS * wide;
    float* keys = scores + BLOCK_ROWS * KV_BLOCK;
    float* values = keys + padded(KV_BLOCK * width, LANES);
    float* maxima = values + KV_BLOCK * wide;
    float *sums = maxima + 2 * LANES + BLOCK_ROWS, *corrections = sums + BLOCK_ROWS;
    int64_t positions[BLOCK_ROWS], tokens[BLOCK_ROWS], heads[BLOCK_ROWS], starts[BLOCK_ROWS];
    int64_t first_tile = INT64_MAX, last_tile = 0;
    for (int r = 0; r < rows; r++) {
        int64_t flat = first_row + r;
        tokens[r] = first_token + flat / share_of;
        heads[r] = kv_head * share_of + flat % share_of;
        positions[r] = a.positions[tokens[r]];
        starts[r] = a.window > 0 ? std::max<int64_t>(0, positions[r] - a.window + 1) : 0;
        first_tile = std::min(first_tile, starts[r] / KV_BLOCK);
        last_tile = std::max(last_tile, positions[r] / KV_BLOCK);
        const T* from = (const T*)a.query + (tokens[r] * a.heads + heads[r]) * width;
        if constexpr (sizeof(T) == 4) memcpy(query + r * width, from, width * 4);
        else for (int64_t i = 0; i < width; i++) query[r * width + i] = float_of(((const bf16*)from)[i]);
        maxima[r] = -INFINITY;
        sums[r] = 0;
    }
    memset(out, 0, rows * wide * sizeof(float));
    const int32_t* table = a.tables + a.sequences[first_token] * a.max_blocks;
    for (int64_t tile_index = first_tile; tile_index <= last_tile; tile_index++) {
        const int64_t at = ((int64_t)table[tile_index] * a.kv_heads + kv_head) * width * KV_BLOCK;
        const T *key_tile = (const T*)a.keys + at, *value_tile = (const T*)a.values + at;
        const float *k, *v;
        if constexpr (sizeof(T) == 4) {
            k = (const float*)key_tile;
            v = (const float*)value_tile;
        } else {
            for (int64_t i = 0; i < width * KV_BLOCK; i += LANES) store(keys + i, load(key_tile + i));
            if (wide == width)
                for (int64_t i = 0; i < width * KV_BLOCK; i += LANES) store(values + i, load(value_tile + i));
            k = keys;
            v = values;
        }
        if (wide != width) {
            for (int j = 0; j < KV_BLOCK; j++)
                for (int64_t i = 0; i < wide; i += LANES)
                    store(values + j * wide + i,
                          load_part(value_tile + j * width + i, (int)std::min<int64_t>(LANES, width - i)));
            v = values;
        }
        const int64_t base = tile_index * KV_BLOCK;
        int whole = 0;  // rows that see every key of this tile go together, the others alone
        while (whole < rows && starts[whole] <= base && positions[whole] >= base + KV_BLOCK - 1) whole++;
        if (whole == rows) {
            attend_tile(query, out, maxima, sums, scores, corrections, k, v, width, wide, (float)a.scale, rows, 0,
                        KV_BLOCK);
            continue;
        }
        for (int r = 0; r < rows; r++) {
            int begin = (int)std::max<int64_t>(0, starts[r] - base);
            int end = (int)std::min<int64_t>(KV_BLOCK, positions[r] - base + 1);
            if (begin < end)
                attend_tile(query + r * width, out + r * wide, maxima + r, sums + r, scores, corrections, k, v, width,
                            wide, (float)a.scale, 1, begin, end);
        }
    }
    for (int r = 0; r < rows; r++) {
        T* to = (T*)a.output + (tokens[r] * a.heads + heads[r]) * width;
        vf inverse = all(1.0f / sums[r]);
        for (int64_t i = 0; i < width; i += LANES) {
            vf value = load(out + r * wide + i) * inverse;
            if (i + LANES <= width) store(to + i, value);
            else store_part(to + i, value, (int)(width - i));
        }
    }
}

template <class T> void attention(const Attention& a) {
    const int64_t share_of = a.heads / a.kv_heads;
    for (int64_t first = 0, last; first < a.tokens; first = last) {
        for (last = first + 1; last < a.tokens && a.sequences[last] == a.sequences[first];) last++;
        int64_t rows = (last - first) * share_of, blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
        share(a.threads, a.kv_heads * blocks, [&](int64_t part) {
            int64_t row = part % blocks * BLOCK_ROWS;
            attend_rows<T>(a, row, (int)std::min<int64_t>(BLOCK_ROWS, rows - row), first, part / blocks);
        });
    }
}

template <class T>
void write_rows(const T* key, const T* value, T* keys, T* values, const int64_t* slots, int64_t tokens,
                int64_t kv_heads, int64_t width) {
    for (int64_t t = 0; t < tokens; t++) {
        if (slots[t] < 0) continue;
        int64_t block = slots[t] / KV_BLOCK, offset = slots[t] % KV_BLOCK;
        for (int64_t h = 0; h < kv_heads; h++) {
            const T *k = key + (t * kv_heads + h) * width, *v = value + (t * kv_heads + h) * width;
            int64_t at = (block * kv_heads + h) * width * KV_BLOCK;
            for (int64_t i = 0; i < width; i++) keys[at + i * KV_BLOCK + offset] = k[i];
            memcpy(values + at + offset * width, v, width * sizeof(T));
        }
    }
}

template <class T> void pack(const T* w, T* packed, int64_t n, int64_t k) {
    constexpr int64_t group = sizeof(T) == 4 ? 1 : 2;
    int64_t k_stored = padded(k, group);
    for (int64_t p = 0; p < panels_of(n); p++) {
        int64_t first = p * PANEL, width = std::min<int64_t>(PANEL, padded(n - first, LANES));
        T* panel = packed + first * k_stored;
        for (int64_t i = 0; i < k_stored; i++)
            for (int64_t j = 0; j < width; j++)
                panel[(i / group * width + j) * group + i % group] = first + j < n && i < k ? w[(first + j) * k + i] : T(0);
    }
}

}  // namespace

// ---------------------------------------------------------------------------------------------------- C interface

struct Linear {  // mirrored by _LinearDescriptor in linear.py
    const void* packed;
    const float* bias;  // or null
    int64_t k, n, is_bf16, threads;
};

extern "C" {

int64_t moemesh_abi_version(void) { return 1; }

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
    return padded(n, LANES) * padded(k, is_bf16 ? 2 : 1);
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
    const Group* all_groups = (const Group*)groups;
    for (int64_t g = 0; g < group_count; g++) {
        if (is_bf16) gated_ffn((const bf16*)x, (bf16*)y, all_groups[g], d, threads);
        else gated_ffn((const float*)x, (float*)y, all_groups[g], d, threads);
    }
}

void moemesh_attention(const Attention* a, int64_t is_bf16) {
    if (is_bf16) attention<bf16>(*a);
    else attention<float>(*a);
}

void moemesh_write_kv(const void* key, const void* value, void* keys, void* values, const int64_t* slots,
                      int64_t tokens, int64_t kv_heads, int64_t width, int64_t is_bf16) {
    if (is_bf16)
        write_rows((const bf16*)key, (const bf16*)value, (bf16*)keys, (bf16*)values, slots, tokens, kv_heads, width);
    else
        write_rows((const float*)key, (const float*)value, (float*)keys, (float*)values, slots, tokens, kv_heads, width);
}

}  // extern "C"
