// Squares of values, as many vectors as one has lanes, transposed in registers.
#pragma once

#include <utility>

#include "../simd.h"

namespace fastode::resident {

template <class A>
using Square = Vec<A>[kLanes<A>];

// What a step of a transposition takes from two rows `half` apart, whose lanes are counted one row after the other.
template <int lanes, int half, bool upper>
struct Quarters {
  static constexpr int from(int k) {
    if (upper) return k & half ? k - half + lanes : k;
    return k & half ? k + lanes : k + half;
  }
};

template <class Order, class V, int... k>
inline V choose_lanes(V a, V b, std::integer_sequence<int, k...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Order::from(k)...);
#else
  using Lanes = std::remove_reference_t<decltype(a[0])>;
  using Int = std::conditional_t<sizeof(Lanes) == 8, int64_t, std::conditional_t<sizeof(Lanes) == 4, int32_t, int16_t>>;
  return __builtin_shuffle(a, b, typename VectorOf<Int, sizeof(V)>::type{Order::from(k)...});
#endif
}

// Swaps the off-diagonal quarters of every square of 2 half rows, then those of its quarters.
template <int half, class V, int lanes>
inline void swap_quarters(V (&rows)[lanes]) {
  if constexpr (half > 0) {
    constexpr std::make_integer_sequence<int, lanes> every{};
    FASTODE_UNROLL for (int i = 0; i < lanes; ++i) {
      if (i & half) continue;
      const V above = rows[i], below = rows[i + half];
      rows[i] = choose_lanes<Quarters<lanes, half, true>>(above, below, every);
      rows[i + half] = choose_lanes<Quarters<lanes, half, false>>(above, below, every);
    }
    swap_quarters<half / 2>(rows);
  }
}

template <class V, int lanes>
inline void transpose(V (&rows)[lanes]) {
  swap_quarters<lanes / 2>(rows);
}

}  // namespace fastode::resident
