// Samples of a user's tensors to maps of our own and back. Included by one .cpp.
#pragma once

#include "plane.h"
#include "square.h"

namespace fastode::resident {

template <class A>
inline constexpr int kFew = std::min(3, Plane<Number<A>>::lanes);  // channels of an image

// As many numbers as fill a vector of what is computed with, as they are moved between maps of A and T: as bits, or as
// values where only one of the two is rounded.
template <class A, class T>
struct Moved {
  static constexpr bool as_bits = std::is_same_v<A, T>, as_values = std::is_same_v<Number<A>, Number<T>>;
  using Bits = typename VectorOf<std::conditional_t<std::is_same_v<T, bfloat16>, int16_t, T>,
                                 static_cast<int>(sizeof(T)) * kLanes<Number<A>>>::type;
  using V = std::conditional_t<as_bits, Bits, Vec<Number<A>>>;

  template <class S>
  static V load(const S* from) {
    if constexpr (as_bits) {
      V value;
      std::memcpy(&value, from, sizeof(V));
      return value;
    } else {
      return load_stored(from);
    }
  }
  template <class S>
  static void store(S* to, V value) {
    if constexpr (as_bits)
      std::memcpy(to, &value, sizeof(V));
    else
      for (int lane = 0; lane < kLanes<Number<A>>; ++lane) to[lane] = to_storage<S>(value[lane]);
  }
};

// The pixels of a block of at most so many channels whose planes are dense, a vector of them at a time:
// f(where they are in a channel's plane, their number, the first one's y, x).
template <class A, class F>
inline void each_piece(const Plane<Number<A>>& plane, int64_t row, const F& f) {
  constexpr int64_t lanes = Plane<Number<A>>::lanes;
  const bool dense = row == plane.width;
  const int64_t length = dense ? plane.pixels() : plane.width;
  for (int64_t y = 0; y < (dense ? 1 : plane.height); ++y)
    for (int64_t x = 0; x < length; x += lanes)
      f(y * row + x, std::min(lanes, length - x), dense ? x / plane.width : y, dense ? x % plane.width : x);
}

// Pixels of a plane one after the other, row by row.
template <class A>
struct Pixels {
  A* at;
  int64_t x, width, pixel, turn;

  Pixels(const View<A>& view, int64_t width, int64_t b, int64_t y, int64_t x)
      : at(view.pixel_at(b, y, x)), x(x), width(width), pixel(view.pixel), turn(view.row - width * view.pixel) {}
  void next() {
    at += pixel;
    if (++x == width) at += turn, x = 0;
  }
};

// Block b of a sample whose channels are planes, a square of pixels times channels at a time.
template <class A, class T>
void load_planes(const Plane<Number<A>>& plane, const T* source, int64_t channel, int64_t row, int64_t channels,
                 const View<A>& to, int64_t b) {
  using Move = Moved<A, T>;
  constexpr int64_t lanes = Plane<Number<A>>::lanes;
  each_piece<A>(plane, row, [&](int64_t first, int64_t count, int64_t y, int64_t x) {
    const T* from = source + first;
    typename Move::V square[lanes] = {};
    if (channels == lanes && count == lanes) {
      FASTODE_UNROLL for (int64_t c = 0; c < lanes; ++c) square[c] = Move::load(from + c * channel);
    } else {
      for (int64_t c = 0; c < channels; ++c) {
        T some[lanes] = {};
        std::copy_n(from + c * channel, count, some);
        square[c] = Move::load(some);
      }
    }
    transpose(square);
    Pixels<A> target(to, plane.width, b, y, x);
    FASTODE_UNROLL for (int64_t i = 0; i < lanes; ++i, target.next()) {
      if (i == count) break;
      Move::store(target.at, square[i]);
    }
  });
}

template <class A, class T>
void store_planes(const Plane<Number<A>>& plane, const View<A>& from, int64_t b, T* target, int64_t channel,
                  int64_t row, int64_t channels) {
  using Move = Moved<A, T>;
  constexpr int64_t lanes = Plane<Number<A>>::lanes;
  each_piece<A>(plane, row, [&](int64_t first, int64_t count, int64_t y, int64_t x) {
    typename Move::V square[lanes] = {};
    Pixels<A> source(from, plane.width, b, y, x);
    FASTODE_UNROLL for (int64_t i = 0; i < lanes; ++i, source.next()) {
      if (i == count) break;
      square[i] = Move::load(source.at);
    }
    transpose(square);
    T* const to = target + first;
    if (channels == lanes && count == lanes) {
      FASTODE_UNROLL for (int64_t c = 0; c < lanes; ++c) Move::store(to + c * channel, square[c]);
    } else {
      for (int64_t c = 0; c < channels; ++c) {
        T some[lanes];
        Move::store(some, square[c]);
        std::copy_n(some, count, to + c * channel);
      }
    }
  });
}

template <class A, class T>
void load_sample(const Plane<Number<A>>& plane, const Feature<const T>& from, int64_t n, const View<A>& to) {
  constexpr int lanes = Plane<Number<A>>::lanes;
  const auto few = [&](auto channels) {
    for (int64_t y = 0; y < plane.height; ++y) {
      const T* source = from.data + n * from.sample + y * from.row;
      A* target = to.pixel_at(0, y, 0);
      for (int64_t x = 0; x < plane.width; ++x, source += from.pixel, target += to.pixel) {
        std::fill_n(target, lanes, A{});
        for (int c = 0; c < channels(); ++c) target[c] = to_accumulator<A>(source[c * from.channel]);
      }
    }
  };
  if (with_few<kFew<A>>(from.channels, few)) return;
  for (int64_t b = 0; b < blocks_of<Number<A>>(from.channels); ++b) {
    const int64_t channels = std::min<int64_t>(lanes, from.channels - b * lanes);
    if constexpr (Moved<A, T>::as_values)
      if (from.pixel == 1 && from.channel != 1) {
        const T* source = from.data + n * from.sample + b * lanes * from.channel;
        load_planes(plane, source, from.channel, from.row, channels, to, b);
        continue;
      }
    for (int64_t y = 0; y < plane.height; ++y) {
      const T* source = from.data + n * from.sample + b * lanes * from.channel + y * from.row;
      A* target = to.pixel_at(b, y, 0);
      if (channels == lanes && from.channel == 1) {
        for (int64_t x = 0; x < plane.width; ++x)
          for (int c = 0; c < lanes; ++c) target[x * to.pixel + c] = to_accumulator<A>(source[x * from.pixel + c]);
      } else {
        for (int64_t x = 0; x < plane.width && channels < lanes; ++x)
          std::fill_n(target + x * to.pixel + channels, lanes - channels, A{});
        for (int64_t c = 0; c < channels; ++c)
          for (int64_t x = 0; x < plane.width; ++x)
            target[x * to.pixel + c] = to_accumulator<A>(source[x * from.pixel + c * from.channel]);
      }
    }
  }
}

template <class A, class T>
void store_sample(const Plane<Number<A>>& plane, const View<A>& from, const Feature<T>& to, int64_t n) {
  constexpr int lanes = Plane<Number<A>>::lanes;
  const auto few = [&](auto channels) {
    for (int64_t y = 0; y < plane.height; ++y) {
      const A* source = from.pixel_at(0, y, 0);
      T* target = to.data + n * to.sample + y * to.row;
      for (int64_t x = 0; x < plane.width; ++x, source += from.pixel, target += to.pixel)
        for (int c = 0; c < channels(); ++c) target[c * to.channel] = to_storage<T>(source[c]);
    }
  };
  if (with_few<kFew<A>>(to.channels, few)) return;
  for (int64_t b = 0; b < blocks_of<Number<A>>(to.channels); ++b) {
    const int64_t channels = std::min<int64_t>(lanes, to.channels - b * lanes);
    if constexpr (Moved<A, T>::as_values)
      if (to.pixel == 1 && to.channel != 1) {
        T* target = to.data + n * to.sample + b * lanes * to.channel;
        store_planes(plane, from, b, target, to.channel, to.row, channels);
        continue;
      }
    for (int64_t y = 0; y < plane.height; ++y) {
      const A* source = from.pixel_at(b, y, 0);
      T* target = to.data + n * to.sample + b * lanes * to.channel + y * to.row;
      if (channels == lanes && to.channel == 1) {
        for (int64_t x = 0; x < plane.width; ++x)
          for (int c = 0; c < lanes; ++c) target[x * to.pixel + c] = to_storage<T>(source[x * from.pixel + c]);
      } else {
        for (int64_t c = 0; c < channels; ++c)
          for (int64_t x = 0; x < plane.width; ++x)
            target[x * to.pixel + c * to.channel] = to_storage<T>(source[x * from.pixel + c]);
      }
    }
  }
}

}  // namespace fastode::resident
