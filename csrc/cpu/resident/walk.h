// How a pass goes over the pixels of a block: loads, stores, sums and combinations of vectors at a pixel. Included by
// norm_impl.h.
#pragma once

#include <algorithm>

#include "norm.h"

namespace fastode::resident {
namespace {

template <class A>
inline Vec<A> at(const A* row, int64_t block) {
  return load<Vec<A>>(row + block * kLanes<A>);
}

template <class T>
inline Vec<Number<T>> at(const View<T>& map, int64_t b, int64_t y, int64_t x) {
  return load_stored(map.pixel_at(b, y, x));
}

template <class T>
inline void put(const View<T>& map, int64_t b, int64_t y, int64_t x, Vec<Number<T>> value) {
  store_stored(map.pixel_at(b, y, x), value);
}

// The pixels of a block: in one row, where every map at hand has them all equally far apart.
struct Area {
  int64_t rows, width, top = 0, left = 0;
};

template <class A, class T>
inline bool is_flat(const Plane<A>& plane, const View<T>& view) {
  return view.row == plane.width * view.pixel;
}

template <class A, class T>
inline bool is_flat(const Plane<A>& plane, const Combine<T>& combine) {
  return std::all_of(combine.term, combine.term + combine.count, [&](const View<T>& v) { return is_flat(plane, v); });
}

template <class A, class... Maps>
inline Area area_of(const Plane<A>& plane, const Maps&... maps) {
  return (is_flat(plane, maps) && ...) ? Area{1, plane.pixels()} : Area{plane.height, plane.width};
}

// Calls f(y, x) for every pixel. It is to hold what it reads by value: of maps behind references, which a store through
// a byte pointer might change, every place would be computed anew from their strides.
template <class F>
inline void walk(const Area& area, const F& f) {
  for (int64_t y = area.top; y < area.top + area.rows; ++y)
    for (int64_t x = area.left; x < area.left + area.width; ++x) f(y, x);
}

// The parts that a pass goes over one after the other: blocks or, where a block is half a line of the cache of pixels
// with all their channels, a few pixels of each block in turn, while they are in the first cache.
template <class T>
class Parts {
 public:
  Parts(const Area& area, int64_t blocks) : all_(area), now_(area), blocks_(blocks) {
    if (std::is_same_v<T, bfloat16> && blocks > 1) now_ = {1, std::min(kStretch, area.width)};
  }

  explicit operator bool() const { return now_.top < all_.rows; }
  void operator++() {
    if (++block < blocks_) return;
    block = 0, now_.left += now_.width;
    if (now_.left >= all_.width) now_.left = 0, now_.top += now_.rows;
    if (now_.rows < all_.rows || now_.width < all_.width) now_.width = std::min(kStretch, all_.width - now_.left);
  }

  int64_t block = 0;
  const Area& area() const { return now_; }

 private:
  static constexpr int64_t kStretch = 32;
  const Area all_;
  Area now_;
  const int64_t blocks_;
};

// Calls f(y, x, sums) for every pixel; returns the sums in total[0, count).
template <int count, class A, class F>
inline void walk_sums(const Area& area, Vec<A>* total, const F& f) {
  constexpr int unroll = count > 2 ? 2 : 4;  // independent chains, to hide the latency of an addition
  Vec<A> sums[unroll][count] = {};
  for (int64_t y = 0; y < area.rows; ++y) {
    int64_t x = 0;
    for (; x + unroll <= area.width; x += unroll) {
      FASTODE_UNROLL for (int k = 0; k < unroll; ++k) f(y, x + k, sums[k]);
    }
    for (; x < area.width; ++x) f(y, x, sums[0]);
  }
  for (int s = 0; s < count; ++s) {
    total[s] = sums[0][s];
    for (int k = 1; k < unroll; ++k) total[s] += sums[k][s];
  }
}

// combine() with the number of terms known to the compiler, -1 for any.
template <int count, class T>
struct Combined {
  using A = Number<T>;
  A scale;
  A coef[count > 0 ? count : 1];
  View<T> term[count > 0 ? count : 1];

  explicit Combined(const Combine<T>& combine) : scale(combine.scale) {
    for (int i = 0; i < count; ++i) coef[i] = combine.coef[i], term[i] = combine.term[i];
  }
  Vec<A> operator()(Vec<A> value, int64_t b, int64_t y, int64_t x) const {
    value *= scale;
    FASTODE_UNROLL for (int i = 0; i < count; ++i) value += coef[i] * at(term[i], b, y, x);
    return value;
  }
};

template <class T>
struct Combined<-1, T> {
  using A = Number<T>;
  const Combine<T>& combine;

  explicit Combined(const Combine<T>& combine) : combine(combine) {}
  Vec<A> operator()(Vec<A> value, int64_t b, int64_t y, int64_t x) const {
    value *= combine.scale;
    for (int i = 0; i < combine.count; ++i) value += combine.coef[i] * at(combine.term[i], b, y, x);
    return value;
  }
};

// Calls f with the flag as a compile-time constant.
template <class F>
inline void with_flag(bool flag, const F& f) {
  flag ? f(std::true_type{}) : f(std::false_type{});
}

// P(v) / rstd, given mean(v) and mean(x v).
template <bool measured, class V>
inline V centred(V v, V mean_v, V x, V mean_xv) {
  if constexpr (measured) return v - mean_v - x * mean_xv;
  return v;
}

// Calls f with the combination, its number of terms known to the compiler up to four.
template <class T, class F>
inline void with_count(const Combine<T>& combine, const F& f) {
  switch (combine.count) {
    case 0:
      return f(Combined<0, T>(combine));
    case 1:
      return f(Combined<1, T>(combine));
    case 2:
      return f(Combined<2, T>(combine));
    case 3:
      return f(Combined<3, T>(combine));
    case 4:
      return f(Combined<4, T>(combine));
    default:
      return f(Combined<-1, T>(combine));
  }
}

}  // namespace
}  // namespace fastode::resident
