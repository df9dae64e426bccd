// Included by one .cpp per arithmetic type.
#pragma once

#include "rows.h"

namespace fastode::resident {

template <class A>
void row_products(const A* rows, int64_t count, int64_t row, int64_t vectors, const A* in, A* out) {
  using V = Vec<A>;
  in_stretches<kTogether>(count, [&](int64_t first, auto together) {
    constexpr int rows_here = together();
    const A* from = rows + first * row;
    V sums[rows_here] = {};
    for (int64_t c = 0; c < vectors * kLanes<A>; c += kLanes<A>) {
      const V value = load<V>(in + c);
      FASTODE_UNROLL for (int k = 0; k < rows_here; ++k) sums[k] += load<V>(from + k * row + c) * value;
    }
    FASTODE_UNROLL for (int k = 0; k < rows_here; ++k) out[first + k] = sum_of_lanes<V>(sums[k]);
  });
}

template <class A>
void sum_of_rows(const A* rows, int64_t count, int64_t row, int64_t vectors, const A* in, A* out) {
  using V = Vec<A>;
  constexpr int64_t lanes = kLanes<A>;
  in_stretches<kTogether>(vectors, [&](int64_t first, auto together) {
    constexpr int vectors_here = together();
    const A* from = rows + first * lanes;
    V sums[vectors_here] = {};
    for (int64_t k = 0; k < count; ++k)
      FASTODE_UNROLL for (int v = 0; v < vectors_here; ++v) sums[v] += load<V>(from + k * row + v * lanes) * in[k];
    FASTODE_UNROLL for (int v = 0; v < vectors_here; ++v) store<V>(out + (first + v) * lanes, sums[v]);
  });
}

}  // namespace fastode::resident
