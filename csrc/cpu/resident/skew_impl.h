// Included by one .cpp per arithmetic type.
#pragma once

#include "skew.h"

namespace fastode::resident {

template <class A>
NormRows<A> SkewPair<A>::rows_of(int which, const A* statistics, bool settled) const {
  const PairNorm<A>& norm = spec.norms[which];
  NormRows<A> rows{};
  const A* own = statistics + norm.statistics_at;
  rows.mean = norm.measured() ? own : norm.mean;
  rows.rstd = norm.measured() ? own + norm.blocks() * kLanes<A> : norm.rstd;
  rows.weight = norm.weight, rows.bias = norm.bias;
  rows.n = rows.xn = spec.zeros;
  if (settled) rows.n = means_, rows.xn = means_ + width_;
  rows.measured = norm.measured();
  return rows;
}

template <class A>
void SkewPair<A>::measure(int which, const View<A>& map, A* statistics) const {
  const PairNorm<A>& norm = spec.norms[which];
  if (!norm.measured()) return;
  moments<A>(plane_of(which), norm.blocks(), map, sums_, sums_ + width_);
  A* mean = statistics + norm.statistics_at;
  group_statistics<A>(plane_of(which).pixels(), norm.channels, norm.groups, norm.eps, sums_, sums_ + width_, mean,
                      mean + norm.blocks() * kLanes<A>);
}

template <class A>
void SkewPair<A>::normalise(int which, const View<A>& point, A* statistics, const View<A>& out) const {
  measure(which, point, statistics);
  if (spec.norms[which].mode == kNoNorm && point.at == out.at) return;
  apply<A>(plane_of(which), spec.norms[which].blocks(), rows_of(which, statistics), {}, point, out, {});
}

template <class A>
void SkewPair<A>::activate(bool y, const Trace<A>& trace) const {
  if (spec.act.kind == kIdentity) return;
  const int which = y ? kPostY : kPostZ;
  NormRows<A> plain{};
  plain.mean = plain.bias = spec.zeros;
  plain.rstd = plain.weight = spec.ones;
  apply<A>(plane_of(which), spec.norms[which].blocks(), plain, spec.act, y ? trace.guide.y : trace.guide.z,
           y ? trace.s.y : trace.s.z, {});
}

template <class A>
void SkewPair<A>::restore(Trace<A>& trace) const {
  if (spec.tells) return;
  if (trace.made.y) activate(true, trace);
  if (trace.made.z) activate(false, trace);
}

template <class A>
void SkewPair<A>::evaluate(const Both<A>& point, Trace<A>& trace, Want want) const {
  // A narrow W^T normalises on its way.
  const bool normalised = spec.gamma != 0 || !spec.shape.template narrow<A>();
  if (want.z || (want.y && spec.gamma != 0))
    normalised ? normalise(kPreY, point.y, trace.statistics, y_hat_) : measure(kPreY, point.y, trace.statistics);
  if (want.y || (want.z && spec.gamma != 0)) normalise(kPreZ, point.z, trace.statistics, z_hat_);
  if (want.y) {
    ConvJob<A> job{z_hat_, trace.guide.y};
    job.combine.add(-spec.gamma, y_hat_);
    skew_down<A>(spec.shape, spec.down, job);
    activate(true, trace);
    measure(kPostY, trace.s.y, trace.statistics);
  }
  if (want.z) {
    ConvJob<A> job{y_hat_, trace.guide.z};
    job.combine.scale = -1;
    job.combine.add(-spec.gamma, z_hat_);
    NormRows<A> norm;
    if (!normalised) {
      norm = rows_of(kPreY, trace.statistics);
      job.in = point.y;
    }
    skew_up<A>(spec.shape, spec.up, normalised ? nullptr : &norm, job, scratch_);
    activate(false, trace);
    measure(kPostZ, trace.s.z, trace.statistics);
  }
  trace.made = want;
}

template <class A>
void SkewPair<A>::settle(int which, const View<A>& x, const A* statistics, const View<A>& cotangent, A scale,
                         A* gradients) const {
  const PairNorm<A>& norm = spec.norms[which];
  const bool parameters = gradients && (norm.weight_at >= 0 || norm.bias_at >= 0);
  if (!norm.measured() && !parameters) return;
  tangent_sums<A>(plane_of(which), norm.blocks(), rows_of(which, statistics), x, cotangent, sums_);
  const int64_t lanes = norm.blocks() * kLanes<A>;
  for (int64_t c = 0; parameters && c < norm.channels; ++c) {
    if (norm.bias_at >= 0) gradients[norm.bias_at + c] += scale * sums_[c];
    if (norm.weight_at >= 0) gradients[norm.weight_at + c] += scale * sums_[lanes + c];
  }
  if (!norm.measured()) return;
  for (int k = 0; k < 2; ++k)
    group_means<A>(plane_of(which).pixels(), norm.channels, norm.groups, sums_ + k * lanes, norm.weight,
                   means_ + k * width_);
}

template <class A>
void SkewPair<A>::pull_half(bool y, const Trace<A>& trace, const Combine<A>& bar, A sign, A* gradients,
                            const View<A>& out) const {
  const int which = y ? kPostY : kPostZ;
  const int64_t blocks = spec.norms[which].blocks();
  const View<A>& s = y ? trace.s.y : trace.s.z;
  View<A> cotangent = bar.term[0];
  A scale = bar.coef[0];
  if (bar.count > 1) {
    combine_maps<A>(plane_of(which), blocks, out, bar);
    cotangent = out, scale = 1;
  }
  settle(which, s, trace.statistics, cotangent, scale, gradients);
  const bool settled = spec.norms[which].measured();
  pull_slope<A>(plane_of(which), blocks, rows_of(which, trace.statistics, settled), spec.act, sign * scale,
                y ? trace.guide.y : trace.guide.z, s, cotangent, out);
}

template <class A>
Want SkewPair<A>::pull(const Both<A>& point, const Trace<A>& trace, const Combine<A>& y_bar, const Combine<A>& z_bar,
                       A* gradients, Want need) const {
  const bool has_p = trace.made.y && y_bar.count > 0, has_q = trace.made.z && z_bar.count > 0;
  if (has_p) pull_half(true, trace, y_bar, 1, gradients, p_);
  if (has_q) pull_half(false, trace, z_bar, -1, gradients, q_);
  if (gradients && spec.weight_at >= 0) {
    GradientPair<A> pairs[2];
    int64_t count = 0;
    if (has_p) {
      apply<A>(z_plane, z_blocks(), rows_of(kPreZ, trace.statistics), {}, point.z, z_hat_, {});
      pairs[count++] = {z_hat_, p_};
    }
    if (has_q) {
      apply<A>(y_plane, y_blocks(), rows_of(kPreY, trace.statistics), {}, point.y, y_hat_, {});
      pairs[count++] = {q_, y_hat_};
    }
    skew_weight_gradient<A>(spec.shape, pairs, count, gradients + spec.weight_at);
  }
  // (3), with q's sign turned; a cotangent that is zero is left out.
  const Want left = reads({has_p, has_q});
  if (need.y && has_q) {
    ConvJob<A> job{q_, y_hat_};
    if (has_p) job.combine.add(-spec.gamma, p_);
    skew_down<A>(spec.shape, spec.down, job);
  } else if (need.y && left.y) {
    combine_maps<A>(y_plane, y_blocks(), y_hat_, Combine<A>{}.add(-spec.gamma, p_));
  }
  if (need.z && has_p) {
    ConvJob<A> job{p_, z_hat_};
    if (has_q) job.combine.add(spec.gamma, q_);
    skew_up<A>(spec.shape, spec.up, nullptr, job, scratch_);
  } else if (need.z && left.z) {
    combine_maps<A>(z_plane, z_blocks(), z_hat_, Combine<A>{}.add(spec.gamma, q_));
  }
  return {need.y && left.y, need.z && left.z};
}

template <class A>
void SkewPair<A>::finish(bool y, const View<A>& point, const Trace<A>& trace, const View<A>& out,
                         const Combine<A>& combine, A* gradients) const {
  const int which = y ? kPreY : kPreZ;
  const View<A>& cotangent = y ? y_hat_ : z_hat_;
  settle(which, point, trace.statistics, cotangent, 1, gradients);
  cotangent_last<A>(plane_of(which), spec.norms[which].blocks(),
                    rows_of(which, trace.statistics, spec.norms[which].measured()), point, cotangent, out, combine);
}

}  // namespace fastode::resident
