// The passes over the errors of steps. Included by one .cpp per arithmetic type.
#pragma once

#include "skew_passes.h"

namespace fastode::resident {

// Calls f(block, y, x, base + the sum of the slopes) for every pixel and end(block, y) after every row of them. Once a
// step: a loop over as many slopes as there are is no slower than one for each number of them.
template <class A, class F, class End>
void each_error(const Plane<A>& plane, int64_t blocks, const View<A>& base, const Slope<A>* slopes, int64_t count,
                const F& f, const End& end) {
  using V = Vec<A>;
  for (int64_t b = 0; b < blocks; ++b) {
    V mean[kSlopes], scale[kSlopes], bias[kSlopes];
    for (int64_t j = 0; j < count; ++j) {
      const NormRows<A>& rows = slopes[j].rows;
      mean[j] = row_at(rows.mean, b), bias[j] = row_at(rows.bias, b);
      scale[j] = row_at(rows.rstd, b) * row_at(rows.weight, b);
    }
    for (int64_t y = 0; y < plane.height; ++y) {
      for (int64_t x = 0; x < plane.width; ++x) {
        V value = load<V>(base.pixel_at(b, y, x));
        // Unlike advance(): the slopes all but cancel, and a factor's rounding would be the whole channel's error.
        for (int64_t j = 0; j < count; ++j)
          value += slopes[j].coefficient * ((load<V>(slopes[j].s.pixel_at(b, y, x)) - mean[j]) * scale[j] + bias[j]);
        f(b, y, x, value);
      }
      end(b, y);
    }
  }
}

template <class A>
double scaled_squares(const Plane<A>& plane, int64_t blocks, const View<A>& base, const Slope<A>* slopes, int64_t count,
                      const Tolerance<A>& tolerance) {
  using V = Vec<A>;
  double sum = 0;
  V squares = {};
  each_error(
      plane, blocks, base, slopes, count,
      [&](int64_t b, int64_t y, int64_t x, V value) {
        const V start = absolute(load<V>(tolerance.start.pixel_at(b, y, x)));
        const V end = absolute(load<V>(tolerance.end.pixel_at(b, y, x)));
        value /= tolerance.atol + tolerance.rtol * (end < start ? start : end);
        squares += value * value;
      },
      [&](int64_t, int64_t) {
        for (int lane = 0; lane < kLanes<A>; ++lane) sum += static_cast<double>(squares[lane]);
        squares = V{};
      });
  return sum;
}

template <class A>
double zero_of(const Plane<A>& plane, int64_t blocks, const View<A>& map) {
  using V = Vec<A>;
  V zero = {};
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t y = 0; y < plane.height; ++y)
      for (int64_t x = 0; x < plane.width; ++x) {
        const V value = load<V>(map.pixel_at(b, y, x));
        zero += value - value;
      }
  double sum = 0;
  for (int lane = 0; lane < kLanes<A>; ++lane) sum += static_cast<double>(zero[lane]);
  return sum;
}

template <class A>
void pull_error(const Plane<A>& plane, int64_t blocks, A factor, const View<A>& base, const Slope<A>* slopes,
                int64_t count, const Tolerance<A>& tolerance, const ErrorBars<A>& bars) {
  using V = Vec<A>;
  const auto sign = [](V u) { return u > 0 ? splat<V>(1) : u < 0 ? splat<V>(-1) : V{}; };
  each_error(
      plane, blocks, base, slopes, count,
      [&](int64_t b, int64_t y, int64_t x, V value) {
        const V u = load<V>(tolerance.start.pixel_at(b, y, x)), v = load<V>(tolerance.end.pixel_at(b, y, x));
        const V start = absolute(u), end = absolute(v);
        const V unit = 1 / (tolerance.atol + tolerance.rtol * (end < start ? start : end));
        const V scaled = value * unit, pulled = factor * scaled * unit, through = -tolerance.rtol * scaled * pulled;
        // Of equal ones either gets a half, as torch has it.
        const V share = start > end ? splat<V>(1) : start < end ? V{} : splat<V>(A(0.5));
        store<V>(bars.error.pixel_at(b, y, x), pulled);
        store<V>(bars.start.pixel_at(b, y, x), share * through * sign(u));
        store<V>(bars.end.pixel_at(b, y, x), (1 - share) * through * sign(v));
      },
      [](int64_t, int64_t) {});
}

template <class A>
void pull_scaled_squares(const Plane<A>& plane, int64_t blocks, A factor, const View<A>& v,
                         const Tolerance<A>& tolerance, const View<A>& bar, const View<A>& start_bar) {
  using V = Vec<A>;
  const auto add = [](A* to, V value) { store<V>(to, load<V>(to) + value); };
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t y = 0; y < plane.height; ++y)
      for (int64_t x = 0; x < plane.width; ++x) {
        const V u = load<V>(tolerance.start.pixel_at(b, y, x));
        const V unit = 1 / (tolerance.atol + tolerance.rtol * absolute(u));
        const V scaled = load<V>(v.pixel_at(b, y, x)) * unit, pulled = factor * scaled * unit;
        const V sign = u > 0 ? splat<V>(1) : u < 0 ? splat<V>(-1) : V{};
        add(bar.pixel_at(b, y, x), pulled);
        add(start_bar.pixel_at(b, y, x), -tolerance.rtol * sign * scaled * pulled);
      }
}

}  // namespace fastode::resident
