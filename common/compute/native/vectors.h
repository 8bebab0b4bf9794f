// Vectors of the widest kind that the build's instruction set has, bf16, and what is computed lane by lane: exp, folds.

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>

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

INLINE int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

INLINE vf load(const float* p) { vf v; memcpy(&v, p, sizeof v); return v; }
INLINE void store(float* p, vf v) { memcpy(p, &v, sizeof v); }
INLINE vf all(float x) {
#if defined(__AVX512F__)
    return (vf)_mm512_set1_ps(x);
#else
    return x - (vf){};
#endif
}

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

}  // namespace
