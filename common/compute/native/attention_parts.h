// What is attended, cut into parts that threads share, and where in the paged cache a part's keys and values lie.

#pragma once

#include "threads.h"

namespace {

struct Attention {  // mirrored by _AttentionDescriptor in services/stage/model/paged_attention.py
    const void* query;          // [T, H, d]
    const void* keys;           // [blocks, Hkv of the cache, d, 32], from the first head that is attended
    const void* values;         // [blocks, Hkv of the cache, 32, d]
    const int32_t* tables;      // [S, max_blocks]
    const int32_t* sequences;   // [T], a row of tables
    const int32_t* positions;   // [T]
    void* output;               // [T, H, d]
    int64_t tokens, heads, kv_heads, cache_heads, width, max_blocks, window, threads;
    double scale;
};

constexpr int PART_ROWS = 24;  // at most

struct Part {  // (token, head) rows that share a sequence and a KV head, and go over its tiles together
    int64_t first_token, first_row, kv_head;
    int rows;
};

INLINE int64_t token_of(const Attention& a, const Part& part, int row) {
    return part.first_token + (part.first_row + row) / (a.heads / a.kv_heads);
}

INLINE int64_t first_seen(const Attention& a, int64_t position) {
    return a.window > 0 ? std::max<int64_t>(0, position - a.window + 1) : 0;
}

struct RowPlaces {  // of a part's rows
    int64_t first_keys[PART_ROWS], last_keys[PART_ROWS];  // positions that the row sees
    int64_t values[PART_ROWS];                            // where the row begins in query and output
    int64_t first_key = INT64_MAX, last_key = 0;          // of all rows

    RowPlaces(const Attention& a, const Part& part) {
        const int64_t group = a.heads / a.kv_heads;
        for (int r = 0; r < part.rows; r++) {
            const int64_t token = token_of(a, part, r), head = part.kv_head * group + (part.first_row + r) % group;
            first_keys[r] = first_seen(a, a.positions[token]);
            last_keys[r] = a.positions[token];
            values[r] = (token * a.heads + head) * a.width;
            first_key = std::min(first_key, first_keys[r]);
            last_key = std::max(last_key, last_keys[r]);
        }
    }
    // Which keys row r sees of `count` positions from `first` on: [begin, end), none where begin >= end.
    int begin_in(int r, int64_t first, int64_t count) const {
        return (int)std::min(count, std::max<int64_t>(0, first_keys[r] - first));
    }
    int end_in(int r, int64_t first, int64_t count) const {
        return (int)std::max<int64_t>(0, std::min(count, last_keys[r] + 1 - first));
    }
};

// Where one KV head's part of a block begins, in keys as in values.
INLINE int64_t tile_at(const Attention& a, const Part& part, int64_t tile) {
    const int64_t block = a.tables[a.sequences[part.first_token] * a.max_blocks + tile];
    return (block * a.cache_heads + part.kv_head) * KV_BLOCK * a.width;
}

}  // namespace
