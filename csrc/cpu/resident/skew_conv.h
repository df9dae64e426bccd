// The skew pair's W, its transpose and its weight gradient on one resident sample. W maps z to y: an odd kernel at
// stride 1, or 4 x 4 at stride 2; the padding is (kernel - 1) / 2.
#pragma once

#include "norm.h"
#include "strided.h"
#include "winograd.h"

namespace fastode::resident {

struct SkewShape {
  int64_t channels, in_channels, kernel, stride;
  int64_t height, width;  // of y; z is `stride` times as large
  bool winograd = false;  // how W and its transpose are done

  int64_t halo() const { return stride == 1 ? kernel / 2 : 1; }
  ConvShape down() const { return {in_channels, channels, kernel, kernel}; }
  // The transposed convolution at stride 2 is one 2 x 2 convolution for each parity of z's rows and columns.
  ConvShape up() const { return {channels, in_channels, kernel / stride, kernel / stride}; }

  template <class A>
  Plane<A> y_plane() const {
    return {height, width, halo()};
  }
  template <class A>
  Plane<A> z_plane() const {
    return {height * stride, width * stride, halo()};
  }
  template <class A>
  int64_t down_size() const {
    return weights_size<A>(down(), winograd);
  }
  template <class A>
  int64_t up_size() const {
    return narrow<A>() ? channels * narrow_taps<A>() : stride * stride * weights_size<A>(up(), winograd);
  }
  template <class A>
  bool winograd_gradient() const {
    return winograd && suits_winograd_gradient<A>(down());
  }
  // Whether the weight gradient is that of skew_narrow.h, too.
  template <class A>
  bool narrow_gradient() const {
    return narrow<A>() && stride == 1 && kernel == 3;
  }
  // Whether z's channels fill so little of a vector that skew_narrow.h is faster.
  template <class A>
  bool narrow() const {
    return 2 * in_channels <= kLanes<A>;
  }
  // Of skew_narrow.h: the products of a pixel of y, one for each tap and channel of z, in whole vectors.
  template <class A>
  int64_t narrow_taps() const {
    return blocks_of<A>(in_channels * kernel * kernel) * kLanes<A>;
  }
  // Elements of the scratch of skew_down, skew_up and skew_weight_gradient.
  template <class A>
  int64_t scratch_size() const;
};

// `weight` [channels, in_channels, kernel, kernel] with any strides.
template <class A, class T>
void pack_skew(const SkewShape& shape, const T* weight, const int64_t* strides, A* down, A* up);

// out = combine(W in), from z's plane to y's; `in` has a zero halo.
template <class A>
void skew_down(const SkewShape& shape, const A* packed, const ConvJob<A>& job, A* scratch, Ahead* ahead);

// out = combine(W^T in), from y's plane to z's; `in` has a zero halo, except where the shape is narrow: there `norm`,
// if there is one, is applied to it first.
template <class A>
void skew_up(const SkewShape& shape, const A* packed, const NormRows<A>* norm, const ConvJob<A>& job, A* scratch,
             Ahead* ahead);

// gradient += the sum over the pairs of W's gradient for an input in z's plane and a cotangent in y's, both with zero
// halos; the layout is that of the shape down(), or of its winograd_gradient(). With a narrow gradient there are at
// most two, the cotangents need no halo, and `norm`, if there is one, is applied to the last one first.
template <class A>
void skew_weight_gradient(const SkewShape& shape, const GradientPair<A>* pairs, int64_t count, const NormRows<A>* norm,
                          A* gradient, A* scratch, Ahead* ahead);

}  // namespace fastode::resident
