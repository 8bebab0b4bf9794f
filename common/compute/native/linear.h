// y = x @ weight^T + bias over packed weights, float32 or bf16.

#pragma once

#include "threads.h"
#include "tile.h"

namespace {

struct Linear {  // mirrored by _LinearDescriptor in linear.py
    const void* packed;
    const float* bias;  // or null
    int64_t k, n, is_bf16, threads;
};

// Packed weights: panels of PANEL columns (the last one of LANES, if that is enough), each [K][width] float32 or
// [ceil(K/2)][width][2] bf16, zero padded.
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

// What a tile asks the memory for while it computes: of each part of a panel so many cache lines of the same part of the
// next one. Rows that take several tiles would wait for a panel's first reading, and leave the memory idle in the others.
// It is every line, or none: with gaps, the processor's own prefetching loses the thread.
struct Ahead {
    static constexpr int64_t PAIRS = 8, LINE = 64 / sizeof(bf16);
    static constexpr int64_t LONGEST_PANEL = 256 * 1024;  // bytes; two of them, and more, fit a second-level cache
    const bf16* from;
    int64_t lines;
};
struct PairRows { const pair_input* x; };  // tells the overloads apart where pair_input is float
template <int ROWS, int VECTORS, class Out>
__attribute__((noinline)) void tile(PairRows x, int64_t x_stride, const bf16* panel, const float* bias, Out* y,
                                    int64_t y_stride, int64_t k, int64_t columns, Ahead ahead) {
    vf acc[ROWS][VECTORS] = {};
    constexpr int64_t VALUES = 2 * VECTORS * LANES;
    const int64_t pairs = (k + 1) / 2;
    int64_t begin = 0;
    for (; ahead.lines && begin + Ahead::PAIRS <= pairs; begin += Ahead::PAIRS) {
        const bf16* next = ahead.from + begin * VALUES;
        for (int64_t line = 0; line < ahead.lines; line++) __builtin_prefetch(next + line * Ahead::LINE);
        accumulate_pairs<ROWS, VECTORS>(acc, x.x + 2 * begin, x_stride, panel + begin * VALUES, VALUES, Ahead::PAIRS);
    }
    accumulate_pairs<ROWS, VECTORS>(acc, x.x + 2 * begin, x_stride, panel + begin * VALUES, VALUES, pairs - begin);
    finish<ROWS, VECTORS, Out>(acc, bias, y, y_stride, columns);
}

template <int VECTORS, class Out>
void panel_rows(const float* x, int64_t x_stride, const float* panel, const float*, const float* bias, Out* y,
                int64_t y_stride, int64_t rows, int64_t k, int64_t columns) {
    in_row_tiles<TILE_ROWS>(rows, [&](auto size, int64_t first) {
        tile<decltype(size)::value, VECTORS, Out>(x + first * x_stride, x_stride, panel, bias, y + first * y_stride,
                                                  y_stride, k, columns);
    });
}
template <int VECTORS, class Out>
void panel_rows(PairRows x, int64_t x_stride, const bf16* panel, const bf16* next, const float* bias, Out* y,
                int64_t y_stride, int64_t rows, int64_t k, int64_t columns) {
    constexpr int64_t LINES = Ahead::PAIRS * 2 * VECTORS * LANES / Ahead::LINE;
    const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    const bool asks = next && tiles > 1 && padded(k, 2) * VECTORS * LANES * 2 <= Ahead::LONGEST_PANEL;
    int64_t asked = asks ? 0 : LINES;
    in_row_tiles<TILE_ROWS>(rows, [&](auto size, int64_t first) {
        const Ahead ahead = {next + asked * Ahead::LINE, std::min((LINES + tiles - 1) / tiles, LINES - asked)};
        asked += ahead.lines;
        tile<decltype(size)::value, VECTORS, Out>({x.x + first * x_stride}, x_stride, panel, bias,
                                                  y + first * y_stride, y_stride, k, columns, ahead);
    });
}

// y[rows][n] = x[rows][k] @ weights + bias, panel by panel. `next`: the panel that this thread is to read after it; null:
// that is not known.
template <class In, class Weight, class Out>
void linear_panel(In x, int64_t x_stride, const Weight* packed, int64_t k_stored, const Weight* next, const float* bias,
                  Out* y, int64_t y_stride, int64_t rows, int64_t k, int64_t n, int64_t p) {
    const Weight* panel = packed + p * PANEL * k_stored;
    int64_t first = p * PANEL, columns = std::min<int64_t>(PANEL, n - first);
    const float* b = bias ? bias + first : nullptr;
    Out* to = y + first;
    // Two widths only: every further one is a quarter of the time that this file takes to compile.
    if (panel_width(columns) == LANES) panel_rows<1>(x, x_stride, panel, next, b, to, y_stride, rows, k, columns);
    else panel_rows<PANEL_VECTORS>(x, x_stride, panel, next, b, to, y_stride, rows, k, columns);
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
    share(threads, panels_of(n), [&](int64_t p) {
        linear_panel(x, x_stride, packed, k, (const float*)nullptr, bias, y, n, rows, k, n, p);
    });
}
void linear(const bf16* x, int64_t x_stride, const bf16* packed, const float* bias, bf16* y, int64_t rows, int64_t k,
            int64_t n, int64_t threads) {
    PairRows pairs = pair_rows(x, x_stride, rows, k, input_buffer);
    threads = worth(threads, linear_work(rows, k, n));
    const int64_t stored = padded(k, 2), panels = panels_of(n);
    share(threads, panels, [&](int64_t p) {
        const bf16* next = p + threads < panels ? packed + (p + threads) * PANEL * stored : nullptr;
        linear_panel(pairs, x_stride, packed, stored, next, bias, y, n, rows, k, n, p);
    });
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
