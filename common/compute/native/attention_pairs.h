// Attention of bf16 rows where the processor multiplies pairs of bf16: scores by dot products of pairs; softmax and
// weighted sum in float32. An online softmax over sections of a sequence in position order.
//
// What decides a row's bits: its scores, pair by pair; one maximum a section, cut at multiples of SECTION positions;
// the sum of weights in LANES lanes, folded at the end; the weighted sum, key by key. Nothing of it depends on the rows
// beside it, or on its chunk.

#pragma once

#include "attention_parts.h"
#include "tile.h"

#if defined(__AVX512BF16__)

namespace {

constexpr int SECTION_TILES = 8, SECTION = SECTION_TILES * KV_BLOCK;
constexpr int PAIRED_ROWS = 8;      // rows that go over one tile together, or half as many over two
constexpr int CHUNK = 2 * LANES;    // columns of values that are loaded at once
constexpr float SMALLEST = -126.0f;  // the least power of 2 that is no denormal

thread_local Buffer section_buffer;

struct SectionRows {  // of one part: what the fold over sections carries, and this section's part of it
    int count;
    bf16* query;    // [rows, even width]
    float* out;     // [rows, wide], of each CHUNK of columns first the even ones, then the odd ones
    float* scores;  // [rows, SECTION], in units of log2; then the weights
    int64_t wide;   // whole chunks
    float maxima[PART_ROWS];
    vf sums[PART_ROWS];
    int begin[PART_ROWS], end[PART_ROWS];  // the keys of this section that the row sees; none where begin >= end
};

struct Section {
    int64_t width;
    int begin, end;  // its tiles that any row sees
    const bf16 *keys[SECTION_TILES], *values[SECTION_TILES];
    // What is fetched meanwhile: tiles lie anywhere, so the processor does not foresee them. It is asked for little by
    // little in all that a section takes, so that memory is never idle.
    const bf16 *next_keys[SECTION_TILES], *next_values[SECTION_TILES];
};

// 2^x for x <= 0, about 1 ulp; 2^0 is exactly 1; what would be a denormal is exactly 0.
INLINE vf power_of_2(vf x) {
    const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, (__m512)all(SMALLEST), _CMP_NLT_UQ);
    const vf n = (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = x - n;
    vf p = all(1.3264727e-3f);  // 2^r on [-1/2, 1/2], largest relative error 9e-8 (fitted, with p(0) = 1)
    p = fma_of(p, r, all(9.671513e-3f));
    p = fma_of(p, r, all(5.5507336e-2f));
    p = fma_of(p, r, all(2.4022242e-1f));
    p = fma_of(p, r, all(6.93147e-1f));
    p = fma_of(p, r, all(1.0f));
    return (vf)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)n);
}

// Which of 16 lanes, or of a chunk's 32 columns, lie below `count`.
INLINE __mmask16 lanes_below(int count) { return (__mmask16)((1u << count) - 1); }
INLINE __mmask32 columns_below(int64_t count) { return count >= CHUNK ? ~0u : (1u << count) - 1; }

// scores[r][key] = scale * query[r] . keys[key], of TILES tiles from `tile` on. In a tile the keys lie side by side:
// two of its rows are interleaved to pairs.
template <int ROWS, int TILES>
__attribute__((noinline)) void score_tiles(const bf16* query, float* scores, float scale, const Section& section,
                                           int tile, bool fetches) {
    const bf16* const* ahead = (fetches ? section.next_keys : section.keys) + tile;
    __m512i low, high;  // where keys 0 to 15 and 16 to 31 of a pair of rows come from
    for (uint32_t i = 0; i < LANES; i++) {
        ((uint32_t*)&low)[i] = i | (i + KV_BLOCK) << 16;
        ((uint32_t*)&high)[i] = (i + LANES) | (i + LANES + KV_BLOCK) << 16;
    }
    vf acc[ROWS][2 * TILES] = {};
    const auto columns = [&](int64_t pair, __m512i (&column)[2 * TILES]) {
        const int64_t at = 2 * pair * KV_BLOCK;
        UNROLL for (int t = 0; t < TILES; t++) {
            __builtin_prefetch(ahead[t] + at);
            __builtin_prefetch(ahead[t] + at + KV_BLOCK);
            const bf16* row = section.keys[tile + t] + at;
            const bool is_whole = 2 * pair + 1 < section.width;
            const __m512i even = _mm512_loadu_si512(row);
            const __m512i odd = is_whole ? _mm512_loadu_si512(row + KV_BLOCK) : _mm512_setzero_si512();
            column[2 * t] = _mm512_permutex2var_epi16(even, low, odd);
            column[2 * t + 1] = _mm512_permutex2var_epi16(even, high, odd);
        }
    };
    accumulate_pairs(acc, query, padded(section.width, 2), columns, padded(section.width, 2) / 2);
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int v = 0; v < 2 * TILES; v++)
            store(scores + r * SECTION + tile * KV_BLOCK + v * LANES, acc[r][v] * all(scale));
}

void score_section(const SectionRows& rows, const Section& section, float scale) {
    const auto score = [&](auto tiles, int tile) {
        constexpr int TILES = decltype(tiles)::value;
        in_row_tiles<PAIRED_ROWS / TILES>(rows.count, [&](auto size, int64_t first) {
            score_tiles<decltype(size)::value, TILES>(rows.query + first * padded(section.width, 2),
                                                      rows.scores + first * SECTION, scale, section, tile, first == 0);
        });
    };
    int tile = section.begin;
    if (rows.count <= PAIRED_ROWS / 2)
        for (; tile + 2 <= section.end; tile += 2) score(rows_t<2>{}, tile);
    for (; tile < section.end; tile++) score(rows_t<1>{}, tile);
}

// scores[r] becomes the weights of the keys that row r sees; a row that sees none is left as it is.
__attribute__((noinline)) void soften_section(SectionRows& rows, const Section& section) {
    const int last_line = (int)(KV_BLOCK * section.width) - KV_BLOCK;  // where the last line of a tile's values begins
    for (int r = 0; r < rows.count; r++) {
        const int begin = rows.begin[r], end = rows.end[r];
        if (begin >= end) continue;
        float* row = rows.scores + r * SECTION;
        const int first = begin / LANES * LANES, last = (end - 1) / LANES * LANES;
        _mm512_mask_storeu_ps(row + first, lanes_below(begin - first), (__m512)all(-INFINITY));
        _mm512_mask_storeu_ps(row + last, ~lanes_below(end - last), (__m512)all(-INFINITY));
        vf best = load(row + first);
        for (int i = first + LANES; i <= last; i += LANES)
            best = (vf)_mm512_max_ps((__m512)best, (__m512)load(row + i));
        const float before = rows.maxima[r], maximum = std::max(before, _mm512_reduce_max_ps((__m512)best));
        if (maximum > before && before > -INFINITY) {
            const vf correction = power_of_2(all(before - maximum));
            rows.sums[r] *= correction;
            float* out = rows.out + r * rows.wide;
            for (int64_t i = 0; i < rows.wide; i += LANES) store(out + i, load(out + i) * correction);
        }
        rows.maxima[r] = maximum;
        vf sum = rows.sums[r];
        for (int i = first; i <= last; i += LANES) {
            const int line = std::min((4 * r + i % KV_BLOCK / 8) * KV_BLOCK, last_line);
            const bf16* ahead = section.next_values[i / KV_BLOCK] + line;
            __builtin_prefetch(ahead);
            __builtin_prefetch(ahead + KV_BLOCK);
            const vf weight = power_of_2(load(row + i) - all(maximum));
            store(row + i, weight);
            sum += weight;
        }
        rows.sums[r] = sum;
    }
}

// out[r] += sum over keys [begin, end) of weights[r][key] * values[key], keys ascending, of CHUNKS chunks of columns.
template <int ROWS, int CHUNKS>
__attribute__((noinline)) void weigh_keys(const SectionRows& rows, int64_t first, const Section& section,
                                          int64_t column, int begin, int end) {
    float* out = rows.out + first * rows.wide + column;
    const float* weights = rows.scores + first * SECTION;
    const bf16* const* ahead = first == 0 ? section.next_values : section.values;
    vf acc[ROWS][2 * CHUNKS];
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int v = 0; v < 2 * CHUNKS; v++) acc[r][v] = load(out + r * rows.wide + v * LANES);
    __mmask32 there[CHUNKS];
    UNROLL for (int c = 0; c < CHUNKS; c++) there[c] = columns_below(section.width - column - c * CHUNK);
    for (int until; begin < end; begin = until) {
        const int tile = begin / KV_BLOCK, base = tile * KV_BLOCK;
        until = std::min(end, base + KV_BLOCK);
        const auto columns = [&](int64_t key, vf (&value)[2 * CHUNKS]) {
            const int64_t at = key * section.width + column;
            UNROLL for (int c = 0; c < CHUNKS; c++) {
                __builtin_prefetch(ahead[tile] + at + c * CHUNK);
                // bf16 is the upper half of a float: of a pair one column takes a shift, the other a mask.
                const vu pair = (vu)_mm512_maskz_loadu_epi16(there[c], section.values[tile] + at + c * CHUNK);
                value[2 * c] = (vf)(pair << 16);
                value[2 * c + 1] = (vf)(pair & 0xffff0000u);
            }
        };
        accumulate(acc, weights + base, SECTION, columns, begin - base, until - base);
    }
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int v = 0; v < 2 * CHUNKS; v++) store(out + r * rows.wide + v * LANES, acc[r][v]);
}

template <int CHUNKS> void weigh_columns(const SectionRows& rows, const Section& section, int64_t column) {
    // A key that a row does not see is left out, not weighed with 0: a freed slot may hold anything. So each row goes
    // alone over the keys before those that all rows see, all go together over these, each alone over the rest.
    in_row_tiles<TILE_ROWS>(rows.count, [&](auto size, int64_t first) {
        constexpr int ROWS = decltype(size)::value;
        const int low = *std::max_element(rows.begin + first, rows.begin + first + ROWS);
        const int high = *std::min_element(rows.end + first, rows.end + first + ROWS);
        const int alone_until = low < high ? low : SECTION;
        for (int64_t r = first; r < first + ROWS; r++) {
            const int end = std::min(alone_until, rows.end[r]);
            if (rows.begin[r] < end) weigh_keys<1, CHUNKS>(rows, r, section, column, rows.begin[r], end);
        }
        if (low >= high) return;
        weigh_keys<ROWS, CHUNKS>(rows, first, section, column, low, high);
        for (int64_t r = first; r < first + ROWS; r++)
            if (high < rows.end[r]) weigh_keys<1, CHUNKS>(rows, r, section, column, high, rows.end[r]);
    });
}

// Tile `tile` of the section `number`, and the one to fetch meanwhile: as far on in the next section, or in the part
// `after`. A chunk fetches nothing: its parts read the same tiles one after another, which are near.
INLINE void place_tile(const Attention& a, const Part& part, const Part* after, const RowPlaces& places, int64_t number,
                       int tile, Section& section) {
    const bf16 *keys = (const bf16*)a.keys, *values = (const bf16*)a.values;
    const int64_t at = tile_at(a, part, number * SECTION_TILES + tile), further = (number + 1) * SECTION_TILES + tile;
    int64_t next = at;
    const bool is_chunk = part.rows > a.heads / a.kv_heads;
    if (!is_chunk && further <= places.last_key / KV_BLOCK) {
        next = tile_at(a, part, further);
    } else if (!is_chunk && after && number == places.last_key / SECTION) {
        const int64_t position = a.positions[token_of(a, *after, 0)];
        const int64_t there = first_seen(a, position) / KV_BLOCK + tile - section.begin;
        if (there <= position / KV_BLOCK) next = tile_at(a, *after, there);
    }
    section.keys[tile] = keys + at;
    section.values[tile] = values + at;
    section.next_keys[tile] = keys + next;
    section.next_values[tile] = values + next;
}

// `after`: the part that comes next on this thread, or null.
void attend_pairs(const Attention& a, const Part& part, const Part* after) {
    const int64_t width = a.width, even = padded(width, 2);
    const RowPlaces places(a, part);
    SectionRows rows;
    rows.count = part.rows;
    rows.wide = padded(width, CHUNK);
    rows.scores = section_buffer.of<float>(PART_ROWS * (SECTION + rows.wide + even));
    rows.out = rows.scores + PART_ROWS * SECTION;
    rows.query = (bf16*)(rows.out + PART_ROWS * rows.wide);
    for (int r = 0; r < rows.count; r++) {
        rows.query[r * even + even - 1] = 0;
        memcpy(rows.query + r * even, (const bf16*)a.query + places.values[r], width * sizeof(bf16));
        rows.maxima[r] = -INFINITY;
        rows.sums[r] = (vf){};
    }
    memset(rows.out, 0, rows.count * rows.wide * sizeof(float));
    const float scale = (float)(a.scale * M_LOG2E);
    for (int64_t s = places.first_key / SECTION; s <= places.last_key / SECTION; s++) {
        Section section;
        section.width = width;
        section.begin = (int)std::max<int64_t>(0, places.first_key / KV_BLOCK - s * SECTION_TILES);
        section.end = (int)std::min<int64_t>(SECTION_TILES, places.last_key / KV_BLOCK + 1 - s * SECTION_TILES);
        for (int t = section.begin; t < section.end; t++) place_tile(a, part, after, places, s, t, section);
        for (int r = 0; r < rows.count; r++) {
            rows.begin[r] = places.begin_in(r, s * SECTION, SECTION);
            rows.end[r] = places.end_in(r, s * SECTION, SECTION);
        }
        score_section(rows, section, scale);
        soften_section(rows, section);
        int64_t column = 0;
        for (; column + CHUNK < width; column += 2 * CHUNK) weigh_columns<2>(rows, section, column);
        if (column < width) weigh_columns<1>(rows, section, column);
    }
    for (int r = 0; r < rows.count; r++) {
        const vf sum[KV_VECTORS] = {rows.sums[r]};
        const vf inverse = all(1.0f / fold_sum(sum));
        bf16* to = (bf16*)a.output + places.values[r];
        for (int64_t i = 0; i < width; i += CHUNK) {
            const float* out = rows.out + r * rows.wide + i;
            const vu evens = rounded_bits(load(out) * inverse), odds = rounded_bits(load(out + LANES) * inverse);
            _mm512_mask_storeu_epi16(to + i, columns_below(width - i), (__m512i)(evens >> 16 | odds));
        }
    }
}

}  // namespace

#endif
