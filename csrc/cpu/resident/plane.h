// Where a sample lives while a block works on it: channels in blocks of one vector, each block a plane of pixels. What
// a convolution reads has a zero halo around each plane; all else is compact, or lies in the user's tensor.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../simd.h"
#include "arena.h"
#include "rows.h"

namespace fastode::resident {

// One sample's feature map of numbers stored as T, wherever it lies: blocks of one vector of channels, strides in
// elements.
template <class T>
struct View {
  T* at = nullptr;  // pixel (0, 0) of block 0
  int64_t row = 0, pixel = 0, block = 0;

  T* pixel_at(int64_t b, int64_t y, int64_t x) const { return at + b * block + y * row + x * pixel; }
};

// The image's size and the layouts of maps of our own. With a halo, the right one of a row is the left one of the next,
// so a padded plane of width W and halo p has rows of W + p pixels.
template <class A>
struct Plane {
  static constexpr int lanes = kLanes<A>;
  int64_t height, width, halo;
  int64_t row;     // elements from a pixel of a padded plane to the one below it
  int64_t size;    // elements of one padded channel block
  int64_t origin;  // element of pixel (0, 0)

  Plane(int64_t height, int64_t width, int64_t halo)
      : height(height),
        width(width),
        halo(halo),
        row((width + halo) * lanes),
        size((height + 2 * halo) * row + halo * lanes),
        origin(halo * row + halo * lanes) {}

  int64_t pixels() const { return height * width; }
  View<A> padded(A* base) const { return {base ? base + origin : nullptr, row, lanes, size}; }
  template <class T>
  View<T> compact(T* base) const {
    return {base, width * lanes, lanes, pixels() * lanes};
  }
};

template <class A>
inline int64_t blocks_of(int64_t channels) {
  return divide_up(channels, kLanes<A>);
}

template <class A>
inline void clear_halo(const Plane<A>& plane, const View<A>& padded, int64_t blocks) {
  const int64_t side = plane.halo * Plane<A>::lanes;
  if (side == 0) return;
  for (int64_t b = 0; b < blocks; ++b) {
    A* block = padded.at - plane.origin + b * plane.size;
    std::fill(block, block + plane.origin, A(0));
    for (int64_t y = 0; y < plane.height; ++y) {
      A* right = block + plane.origin + y * plane.row + plane.width * Plane<A>::lanes;
      std::fill(right, right + side, A(0));
    }
    std::fill(block + plane.origin + plane.height * plane.row, block + plane.size, A(0));
  }
}

// A tensor [N, C, H, W] with any strides, as a resident program reads or writes it.
template <class T>
struct Feature {
  T* data;
  int64_t channels, height, width;
  int64_t sample, channel, row, pixel;  // strides in elements
};

template <class A, class T>
inline A to_accumulator(T value) {
  if constexpr (std::is_same_v<T, A>)
    return value;
  else if constexpr (std::is_same_v<T, bfloat16>)
    return widen(value);
  else
    return static_cast<A>(value);
}

template <class T, class A>
inline T to_storage(A value) {
  if constexpr (std::is_same_v<T, A>)
    return value;
  else if constexpr (std::is_same_v<T, bfloat16>)
    return narrow(value);
  else
    return static_cast<T>(value);
}

// Sample n of a tensor as blocks of a compact map, and back; where the last block has fewer channels than a vector, the
// map's others are zero.
template <class A, class T>
void load_sample(const Plane<Number<A>>& plane, const Feature<const T>& from, int64_t n, const View<A>& to);
template <class A, class T>
void store_sample(const Plane<Number<A>>& plane, const View<A>& from, const Feature<T>& to, int64_t n);

#define FASTODE_MOVE(keyword, A, T)                                                                             \
  keyword template void load_sample(const Plane<Number<A>>&, const Feature<const T>&, int64_t, const View<A>&); \
  keyword template void store_sample(const Plane<Number<A>>&, const View<A>&, const Feature<T>&, int64_t)

// What resident_plane.cpp instantiates.
#define FASTODE_MOVES(keyword)               \
  FASTODE_MOVE(keyword, float, float);       \
  FASTODE_MOVE(keyword, float, bfloat16);    \
  FASTODE_MOVE(keyword, bfloat16, bfloat16); \
  FASTODE_MOVE(keyword, double, double);     \
  FASTODE_MOVE(keyword, double, bfloat16)

FASTODE_MOVES(extern);

}  // namespace fastode::resident
