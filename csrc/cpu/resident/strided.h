// Maps that lose rows and columns on their way: convolutions of stride 2, and means over windows with channels of zeros
// behind them.
#pragma once

#include "conv.h"

namespace fastode::resident {

// Every second row and column, from (py, px) on.
template <class A>
View<A> parity(View<A> view, int64_t py, int64_t px) {
  view.at += py * view.row + px * view.pixel;
  view.row *= 2, view.pixel *= 2;
  return view;
}

template <class A>
Combine<A> parity(Combine<A> combine, int64_t py, int64_t px) {
  for (int i = 0; i < combine.count; ++i) combine.term[i] = parity(combine.term[i], py, px);
  return combine;
}

// Pulled back, a convolution of stride 2 is one of stride 1 for each parity of its input's rows and columns. Along one
// side, input 2 i + parity meets output j with tap parity + padding - 2 (j - i): these taps, the last one first.
struct ParityTaps {
  int64_t count, first, last;
  int64_t before;  // outputs from i back to the one that meets the last tap
  int64_t above;   // inputs of this parity from output j's own back to the one that meets the first tap

  ParityTaps(int64_t kernel, int64_t parity) {
    const int64_t padding = kernel / 2;
    first = (parity + padding) % 2;
    count = kernel > first ? (kernel - first + 1) / 2 : 0;
    last = first + 2 * (count - 1);
    before = (last - parity - padding) / 2;
    above = (parity + padding - first) / 2;
  }
};

// f(py, px, rows' taps, columns' taps) for each parity that meets any tap.
template <class F>
void each_parity(const ConvShape& shape, const F& f) {
  for (int64_t py = 0; py < 2; ++py)
    for (int64_t px = 0; px < 2; ++px) {
      const ParityTaps rows(shape.kernel_h, py), columns(shape.kernel_w, px);
      if (rows.count * columns.count > 0) f(py, px, rows, columns);
    }
}

// Elements of the weights of all parities of a convolution `shape` of stride 2, whose sides are 1 or 3 and padded by
// half of that.
template <class A>
int64_t strided_back_size(const ConvShape& shape) {
  return divide_up(shape.in_channels, kLanes<A>) * kLanes<A> * shape.out_channels * shape.kernel_h * shape.kernel_w;
}

template <class A, class T>
void pack_strided_back(const ConvShape& shape, const T* weight, const int64_t* strides, A* packed);

// As convolve(), from one plane to another.
template <class A>
void convolve_strided(const Plane<A>& in, const Plane<A>& out, const ConvShape& shape, const A* packed, const A* bias,
                      const ConvJob<A>* jobs, int64_t count, Ahead* ahead);

// The jobs' inputs are cotangents of the convolution's output, with a zero halo. What a kernel of one row or column
// does not meet is zero, without any terms.
template <class A>
void convolve_strided_back(const Plane<A>& in, const Plane<A>& out, const ConvShape& shape, const A* packed,
                           const ConvJob<A>* jobs, int64_t count, Ahead* ahead);

// As weight_gradient(); the pairs' inputs have a zero halo.
template <class A>
void strided_weight_gradient(const Plane<A>& out, const ConvShape& shape, const GradientPair<A>* pairs, int64_t count,
                             A* gradient);

// out = combine(mean over windows of in, with channels of zeros behind), and out = its pull-back of the cotangent `in`.
template <class T>
void average(const Plane<Number<T>>& out, const ConvShape& shape, const ConvJob<T>& job);
template <class T>
void average_back(const Plane<Number<T>>& in, const Plane<Number<T>>& out, const ConvShape& shape,
                  const ConvJob<T>& job);

}  // namespace fastode::resident
