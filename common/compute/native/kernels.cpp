// Compute kernels of stage and expert nodes: linear, grouped gated FFN, paged attention, norm, rope.
//
// The numeric rule: the bits of one output row depend on that row's inputs and the weights, and on nothing else.
// How it holds here, by construction:
//   * one output element is one accumulator lane; its products are added in the order of k (float32: in sections of
//     K_SECTION, whose sums are added in order, for precision), whatever the number of rows, panels or threads.
//     Row blocking only puts several such lanes side by side.
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
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif

namespace {

// ---------------------------------------------------------------------------------------------------- vectors

#if defined(__AVX512F__)
constexpr int LANES = 16, PANEL_VECTORS = 4, TILE_ROWS = 6, SCORE_ROWS = 8;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int LANES = 8, PANEL_VECTORS = 2, TILE_ROWS = 6, SCORE_ROWS = 3;
#elif defined(__aarch64__)
constexpr int LANES = 4, PANEL_VECTORS = 4, TILE_ROWS = 5, SCORE_ROWS = 2;
#else
constexpr int LANES = 4, PANEL_VECTORS = 2, TILE_ROWS = 4, SCORE_ROWS = 1;
#endif

constexpr int PANEL = LANES * PANEL_VECTORS;
constexpr int K_SECTION = 256;
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

INLINE float float_of(float x) { return x; }
INLINE float float_of(bf16 x) { uint32_t bits = (uint32_t)x << 16; float y; memcpy(&y, &bits, 4); return y; }
INLINE bf16 bf16_of(float x) {
    uint32_t bits; memcpy(&bits, &x, 4);
    uint32_t nan = (bits >> 16) | 0x40, nearest_even = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
    return (bf16)((bits & 0x7fffffffu) > 0x7f800000u ? nan : nearest_even);  // no branch: the loops around it vectorise
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

template <class T> INLINE vf take(const T* from, int64_t left) {
    return left >= LANES ? load(from) : load_part(from, (int)left);
}
template <class T> INLINE void put(T* to, vf x, int64_t left) {
    if (left >= LANES) store(to, x);
    else store_part(to, x, (int)left);
}
INLINE vf as(vf x, const float*) { return x; }  // rounded to what a tensor of that type holds
INLINE vf as(vf x, const bf16*) { return rounded(x); }

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

INLINE vf max_of(vf a, vf b) { return select((vi)(a > b), a, b); }

// Sum and maximum of 32 virtual lanes by folding halves onto each other: the same order at any vector width.
INLINE float fold_sum(const vf v[KV_VECTORS]) {
#if defined(__AVX512F__)
    __m512 a = (__m512)(v[0] + v[1]);
    __m256 b = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_add_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
#else
    float lanes[KV_BLOCK];
    for (int i = 0; i < KV_VECTORS; i++) store(lanes + i * LANES, v[i]);
    for (int half = KV_BLOCK / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
#endif
}
INLINE float fold_max(const vf v[KV_VECTORS]) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)max_of(v[0], v[1]));
#else
    vf best = v[0];
    for (int i = 1; i < KV_VECTORS; i++) best = max_of(best, v[i]);
    float lanes[LANES];
    store(lanes, best);
    return *std::max_element(lanes, lanes + LANES);
#endif
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

// Worker threads, made when a call first asks for them. One call at a time uses them; another one computes alone.
class Pool {
  public:
    template <class Work> bool run(int64_t threads, int64_t parts, const Work& work) {
        std::unique_lock<std::mutex> only(calls_, std::try_to_lock);
        if (!only.owns_lock()) return false;
        while ((int64_t)workers_.size() < threads - 1) workers_.emplace_back([this, n = workers_.size()] { serve((int64_t)n); });
        std::unique_lock<std::mutex> lock(state_);
        job_ = {[](const void* context, int64_t part) { (*(const Work*)context)(part); }, &work, parts, threads - 1};
        next_part_ = 0;
        busy_ = threads - 1;
        round_++;
        lock.unlock();
        wake_.notify_all();
        take_parts();
        lock.lock();
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
        int64_t parts, helpers;
    };
    void take_parts() {
        for (int64_t part; (part = next_part_.fetch_add(1)) < job_.parts;) job_.work(job_.context, part);
    }
    void serve(int64_t number) {
        std::unique_lock<std::mutex> lock(state_);
        for (uint64_t seen = 0;;) {
            wake_.wait(lock, [&] { return stop_ || round_ != seen; });
            if (stop_) return;
            seen = round_;
            if (number >= job_.helpers) continue;
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
    int64_t busy_ = 0;
    uint64_t round_ = 0;
    bool stop_ = false;
};

constexpr double WORTH_SHARING = 2e6;  // multiply-adds; waking a thread costs about as much as 20 us of work
INLINE int64_t worth(int64_t threads, double multiply_adds) { return multiply_adds < WORTH_SHARING ? 1 : threads; }
// A few rows wait for the weights to come from memory, which takes as long as computing with this many rows.
constexpr int64_t ROWS_HIDDEN_BY_MEMORY = 8;
INLINE double linear_work(int64_t rows, int64_t k, int64_t n) {
    return (double)k * (double)n * (double)std::max(rows, ROWS_HIDDEN_BY_MEMORY);
}

// Does parts [0, parts) in any order, on up to `threads` threads.
template <class Work> void share(int64_t threads, int64_t parts, const Work& work) {
    if (threads > 1 && parts > 1) {
        static Pool pool;
        if (pool.run(threads, parts, work)) return;
    }
    for (int64_t part = 0; part < parts; part++) work(part);
}

// ---------------------------------------------------------------------------------------------------- the tile

// acc[r][v] += sum over k of x[r][k] * w[k][v], k ascending: the only place where products are added.
template <int ROWS, int VECTORS, class Weight>
INLINE void accumulate(vf (&acc)[ROWS][VECTORS], const float* x, int64_t x_stride, const Weight* w, int64_t w_stride,
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

// Packed weights: panels of PANEL columns (the last one of LANES, if that is enough), each [K][width] float32 or
// [ceil(K/2)][width][2] bf16, zero padded.
INLINE int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
INLINE int64_t panels_of(int64_t n) { return (n + PANEL - 1) / PANEL; }
INLINE int64_t panel_width(int64_t columns) { return columns <= LANES ? LANES : PANEL; }

template <int ROWS, int VECTORS, class Out>
INLINE void finish(vf (&acc)[ROWS][VECTORS], const float* bias, Out* y, int64_t y_stride, int64_t columns) {
    UNROLL for (int v = 0; v < VECTORS; v++) {
        const int64_t left = columns - v * LANES;
        if (left <= 0) continue;
        vf b = bias ? take(bias + v * LANES, left) : (vf){};
        UNROLL for (int r = 0; r < ROWS; r++) put(y + r * y_stride + v * LANES, bias ? acc[r][v] + b : acc[r][v], left);
    }
}

template <int ROWS, int VECTORS, class Out>
__attribute__((noinline)) void tile(const float* x, int64_t x_stride, const float* panel, const float* bias, Out* y,
                                    int64_t y_stride, int64_t k, int64_t columns) {
    vf total[ROWS][VECTORS] = {};
    for (int64_t begin = 0; begin < k; begin += K_SECTION) {
        vf acc[ROWS][VECTORS] = {};
        accumulate<ROWS, VECTORS>(acc, x, x_stride, panel, VECTORS * LANES, begin, std::min(k, begin + K_SECTION));
        UNROLL for (int r = 0; r < ROWS; r++) UNROLL for (int v = 0; v < VECTORS; v++) total[r][v] += acc[r][v];
    }
    finish<ROWS, VECTORS, Out>(total, bias, y, y_stride, columns);
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

// Calls work(rows<n>, first) for tiles of at most MOST rows, as even as they can be: 8 rows are 4 + 4, not 6 + 2.
template <int N> struct rows_t { static constexpr int value = N; };
template <int MOST, class Work> INLINE void in_row_tiles(int64_t rows, const Work& work) {
    for (int64_t first = 0, tiles = (rows + MOST - 1) / MOST; tiles; tiles--) {
        int64_t size = (rows - first + tiles - 1) / tiles;
        switch (size) {
            case 1: work(rows_t<1>{}, first); break;
            case 2: if constexpr (MOST >= 2) work(rows_t<2>{}, first); break;
            case 3: if constexpr (MOST >= 3) work(rows_t<3>{}, first); break;
            case 4: if constexpr (MOST >= 4) work(rows_t<4>{}, first); break;
            case 5: if constexpr (MOST >= 5) work(rows_t<5>{}, first); break;
            case 6: if constexpr (MOST >= 6) work(rows_t<6>{}, first); break;
            case 7: if constexpr (MOST >= 7) work(rows_t<7>{}, first); break;
            case 8: if constexpr (MOST >= 8) work(rows_t<8>{}, first); break;
        }
        first += size;
    }
}

template <int VECTORS, class In, class Weight, class Out>
void panel_rows(In x, int64_t x_stride, const Weight* panel, const float* bias, Out* y, int64_t y_stride, int64_t rows,
                int64_t k, int64_t columns) {
    in_row_tiles<TILE_ROWS>(rows, [&](auto size, int64_t first) {
        tile<decltype(size)::value, VECTORS, Out>(row_at(x, first * x_stride), x_stride, panel, bias, y + first * y_stride,
                                                  y_stride, k, columns);
    });
}

// y[rows][n] = x[rows][k] @ weights + bias, panel by panel.
template <class In, class Weight, class Out>
void linear_panel(In x, int64_t x_stride, const Weight* packed, int64_t k_stored, const float* bias, Out* y,
                  int64_t y_stride, int64_t rows, int64_t k, int64_t n, int64_t p) {
    const Weight* panel = packed + p * PANEL * k_stored;
    int64_t first = p * PANEL, columns = std::min<int64_t>(PANEL, n - first);
    const float* b = bias ? bias + first : nullptr;
    Out* to = y + first;
    // Two widths only: every further one is a quarter of the time that this file takes to compile.
    if (panel_width(columns) == LANES) panel_rows<1>(x, x_stride, panel, b, to, y_stride, rows, k, columns);
    else panel_rows<PANEL_VECTORS>(x, x_stride, panel, b, to, y_stride, rows, k, columns);
}

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
    threads = worth(threads, linear_work(rows, k, n));
    share(threads, panels_of(n), [&](int64_t p) { linear_panel(x, x_stride, packed, k, bias, y, n, rows, k, n, p); });
}
void linear(const bf16* x, int64_t x_stride, const bf16* packed, const float* bias, bf16* y, int64_t rows, int64_t k,
            int64_t n, int64_t threads) {
    PairRows pairs = pair_rows(x, x_stride, rows, k, input_buffer);
    threads = worth(threads, linear_work(rows, k, n));
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
    share(worth(threads, linear_work(rows, d, 2 * width)), 2 * panels, [&](int64_t p) {
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
    share(worth(threads, linear_work(rows, d, 2 * width)), 2 * panels, [&](int64_t p) {
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

// out[r] = out[r] * corrections[r] + sum over keys [begin, end) of weights[r][key] * values[key], keys ascending.
template <int ROWS, int VECTORS, class Cached>
INLINE void weigh_tile(float* out, int64_t out_stride, const float* weights, const float* corrections,
                       const Cached* values, int64_t v_stride, int begin, int end) {
    vf acc[ROWS][VECTORS];
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int v = 0; v < VECTORS; v++) {
            acc[r][v] = load(out + r * out_stride + v * LANES);
            if (corrections) acc[r][v] = acc[r][v] * all(corrections[r]);
        }
    accumulate<ROWS, VECTORS>(acc, weights, KV_BLOCK, values, v_stride, begin, end);
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int v = 0; v < VECTORS; v++) store(out + r * out_stride + v * LANES, acc[r][v]);
}

struct Rows {  // of one call to attend_rows: what the fold over tiles carries, and this tile's part of it
    int count;
    float *query, *out, *scores;
    float maxima[BLOCK_ROWS], sums[BLOCK_ROWS], corrections[BLOCK_ROWS];
    int begin[BLOCK_ROWS], end[BLOCK_ROWS];  // the keys of this tile that the row sees; none where begin >= end
};

// scores[r] becomes the weights of the keys that row r sees; a row that sees none is left as it is.
__attribute__((noinline)) void soften(Rows& rows, float scale) {
    vi lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    for (int r = 0; r < rows.count; r++) {
        rows.corrections[r] = 1.0f;
        if (rows.begin[r] >= rows.end[r]) continue;
        float* row = rows.scores + r * KV_BLOCK;
        vf score[KV_VECTORS];
        UNROLL for (int v = 0; v < KV_VECTORS; v++) {
            vi key = lane + v * LANES, seen = (vi)(key >= rows.begin[r]) & (vi)(key < rows.end[r]);
            score[v] = select(seen, load(row + v * LANES) * all(scale), all(-INFINITY));
        }
        float best = fold_max(score);
        if (best > rows.maxima[r]) {  // otherwise the correction is exp(0), exactly 1
            rows.corrections[r] = exp_of(all(rows.maxima[r] - best))[0];
            rows.maxima[r] = best;
        }
        UNROLL for (int v = 0; v < KV_VECTORS; v++) {
            score[v] = exp_of(score[v] - all(rows.maxima[r]));  // exactly 0 where not seen
            store(row + v * LANES, score[v]);
        }
        rows.sums[r] = rows.sums[r] * rows.corrections[r] + fold_sum(score);
    }
}

template <int VECTORS, class Cached>
INLINE void weigh_values(const Rows& rows, int64_t column, const Cached* values, int64_t wide) {
    float* out = rows.out + column;
    int low = *std::max_element(rows.begin, rows.begin + rows.count);
    int high = *std::min_element(rows.end, rows.end + rows.count);
    if (low >= high) low = high = KV_BLOCK;  // no key that all rows see: each row goes alone
    // A key that a row does not see is left out, not weighed with 0: a freed slot may hold anything. So the rows go
    // alone over the keys before those that all see, together over these, and alone over the rest.
    const bool together = high > low;
    for (int r = 0; r < rows.count; r++)
        if (rows.begin[r] < std::min(low, rows.end[r]))
            weigh_tile<1, VECTORS>(out + r * wide, wide, rows.scores + r * KV_BLOCK, rows.corrections + r, values, wide,
                                   rows.begin[r], std::min(low, rows.end[r]));
    if (!together) return;
    in_row_tiles<TILE_ROWS>(rows.count, [&](auto size, int64_t first) {
        float corrections[TILE_ROWS];  // what went alone before has been corrected
        for (int r = 0; r < decltype(size)::value; r++)
            corrections[r] = rows.begin[first + r] < low ? 1.0f : rows.corrections[first + r];
        weigh_tile<decltype(size)::value, VECTORS>(out + first * wide, wide, rows.scores + first * KV_BLOCK, corrections,
                                                   values, wide, low, high);
    });
    for (int r = 0; r < rows.count; r++)
        if (rows.end[r] > high)
            weigh_tile<1, VECTORS>(out + r * wide, wide, rows.scores + r * KV_BLOCK, nullptr, values, wide, high,
                                   rows.end[r]);
}

// One tile: keys [width][32], values [32][wide].
template <class Cached>
__attribute__((noinline)) void attend_tile(Rows& rows, const Cached* keys, const Cached* values, int64_t width,
                                           int64_t wide, float scale) {
    in_row_tiles<SCORE_ROWS>(rows.count, [&](auto size, int64_t first) {
        constexpr int ROWS = decltype(size)::value;
        vf acc[ROWS][KV_VECTORS] = {};
        accumulate<ROWS, KV_VECTORS>(acc, rows.query + first * width, width, keys, KV_BLOCK, 0, width);
        UNROLL for (int r = 0; r < ROWS; r++)
            UNROLL for (int v = 0; v < KV_VECTORS; v++) store(rows.scores + (first + r) * KV_BLOCK + v * LANES, acc[r][v]);
    });
    soften(rows, scale);
    int64_t column = 0;
    for (; column + PANEL <= wide; column += PANEL) weigh_values<PANEL_VECTORS>(rows, column, values + column, wide);
    for (; column < wide; column += LANES) weigh_values<1>(rows, column, values + column, wide);
}

struct Part {  // at most BLOCK_ROWS (token, head) rows that share a sequence and a KV head
    int64_t first_token, first_row, kv_head;
    int rows;
};

template <class T> void attend_rows(const Attention& a, const Part& part) {
    const int64_t width = a.width, wide = padded(width, LANES), group = a.heads / a.kv_heads;
    const int count = part.rows;
    const int64_t tile_values = KV_BLOCK * width, query_values = padded(BLOCK_ROWS * width, LANES);
    float* memory = attention_buffer.of<float>(query_values + BLOCK_ROWS * (wide + KV_BLOCK) + tile_values + KV_BLOCK * wide);
    Rows rows;
    rows.count = count;
    rows.query = memory;
    rows.out = rows.query + query_values;
    rows.scores = rows.out + BLOCK_ROWS * wide;
    float *keys = rows.scores + BLOCK_ROWS * KV_BLOCK, *values = keys + tile_values;
    int64_t positions[BLOCK_ROWS], starts[BLOCK_ROWS], at_output[BLOCK_ROWS];
    int64_t first_tile = INT64_MAX, last_tile = 0;
    for (int r = 0; r < count; r++) {
        int64_t token = part.first_token + (part.first_row + r) / group;
        int64_t head = part.kv_head * group + (part.first_row + r) % group;
        positions[r] = a.positions[token];
        starts[r] = a.window > 0 ? std::max<int64_t>(0, positions[r] - a.window + 1) : 0;
        first_tile = std::min(first_tile, starts[r] / KV_BLOCK);
        last_tile = std::max(last_tile, positions[r] / KV_BLOCK);
        at_output[r] = (token * a.heads + head) * width;
        const T* from = (const T*)a.query + at_output[r];
        for (int64_t i = 0; i < width; i++) rows.query[r * width + i] = float_of(from[i]);
        rows.maxima[r] = -INFINITY;
        rows.sums[r] = 0;
    }
    memset(rows.out, 0, count * wide * sizeof(float));
    const int32_t* table = a.tables + a.sequences[part.first_token] * a.max_blocks;
    for (int64_t t = first_tile; t <= last_tile; t++) {
        for (int r = 0; r < count; r++) {
            rows.begin[r] = (int)std::min<int64_t>(KV_BLOCK, std::max<int64_t>(0, starts[r] - t * KV_BLOCK));
            rows.end[r] = (int)std::max<int64_t>(0, std::min<int64_t>(KV_BLOCK, positions[r] - t * KV_BLOCK + 1));
        }
        const int64_t at = ((int64_t)table[t] * a.kv_heads + part.kv_head) * tile_values;
        const T *key_tile = (const T*)a.keys + at, *value_tile = (const T*)a.values + at;
        // Widening and padding change no value: they are done where that is quicker, or where a row ends in mid-vector.
        const float scale = (float)a.scale;
        const bool pad = wide != width, widen = sizeof(T) != sizeof(float) && (pad || count > SCORE_ROWS);
        if (widen)
            for (int64_t i = 0; i < tile_values; i += LANES) store(keys + i, load(key_tile + i));
        if (pad)
            for (int64_t j = 0; j < KV_BLOCK; j++)
                for (int64_t i = 0; i < wide; i += LANES)
                    store(values + j * wide + i, take(value_tile + j * width + i, width - i));
        else if (widen)
            for (int64_t i = 0; i < tile_values; i += LANES) store(values + i, load(value_tile + i));
        if (widen) attend_tile<float>(rows, keys, values, width, wide, scale);
        else if (pad) attend_tile<float>(rows, (const float*)key_tile, values, width, wide, scale);  // T is float
        else attend_tile<T>(rows, key_tile, value_tile, width, wide, scale);
    }
    for (int r = 0; r < count; r++) {
        T* to = (T*)a.output + at_output[r];
        vf inverse = all(1.0f / rows.sums[r]);
        for (int64_t i = 0; i < width; i += LANES) {
            put(to + i, load(rows.out + r * wide + i) * inverse, width - i);
        }
    }
}

template <class T> void attention(const Attention& a) {
    static thread_local std::vector<Part> parts;
    parts.clear();
    const int64_t group = a.heads / a.kv_heads;
    double keys_seen = 0;
    for (int64_t t = 0; t < a.tokens; t++)
        keys_seen += (double)(a.window > 0 ? std::min<int64_t>(a.window, a.positions[t] + 1) : a.positions[t] + 1);
    const int64_t threads = worth(a.threads, 2 * keys_seen * (double)(a.heads * a.width));
    for (int64_t first = 0, last; first < a.tokens; first = last) {
        for (last = first + 1; last < a.tokens && a.sequences[last] == a.sequences[first];) last++;
        const int64_t rows = (last - first) * group;
        for (int64_t head = 0; head < a.kv_heads; head++)
            for (int64_t row = 0; row < rows; row += BLOCK_ROWS)
                parts.push_back({first, row, head, (int)std::min<int64_t>(BLOCK_ROWS, rows - row)});
    }
    const Part* all_parts = parts.data();
    share(threads, (int64_t)parts.size(), [&](int64_t p) { attend_rows<T>(a, all_parts[p]); });
}

template <class T>
void write_rows(const T* key, int64_t key_stride, const T* value, int64_t value_stride, T* keys, T* values,
                const int64_t* slots, int64_t tokens, int64_t kv_heads, int64_t width) {
    for (int64_t t = 0; t < tokens; t++) {
        if (slots[t] < 0) continue;
        int64_t block = slots[t] / KV_BLOCK, offset = slots[t] % KV_BLOCK;
        for (int64_t h = 0; h < kv_heads; h++) {
            const T *k = key + t * key_stride + h * width, *v = value + t * value_stride + h * width;
            int64_t at = (block * kv_heads + h) * width * KV_BLOCK;
            for (int64_t i = 0; i < width; i++) keys[at + i * KV_BLOCK + offset] = k[i];
            memcpy(values + at + offset * width, v, width * sizeof(T));
        }
    }
}

// ---------------------------------------------------------------------------------------------------- norm, rope

// y = round(x / rms(x)) * weight, rounded where the reference makes a tensor. y may be x.
template <class T> INLINE void normalize(const T* x, const T* weight, T* y, int64_t width, float epsilon) {
    vf squares[KV_VECTORS] = {};
    for (int64_t i = 0; i < width; i += KV_BLOCK)
        UNROLL for (int v = 0; v < KV_VECTORS; v++) {
            const int64_t at = i + v * LANES;
            if (at >= width) continue;
            vf value = take(x + at, width - at);
            squares[v] = fma_of(value, value, squares[v]);
        }
    const vf inverse = all(1.0f / sqrtf(fold_sum(squares) / (float)width + epsilon));
    for (int64_t i = 0; i < width; i += LANES)
        put(y + i, as(take(x + i, width - i) * inverse, x) * take(weight + i, width - i), width - i);
}

// summed[r] = x[r] + added[r] where there is something to add, then the norm of it.
template <class T>
void norm_rows(const T* x, int64_t x_stride, const T* added, T* summed, const T* weight, T* y, int64_t rows,
               int64_t width, float epsilon) {
    for (int64_t r = 0; r < rows; r++) {
        const T* row = x + r * x_stride;
        if (added) {
            T* sum = summed + r * width;
            for (int64_t i = 0; i < width; i += LANES)
                put(sum + i, take(row + i, width - i) + take(added + r * width + i, width - i), width - i);
            row = sum;
        }
        normalize(row, weight, y + r * width, width, epsilon);
    }
}

// Rotates the first `turned` values of each head, halves against each other; the sign is in `sine`. The norm of each
// head comes first where there is a weight for it, one for all heads (weight_stride 0) or one a head.
template <class T>
void rope_rows(const T* x, int64_t x_stride, const T* cosine, const T* sine, const T* weight, int64_t weight_stride, T* y,
               int64_t tokens, int64_t heads, int64_t width, int64_t turned, float epsilon) {
    const int64_t half = turned / 2;
    for (int64_t t = 0; t < tokens; t++) {
        const T *c = cosine + t * turned, *s = sine + t * turned;
        for (int64_t h = 0; h < heads; h++) {
            const T* from = x + t * x_stride + h * width;
            T* to = y + (t * heads + h) * width;
            if (weight) normalize(from, weight + h * weight_stride, to, width, epsilon);
            else memcpy(to, from, width * sizeof(T));
            for (int64_t i = 0; i < half; i += LANES) {
                const int64_t left = half - i;
                vf low = take(to + i, left), high = take(to + half + i, left);
                put(to + i, as(low * take(c + i, left), x) + as(high * take(s + i, left), x), left);
                put(to + half + i, as(high * take(c + half + i, left), x) + as(low * take(s + half + i, left), x), left);
            }
        }
    }
}

// A unit is what lies together in a panel: one float or a pair of bf16.
template <class T> void pack(const T* w, T* packed, int64_t n, int64_t k) {
    constexpr int64_t UNIT = 4 / sizeof(T), LINE = 16;
    const int64_t units = padded(k, UNIT) / UNIT;
    for (int64_t first = 0; first < n; first += PANEL) {
        const int64_t width = panel_width(n - first);
        uint32_t* panel = (uint32_t*)packed + first * units;
        for (int64_t begin = 0; begin < units; begin += LINE) {
            // By way of a small block: rows of a weight are often a power of two apart, and evict each other.
            uint32_t block[PANEL][LINE] = {};
            const int64_t values = std::min(LINE * UNIT, k - begin * UNIT);
            for (int64_t j = 0; j < std::min(width, n - first); j++)
                memcpy(block[j], w + (first + j) * k + begin * UNIT, values * sizeof(T));
            for (int64_t i = 0; i < std::min(LINE, units - begin); i++)
                for (int64_t j = 0; j < width; j++) panel[(begin + i) * width + j] = block[j][i];
        }
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

int64_t moemesh_abi_version(void) { return 3; }

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
    const Group* all_groups = (const Group*)groups;
    double work = 0;
    for (int64_t g = 0; g < group_count; g++)
        work += 3 * linear_work(all_groups[g].end - all_groups[g].begin, d, all_groups[g].width);
    threads = worth(threads, work);
    const bool by_group = group_count >= 2 * threads;  // otherwise threads divide the panels of one group after another
    share(by_group ? threads : 1, group_count, [&](int64_t g) {
        if (is_bf16) gated_ffn((const bf16*)x, (bf16*)y, all_groups[g], d, by_group ? 1 : threads);
        else gated_ffn((const float*)x, (float*)y, all_groups[g], d, by_group ? 1 : threads);
    });
}

void moemesh_attention(const Attention* a, int64_t is_bf16) {
    if (is_bf16) attention<bf16>(*a);
    else attention<float>(*a);
}

void moemesh_write_kv(const void* key, int64_t key_stride, const void* value, int64_t value_stride, void* keys,
                      void* values, const int64_t* slots, int64_t tokens, int64_t kv_heads, int64_t width,
                      int64_t is_bf16) {
    if (is_bf16)
        write_rows((const bf16*)key, key_stride, (const bf16*)value, value_stride, (bf16*)keys, (bf16*)values, slots,
                   tokens, kv_heads, width);
    else
        write_rows((const float*)key, key_stride, (const float*)value, value_stride, (float*)keys, (float*)values, slots,
                   tokens, kv_heads, width);
}

// `added` and `summed` are both null or both [rows, width].
void moemesh_rms_norm(const void* x, int64_t x_stride, const void* added, void* summed, const void* weight, void* y,
                      int64_t rows, int64_t width, float epsilon, int64_t is_bf16) {
    if (is_bf16)
        norm_rows((const bf16*)x, x_stride, (const bf16*)added, (bf16*)summed, (const bf16*)weight, (bf16*)y, rows, width,
                  epsilon);
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
        rope_rows((const float*)x, x_stride, (const float*)cosine, (const float*)sine, (const float*)weight, weight_stride,
                  (float*)y, tokens, heads, width, turned, epsilon);
}

}  // extern "C"
