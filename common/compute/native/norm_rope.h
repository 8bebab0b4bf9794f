// RMSNorm and rotary embedding, rounded where the reference makes a tensor.

#pragma once

#include "vectors.h"

namespace {

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
void rope_rows(const T* x, int64_t x_stride, const T* cosine, const T* sine, const T* weight, int64_t weight_stride,
               T* y, int64_t tokens, int64_t heads, int64_t width, int64_t turned, float epsilon) {
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
                vf turned_low = as(low * take(c + i, left), x) + as(high * take(s + i, left), x);
                vf turned_high = as(high * take(c + half + i, left), x) + as(low * take(s + half + i, left), x);
                put(to + i, turned_low, left);
                put(to + half + i, turned_high, left);
            }
        }
    }
}

}  // namespace
