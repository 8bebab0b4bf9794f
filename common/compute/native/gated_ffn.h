// The gated FFN of one expert: down(silu(gate(x)) * up(x)).

#pragma once

#include "linear.h"

namespace {

struct Group {  // one expert's rows; mirrored by group_fields in gated_ffn.py
    const void *gate, *up, *down;
    int64_t width, begin, end;
};

INLINE void activate(const float* gate, const float* up, float* product, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES) store(product + i, silu_of(load(gate + i)) * load(up + i));
}
INLINE void activate(const float* gate, const float* up, bf16* product, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES)  // rounded where the reference materialises a bf16 tensor
        store(product + i, rounded(silu_of(rounded(load(gate + i)))) * rounded(load(up + i)));
}

void gated_ffn(const float* x, float* y, const Group& g, int64_t d, int64_t threads) {
    int64_t rows = g.end - g.begin, width = g.width, all_values = padded(rows * width, LANES);
    float *gate = gate_buffer.of<float>(all_values), *up = up_buffer.of<float>(all_values);
    float* product = product_buffer.of<float>(all_values);
    int64_t panels = panels_of(width);
    share(worth(threads, linear_work(rows, d, 2 * width)), 2 * panels, [&](int64_t p) {
        bool is_up = p >= panels;
        linear_panel(x + g.begin * d, d, (const float*)(is_up ? g.up : g.gate), d, (const float*)nullptr, nullptr,
                     is_up ? up : gate, width, rows, d, width, is_up ? p - panels : p);
    });
    activate(gate, up, product, all_values);
    linear(product, width, (const float*)g.down, nullptr, y + g.begin * d, rows, width, d, threads);
}
void gated_ffn(const bf16* x, bf16* y, const Group& g, int64_t d, int64_t threads) {
    int64_t rows = g.end - g.begin, width = g.width, all_values = padded(rows * width, LANES);
    float *gate = gate_buffer.of<float>(all_values), *up = up_buffer.of<float>(all_values);
    bf16* product = product_buffer.of<bf16>(all_values);
    int64_t panels = panels_of(width), x_stride = d;
    PairRows pairs = pair_rows(x + g.begin * d, x_stride, rows, d, input_buffer);
    const int64_t stored = padded(d, 2), helping = worth(threads, linear_work(rows, d, 2 * width));
    const auto panel_at = [&](int64_t p) {
        return p < panels       ? (const bf16*)g.gate + p * PANEL * stored
               : p < 2 * panels ? (const bf16*)g.up + (p - panels) * PANEL * stored
                                : (const bf16*)g.down;
    };
    share(helping, 2 * panels, [&](int64_t p) {
        bool is_up = p >= panels;
        linear_panel(pairs, x_stride, (const bf16*)(is_up ? g.up : g.gate), stored, panel_at(p + helping), nullptr,
                     is_up ? up : gate, width, rows, d, width, is_up ? p - panels : p);
    });
    activate(gate, up, product, all_values);
    linear(product, width, (const bf16*)g.down, nullptr, y + g.begin * d, rows, width, d, threads);
}

// Each group's rows of x go through its expert. Threads share the groups, or, of few groups, the panels of each.
template <class T>
void grouped_ffn(const T* x, T* y, const Group* groups, int64_t group_count, int64_t d, int64_t threads) {
    double work = 0;
    for (int64_t g = 0; g < group_count; g++)
        work += 3 * linear_work(groups[g].end - groups[g].begin, d, groups[g].width);
    threads = worth(threads, work);
    const bool by_group = group_count >= 2 * threads;
    share(by_group ? threads : 1, group_count, [&](int64_t g) { gated_ffn(x, y, groups[g], d, by_group ? 1 : threads); });
}

template <class T> void gated_product(const T* gate, const T* up, T* product, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES) {
        const int64_t left = n - i;
        put(product + i, as(silu_of(take(gate + i, left)), gate) * take(up + i, left), left);
    }
}

}  // namespace
