// The only place where products are added: a few rows times a few vectors of columns, k ascending.

#pragma once

#include "vectors.h"

namespace {

// acc[r][v] += sum over k of x[r][k] * w[k][v], k ascending: the only place where products are added. `columns(k, c)`
// makes c the w[k].
template <int ROWS, int VECTORS, class Columns>
INLINE void accumulate(vf (&acc)[ROWS][VECTORS], const float* x, int64_t x_stride, const Columns& columns,
                       int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; k++) {
        vf column[VECTORS];
        columns(k, column);
        UNROLL for (int r = 0; r < ROWS; r++) {
            vf value = all(x[r * x_stride + k]);
            UNROLL for (int v = 0; v < VECTORS; v++) acc[r][v] = fma_of(value, column[v], acc[r][v]);
        }
    }
}

template <int ROWS, int VECTORS, class Weight>
INLINE void accumulate(vf (&acc)[ROWS][VECTORS], const float* x, int64_t x_stride, const Weight* w, int64_t w_stride,
                       int64_t begin, int64_t end) {
    const auto columns = [&](int64_t k, vf (&column)[VECTORS]) {
        UNROLL for (int v = 0; v < VECTORS; v++) column[v] = load(w + k * w_stride + v * LANES);
    };
    accumulate(acc, x, x_stride, columns, begin, end);
}

// The same for bf16 weights: w holds pairs (k even in the low half, k odd in the high half of each 32-bit lane).
#if defined(__AVX512BF16__)
typedef bf16 pair_input;  // x stays bf16; dpbf16ps multiplies the pair and adds both products
template <int ROWS, int VECTORS, class Columns>
INLINE void accumulate_pairs(vf (&acc)[ROWS][VECTORS], const bf16* x, int64_t x_stride, const Columns& columns,
                             int64_t pairs) {
    for (int64_t k = 0; k < pairs; k++) {
        __m512i column[VECTORS];
        columns(k, column);
        UNROLL for (int r = 0; r < ROWS; r++) {
            int32_t pair;
            memcpy(&pair, x + r * x_stride + 2 * k, 4);
            __m512i value = _mm512_set1_epi32(pair);
            UNROLL for (int v = 0; v < VECTORS; v++)
                acc[r][v] = (vf)_mm512_dpbf16_ps((__m512)acc[r][v], (__m512bh)value, (__m512bh)column[v]);
        }
    }
}
template <int ROWS, int VECTORS>
INLINE void accumulate_pairs(vf (&acc)[ROWS][VECTORS], const bf16* x, int64_t x_stride, const bf16* w,
                             int64_t w_stride, int64_t pairs) {
    const auto columns = [&](int64_t k, __m512i (&column)[VECTORS]) {
        UNROLL for (int v = 0; v < VECTORS; v++) column[v] = _mm512_loadu_si512(w + k * w_stride + v * 2 * LANES);
    };
    accumulate_pairs(acc, x, x_stride, columns, pairs);
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

// Calls work(rows_t<n>, first) for tiles of at most MOST rows, as even as they can be: 8 rows are 4 + 4, not 6 + 2.
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

}  // namespace
