// A gate's choice of experts: the softmax of a token's logits, the best of them, and their weights.
//
// With AVX-512 and AVX2 each bit is that of torch's softmax, topk, sum and division by a build of torch with the same
// instructions: its exp (Sleef's `expf`, 1.0 ulp), its order of additions, and its order of equal values.

#pragma once

#include <utility>
#include <vector>

#include "threads.h"

namespace {

struct Choice {  // mirrored by ChoiceDescriptor in expert_choice.py
    int64_t experts, experts_per_token;
    int64_t normalize;      // weights are divided by their sum
    int64_t round_weights;  // to the type of the logits
};

thread_local Buffer choice_buffer;

// exp of what is at most 0; under -104 exactly 0. Source: Sleef (Shibata and Petrogalli, IEEE TPDS 31(6), 2020).
INLINE vf exp_below_zero(vf x) {
    const vi under = (vi)(x < all(-104.0f));
    const vf y = select(under, (vf){}, x), shift = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const vf n = (y * all(1.44269504f) + shift) - shift;
    vf r = fma_of(n, all(-0.693145752f), y);
    r = fma_of(n, all(-1.42860677e-6f), r);
    vf p = all(1.98527618e-4f);
    p = fma_of(p, r, all(1.39304355e-3f));
    p = fma_of(p, r, all(8.33336078e-3f));
    p = fma_of(p, r, all(4.16664854e-2f));
    p = fma_of(p, r, all(1.66666672e-1f));
    p = fma_of(p, r, all(0.5f));
    p = all(1.0f) + fma_of(r * r, p, r);
    const vi exponent = __builtin_convertvector(n, vi), half = exponent >> 1;  // in two steps: it may be a denormal
    return select(under, (vf){}, p * (vf)((half + 127) << 23) * (vf)((exponent - half + 127) << 23));
}

// A row that is shorter than a vector is added up in order, a longer one in lanes that are folded at the end.
INLINE float sum_in_lanes(const float* x, int64_t n) {
    float lanes[LANES] = {};
    for (int64_t i = 0; i < n; i++) lanes[i % LANES] += x[i];
    if (n < LANES) {
        for (int64_t i = 1; i < n; i++) lanes[0] += lanes[i];
    } else {
        for (int half = LANES / 2; half; half /= 2)
            for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    }
    return lanes[0];
}

// The sum of a few weights: a row of up to 7 in four sums, of every fourth value each; a longer one in eight lanes of
// such sums, which are added, in order, to what is left over.
INLINE float sum_by_fours(const float* x, int64_t n, int64_t stride) {
    float sums[4] = {};
    for (int64_t i = 0; i < n; i++) sums[i < n / 4 * 4 ? i % 4 : 0] += x[i * stride];
    return ((sums[0] + sums[1]) + sums[2]) + sums[3];
}
INLINE float sum_of_weights(const float* weights, int64_t n) {
    constexpr int64_t EIGHT = 8;
    if (n < EIGHT) return sum_by_fours(weights, n, 1);
    float sum = 0;
    for (int64_t i = n / EIGHT * EIGHT; i < n; i++) sum += weights[i];
    for (int64_t lane = 0; lane < EIGHT; lane++) sum += sum_by_fours(weights + lane, n / EIGHT, EIGHT);
    return sum;
}

template <class T> INLINE void softmax(const T* logits, float* probabilities, int64_t n) {
    float largest = float_of(logits[0]);
    for (int64_t i = 1; i < n; i++) largest = std::max(largest, float_of(logits[i]));
    for (int64_t i = 0; i < n; i += LANES)
        put(probabilities + i, exp_below_zero(take(logits + i, n - i) - all(largest)), n - i);
    const float inverse = 1.0f / sum_in_lanes(probabilities, n);
    for (int64_t i = 0; i < n; i++) probabilities[i] *= inverse;
}

// The best come first, by falling probability. Which of equal ones are taken, and their order, is the standard
// library's, called as torch calls it. One that is not a number is better than any number.
INLINE void choose_best(const float* probabilities, int64_t n, int64_t wanted, int64_t* experts, float* weights) {
    typedef std::pair<float, int64_t> Scored;
    static thread_local std::vector<Scored> scored;
    scored.resize(n);
    for (int64_t i = 0; i < n; i++) scored[i] = {probabilities[i], i};
    const auto is_better = [](const Scored& a, const Scored& b) {
        return (a.first != a.first && b.first == b.first) || a.first > b.first;
    };
    const auto first = scored.begin();
    if (wanted * 64 <= n) {
        std::partial_sort(first, first + wanted, scored.end(), is_better);
    } else {
        std::nth_element(first, first + (wanted - 1), scored.end(), is_better);
        std::sort(first, first + (wanted - 1), is_better);
    }
    for (int64_t i = 0; i < wanted; i++) weights[i] = scored[i].first, experts[i] = scored[i].second;
}

// logits [rows][experts] -> experts and weights [rows][experts_per_token].
template <class T>
void choose_experts(const Choice& c, const T* logits, int64_t rows, int64_t* experts, float* weights) {
    const int64_t wanted = c.experts_per_token;
    float* probabilities = choice_buffer.of<float>(c.experts);
    for (int64_t r = 0; r < rows; r++, experts += wanted, weights += wanted) {
        softmax(logits + r * c.experts, probabilities, c.experts);
        choose_best(probabilities, c.experts, wanted, experts, weights);
        const float sum = c.normalize ? sum_of_weights(weights, wanted) : 1.0f;
        for (int64_t i = 0; i < wanted; i++) {
            weights[i] /= sum;
            if (c.round_weights && sizeof(T) == sizeof(bf16)) weights[i] = float_of(bf16_of(weights[i]));
        }
    }
}

}  // namespace
