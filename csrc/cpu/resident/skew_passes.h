// What the skew pair needs between its convolutions beside norm.h. A norm after the activation normalises s = act(h),
// and `guide` is h or, where act' has the same value at s, s itself.
#pragma once

#include "norm.h"

namespace fastode::resident {

// coefficient * norm(s) for rows of the norm's statistics and parameters.
template <class A>
struct Slope {
  A coefficient;
  View<A> s;
  NormRows<A> rows;
};

// out = base + the sum of the slopes, of which there are kSlopes at most.
inline constexpr int64_t kSlopes = 4;
template <class A>
void advance(const Plane<A>& plane, int64_t blocks, const View<A>& base, const Slope<A>* slopes, int64_t count,
             const View<A>& out);

// out = factor * act'(guide) P(weight cotangent); P is that of the norm of s.
template <class A>
void pull_slope(const Plane<A>& plane, int64_t blocks, const NormRows<A>& rows, const Unary<A>& act, A factor,
                const View<A>& guide, const View<A>& s, const View<A>& cotangent, const View<A>& out);

// out = the channels of every `stride`-th pixel of `in`, repeated until there are `channels` of them; `plane` is out's.
template <class A>
void repeat_channels(const Plane<A>& plane, int64_t in_channels, int64_t channels, int64_t stride, const View<A>& in,
                     const View<A>& out);

// in += the adjoint of repeat_channels on `out`.
template <class A>
void add_repeated(const Plane<A>& plane, int64_t in_channels, int64_t channels, int64_t stride, const View<A>& in,
                  const View<A>& out);

// Mean and reciprocal deviation of the groups of one sample, for every channel, from its channels' moments.
template <class A>
void group_statistics(int64_t pixels, int64_t channels, int64_t groups, double eps, const A* means, const A* squares,
                      A* mean, A* rstd);

// Means over the groups of one sample, for every channel, of what its channels sum up to, weighted.
template <class A>
void group_means(int64_t pixels, int64_t channels, int64_t groups, const A* sums, const A* weight, A* means);

}  // namespace fastode::resident
