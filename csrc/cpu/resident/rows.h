// Loops over few rows or vectors, as many as the compiler knows, and sums of a vector.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "../simd.h"
#include "arena.h"

namespace fastode::resident {

// Rows, or vectors of a row, that are gone over at a time: their sums hide the latency of an addition.
inline constexpr int kTogether = 12;

// Where there are at most `most`: calls f with their number as a compile-time constant, and returns true. A loop over
// so few would cost more than its body.
template <int most, class F>
bool with_few(int64_t count, const F& f) {
  if constexpr (most > 0) {
    if (count == most) return f(std::integral_constant<int, most>{}), true;
    return with_few<most - 1>(count, f);
  }
  return false;
}

// Calls f(first, how many as a constant) for stretches of at most `most` that make up [0, count), of nearly equal
// length.
template <int most, class F>
void in_stretches(int64_t count, const F& f) {
  const int64_t stretches = divide_up(count, most);
  for (int64_t s = 0; s < stretches; ++s) {
    const int64_t first = s * count / stretches, end = (s + 1) * count / stretches;
    with_few<most>(end - first, [&](auto known) { f(first, known); });
  }
}

// Each lane's sum with the lane `half` further on or back.
template <int half, class V, int... lane>
inline V folded(V value, std::integer_sequence<int, lane...>) {
#if defined(__clang__)
  return value + __builtin_shufflevector(value, value, (lane ^ half)...);
#else
  return value + __builtin_shuffle(value, typename Lane<V>::Int{(lane ^ half)...});
#endif
}

template <class V, int half = Lane<V>::count / 2>
inline ScalarOf<V> sum_of_lanes(V value) {
  if constexpr (half == 0)
    return value[0];
  else
    return sum_of_lanes<V, half / 2>(folded<half>(value, std::make_integer_sequence<int, Lane<V>::count>{}));
}

// The products of a matrix whose rows are whole vectors, `row` elements apart, with a vector: out[k] = <row k, in>.
template <class A>
void row_products(const A* rows, int64_t count, int64_t row, int64_t vectors, const A* in, A* out);

// The adjoint's: out = the sum of in[k] * row k.
template <class A>
void sum_of_rows(const A* rows, int64_t count, int64_t row, int64_t vectors, const A* in, A* out);

}  // namespace fastode::resident
