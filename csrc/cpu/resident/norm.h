// Everything between two convolutions, on one resident sample: norm and activation in their value, tangent, cotangent
// and second-order forms. A norm enters as rows of per-channel numbers, so group, batch and fixed statistics share
// these passes, and "no norm" is mean 0, rstd 1, weight 1, bias 0. Maps are stored as T.
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

// Chan's formula: adds the mean and the squared deviations of `next` pixels to those of `seen` other ones.
template <class V>
inline void merge_moments(ScalarOf<V> seen, V& mean, V& squares, ScalarOf<V> next, V mean_next, V squares_next) {
  const ScalarOf<V> share = next / (seen + next);
  const V delta = mean_next - mean;
  mean += delta * share;
  squares += squares_next + delta * delta * (seen * share);
}

// Mean and sum of squared deviations of every channel, found and merged a stretch of pixels at a time.
template <class T>
void moments(const Plane<Number<T>>& plane, int64_t blocks, const View<T>& map, Number<T>* mean, Number<T>* squares);

// out = combine(act(norm(h)))
template <class T>
void apply(const Plane<Number<T>>& plane, int64_t blocks, const NormRows<Number<T>>& rows, const Unary<Number<T>>& act,
           const View<T>& h, const View<T>& out, const Combine<T>& combine);

// out = relu(step norm(h) + skip), or with `skip_rows` the norm of `skip`.
template <class T>
void join(const Plane<Number<T>>& plane, int64_t blocks, const NormRows<Number<T>>& rows, const View<T>& h,
          Number<T> step, const NormRows<Number<T>>* skip_rows, const View<T>& skip, const View<T>& out);

// out = act'(h) cotangent
template <class T>
void pull_activation(const Plane<Number<T>>& plane, int64_t blocks, const Unary<Number<T>>& act, const View<T>& h,
                     const View<T>& cotangent, const View<T>& out);

// n = act'(norm(h)) cotangent; sums [2, channels]: of n and of x n.
template <class T>
void cotangent_first(const Plane<Number<T>>& plane, int64_t blocks, const NormRows<Number<T>>& rows,
                     const Unary<Number<T>>& act, const View<T>& h, const View<T>& cotangent, const View<T>& n,
                     Number<T>* sums);

// out = combine(P(weight n))
template <class T>
void cotangent_last(const Plane<Number<T>>& plane, int64_t blocks, const NormRows<Number<T>>& rows, const View<T>& h,
                    const View<T>& n, const View<T>& out, const Combine<T>& combine);

// sums [2, channels]: of t and of x t.
template <class T>
void tangent_sums(const Plane<Number<T>>& plane, int64_t blocks, const NormRows<Number<T>>& rows, const View<T>& h,
                  const View<T>& t, Number<T>* sums);

// out = combine(act'(norm(h)) weight P(t))
template <class T>
void tangent_apply(const Plane<Number<T>>& plane, int64_t blocks, const NormRows<Number<T>>& rows,
                   const Unary<Number<T>>& act, const View<T>& h, const View<T>& t, const View<T>& out,
                   const Combine<T>& combine);

// From cotangents of the value and of the tangent, in place: n, of the norm's output, and m, of its tangent.
// sums [5, channels]: of n, x n, m, x m and m P(t).
template <class T>
void second_first(const Plane<Number<T>>& plane, int64_t blocks, const NormRows<Number<T>>& rows,
                  const Unary<Number<T>>& act, const View<T>& h, const View<T>& t, const View<T>& n, const View<T>& m,
                  Number<T>* sums);

// out = combine(cotangent of h); tangent_out (or null) = P(weight m), the cotangent of t.
template <class T>
void second_last(const Plane<Number<T>>& plane, int64_t blocks, const NormRows<Number<T>>& rows, const View<T>& h,
                 const View<T>& t, const View<T>& n, const View<T>& m, const View<T>& out, const View<T>* tangent_out,
                 const Combine<T>& combine);

// out = sum of the terms.
template <class T>
void combine_maps(const Plane<Number<T>>& plane, int64_t blocks, const View<T>& out, const Combine<T>& combine);

// sums [channels] += the sum over the pixels.
template <class T>
void add_channel_sums(const Plane<Number<T>>& plane, int64_t blocks, const View<T>& map, Number<T>* sums);

template <class T>
double inner_product(const Plane<Number<T>>& plane, int64_t blocks, const View<T>& a, const View<T>& b);

}  // namespace fastode::resident
