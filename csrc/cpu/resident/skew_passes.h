// What the skew pair needs between its convolutions, beside norm.h. A norm after the activation normalises s = act(h).
// `guide` is the map at which act' is taken: h or, where act' has the same value at s, s.
#pragma once

#include "norm.h"

namespace fastode::resident {

inline constexpr int64_t kBandPixels = 64;

template <class A>
inline Vec<A> row_at(const A* row, int64_t block) {
  return load<Vec<A>>(row + block * kLanes<A>);
}

// Calls f(the plane of a band, its first row) for every band of rows. A pass reads one block of channels after the
// other, and in channels_last the blocks of a pixel share cache lines: a band is small enough to stay in the first
// cache until its last block is read.
template <class A, class F>
void each_band(const Plane<A>& plane, const F& f) {
  const int64_t rows = std::max<int64_t>(1, kBandPixels / plane.width);
  for (int64_t y = 0; y < plane.height; y += rows)
    f(Plane<A>(std::min(rows, plane.height - y), plane.width, plane.halo), y);
}

template <class A>
View<A> below(View<A> view, int64_t y) {
  view.at += y * view.row;
  return view;
}

template <class A>
Combine<A> below(Combine<A> combine, int64_t y) {
  for (int i = 0; i < combine.count; ++i) combine.term[i] = below(combine.term[i], y);
  return combine;
}

// A map of the program's type or, where `rounded` is set, one stored in bfloat16: widened and rounded band by band.
template <class A>
struct Stored {
  View<A> view = {};
  View<bfloat16> rounded = {};

  Stored() = default;
  Stored(const View<A>& view) : view(view) {}
  explicit Stored(const View<bfloat16>& rounded) : rounded(rounded) {}
};

inline void widen_band(const Plane<float>& band, int64_t blocks, const View<bfloat16>& from, const View<float>& to);
inline void round_band(const Plane<float>& band, int64_t blocks, const View<float>& from, const View<bfloat16>& to);

// Brings a band of a map in channels_last into the cache by reading it from end to end, which is faster than the
// passes' way, block by block.
template <class A>
void touch(const Plane<A>& band, int64_t blocks, const View<A>& map) {
  if (blocks == 1 || map.block != kLanes<A>) return;
  for (int64_t y = 0; y < band.height; ++y)
    for (int64_t x = 0; x < band.width; ++x)
      for (int64_t b = 0; b < blocks; ++b) static_cast<void>(*static_cast<const volatile A*>(map.pixel_at(b, y, x)));
}

// Which elements of a map are positive, a bit for each: word x / pixels of a row of pixels holds that of pixel x in bit
// x % pixels, lane by lane.
template <class A>
struct Signs {
  using Word = typename Lane<Vec<A>>::Int;
  static constexpr int64_t pixels = 8 * sizeof(A);

  A* at = nullptr;  // of block 0 and row 0; null for none
  int64_t row = 0, block = 0;

  Signs() = default;
  Signs(const Plane<A>& plane, A* at)
      : at(at), row(divide_up(plane.width, pixels) * kLanes<A>), block(plane.height * row) {}
};

template <class A>
Signs<A> below(Signs<A> signs, int64_t y) {
  signs.at += y * signs.row;
  return signs;
}

template <class A>
void note_signs(const Plane<A>& plane, int64_t blocks, const View<A>& map, const Signs<A>& signs);

// A norm's standardised input as it is found from a map: (map - origin) * unit.
template <class A>
struct Standard {
  View<A> map;
  const A *origin, *unit;  // rows
};

// sums [2, channels] += the sum of the cotangent and of (x.map - x.origin) * x.unit times it, over a band.
template <class A>
void add_cotangent_sums(const Plane<A>& band, int64_t blocks, const Standard<A>& x, const View<A>& cotangent, A* sums);

// coefficient * norm(s) for rows of the norm's statistics and parameters.
template <class A>
struct Slope {
  A coefficient;
  View<A> s;
  NormRows<A> rows;
};

// out = base + the sum of the slopes, of which there are kSlopes at most.
inline constexpr int64_t kSlopes = 7;
template <class A>
void advance(const Plane<A>& plane, int64_t blocks, const View<A>& base, const Slope<A>* slopes, int64_t count,
             const View<A>& out);

// What the error of a solution is measured in: atol + rtol * the larger of |start| and |end|, both maps.
template <class A>
struct Tolerance {
  A rtol, atol;
  View<A> start, end;
};

// The sum of the squares of (base + the sum of the slopes) / tolerance.
template <class A>
double scaled_squares(const Plane<A>& plane, int64_t blocks, const View<A>& base, const Slope<A>* slopes, int64_t count,
                      const Tolerance<A>& tolerance);

// Zero, or NaN where a value of the map is not finite.
template <class A>
double zero_of(const Plane<A>& plane, int64_t blocks, const View<A>& map);

// Writes the cotangents of the error, which is base + the sum of the slopes, of the start and of the end that are
// factor / 2 times the gradient of the sum of the squares of error / tolerance. An output may lie where an input does.
template <class A>
struct ErrorBars {
  View<A> error, start, end;
};
template <class A>
void pull_error(const Plane<A>& plane, int64_t blocks, A factor, const View<A>& base, const Slope<A>* slopes,
                int64_t count, const Tolerance<A>& tolerance, const ErrorBars<A>& bars);

// Adds to `bar` and `start_bar` the cotangents of v and of u = tolerance.start that are factor / 2 times the gradient
// of the sum of squares of v / (atol + rtol |u|); v may be u, and its cotangent the same map.
template <class A>
void pull_scaled_squares(const Plane<A>& plane, int64_t blocks, A factor, const View<A>& v,
                         const Tolerance<A>& tolerance, const View<A>& bar, const View<A>& start_bar);

// out = factor * act' P(weight cotangent); P is that of the norm. act' is that of the guide or, where there are signs,
// of any value with that sign.
template <class A>
void pull_slope(const Plane<A>& plane, int64_t blocks, const NormRows<A>& rows, const Unary<A>& act, A factor,
                const View<A>& guide, const Signs<A>& signs, const Standard<A>& s, const View<A>& cotangent,
                const View<A>& out);

// out = the channels of every `stride`-th pixel of `in`, repeated until there are `channels` of them; `plane` is out's.
template <class A>
void repeat_channels(const Plane<A>& plane, int64_t in_channels, int64_t channels, int64_t stride, const View<A>& in,
                     const View<A>& out);

// in += the adjoint of repeat_channels on `out`.
template <class A>
void add_repeated(const Plane<A>& plane, int64_t in_channels, int64_t channels, int64_t stride, const View<A>& in,
                  const View<A>& out);

// merge_moments of rows: those of a map's first `seen` pixels with those of the `next` ones.
template <class A>
void merge_band_moments(int64_t blocks, int64_t seen, int64_t next, const A* mean_next, const A* squares_next, A* mean,
                        A* squares);

// Mean and reciprocal deviation of the groups of one sample, for every channel, from its channels' moments.
template <class A>
void group_statistics(int64_t pixels, int64_t channels, int64_t groups, double eps, const A* means, const A* squares,
                      A* mean, A* rstd);

// Means over the groups of one sample, for every channel, of what its channels sum up to, weighted.
template <class A>
void group_means(int64_t pixels, int64_t channels, int64_t groups, const A* sums, const A* weight, A* means);

}  // namespace fastode::resident
