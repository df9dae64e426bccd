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
void SkewPair<A>::add_moments(int which, const Plane<A>& band, int64_t y, const View<A>& map) const {
  const PairNorm<A>& norm = spec.norms[which];
  if (!norm.measured()) return;
  A* found = y == 0 ? sums_ : means_;
  moments<A>(band, norm.blocks(), below(map, y), found, found + width_);
  if (y > 0)
    merge_moments<A>(norm.blocks(), y * band.width, band.pixels(), means_, means_ + width_, sums_, sums_ + width_);
}

template <class A>
void SkewPair<A>::settle_moments(int which, A* statistics) const {
  const PairNorm<A>& norm = spec.norms[which];
  if (!norm.measured()) return;
  A* mean = statistics + norm.statistics_at;
  group_statistics<A>(plane_of(which).pixels(), norm.channels, norm.groups, norm.eps, sums_, sums_ + width_, mean,
                      mean + norm.blocks() * kLanes<A>);
}

template <class A>
void SkewPair<A>::measure(int which, const View<A>& map, A* statistics) const {
  if (!spec.norms[which].measured()) return;
  each_band(plane_of(which), [&](const Plane<A>& band, int64_t y) {
    touch(band, spec.norms[which].blocks(), below(map, y));
    add_moments(which, band, y, map);
  });
  settle_moments(which, statistics);
}

template <class A>
void SkewPair<A>::normalise(int which, const View<A>& point, const A* statistics, const View<A>& out) const {
  if (spec.norms[which].mode == kNoNorm && point.at == out.at) return;
  const NormRows<A> rows = rows_of(which, statistics);
  each_band(plane_of(which), [&](const Plane<A>& band, int64_t y) {
    touch(band, spec.norms[which].blocks(), below(point, y));
    apply<A>(band, spec.norms[which].blocks(), rows, {}, below(point, y), below(out, y), {});
  });
}

template <class A>
void SkewPair<A>::activate(bool y, const Trace<A>& trace, const Plane<A>& band, int64_t at) const {
  if (spec.act.kind == kIdentity) return;
  NormRows<A> plain{};
  plain.mean = plain.bias = spec.zeros;
  plain.rstd = plain.weight = spec.ones;
  apply<A>(band, spec.norms[y ? kPostY : kPostZ].blocks(), plain, spec.act,
           below(y ? trace.guide.y : trace.guide.z, at), below(y ? trace.s.y : trace.s.z, at), {});
}

template <class A>
void SkewPair<A>::restore(Trace<A>& trace) const {
  if (spec.tells) return;
  for (const bool y : {true, false})
    if (y ? trace.made.y : trace.made.z)
      each_band(y ? y_plane : z_plane, [&](const Plane<A>& band, int64_t at) { activate(y, trace, band, at); });
}

template <class A>
void SkewPair<A>::make_y(const Trace<A>& trace, bool measured) const {
  SkewShape part = spec.shape;
  Combine<A> damping;
  damping.add(-spec.gamma, y_hat_);
  each_band(y_plane, [&](const Plane<A>& band, int64_t at) {
    part.height = band.height;
    skew_down<A>(part, spec.down, {below(z_hat_, at * part.stride), below(trace.guide.y, at), below(damping, at)},
                 ahead);
    activate(true, trace, band, at);
    if (measured) add_moments(kPostY, band, at, trace.s.y);
  });
}

template <class A>
void SkewPair<A>::remake_y(const Both<A>& point, const Trace<A>& trace) const {
  if (spec.gamma != 0) normalise(kPreY, point.y, trace.statistics, y_hat_);
  normalise(kPreZ, point.z, trace.statistics, z_hat_);
  make_y(trace, false);
}

template <class A>
void SkewPair<A>::evaluate(const Both<A>& point, Trace<A>& trace, Want want) const {
  // A narrow W^T normalises on its way.
  const bool narrow = spec.shape.template narrow<A>(), normalised = spec.gamma != 0 || !narrow;
  const Want read = reads(want);
  if (read.y) measure(kPreY, point.y, trace.statistics);
  if (read.y && normalised) normalise(kPreY, point.y, trace.statistics, y_hat_);
  if (read.z) measure(kPreZ, point.z, trace.statistics);
  if (read.z) normalise(kPreZ, point.z, trace.statistics, z_hat_);
  if (want.y) {
    make_y(trace, true);
    settle_moments(kPostY, trace.statistics);
  }
  if (want.z) {
    const NormRows<A> rows = rows_of(kPreY, trace.statistics);
    ConvJob<A> job{normalised ? y_hat_ : point.y, trace.guide.z};
    job.combine.scale = -1;
    job.combine.add(-spec.gamma, z_hat_);
    skew_up<A>(spec.shape, spec.up, normalised ? nullptr : &rows, job, scratch_, ahead);
    each_band(z_plane, [&](const Plane<A>& band, int64_t at) {
      activate(false, trace, band, at);
      add_moments(kPostZ, band, at, trace.s.z);
    });
    settle_moments(kPostZ, trace.statistics);
  }
  trace.made = want;
}

template <class A>
void SkewPair<A>::settle(int which, const View<A>& x, const A* statistics, const View<A>& cotangent, A scale,
                         A* gradients) const {
  const PairNorm<A>& norm = spec.norms[which];
  const bool parameters = gradients && (norm.weight_at >= 0 || norm.bias_at >= 0);
  if (!norm.measured() && !parameters) return;
  const int64_t lanes = norm.blocks() * kLanes<A>;
  const NormRows<A> rows = rows_of(which, statistics);
  std::fill(sums_, sums_ + 2 * lanes, A(0));
  each_band(plane_of(which), [&](const Plane<A>& band, int64_t y) {
    touch(band, norm.blocks(), below(cotangent, y));
    tangent_sums<A>(band, norm.blocks(), rows, below(x, y), below(cotangent, y), means_);
    for (int64_t c = 0; c < 2 * lanes; ++c) sums_[c] += means_[c];
  });
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
  const NormRows<A> rows = rows_of(which, trace.statistics, spec.norms[which].measured());
  const View<A>& guide = y ? trace.guide.y : trace.guide.z;
  each_band(plane_of(which), [&](const Plane<A>& band, int64_t at) {
    pull_slope<A>(band, blocks, rows, spec.act, sign * scale, below(guide, at), below(s, at), below(cotangent, at),
                  below(out, at));
  });
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
      normalise(kPreZ, point.z, trace.statistics, z_hat_);
      pairs[count++] = {z_hat_, p_};
    }
    if (has_q) {
      normalise(kPreY, point.y, trace.statistics, y_hat_);
      pairs[count++] = {q_, y_hat_};
    }
    skew_weight_gradient<A>(spec.shape, pairs, count, gradients + spec.weight_at);
  }
  // (3), with q's sign turned; a cotangent that is zero is left out.
  const Want left = reads({has_p, has_q});
  if (need.y && has_q) {
    ConvJob<A> job{q_, y_hat_};
    if (has_p) job.combine.add(-spec.gamma, p_);
    skew_down<A>(spec.shape, spec.down, job, ahead);
  } else if (need.y && left.y) {
    combine_maps<A>(y_plane, y_blocks(), y_hat_, Combine<A>{}.add(-spec.gamma, p_));
  }
  if (need.z && has_p) {
    ConvJob<A> job{p_, z_hat_};
    if (has_q) job.combine.add(spec.gamma, q_);
    skew_up<A>(spec.shape, spec.up, nullptr, job, scratch_, ahead);
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
  const NormRows<A> rows = rows_of(which, trace.statistics, spec.norms[which].measured());
  each_band(plane_of(which), [&](const Plane<A>& band, int64_t at) {
    cotangent_last<A>(band, spec.norms[which].blocks(), rows, below(point, at), below(cotangent, at), below(out, at),
                      below(combine, at));
  });
}

}  // namespace fastode::resident
