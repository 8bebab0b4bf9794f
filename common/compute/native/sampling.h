// Tokens for rows of logits, by the rules of services/stage/model/sampling.py: the best one, or one that is drawn.
//
// What is computed here only has to be good enough to know which token those rules choose. Where two are so close that
// it is not, where a logit is not finite that matters, the answer is UNDECIDED, and the caller computes by the rules.

#pragma once

#include <cmath>
#include <functional>

#include "threads.h"
#include "vectors.h"

namespace {

struct SamplingRow {  // mirrored by _ROW in sampling.py
    double temperature;  // 0: the best token
    double margin;       // how far from the best logit one may be
    double top_p;
    int64_t top_k, seed, choice, position, token;
};

constexpr int64_t UNDECIDED = -1;
constexpr int TILE_VECTORS = 4, TILE = TILE_VECTORS * LANES;
constexpr float LEAST = -INFINITY;
constexpr double MOST_NOISE = 38.0;  // -log(-log(1 - 2^-53)) is 36.74

typedef uint64_t vq __attribute__((vector_size(LANES * 8)));

// SplitMix64, for one number or many.
constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15u;
template <class Q> INLINE Q mixed(Q state) {
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9u;
    state = (state ^ (state >> 27)) * 0x94D049BB133111EBu;
    return state ^ (state >> 31);
}
INLINE uint64_t key_of(const SamplingRow& row) {
    uint64_t key = mixed((uint64_t)row.seed + GOLDEN);
    key = mixed(key ^ ((uint64_t)row.choice + GOLDEN));
    return mixed(key ^ ((uint64_t)row.position + GOLDEN));
}
INLINE double noise_of(uint64_t key, int64_t token) {
    const uint64_t bits = mixed(key + GOLDEN * (uint64_t)(token + 1));
    return -log(-log(((double)(bits >> 12) + 0.5) * 0x1p-52));
}
// Another library's logarithms, and the sum's rounding, may change a logit with noise by this much.
INLINE double doubt_of(double value) { return 1e-9 + 1e-15 * fabs(value); }

INLINE bool any(vi mask) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
    return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
    int32_t lanes[LANES], found = 0;
    memcpy(lanes, &mask, sizeof mask);
    for (int lane = 0; lane < LANES; lane++) found |= lanes[lane];
    return found != 0;
#endif
}
INLINE float largest_of(vf x) {
    float lanes[LANES];
    store(lanes, x);
    return *std::max_element(lanes, lanes + LANES);
}
template <class T> INLINE vf take_or_least(const T* from, int64_t left) {
    if (left >= LANES) return load(from);
    float whole[LANES];
    for (int lane = 0; lane < LANES; lane++) whole[lane] = lane < left ? float_of(from[lane]) : LEAST;
    return load(whole);
}

// Logits of one row, divided by its temperature in float32, without those that are below `floor`.
template <class T> struct Scaled {
    const T* logits;
    int64_t size;
    float temperature, floor;
    float operator[](int64_t token) const {
        const float x = float_of(logits[token]) / temperature;
        return x < floor ? LEAST : x;
    }
    vf at(int64_t token) const {
        const vf x = take_or_least(logits + token, size - token) / all(temperature);
        return select((vi)(x < all(floor)), all(LEAST), x);
    }
};

// The first of the largest.
template <class T> int64_t best_token(const Scaled<T>& row) {
    constexpr int64_t SPAN = 8 * TILE;
    float best = LEAST;
    int64_t token = 0;
    for (int64_t start = 0; start < row.size; start += SPAN) {
        vf largest = all(LEAST);
        vi strange = {};
        for (int64_t i = start; i < std::min(start + SPAN, row.size); i += LANES) {
            const vf x = row.at(i);
            largest = max_of(x, largest);
            strange |= (vi)(x != x);
        }
        if (any(strange)) return UNDECIDED;
        const float here = largest_of(largest);
        if (here > best) best = here, token = start;
    }
    while (row[token] != best) token++;
    return token;
}

// The last token that a filter leaves, in the order of a stable sort: larger ones stay, and equal ones before it.
struct Cut {
    float value = LEAST;
    int64_t token = INT64_MAX;
    bool keeps(float other, int64_t other_token) const {
        return other > value || (other == value && other_token <= token);
    }
};

struct Entry {
    float value;
    int32_t token;
    double weight;  // relative to the best token
};
INLINE bool comes_before(const Entry& a, const Entry& b) {
    return a.value > b.value || (a.value == b.value && a.token < b.token);
}

// At least `count` values are not below this one: as many tiles have one.
template <class T> float floor_of_best(const Scaled<T>& row, int64_t count) {
    thread_local Buffer buffer;
    const int64_t tiles = (row.size + TILE - 1) / TILE;
    if (count > tiles) return LEAST;
    float* best = buffer.of<float>(tiles);
    for (int64_t tile = 0; tile < tiles; tile++) {
        vf largest = all(LEAST);
        for (int64_t i = tile * TILE; i < std::min((tile + 1) * TILE, row.size); i += LANES)
            largest = max_of(row.at(i), largest);
        best[tile] = largest_of(largest);
    }
    std::nth_element(best, best + count - 1, best + tiles, std::greater<float>());
    return best[count - 1];
}

// Finds those that are not below `floor`. `rest` becomes the weight of the others, as far as float32 goes.
template <class T> int64_t find(const Scaled<T>& row, float floor, float best, bool weighs, Entry* found, double* rest) {
    int64_t count = 0;
    *rest = 0;
    for (int64_t start = 0; start < row.size; start += TILE) {
        vf below = {};
        vi hits = {};
        for (int64_t i = start; i < std::min(start + TILE, row.size); i += LANES) {
            const vf x = row.at(i);
            const vi hit = (vi)(x >= all(floor));
            hits |= hit;
            if (weighs) below += select(hit, (vf){}, exp_of(x - all(best)));
        }
        if (weighs) {
            float lanes[LANES];
            store(lanes, below);
            for (int lane = 0; lane < LANES; lane++) *rest += lanes[lane];
        }
        if (!any(hits)) continue;
        for (int64_t i = start; i < std::min(start + TILE, row.size); i++) {
            const float x = row[i];
            if (x >= floor) found[count++] = {x, (int32_t)i, weighs ? exp((double)x - best) : 0};
        }
    }
    return count;
}

// Of `count` entries, the last one of the smallest set that holds `target`; false where that is too close to tell.
bool find_last_within(Entry* entries, int64_t count, double target, double doubt, Cut* cut) {
    if (!count) return false;
    int64_t low = 0, high = count;
    double before = 0;  // what those before `low` weigh, which all stay
    while (high - low > TILE) {
        const int64_t middle = low + (high - low) / 2;
        std::nth_element(entries + low, entries + middle, entries + high, comes_before);
        double weight = before;
        for (int64_t i = low; i < middle; i++) weight += entries[i].weight;
        if (fabs(weight - target) <= doubt) return false;
        if (weight > target) high = middle;
        else low = middle, before = weight;
    }
    std::sort(entries + low, entries + high, comes_before);
    int64_t last = low;
    for (;;) {
        before += entries[last].weight;
        const bool is_end = last + 1 == high;
        // What follows the end stays if this does not hold the target.
        if (is_end && high < count) break;
        if (fabs(before - target) <= doubt) return false;
        if (before > target) break;
        if (is_end) return false;
        last++;
    }
    *cut = {entries[last].value, entries[last].token};
    return true;
}

// The best top_k, and of these the smallest set that holds probability top_p; false where that is too close to tell.
template <class T> bool find_cut(const Scaled<T>& row, const SamplingRow& wanted, float best, Cut* cut) {
    thread_local Buffer buffer;
    const bool has_limit = wanted.top_k > 0 && wanted.top_k < row.size, has_share = wanted.top_p < 1;
    if (!has_limit && !has_share) return true;
    Entry* entries = buffer.of<Entry>(row.size);
    // Less likely ones than this hold less than 1 - top_p together.
    const float floor = has_limit ? floor_of_best(row, wanted.top_k)
                                  : best + (float)log((1 - wanted.top_p) / (double)row.size) - 0.01f;
    double rest;
    int64_t count = find(row, floor, best, has_share, entries, &rest);
    if (has_limit) {
        std::nth_element(entries, entries + wanted.top_k - 1, entries + count, comes_before);
        count = wanted.top_k, rest = 0;
        *cut = {entries[count - 1].value, entries[count - 1].token};
    }
    if (!has_share) return true;
    double total = rest;
    for (int64_t i = 0; i < count; i++) total += entries[i].weight;
    return find_last_within(entries, count, wanted.top_p * total, 1e-10 * total + 1e-5 * rest, cut);
}

// The token with the largest sum of logit and noise. For noise n of a uniform u, 1 - u <= -log(u) = exp(-n): so one that
// reaches a sum needs 1 - u <= exp(logit - sum), and few have that.
template <class T> int64_t drawn_token(const Scaled<T>& row, int64_t best, const Cut& cut, uint64_t key) {
    double largest = row[best] + noise_of(key, best), second = LEAST;
    if (!std::isfinite(largest)) return UNDECIDED;
    int64_t token = best;
    vq counts;
    for (int lane = 0; lane < LANES; lane++) counts[lane] = key + GOLDEN * (uint64_t)(lane + 1);
    float to_reach;
    const auto raise = [&](double sum) {
        sum -= 2 * doubt_of(sum);
        to_reach = (float)sum;
        if (to_reach > sum) to_reach = nextafterf(to_reach, LEAST);
    };
    raise(largest);
    for (int64_t start = 0; start < row.size; start += TILE) {
        vf lacks[TILE_VECTORS];
        vi hits = {};
        const int vectors = (int)std::min<int64_t>(TILE_VECTORS, (row.size - start + LANES - 1) / LANES);
        for (int v = 0; v < vectors; v++) {
            const vf x = row.at(start + v * LANES);
            lacks[v] = x - all(to_reach);
            hits |= (vi)(lacks[v] >= all(-(float)MOST_NOISE)) & (vi)(x >= all(cut.value));
        }
        if (!any(hits)) continue;
        int32_t may_reach[TILE] = {};
        for (int v = 0; v < vectors; v++) {
            // exp from above: 2^n (1 + f) >= 2^(n + f). The first term is far more than what is rounded here.
            const vf capped = max_of(-max_of(-lacks[v], all(0.0f)), all(-80.0f)) + all(1e-3f);
            const vf power = fma_of(capped, all(1.44269504f), all(127.0f)) * all(8388608.0f);
            const vf bound = (vf)__builtin_convertvector(power, vi);
            const vq missing = ~mixed(counts + GOLDEN * (uint64_t)(start + v * LANES));
            const vf above = __builtin_convertvector(__builtin_convertvector(missing >> 40, vi), vf) * all(0x1p-24f);
            const vi hit = (vi)(above <= bound);
            memcpy(may_reach + v * LANES, &hit, sizeof hit);
        }
        for (int64_t i = start; i < std::min(start + TILE, row.size); i++) {
            if (!may_reach[i - start] || i == best) continue;
            const float logit = row[i];
            const double sum = logit + noise_of(key, i);
            if (sum <= second || !cut.keeps(logit, i)) continue;
            if (sum > largest) second = largest, largest = sum, token = i, raise(sum);
            else second = sum;
        }
    }
    return largest - second > 2 * doubt_of(largest) ? token : UNDECIDED;
}

template <class T> int64_t chosen_token(const T* logits, int64_t size, const SamplingRow& wanted) {
    const bool draws = wanted.temperature > 0;
    Scaled<T> row = {logits, size, draws ? (float)wanted.temperature : 1.0f, LEAST};
    const int64_t best = best_token(row);
    if (best == UNDECIDED || !draws) return best;
    row.floor = row[best] + (float)wanted.margin;
    Cut cut;
    if (!std::isfinite(row[best]) || !find_cut(row, wanted, row[best], &cut)) return UNDECIDED;
    return drawn_token(row, best, cut, key_of(wanted));
}

constexpr double WORK_OF_LOGIT = 100;  // as multiply-adds

template <class T>
void choose_tokens(const T* logits, int64_t stride, SamplingRow* rows, int64_t count, int64_t size, int64_t threads) {
    share(worth(threads, WORK_OF_LOGIT * (double)count * (double)size), count, [&](int64_t r) {
        rows[r].token = chosen_token(logits + r * stride, size, rows[r]);
    });
}

}  // namespace
