// Included by one .cpp per arithmetic type.
#pragma once

#include <cmath>

#include "branch.h"

namespace fastode::resident {

template <class A>
NormRows<A> Branch<A>::rows_of(const Evaluation<A>& e, size_t j, const Range& range, int64_t i) const {
  const UnitSpec<A>& unit = spec_.units[j];
  NormRows<A> rows;
  rows.mean = e.mean[j].at(range, i), rows.rstd = e.rstd[j].at(range, i);
  rows.weight = unit.weight, rows.bias = unit.bias;
  rows.n = rows.xn = rows.t = rows.xt = rows.c = rows.xc = spec_.zeros;
  rows.measured = unit.measured();
  if (!rows.measured) return rows;
  if (mean_n_.base) rows.n = mean_n_.at(range, i), rows.xn = mean_xn_.at(range, i);
  if (mean_c_.base) {
    rows.c = mean_c_.at(range, i), rows.xc = mean_xc_.at(range, i);
    rows.t = mean_t_[j].at(range, i), rows.xt = mean_xt_[j].at(range, i);
  }
  return rows;
}

template <class A>
void Branch<A>::measure(const Evaluation<A>& e, size_t j, const Range& range, int64_t i) const {
  const UnitSpec<A>& unit = spec_.units[j];
  const int64_t lanes = spec_.lanes_of(unit), group = unit.in_channels / unit.groups;
  A* channel_means = sums_.at(range, i);
  A* channel_squares = channel_means + lanes;
  moments(plane_, lanes / kLanes<A>, e.inputs[j].at(range, i), channel_means, channel_squares);
  if (unit.norm != kGroupNorm) return;
  A* mean = e.mean[j].at(range, i);
  A* rstd = e.rstd[j].at(range, i);
  std::fill(mean, mean + lanes, A(0));
  std::fill(rstd, rstd + lanes, A(0));
  const double pixels = static_cast<double>(plane_.pixels());
  for (int64_t first = 0; first < unit.in_channels; first += group) {
    double sum = 0, squares = 0;
    for (int64_t c = first; c < first + group; ++c) sum += channel_means[c];
    const double average = sum / static_cast<double>(group);
    for (int64_t c = first; c < first + group; ++c) {
      const double delta = channel_means[c] - average;
      squares += channel_squares[c] + pixels * delta * delta;
    }
    const double variance = squares / (pixels * static_cast<double>(group));
    std::fill(mean + first, mean + first + group, static_cast<A>(average));
    std::fill(rstd + first, rstd + first + group, static_cast<A>(1 / std::sqrt(variance + unit.eps)));
  }
}

template <class A>
void Branch<A>::measure_batch(const Evaluation<A>& e, size_t j) const {
  const UnitSpec<A>& unit = spec_.units[j];
  if (unit.norm != kBatchNorm) return;
  const int64_t channels = unit.in_channels, lanes = spec_.lanes_of(unit), samples = executor_.samples;
  const double pixels = static_cast<double>(plane_.pixels()), count = static_cast<double>(samples);
  double *average = totals_, *squares = totals_ + lanes;
  std::fill(totals_, totals_ + 2 * lanes, 0.0);
  for (int64_t n = 0; n < samples; ++n)
    for (int64_t c = 0; c < channels; ++c) average[c] += sums_.base[n * sums_.stride + c];
  for (int64_t c = 0; c < channels; ++c) average[c] /= count;
  for (int64_t n = 0; n < samples; ++n)
    for (int64_t c = 0; c < channels; ++c) {
      const double delta = sums_.base[n * sums_.stride + c] - average[c];
      squares[c] += sums_.base[n * sums_.stride + lanes + c] + pixels * delta * delta;
    }
  std::fill(e.mean[j].base, e.mean[j].base + lanes, A(0));
  std::fill(e.rstd[j].base, e.rstd[j].base + lanes, A(0));
  A* statistics = e.statistics;
  for (size_t k = 0; k < j && statistics; ++k)
    if (spec_.units[k].norm == kBatchNorm) statistics += 2 * spec_.units[k].in_channels;
  for (int64_t c = 0; c < channels; ++c) {
    const double variance = squares[c] / (count * pixels);
    e.mean[j].base[c] = static_cast<A>(average[c]);
    e.rstd[j].base[c] = static_cast<A>(1 / std::sqrt(variance + unit.eps));
    if (statistics) statistics[c] = static_cast<A>(average[c]), statistics[channels + c] = static_cast<A>(variance);
  }
}

template <class A>
void Branch<A>::settle(size_t j, const Range& range, int64_t i, bool weighted,
                       std::initializer_list<Rows<A>> means) const {
  const UnitSpec<A>& unit = spec_.units[j];
  if (unit.norm != kGroupNorm) return;
  const int64_t lanes = spec_.lanes_of(unit), group = unit.in_channels / unit.groups;
  const double members = static_cast<double>(plane_.pixels() * group);
  const A* sums = sums_.at(range, i);
  for (const Rows<A>& row : means) {
    A* to = row.at(range, i);
    std::fill(to, to + lanes, A(0));
    for (int64_t first = 0; first < unit.in_channels; first += group) {
      double total = 0;
      for (int64_t c = first; c < first + group; ++c)
        total += static_cast<double>(sums[c]) * (weighted ? static_cast<double>(unit.weight[c]) : 1.0);
      std::fill(to + first, to + first + group, static_cast<A>(total / members));
    }
    sums += lanes;
  }
}

template <class A>
void Branch<A>::settle_batch(size_t j, bool weighted, std::initializer_list<Rows<A>> means) const {
  const UnitSpec<A>& unit = spec_.units[j];
  if (unit.norm != kBatchNorm) return;
  const int64_t lanes = spec_.lanes_of(unit), samples = executor_.samples, count = static_cast<int64_t>(means.size());
  const double members = static_cast<double>(plane_.pixels() * samples);
  std::fill(totals_, totals_ + count * lanes, 0.0);
  for (int64_t n = 0; n < samples; ++n)
    for (int64_t c = 0; c < count * lanes; ++c) totals_[c] += sums_.base[n * sums_.stride + c];
  const double* total = totals_;
  for (const Rows<A>& row : means) {
    // Rows of means have one entry per sample for every norm; a batch norm's are all alike.
    for (int64_t c = 0; c < lanes; ++c)
      row.base[c] = static_cast<A>(total[c] / members * (weighted ? static_cast<double>(unit.weight[c]) : 1.0));
    for (int64_t n = 1; n < samples; ++n) std::copy(row.base, row.base + lanes, row.base + n * row.stride);
    total += lanes;
  }
}

template <class A>
void Branch<A>::activate_input(const Evaluation<A>& e, size_t j, const Range& range, int64_t i, const View<A>& out,
                               const Combine<A>& mix) const {
  const UnitSpec<A>& unit = spec_.units[j];
  apply(plane_, blocks_of<A>(unit.in_channels), rows_of(e, j, range, i), unit.act, e.inputs[j].at(range, i), out, mix);
}

template <class A>
void Branch<A>::activate_tangent(const Evaluation<A>& e, size_t j, const Range& range, int64_t i, const View<A>& out,
                                 const Combine<A>& mix) const {
  const UnitSpec<A>& unit = spec_.units[j];
  tangent_apply(plane_, blocks_of<A>(unit.in_channels), rows_of(e, j, range, i), unit.act, e.inputs[j].at(range, i),
                tangents_[j].at(range, i), out, mix);
}

template <class A>
void Branch<A>::convolve_input(const Evaluation<A>& e, size_t j, const Range& range, int64_t i, const View<A>& out,
                               const Combine<A>& combine) const {
  const UnitSpec<A>& unit = spec_.units[j];
  if constexpr (std::is_same_v<A, float>) {
    if (spec_.narrow) {
      bfloat16* narrow = narrow_ + range.worker * narrow_stride_;
      apply(plane_, unit.in_channels, rows_of(e, j, range, i), unit.act, e.inputs[j].at(range, i), narrow);
      const TileJob job{narrow, out, combine};
      return convolve(plane_, unit.shape, unit.forward, unit.conv_bias, &job, 1);
    }
  }
  const View<A> active = active_.at(range, i);
  activate_input(e, j, range, i, active, {});
  const ConvJob<A> job{active, out, combine};
  convolve<A>(plane_, unit.shape, unit.forward, unit.conv_bias, &job, 1);
}

template <class A>
void Branch<A>::convolve_tangent(const Evaluation<A>& e, size_t j, const Range& range, int64_t i, const View<A>& out,
                                 const Combine<A>& combine) const {
  const UnitSpec<A>& unit = spec_.units[j];
  if constexpr (std::is_same_v<A, float>) {
    if (spec_.narrow) {
      bfloat16* narrow = narrow_ + range.worker * narrow_stride_;
      tangent_apply(plane_, unit.in_channels, rows_of(e, j, range, i), unit.act, e.inputs[j].at(range, i),
                    tangents_[j].at(range, i), narrow);
      const TileJob job{narrow, out, combine};
      return convolve(plane_, unit.shape, unit.forward, nullptr, &job, 1);
    }
  }
  const View<A> active = active_.at(range, i);
  activate_tangent(e, j, range, i, active, {});
  const ConvJob<A> job{active, out, combine};
  convolve<A>(plane_, unit.shape, unit.forward, nullptr, &job, 1);
}

template <class A>
void Branch<A>::convolve_back(const UnitSpec<A>& unit, const Range& range, const View<A>& in,
                              const View<A>& out) const {
  if constexpr (std::is_same_v<A, float>) {
    if (spec_.narrow) {
      bfloat16* narrow = narrow_ + range.worker * narrow_stride_;
      narrow_map(plane_, unit.out_channels, in, narrow);
      const TileJob job{narrow, out};
      return convolve(plane_, unit.shape.transposed(), unit.backward, nullptr, &job, 1);
    }
  }
  const ConvJob<A> job{in, out};
  convolve<A>(plane_, unit.shape.transposed(), unit.backward, nullptr, &job, 1);
}

template <class A>
void Branch<A>::add_weight_gradient(const UnitSpec<A>& unit, const Range& range, const GradientPair<A>* pairs,
                                    int64_t count) const {
  A* gradient = executor_.gradients_of(range) + unit.conv_at;
  if constexpr (std::is_same_v<A, float>) {
    if (spec_.narrow)
      return weight_gradient(plane_, unit.shape, pairs, count, gradient,
                             tile_scratch_ + range.worker * tile_scratch_stride_);
  }
  weight_gradient<A>(plane_, unit.shape, pairs, count, gradient);
}

template <class A>
void Branch<A>::value(Evaluation<A>& e, const Map<A>& in, const Map<A>* out, const Mix<A>& mix) const {
  const size_t units = spec_.units.size();
  e.inputs[0] = in;
  if (spec_.units[0].measured()) {
    each([&](const Range& range) {
      for (int64_t i = 0; i < range.count; ++i) measure(e, 0, range, i);
    });
    measure_batch(e, 0);
  }
  for (size_t j = 0; j + (out ? 0 : 1) < units; ++j) {
    const UnitSpec<A>& unit = spec_.units[j];
    const bool last = j + 1 == units;
    const Map<A>& to = last ? *out : e.inputs[j + 1];
    each([&](const Range& range) {
      for (int64_t i = 0; i < range.count; ++i) {
        const Combine<A> combine = last ? mix.at(range, i) : Combine<A>{};
        const View<A> target = to.at(range, i);
        if (unit.has_conv)
          convolve_input(e, j, range, i, target, combine);
        else
          activate_input(e, j, range, i, target, combine);
        if (!last && spec_.units[j + 1].measured()) measure(e, j + 1, range, i);
      }
    });
    if (!last) measure_batch(e, j + 1);
  }
}

template <class A>
void Branch<A>::sum_tangent(const Evaluation<A>& e, size_t j, const Range& range, int64_t i) const {
  const UnitSpec<A>& unit = spec_.units[j];
  if (!unit.measured()) return;
  tangent_sums(plane_, blocks_of<A>(unit.in_channels), rows_of(e, j, range, i), e.inputs[j].at(range, i),
               tangents_[j].at(range, i), sums_.at(range, i));
  settle(j, range, i, false, {mean_t_[j], mean_xt_[j]});
}

template <class A>
void Branch<A>::tangent(const Evaluation<A>& e, const Map<A>& t, const Map<A>& out, const Mix<A>& mix) {
  const size_t units = spec_.units.size();
  tangents_[0] = t;
  if (spec_.units[0].measured()) {
    each([&](const Range& range) {
      for (int64_t i = 0; i < range.count; ++i) sum_tangent(e, 0, range, i);
    });
    settle_batch(0, false, {mean_t_[0], mean_xt_[0]});
  }
  for (size_t j = 0; j < units; ++j) {
    const UnitSpec<A>& unit = spec_.units[j];
    const bool last = j + 1 == units;
    const Map<A>& to = last ? out : tangents_[j + 1];
    each([&](const Range& range) {
      for (int64_t i = 0; i < range.count; ++i) {
        const Combine<A> combine = last ? mix.at(range, i) : Combine<A>{};
        const View<A> target = to.at(range, i);
        if (unit.has_conv)
          convolve_tangent(e, j, range, i, target, combine);
        else
          activate_tangent(e, j, range, i, target, combine);
        if (!last) sum_tangent(e, j + 1, range, i);
      }
    });
    if (!last) settle_batch(j + 1, false, {mean_t_[j + 1], mean_xt_[j + 1]});
  }
}

template <class A>
inline void add_row(const A* from, int64_t count, A* to) {
  for (int64_t c = 0; c < count; ++c) to[c] += from[c];
}

template <class A>
void Branch<A>::cotangent(const Evaluation<A>& e, const Map<A>& cotangent, const Map<A>& out, const Mix<A>& mix,
                          bool parameters) const {
  const size_t units = spec_.units.size();
  for (size_t j = units; j-- > 0;) {
    const UnitSpec<A>& unit = spec_.units[j];
    const int64_t blocks = blocks_of<A>(unit.in_channels), out_blocks = blocks_of<A>(unit.out_channels);
    const bool last = j + 1 == units;
    const Map<A>& g = last ? cotangent : g_;
    each([&](const Range& range) {
      A* gradients = executor_.gradients_of(range);
      if (!last)
        for (int64_t i = 0; i < range.count; ++i)
          cotangent_last(plane_, out_blocks, rows_of(e, j + 1, range, i), e.inputs[j + 1].at(range, i), n_.at(range, i),
                         g_.at(range, i), Combine<A>{});
      if (parameters && unit.has_conv) {
        GradientPair<A> pairs[kGroup];
        for (int64_t i = 0; i < range.count; ++i) {
          pairs[i] = {active_.at(range, i), g.at(range, i)};
          activate_input(e, j, range, i, active_.at(range, i), {});
          if (unit.conv_bias_at >= 0)
            add_channel_sums(plane_, out_blocks, g.at(range, i), gradients + unit.conv_bias_at);
        }
        add_weight_gradient(unit, range, pairs, range.count);
      }
      for (int64_t i = 0; i < range.count; ++i) {
        const View<A> n = n_.at(range, i);
        A* sums = sums_.at(range, i);
        View<A> source = g.at(range, i);
        if (unit.has_conv) {
          convolve_back(unit, range, source, n);
          source = n;
        }
        cotangent_first(plane_, blocks, rows_of(e, j, range, i), unit.act, e.inputs[j].at(range, i), source, n, sums);
        if (parameters && unit.bias_at >= 0) add_row(sums, blocks * kLanes<A>, gradients + unit.bias_at);
        if (parameters && unit.weight_at >= 0)
          add_row(sums + blocks * kLanes<A>, blocks * kLanes<A>, gradients + unit.weight_at);
        settle(j, range, i, true, {mean_n_, mean_xn_});
      }
    });
    settle_batch(j, true, {mean_n_, mean_xn_});
  }
  each([&](const Range& range) {
    for (int64_t i = 0; i < range.count; ++i)
      cotangent_last(plane_, blocks_of<A>(spec_.units[0].in_channels), rows_of(e, 0, range, i),
                     e.inputs[0].at(range, i), n_.at(range, i), out.at(range, i), mix.at(range, i));
  });
}

template <class A>
void Branch<A>::second(const Evaluation<A>& e, const Map<A>& v, const Map<A>& q, const Map<A>& out, const Mix<A>& mix,
                       bool parameters) const {
  const size_t units = spec_.units.size();
  for (size_t j = units; j-- > 0;) {
    const UnitSpec<A>& unit = spec_.units[j];
    const int64_t blocks = blocks_of<A>(unit.in_channels), out_blocks = blocks_of<A>(unit.out_channels);
    const int64_t lanes = blocks * kLanes<A>;
    const bool last = j + 1 == units;
    const Map<A>&g = last ? v : g_, &tangent_g = last ? q : tangent_g_;
    each([&](const Range& range) {
      A* gradients = executor_.gradients_of(range);
      if (!last)
        for (int64_t i = 0; i < range.count; ++i) {
          const View<A> tangent_g = tangent_g_.at(range, i);
          second_last(plane_, out_blocks, rows_of(e, j + 1, range, i), e.inputs[j + 1].at(range, i),
                      tangents_[j + 1].at(range, i), n_.at(range, i), m_.at(range, i), g_.at(range, i), &tangent_g,
                      Combine<A>{});
        }
      if (parameters && unit.has_conv) {
        GradientPair<A> pairs[2 * kGroup];
        for (int64_t i = 0; i < range.count; ++i) {
          pairs[2 * i] = {active_.at(range, i), g.at(range, i)};
          pairs[2 * i + 1] = {tangent_active_.at(range, i), tangent_g.at(range, i)};
          activate_input(e, j, range, i, active_.at(range, i), {});
          activate_tangent(e, j, range, i, tangent_active_.at(range, i), {});
          if (unit.conv_bias_at >= 0)  // the tangent stream has no bias
            add_channel_sums(plane_, out_blocks, g.at(range, i), gradients + unit.conv_bias_at);
        }
        add_weight_gradient(unit, range, pairs, 2 * range.count);
      }
      for (int64_t i = 0; i < range.count; ++i) {
        const View<A> n = n_.at(range, i), m = m_.at(range, i);
        A* sums = sums_.at(range, i);
        if (unit.has_conv) {
          convolve_back(unit, range, g.at(range, i), n);
          convolve_back(unit, range, tangent_g.at(range, i), m);
        } else {
          combine_maps(plane_, blocks, n, Combine<A>{}.add(1, g.at(range, i)));
          combine_maps(plane_, blocks, m, Combine<A>{}.add(1, tangent_g.at(range, i)));
        }
        second_first(plane_, blocks, rows_of(e, j, range, i), unit.act, e.inputs[j].at(range, i),
                     tangents_[j].at(range, i), n, m, sums);
        // <m, P(t)> joins <n, x>: both are the weight's gradient and both pull the cotangent along x.
        add_row(sums + 4 * lanes, lanes, sums + lanes);
        if (parameters && unit.bias_at >= 0) add_row(sums, lanes, gradients + unit.bias_at);
        if (parameters && unit.weight_at >= 0) add_row(sums + lanes, lanes, gradients + unit.weight_at);
        settle(j, range, i, true, {mean_n_, mean_xn_, mean_c_, mean_xc_});
      }
    });
    settle_batch(j, true, {mean_n_, mean_xn_, mean_c_, mean_xc_});
  }
  each([&](const Range& range) {
    for (int64_t i = 0; i < range.count; ++i)
      second_last(plane_, blocks_of<A>(spec_.units[0].in_channels), rows_of(e, 0, range, i), e.inputs[0].at(range, i),
                  tangents_[0].at(range, i), n_.at(range, i), m_.at(range, i), out.at(range, i),
                  static_cast<const View<A>*>(nullptr), mix.at(range, i));
  });
}

}  // namespace fastode::resident
