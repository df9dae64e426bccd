// Loops over few rows or vectors, as many as the compiler knows, and sums of a vector.
#pragma once

#include <cstdint>
#include <type_traits>

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

template <class V>
ScalarOf<V> sum_of_lanes(V value) {
  constexpr int count = Lane<V>::count;
  ScalarOf<V> lanes[count];
  store<V>(lanes, value);
  FASTODE_UNROLL for (int half = count / 2; half > 0; half /= 2) {
    FASTODE_UNROLL for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// The products of a matrix whose rows are whole vectors, `row` elements apart, with a vector: out[k] = <row k, in>.
template <class A>
void row_products(const A* rows, int64_t count, int64_t row, int64_t vectors, const A* in, A* out);

// The adjoint's: out = the sum of in[k] * row k.
template <class A>
void sum_of_rows(const A* rows, int64_t count, int64_t row, int64_t vectors, const A* in, A* out);

}  // namespace fastode::resident
