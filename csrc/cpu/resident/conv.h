// Direct convolutions of one resident sample: value, data gradient (the same kernel on flipped, transposed weights) and
// weight gradient.
#pragma once

#include "plane.h"

namespace fastode::resident {

// result = scale * (what was computed) + sum_i coef[i] * term[i]; every term has the result's shape, in a layout of its
// own, and may be the result itself, because each element is read before it is written.
template <class T>
struct Combine {
  using A = Number<T>;
  static constexpr int capacity = 8;
  A scale = 1;
  int count = 0;
  A coef[capacity] = {};
  View<T> term[capacity] = {};

  Combine& add(A coefficient, const View<T>& map) {
    if (coefficient != 0) {
      coef[count] = coefficient;
      term[count++] = map;
    }
    return *this;
  }
};

// One convolution's weights for one direction, packed [output group][input block][ky][kx of a tap set][input
// channel][kx in the set][output channel]; `packed_size` elements.
struct ConvShape {
  int64_t in_channels, out_channels, kernel_h, kernel_w, stride = 1;

  template <class A>
  int64_t packed_size() const {
    return blocks_of<A>(out_channels) * kLanes<A> * in_channels * kernel_h * kernel_w;
  }
  template <class A>
  int64_t gradient_size() const {
    return blocks_of<A>(out_channels) * kLanes<A> * blocks_of<A>(in_channels) * kLanes<A> * kernel_h * kernel_w;
  }
  ConvShape transposed() const { return {out_channels, in_channels, kernel_h, kernel_w}; }
};

// `weight` is [out, in, kh, kw] with any strides; `flip` packs the data gradient's weights for the shape `shape`
// (already transposed: shape.in_channels are the convolution's outputs).
template <class A, class T>
void pack_weights(const ConvShape& shape, bool flip, const T* weight, const int64_t* strides, A* packed);

inline constexpr int64_t kMostJobs = 16;  // of one call

// One sample of a convolution: out = combine(conv(in) + bias). `in` has neighbouring pixels and a zero halo of at least
// the padding (kernel - 1) / 2 around it.
template <class A>
struct ConvJob {
  View<A> in, out;
  Combine<A> combine = {};
};

// The memory that a worker reads next, in that order. Convolutions prefetch a cache line of it at every step, which
// takes longer than the line's way. No more than `room` is prefetched, or it would drive what is worked on out of the
// cache.
class Ahead {
 public:
  static constexpr int64_t line = 64;  // bytes

  explicit Ahead(int64_t room = 1 << 19) : room_(room) {}  // bytes, a quarter of a core's own cache

  void add(const char* at, int64_t bytes) {
    if (count_ == kCapacity || bytes > room_) return;
    stretches_[count_++] = {at, bytes};
    room_ -= bytes;
  }
  // Where the next `lines` lines lie, or null if none are left; the last ones may lie behind the stretch's end.
  const char* take(int64_t lines) {
    if (next_ == count_) return nullptr;
    Stretch& stretch = stretches_[next_];
    const char* at = stretch.at;
    stretch.at += lines * line, stretch.bytes -= lines * line;
    if (stretch.bytes <= 0) ++next_;
    return at;
  }

 private:
  static constexpr int kCapacity = 12;
  struct Stretch {
    const char* at;
    int64_t bytes;
  } stretches_[kCapacity];
  int next_ = 0, count_ = 0;
  int64_t room_;
};

// Runs every job with one slice of the weights before the next slice, so that a slice is brought into the cache once.
template <class A>
void convolve(const Plane<A>& plane, const ConvShape& shape, const A* packed, const A* bias, const ConvJob<A>* jobs,
              int64_t count, Ahead* ahead = nullptr);

// `in` has a zero halo where the kernel is neither 1 nor 3 wide, `cotangent` where it is 3 wide; both have neighbouring
// pixels.
template <class A>
struct GradientPair {
  View<A> in, cotangent;
};

// gradient += sum over the pairs of the weight gradient; `gradient` has gradient_size elements.
template <class A>
void weight_gradient(const Plane<A>& plane, const ConvShape& shape, const GradientPair<A>* pairs, int64_t count,
                     A* gradient);

// Sums the parts' accumulators in order and writes [out, in, kh, kw] with these strides.
template <class A, class T>
void unpack_gradient(const ConvShape& shape, const A* gradient, int64_t worker_stride, int64_t workers, T* weight,
                     const int64_t* strides);

}  // namespace fastode::resident
