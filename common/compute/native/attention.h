// Causal attention over a paged KV cache, as an online softmax over its blocks in position order; and filling them.
// Where there are dot products of bf16 pairs, bf16 rows go by attention_pairs.h instead.

#pragma once

#include <type_traits>

#include "attention_pairs.h"
#include "attention_parts.h"
#include "tile.h"

namespace {

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
    float maxima[PART_ROWS], sums[PART_ROWS], corrections[PART_ROWS];
    int begin[PART_ROWS], end[PART_ROWS];  // the keys of this tile that the row sees; none where begin >= end
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
    const int low = *std::max_element(rows.begin, rows.begin + rows.count);
    const int high = *std::min_element(rows.end, rows.end + rows.count);
    // A key that a row does not see is left out, not weighed with 0: a freed slot may hold anything. So each row goes
    // alone over the keys before those that all rows see, all go together over these, each alone over the rest.
    const int alone_until = low < high ? low : KV_BLOCK;
    for (int r = 0; r < rows.count; r++) {
        const int end = std::min(alone_until, rows.end[r]);
        if (rows.begin[r] < end)
            weigh_tile<1, VECTORS>(out + r * wide, wide, rows.scores + r * KV_BLOCK, rows.corrections + r, values, wide,
                                   rows.begin[r], end);
    }
    if (low >= high) return;
    in_row_tiles<TILE_ROWS>(rows.count, [&](auto size, int64_t first) {
        constexpr int ROWS = decltype(size)::value;
        float corrections[ROWS];  // what went alone before has been corrected
        for (int r = 0; r < ROWS; r++)
            corrections[r] = rows.begin[first + r] < low ? 1.0f : rows.corrections[first + r];
        weigh_tile<ROWS, VECTORS>(out + first * wide, wide, rows.scores + first * KV_BLOCK, corrections, values, wide,
                                  low, high);
    });
    for (int r = 0; r < rows.count; r++)
        if (rows.end[r] > high)
            weigh_tile<1, VECTORS>(out + r * wide, wide, rows.scores + r * KV_BLOCK, nullptr, values, wide, high,
                                   rows.end[r]);
}

struct KvTile {  // where one KV head's part of a block lies
    const char *keys = nullptr, *values = nullptr;
    int64_t bytes = 0;  // of each
};

template <class T> INLINE KvTile tile_of(const Attention& a, const Part& part, int64_t tile) {
    const int64_t at = tile_at(a, part, tile);
    return {(const char*)((const T*)a.keys + at), (const char*)((const T*)a.values + at),
            KV_BLOCK * a.width * (int64_t)sizeof(T)};
}

// Asks for what will be read soon: tiles are short and lie anywhere, so the processor does not foresee them.
INLINE void fetch(const char* memory, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(memory + i);
}

// One tile: keys [width][32], values [32][wide]. `next`: what is fetched meanwhile.
template <class Cached>
__attribute__((noinline)) void attend_tile(Rows& rows, const Cached* keys, const Cached* values, int64_t width,
                                           int64_t wide, float scale, const KvTile& next) {
    fetch(next.keys, next.bytes);
    in_row_tiles<SCORE_ROWS>(rows.count, [&](auto size, int64_t first) {
        constexpr int ROWS = decltype(size)::value;
        vf acc[ROWS][KV_VECTORS] = {};
        accumulate<ROWS, KV_VECTORS>(acc, rows.query + first * width, width, keys, KV_BLOCK, 0, width);
        UNROLL for (int r = 0; r < ROWS; r++)
            UNROLL for (int v = 0; v < KV_VECTORS; v++)
                store(rows.scores + (first + r) * KV_BLOCK + v * LANES, acc[r][v]);
    });
    soften(rows, scale);
    fetch(next.values, next.bytes);
    int64_t column = 0;
    for (; column + PANEL <= wide; column += PANEL) weigh_values<PANEL_VECTORS>(rows, column, values + column, wide);
    for (; column < wide; column += LANES) weigh_values<1>(rows, column, values + column, wide);
}

// `after`: the part whose first tile is fetched at the end, or null.
template <class T> void attend_rows(const Attention& a, const Part& part, const Part* after) {
    const int64_t width = a.width, wide = padded(width, LANES), group = a.heads / a.kv_heads;
    const int count = part.rows;
    const int64_t tile_values = KV_BLOCK * width, query_values = padded(PART_ROWS * width, LANES);
    float* memory = attention_buffer.of<float>(query_values + PART_ROWS * (wide + KV_BLOCK) + tile_values +
                                               KV_BLOCK * wide);
    Rows rows;
    rows.count = count;
    rows.query = memory;
    rows.out = rows.query + query_values;
    rows.scores = rows.out + PART_ROWS * wide;
    float *keys = rows.scores + PART_ROWS * KV_BLOCK, *values = keys + tile_values;
    const RowPlaces places(a, part);
    for (int r = 0; r < count; r++) {
        const T* from = (const T*)a.query + places.values[r];
        for (int64_t i = 0; i < width; i++) rows.query[r * width + i] = float_of(from[i]);
        rows.maxima[r] = -INFINITY;
        rows.sums[r] = 0;
    }
    memset(rows.out, 0, count * wide * sizeof(float));
    const int64_t last_tile = places.last_key / KV_BLOCK;
    for (int64_t t = places.first_key / KV_BLOCK; t <= last_tile; t++) {
        for (int r = 0; r < count; r++) {
            rows.begin[r] = places.begin_in(r, t * KV_BLOCK, KV_BLOCK);
            rows.end[r] = places.end_in(r, t * KV_BLOCK, KV_BLOCK);
        }
        const KvTile tile = tile_of<T>(a, part, t);
        const T *key_tile = (const T*)tile.keys, *value_tile = (const T*)tile.values;
        KvTile next;  // nothing in a chunk: its parts read the same tiles one after another, which are near
        const bool fetches = count <= group;
        if (fetches && t < last_tile) {
            next = tile_of<T>(a, part, t + 1);
        } else if (fetches && after) {
            next = tile_of<T>(a, *after, first_seen(a, a.positions[token_of(a, *after, 0)]) / KV_BLOCK);
        }
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
        if (widen) attend_tile<float>(rows, keys, values, width, wide, scale, next);
        else if (pad) attend_tile<float>(rows, (const float*)key_tile, values, width, wide, scale, next);  // T is float
        else attend_tile<T>(rows, key_tile, value_tile, width, wide, scale, next);
    }
    for (int r = 0; r < count; r++) {
        T* to = (T*)a.output + places.values[r];
        vf inverse = all(1.0f / rows.sums[r]);
        for (int64_t i = 0; i < width; i += LANES) {
            put(to + i, load(rows.out + r * wide + i) * inverse, width - i);
        }
    }
}

template <class T> INLINE void attend(const Attention& a, const Part& part, const Part* after) {
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<T, bf16>) return attend_pairs(a, part, after);
#endif
    attend_rows<T>(a, part, after);
}

constexpr int64_t RUNS = 16;  // of parts, a thread: a run's parts follow each other, so that one can fetch for the next

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
            for (int64_t row = 0; row < rows; row += PART_ROWS)
                parts.push_back({first, row, head, (int)std::min<int64_t>(PART_ROWS, rows - row)});
    }
    const Part* all_parts = parts.data();
    const int64_t count = (int64_t)parts.size();
    const int64_t run = threads > 1 ? std::max<int64_t>(1, count / (RUNS * threads)) : std::max<int64_t>(1, count);
    share(threads, (count + run - 1) / run, [&](int64_t r) {
        const int64_t end = std::min(count, (r + 1) * run);
        for (int64_t p = r * run; p < end; p++) attend<T>(a, all_parts[p], p + 1 < end ? all_parts + p + 1 : nullptr);
    });
}

template <class T>
void write_rows(const T* key, int64_t key_stride, const T* value, int64_t value_stride, T* keys, T* values,
                const int64_t* slots, int64_t tokens, int64_t kv_heads, int64_t cache_heads, int64_t width) {
    for (int64_t t = 0; t < tokens; t++) {
        if (slots[t] < 0) continue;
        int64_t block = slots[t] / KV_BLOCK, offset = slots[t] % KV_BLOCK;
        for (int64_t h = 0; h < kv_heads; h++) {
            const T *k = key + t * key_stride + h * width, *v = value + t * value_stride + h * width;
            int64_t at = (block * cache_heads + h) * width * KV_BLOCK;
            for (int64_t i = 0; i < width; i++) keys[at + i * KV_BLOCK + offset] = k[i];
            memcpy(values + at + offset * width, v, width * sizeof(T));
        }
    }
}

}  // namespace
