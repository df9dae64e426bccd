// Everything between two convolutions, on one resident sample: norm and activation in their value, tangent, cotangent
// and second-order forms. A norm enters as rows of per-channel numbers, so group, batch and fixed statistics share
// these passes, and "no norm" is mean 0, rstd 1, weight 1, bias 0.
#pragma once

#include "../activation.h"
#include "conv.h"

namespace fastode::resident {

// Per-channel rows, each padded to whole vectors. The means are those of the norm's derivatives (design notes in the
// operator's README): P(v) = rstd (v - mean(v) - x mean(x v)), x the normalised input.
template <class A>
struct NormRows {
  const A *mean, *rstd, *weight, *bias;
  // Means over the normalised set: of the weighted cotangent n, of x n, of the tangent t, of x t, of the weighted
  // tangent cotangent c, and of x c. The second order adds mean(c P(t)) to `xn`.
  const A *n, *xn, *t, *xt, *c, *xc;
  // Whether the statistics are the input's own. Where not, all these means are zero and are not even multiplied,
  // because 0 times an infinite input would be NaN.
  bool measured;
};

template <class A>
struct Unary {
  int64_t kind = kIdentity;
  ActivationArguments<A> arguments = {};
};

// Mean and sum of squared deviations of every channel, a stretch of pixels at a time, merged by Chan's formula.
template <class A>
void moments(const Plane<A>& plane, int64_t blocks, const View<A>& map, A* mean, A* squares);

// out = combine(act(norm(h)))
template <class A>
void apply(const Plane<A>& plane, int64_t blocks, const NormRows<A>& rows, const Unary<A>& act, const View<A>& h,
           const View<A>& out, const Combine<A>& combine);

// The same rounded into a bfloat16 map, whose halo is set to zero.
void apply(const Plane<float>& plane, int64_t channels, const NormRows<float>& rows, const Unary<float>& act,
           const View<float>& h, bfloat16* out);

// n = act'(norm(h)) cotangent; sums [2, channels]: of n and of x n.
template <class A>
void cotangent_first(const Plane<A>& plane, int64_t blocks, const NormRows<A>& rows, const Unary<A>& act,
                     const View<A>& h, const View<A>& cotangent, const View<A>& n, A* sums);

// out = combine(P(weight n))
template <class A>
void cotangent_last(const Plane<A>& plane, int64_t blocks, const NormRows<A>& rows, const View<A>& h, const View<A>& n,
                    const View<A>& out, const Combine<A>& combine);

// sums [2, channels]: of t and of x t.
template <class A>
void tangent_sums(const Plane<A>& plane, int64_t blocks, const NormRows<A>& rows, const View<A>& h, const View<A>& t,
                  A* sums);

// out = combine(act'(norm(h)) weight P(t))
template <class A>
void tangent_apply(const Plane<A>& plane, int64_t blocks, const NormRows<A>& rows, const Unary<A>& act,
                   const View<A>& h, const View<A>& t, const View<A>& out, const Combine<A>& combine);

void tangent_apply(const Plane<float>& plane, int64_t channels, const NormRows<float>& rows, const Unary<float>& act,
                   const View<float>& h, const View<float>& t, bfloat16* out);

// From cotangents of the value and of the tangent, in place: n, of the norm's output, and m, of its tangent.
// sums [5, channels]: of n, x n, m, x m and m P(t).
template <class A>
void second_first(const Plane<A>& plane, int64_t blocks, const NormRows<A>& rows, const Unary<A>& act, const View<A>& h,
                  const View<A>& t, const View<A>& n, const View<A>& m, A* sums);

// out = combine(cotangent of h); tangent_out (or null) = P(weight m), the cotangent of t.
template <class A>
void second_last(const Plane<A>& plane, int64_t blocks, const NormRows<A>& rows, const View<A>& h, const View<A>& t,
                 const View<A>& n, const View<A>& m, const View<A>& out, const View<A>* tangent_out,
                 const Combine<A>& combine);

// out = sum of the terms.
template <class A>
void combine_maps(const Plane<A>& plane, int64_t blocks, const View<A>& out, const Combine<A>& combine);

// sums [channels] += the sum over the pixels.
template <class A>
void add_channel_sums(const Plane<A>& plane, int64_t blocks, const View<A>& map, A* sums);

template <class A>
double inner_product(const Plane<A>& plane, int64_t blocks, const View<A>& a, const View<A>& b);

}  // namespace fastode::resident
