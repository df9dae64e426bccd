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
void SkewPair<A>::add_moments(int which, const Plane<A>& band, int64_t y, const View<A>& rows) const {
  const PairNorm<A>& norm = spec.norms[which];
  if (!norm.measured()) return;
  A* found = y == 0 ? sums_ : means_;
  moments<A>(band, norm.blocks(), rows, found, found + width_);
  if (y > 0)
    merge_band_moments<A>(norm.blocks(), y * band.width, band.pixels(), means_, means_ + width_, sums_, sums_ + width_);
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
void SkewPair<A>::measure(int which, const Stored<A>& map, A* statistics) const {
  if (!spec.norms[which].measured()) return;
  each_band(plane_of(which), [&](const Plane<A>& band, int64_t y) {
    const View<A> rows = read(which, map, band, y, one_);
    touch(band, spec.norms[which].blocks(), rows);
    add_moments(which, band, y, rows);
  });
  settle_moments(which, statistics);
}

template <class A>
void SkewPair<A>::normalise(int which, const Stored<A>& point, const A* statistics, const View<A>& out) const {
  if (spec.norms[which].mode == kNoNorm && point.view.at == out.at) return;
  const NormRows<A> rows = rows_of(which, statistics);
  each_band(plane_of(which), [&](const Plane<A>& band, int64_t y) {
    const View<A> from = read(which, point, band, y, one_);
    touch(band, spec.norms[which].blocks(), from);
    apply<A>(band, spec.norms[which].blocks(), rows, {}, from, below(out, y), {});
  });
}

template <class A>
void SkewPair<A>::take_tiles(Arena& arena, bool backward) {
  const SkewTiles& tiles = spec.tiles;
  const auto zeros = [&](int64_t size) {
    bfloat16* map = arena.take<bfloat16>(size);
    if (map) std::fill(map, map + size, bfloat16{0});
    return map;
  };
  hat_ = {zeros(tiles.y_size()), zeros(tiles.z_size())};
  if (backward) bar_ = {zeros(tiles.y_size()), zeros(tiles.z_size())};
  if (backward) tile_scratch_ = arena.take<bfloat16>(tiles.gradient_scratch());
  int64_t pixels = 0;
  each_band(z_plane, [&](const Plane<A>& band, int64_t) { pixels = std::max(pixels, band.pixels()); });
  each_band(y_plane, [&](const Plane<A>& band, int64_t) { pixels = std::max(pixels, band.pixels()); });
  for (A** band : {&band_, &one_, &other_})
    *band = arena.take<A>(std::max(y_blocks(), z_blocks()) * pixels * kLanes<A>);
}

template <class A>
void SkewPair<A>::round(bool y, const Plane<A>& band, int64_t at, const View<A>& from, const Rounded& to) const {
  if constexpr (kOnTiles<A>) spec.tiles.round(y, from, at, band.height, y ? to.y : to.z);
}

template <class A>
void SkewPair<A>::feed(int which, const Stored<A>& point, const A* statistics, bool whole) const {
  const View<A>& map = is_y(which) ? y_hat_ : z_hat_;
  if (!spec.tiles || whole) normalise(which, point, statistics, map);
  if (!spec.tiles) return;
  const PairNorm<A>& norm = spec.norms[which];
  const NormRows<A> rows = rows_of(which, statistics);
  each_band(plane_of(which), [&](const Plane<A>& band, int64_t at) {
    View<A> from = whole ? below(map, at) : read(which, point, band, at, one_);
    if (!whole && norm.mode != kNoNorm) {
      const View<A> to = band_of(map, false, band, at);
      apply<A>(band, norm.blocks(), rows, {}, from, to, {});
      from = to;
    }
    round(is_y(which), band, at, from, hat_);
  });
}

template <class A>
void SkewPair<A>::down(bool cotangent, const Plane<A>& band, int64_t at, const View<A>& out,
                       const Combine<A>& combine) const {
  if constexpr (kOnTiles<A>)
    if (spec.tiles)
      return spec.tiles.down(spec.down, cotangent ? bar_.z : hat_.z, at, band.height, below(out, at),
                             below(combine, at), ahead);
  SkewShape part = spec.shape;
  part.height = band.height;
  skew_down<A>(part, spec.down, {below(cotangent ? q_ : z_hat_, at * part.stride), below(out, at), below(combine, at)},
               scratch_, ahead);
}

template <class A>
void SkewPair<A>::up(bool cotangent, const View<A>& out, const Combine<A>& combine) const {
  if constexpr (kOnTiles<A>)
    if (spec.tiles) return spec.tiles.up(spec.up, cotangent ? bar_.y : hat_.y, 0, y_plane.height, out, combine, ahead);
  skew_up<A>(spec.shape, spec.up, nullptr, {cotangent ? p_ : y_hat_, out, combine}, scratch_, ahead);
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
  Combine<A> damping;
  damping.add(-spec.gamma, y_hat_);
  const bool whole = spec.shape.winograd;  // its tiles are of two rows, and a band may be of one
  if (whole) down(false, y_plane, 0, trace.guide.y, damping);
  each_band(y_plane, [&](const Plane<A>& band, int64_t at) {
    if (!whole) down(false, band, at, trace.guide.y, damping);
    activate(true, trace, band, at);
    if (measured) add_moments(kPostY, band, at, below(trace.s.y, at));
  });
}

template <class A>
void SkewPair<A>::remake_y(const Point<A>& point, const Trace<A>& trace) const {
  if (spec.gamma != 0) normalise(kPreY, point.y, trace.statistics, y_hat_);
  feed(kPreZ, point.z, trace.statistics, false);
  make_y(trace, false);
}

template <class A>
void SkewPair<A>::evaluate(const Point<A>& point, Trace<A>& trace, Want want) const {
  // A narrow W^T normalises on its way.
  const bool narrow = !spec.tiles && spec.shape.template narrow<A>(), damped = spec.gamma != 0;
  const bool normalised = damped || !narrow;
  const Want read = reads(want);
  if (read.y) measure(kPreY, point.y, trace.statistics);
  if (read.y && normalised) feed(kPreY, point.y, trace.statistics, damped);
  if (read.z) measure(kPreZ, point.z, trace.statistics);
  if (read.z) feed(kPreZ, point.z, trace.statistics, damped);
  if (want.z) {
    const NormRows<A> rows = rows_of(kPreY, trace.statistics);
    ConvJob<A> job{point.y.view, trace.guide.z};
    job.combine.scale = -1;
    job.combine.add(-spec.gamma, z_hat_);
    normalised ? up(false, job.out, job.combine) : skew_up<A>(spec.shape, spec.up, &rows, job, scratch_, ahead);
    each_band(z_plane, [&](const Plane<A>& band, int64_t at) {
      activate(false, trace, band, at);
      add_moments(kPostZ, band, at, below(trace.s.z, at));
    });
    settle_moments(kPostZ, trace.statistics);
  }
  if (want.y) {
    make_y(trace, true);
    settle_moments(kPostY, trace.statistics);
  }
  trace.made = want;
}

template <class A>
void SkewPair<A>::settle(int which, const Stored<A>& x, const A* origin, const A* unit, const Stored<A>& cotangent,
                         A scale, A* gradients, double* total) const {
  const PairNorm<A>& norm = spec.norms[which];
  const bool parameters = gradients && (norm.weight_at >= 0 || norm.bias_at >= 0);
  if (!norm.measured() && !parameters && !total) return;
  const int64_t lanes = norm.blocks() * kLanes<A>;
  std::fill(sums_, sums_ + 2 * lanes, A(0));
  each_band(plane_of(which), [&](const Plane<A>& band, int64_t y) {
    add_cotangent_sums<A>(band, norm.blocks(), {read(which, x, band, y, other_), origin, unit},
                          read(which, cotangent, band, y, one_), sums_);
  });
  for (int64_t c = 0; parameters && c < norm.channels; ++c) {
    if (norm.bias_at >= 0) gradients[norm.bias_at + c] += scale * sums_[c];
    if (norm.weight_at >= 0) gradients[norm.weight_at + c] += scale * sums_[lanes + c];
  }
  for (int64_t c = 0; total && c < norm.channels; ++c)
    *total +=
        static_cast<double>(scale) * static_cast<double>(norm.weight[c] * sums_[lanes + c] + norm.bias[c] * sums_[c]);
  if (!norm.measured()) return;
  for (int k = 0; k < 2; ++k)
    group_means<A>(plane_of(which).pixels(), norm.channels, norm.groups, sums_ + k * lanes, norm.weight,
                   means_ + k * width_);
}

template <class A>
void SkewPair<A>::pull_half(bool y, const Trace<A>& trace, const Cotangent<A>& bar, A sign, A* gradients,
                            const View<A>& out) const {
  const int which = y ? kPostY : kPostZ;
  const int64_t blocks = spec.norms[which].blocks();
  const Signs<A>& signs = y ? trace.y_signs : trace.z_signs;
  const PairNorm<A>& norm = spec.norms[which];
  const NormRows<A> plain = rows_of(which, trace.statistics);
  const Standard<A> s{y ? trace.s.y : trace.s.z, signs.at ? norm.bias : plain.mean, signs.at ? norm.unit : plain.rstd};
  Stored<A> cotangent = bar.stored;
  A scale = 1;
  if (bar.terms.count == 1) cotangent = bar.terms.term[0], scale = bar.terms.coef[0];
  if (bar.terms.count > 1) combine_maps<A>(plane_of(which), blocks, out, bar.terms), cotangent = out;
  settle(which, s.map, s.origin, s.unit, cotangent, scale, gradients, product);
  const NormRows<A> rows = rows_of(which, trace.statistics, spec.norms[which].measured());
  const View<A>& guide = y ? trace.guide.y : trace.guide.z;
  each_band(plane_of(which), [&](const Plane<A>& band, int64_t at) {
    const View<A> to = band_of(out, !spec.tiles || spec.gamma != 0, band, at);
    pull_slope<A>(band, blocks, rows, spec.act, sign * scale, below(guide, at), below(signs, at),
                  {below(s.map, at), s.origin, s.unit}, read(which, cotangent, band, at, one_), to);
    if (spec.tiles) round(y, band, at, to, bar_);
  });
}

template <class A>
void SkewPair<A>::add_weight_gradient(const Point<A>& point, const Trace<A>& trace, bool has_p, bool has_q,
                                      A* gradient) const {
  if (has_p) feed(kPreZ, point.z, trace.statistics, false);
  const bool normalises = !spec.tiles && spec.shape.template narrow_gradient<A>();
  if (has_q && !normalises) feed(kPreY, point.y, trace.statistics, false);
  if constexpr (kOnTiles<A>) {
    if (has_p && spec.tiles) spec.tiles.weight_gradient(hat_.z, bar_.y, gradient, tile_scratch_);
    if (has_q && spec.tiles) spec.tiles.weight_gradient(bar_.z, hat_.y, gradient, tile_scratch_);
  }
  if (spec.tiles) return;
  GradientPair<A> pairs[2];
  int64_t count = 0;
  if (has_p) pairs[count++] = {z_hat_, p_};
  if (has_q) pairs[count++] = {q_, normalises ? point.y.view : y_hat_};
  const NormRows<A> rows = rows_of(kPreY, trace.statistics);
  skew_weight_gradient<A>(spec.shape, pairs, count, has_q && normalises ? &rows : nullptr, gradient, scratch_, ahead);
}

template <class A>
Want SkewPair<A>::pull(const Point<A>& point, const Trace<A>& trace, const Cotangent<A>& y_bar,
                       const Cotangent<A>& z_bar, A* gradients, Want need, const Both<A>& to) const {
  const bool has_p = trace.made.y && y_bar.present(), has_q = trace.made.z && z_bar.present();
  if (has_p) pull_half(true, trace, y_bar, 1, gradients, p_);
  if (has_q) pull_half(false, trace, z_bar, -1, gradients, q_);
  if (gradients && spec.weight_at >= 0) add_weight_gradient(point, trace, has_p, has_q, gradients + spec.weight_at);
  // (3), with q's sign turned; a cotangent that is zero is left out.
  const Want left = reads({has_p, has_q});
  // W last: its result may go where no line is at hand before W^T has asked for it.
  if (need.z && has_p) {
    Combine<A> damping;
    if (has_q) damping.add(spec.gamma, q_);
    up(true, to.z, damping);
  } else if (need.z && left.z) {
    combine_maps<A>(z_plane, z_blocks(), to.z, Combine<A>{}.add(spec.gamma, q_));
  }
  if (need.y && has_q) {
    Combine<A> damping;
    if (has_p) damping.add(-spec.gamma, p_);
    down(true, y_plane, 0, to.y, damping);
  } else if (need.y && left.y) {
    combine_maps<A>(y_plane, y_blocks(), to.y, Combine<A>{}.add(-spec.gamma, p_));
  }
  return {need.y && left.y, need.z && left.z};
}

template <class A>
void SkewPair<A>::finish(bool y, const Stored<A>& point, const Trace<A>& trace, const View<A>& cotangent,
                         const Stored<A>& out, const Combine<A>& combine, A* gradients) const {
  const int which = y ? kPreY : kPreZ;
  const NormRows<A> plain = rows_of(which, trace.statistics);
  settle(which, point, plain.mean, plain.rstd, cotangent, 1, gradients);
  const NormRows<A> rows = rows_of(which, trace.statistics, spec.norms[which].measured());
  write(y, out, [&](const Plane<A>& band, int64_t at, const View<A>& to) {
    cotangent_last<A>(band, spec.norms[which].blocks(), rows, read(which, point, band, at, one_), below(cotangent, at),
                      to, below(combine, at));
  });
}

}  // namespace fastode::resident
