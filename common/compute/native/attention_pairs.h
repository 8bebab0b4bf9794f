// Attention of bf16 rows where the processor multiplies pairs of bf16: scores and weighted sum by dot products of
// pairs, softmax in float32. Weights are rounded to bf16; their sum is of what they were before. An online softmax over
// sections of a sequence in position order.
//
// What decides a row's bits: its scores, pair by pair of columns; one maximum a section, cut at multiples of SECTION
// positions; the sum of weights in LANES lanes, folded at the end; the weighted sum, pair by pair of keys, the first of
// them at an even position. Nothing of it depends on the rows beside it, or on its chunk.

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
    float* out;     // [rows, wide]
    float* scores;  // [rows, SECTION], in units of log2; then, at the beginning of each row, the weights in bf16
    int64_t wide;   // whole chunks
    float maxima[PART_ROWS];
    vf sums[PART_ROWS];
    int begin[PART_ROWS], end[PART_ROWS];  // the keys of this section that the row sees; none where begin >= end
};

struct Section {
    int64_t width;
    int begin, end;  // its tiles that any row sees
    const bf16 *keys[SECTION_TILES], *values[SECTION_TILES];
    // Where `FETCHES`, what is fetched meanwhile: tiles lie anywhere, so the processor does not foresee them. They are
    // asked for little by little in all that a section takes, so that memory is never idle.
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

struct Pairing {  // of what lies in two vectors of bf16: pairs of the first halves, and of the second ones
    __m512i low, high;
    Pairing() {
        for (uint32_t i = 0; i < LANES; i++) {
            ((uint32_t*)&low)[i] = i | (i + 2 * LANES) << 16;
            ((uint32_t*)&high)[i] = (i + LANES) | (i + 3 * LANES) << 16;
        }
    }
    __attribute__((always_inline)) void operator()(__m512i even, __m512i odd, __m512i* pairs) const {
        pairs[0] = _mm512_permutex2var_epi16(even, low, odd);
        pairs[1] = _mm512_permutex2var_epi16(even, high, odd);
    }
};

// scores[r][key] = scale * query[r] . keys[key], of TILES tiles from `tile` on. In a tile the keys lie side by side:
// two of its rows are interleaved to pairs.
template <bool FETCHES, int ROWS, int TILES>
__attribute__((noinline)) void score_tiles(const bf16* query, float* scores, float scale, const Section& section,
                                           int tile) {
    const Pairing pairing;
    vf acc[ROWS][2 * TILES] = {};
    const auto columns = [&](int64_t pair, __m512i (&column)[2 * TILES]) {
        const int64_t at = 2 * pair * KV_BLOCK;
        UNROLL for (int t = 0; t < TILES; t++) {
            if constexpr (FETCHES) {
                __builtin_prefetch(section.next_keys[tile + t] + at);
                __builtin_prefetch(section.next_keys[tile + t] + at + KV_BLOCK);
            }
            const bf16* row = section.keys[tile + t] + at;
            const bool is_whole = 2 * pair + 1 < section.width;
            const __m512i odd = is_whole ? _mm512_loadu_si512(row + KV_BLOCK) : _mm512_setzero_si512();
            pairing(_mm512_loadu_si512(row), odd, column + 2 * t);
        }
    };
    accumulate_pairs(acc, query, padded(section.width, 2), columns, padded(section.width, 2) / 2);
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int v = 0; v < 2 * TILES; v++)
            store(scores + r * SECTION + tile * KV_BLOCK + v * LANES, acc[r][v] * all(scale));
}

template <bool FETCHES> void score_section(const SectionRows& rows, const Section& section, float scale) {
    const auto score = [&](auto tiles, int tile) {
        constexpr int TILES = decltype(tiles)::value;
        in_row_tiles<PAIRED_ROWS / TILES>(rows.count, [&](auto size, int64_t first) {
            score_tiles<FETCHES, decltype(size)::value, TILES>(rows.query + first * padded(section.width, 2),
                                                               rows.scores + first * SECTION, scale, section, tile);
        });
    };
    int tile = section.begin;
    if (rows.count <= PAIRED_ROWS / 2)
        for (; tile + 2 <= section.end; tile += 2) score(rows_t<2>{}, tile);
    for (; tile < section.end; tile++) score(rows_t<1>{}, tile);
}

// scores[r] becomes the weights of the keys that row r sees; a row that sees none is left as it is.
template <bool FETCHES> __attribute__((noinline)) void soften_section(SectionRows& rows, const Section& section) {
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
            if constexpr (FETCHES) {
                const int line = std::min((4 * r + i % KV_BLOCK / 8) * KV_BLOCK, last_line);
                const bf16* ahead = section.next_values[i / KV_BLOCK] + line;
                __builtin_prefetch(ahead);
                __builtin_prefetch(ahead + KV_BLOCK);
            }
            const vf weight = power_of_2(load(row + i) - all(maximum));
            sum += weight;
            _mm256_storeu_si256((__m256i*)((bf16*)row + i), (__m256i)_mm512_cvtneps_pbh((__m512)weight));
        }
        rows.sums[r] = sum;
    }
}

// out[r] += sum over keys [begin, end) of weights[r][key] * values[key], pair by pair, of CHUNKS chunks of columns. Of
// a pair of which one key lies outside, that one's values count as 0: a freed slot may hold anything.
template <bool FETCHES, int ROWS, int CHUNKS>
__attribute__((noinline)) void weigh_keys(const SectionRows& rows, int64_t first, const Section& section,
                                          int64_t column, int begin, int end) {
    float* out = rows.out + first * rows.wide + column;
    const bf16* weights = (const bf16*)(rows.scores + first * SECTION);
    const Pairing pairing;
    vf acc[ROWS][2 * CHUNKS];
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int v = 0; v < 2 * CHUNKS; v++) acc[r][v] = load(out + r * rows.wide + v * LANES);
    for (int until, pair = begin & ~1; pair < end; pair = until) {
        const int tile = pair / KV_BLOCK, in_tile = pair % KV_BLOCK;
        const bool has_even = pair >= begin, has_odd = pair + 1 < end;
        until = has_even && has_odd ? std::min(end & ~1, (tile + 1) * KV_BLOCK) : pair + 2;
        __mmask32 evens[CHUNKS], odds[CHUNKS];
        UNROLL for (int c = 0; c < CHUNKS; c++) {
            const __mmask32 there = columns_below(section.width - column - c * CHUNK);
            evens[c] = has_even ? there : 0;
            odds[c] = has_odd ? there : 0;
        }
        const auto columns = [&](int64_t k, __m512i (&value)[2 * CHUNKS]) {
            const int64_t at = (in_tile + 2 * k) * section.width + column;
            UNROLL for (int c = 0; c < CHUNKS; c++) {
                if constexpr (FETCHES) {
                    __builtin_prefetch(section.next_values[tile] + at + c * CHUNK);
                    __builtin_prefetch(section.next_values[tile] + at + c * CHUNK + section.width);
                }
                const bf16* row = section.values[tile] + at + c * CHUNK;
                pairing(_mm512_maskz_loadu_epi16(evens[c], row), _mm512_maskz_loadu_epi16(odds[c], row + section.width),
                        value + 2 * c);
            }
        };
        accumulate_pairs(acc, weights + pair, 2 * SECTION, columns, (until - pair) / 2);
    }
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int v = 0; v < 2 * CHUNKS; v++) store(out + r * rows.wide + v * LANES, acc[r][v]);
}

template <bool FETCHES, int CHUNKS>
void weigh_columns(const SectionRows& rows, const Section& section, int64_t column) {
    // Each row goes alone over the pairs before those that all rows see, all go together over these, each alone over
    // the rest: no pair is cut in two. What begins or ends for all at one key, in mid-pair perhaps, does so together.
    in_row_tiles<TILE_ROWS>(rows.count, [&](auto size, int64_t first) {
        constexpr int ROWS = decltype(size)::value;
        const auto [least_begin, most_begin] = std::minmax_element(rows.begin + first, rows.begin + first + ROWS);
        const auto [least_end, most_end] = std::minmax_element(rows.end + first, rows.end + first + ROWS);
        const int low = *least_begin == *most_begin ? *most_begin : (*most_begin + 1) & ~1;
        const int high = *least_end == *most_end ? *least_end : *least_end & ~1;
        const int alone_until = low < high ? low : SECTION;
        for (int64_t r = first; r < first + ROWS; r++) {
            const int end = std::min(alone_until, rows.end[r]);
            if (rows.begin[r] < end) weigh_keys<FETCHES, 1, CHUNKS>(rows, r, section, column, rows.begin[r], end);
        }
        if (low >= high) return;
        weigh_keys<FETCHES, ROWS, CHUNKS>(rows, first, section, column, low, high);
        for (int64_t r = first; r < first + ROWS; r++)
            if (high < rows.end[r]) weigh_keys<FETCHES, 1, CHUNKS>(rows, r, section, column, high, rows.end[r]);
    });
}

// Tile `tile` of the section `number`, and the one to fetch meanwhile: as far on in the next section, or in the part
// `after`.
INLINE void place_tile(const Attention& a, const Part& part, const Part* after, const RowPlaces& places, int64_t number,
                       int tile, Section& section) {
    const bf16 *keys = (const bf16*)a.keys, *values = (const bf16*)a.values;
    const int64_t at = tile_at(a, part, number * SECTION_TILES + tile), further = (number + 1) * SECTION_TILES + tile;
    int64_t next = at;
    if (further <= places.last_key / KV_BLOCK) {
        next = tile_at(a, part, further);
    } else if (after && number == places.last_key / SECTION) {
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
template <bool FETCHES> void attend_part(const Attention& a, const Part& part, const Part* after) {
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
        score_section<FETCHES>(rows, section, scale);
        soften_section<FETCHES>(rows, section);
        int64_t column = 0;
        for (; column + CHUNK < width; column += 2 * CHUNK) weigh_columns<FETCHES, 2>(rows, section, column);
        if (column < width) weigh_columns<FETCHES, 1>(rows, section, column);
    }
    for (int r = 0; r < rows.count; r++) {
        const vf sum[KV_VECTORS] = {rows.sums[r]};
        const vf inverse = all(1.0f / fold_sum(sum));
        bf16* to = (bf16*)a.output + places.values[r];
        for (int64_t i = 0; i < width; i += LANES) put(to + i, load(rows.out + r * rows.wide + i) * inverse, width - i);
    }
}

INLINE void attend_pairs(const Attention& a, const Part& part, const Part* after) {
    // A chunk fetches nothing: its parts read the same tiles one after another, which are near.
    if (part.rows > a.heads / a.kv_heads) attend_part<false>(a, part, after);
    else attend_part<true>(a, part, after);
}

}  // namespace

#endif
