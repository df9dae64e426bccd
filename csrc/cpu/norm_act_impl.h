// The operators of norm_act.h, instantiated for every storage type in norm_act.cpp: values and cotangents. Tangents and
// second order are in norm_act_tangent_impl.h, the sweeps in norm_act_sweeps_impl.h.
#pragma once

#include <cmath>

#include "norm_act.h"

namespace fastode {

// The statistics of normalised set `set`: the sample's groups, or (set 0) the batch's channels.
template <class A>
struct Statistics {
  const A *first, *second;  // mean and variance, or mean(t) and mean(xhat t)

  Statistics(const A* data, const Geometry& g, const NormAct<A>& op, int64_t set)
      : first(data + set * op.groups),
        second(data + (op.norm == kGroupNorm ? g.samples : 1) * op.groups + set * op.groups) {}
};

// How many entries one normalised set has.
template <class A>
inline A set_size(const Geometry& g, const NormAct<A>& op) {
  return A(op.norm == kGroupNorm ? g.pixels * (g.channels / op.groups) : g.samples * g.pixels);
}

// Per-channel rows of the value map n = (h - mean) * scale + shift.
template <class A>
inline void value_rows(const Geometry& g, const NormAct<A>& op, const A* stats, int64_t set, const Scratch<A>& s,
                       int64_t worker) {
  if (op.norm == kNoNorm) return;
  const Statistics<A> x(stats, g, op, set);
  const int64_t per_group = g.channels / op.groups;
  A *mean = s.row(worker, kMean), *rstd = s.row(worker, kRstd), *scale = s.row(worker, kScale),
    *shift = s.row(worker, kShift);
  for (int64_t c = 0; c < g.channels; ++c) {
    mean[c] = x.first[c / per_group];
    rstd[c] = A(1) / std::sqrt(x.second[c / per_group] + op.eps);
    scale[c] = rstd[c] * (op.weight ? op.weight[c] : A(1));
    shift[c] = op.bias ? op.bias[c] : A(0);
  }
  for (A* row : {mean, rstd, scale, shift}) repeat(row, g.channels);
}

// Sums a per-channel quantity over each group: total[group] -> broadcast back by the callers.
template <class A, class F>
inline void over_groups(const Geometry& g, const NormAct<A>& op, const F& f) {
  const int64_t per_group = g.channels / op.groups;
  for (int64_t group = 0; group < op.groups; ++group) f(group, group * per_group, (group + 1) * per_group);
}

// sum[c] += over samples, in order and in double, of partial[n * stride + c].
template <class A>
inline void total(const A* partial, int64_t samples, int64_t stride, int64_t count, A* sum) {
  for (int64_t c = 0; c < count; ++c) {
    double value = 0;
    for (int64_t n = 0; n < samples; ++n) value += partial[n * stride + c];
    sum[c] = A(value);
  }
}

// Runs reduce(worker, n, sums), finish(worker, sums, wbar, bbar) and apply(worker, n, rows_of) as the norm asks for.
template <int count, class A, class Reduce, class Finish, class Apply>
void drive(const Geometry& g, const NormAct<A>& op, const A* stats, const Scratch<A>& s, A* wbar, A* bbar,
           const Reduce& reduce_sample, const Finish& finish, const Apply& apply) {
  const Workers workers(g.samples);
  const int64_t stride = kMaxSums * g.channels;
  const bool sums_needed = op.couples() || wbar != nullptr;
  if (op.norm == kGroupNorm) {
    workers.for_samples(g.samples, [&](int64_t w, int64_t n) {
      value_rows(g, op, stats, n, s, w);
      reduce_sample(w, n, w, s.sums(w));
      A* mine = s.partial + n * stride;
      finish(w, n, s.sums(w), wbar ? mine : nullptr, wbar ? mine + g.channels : nullptr);
      apply(w, n, w);
    });
    if (wbar) {
      total(s.partial, g.samples, stride, g.channels, wbar);
      total(s.partial + g.channels, g.samples, stride, g.channels, bbar);
    }
    return;
  }
  value_rows(g, op, stats, 0, s, 0);
  if (!op.couples()) {
    finish(0, 0, nullptr, nullptr, nullptr);
    workers.for_samples(g.samples, [&](int64_t w, int64_t n) {
      if (sums_needed) reduce_sample(w, n, 0, s.partial + n * stride);
      apply(w, n, 0);
    });
    if (sums_needed) {
      total(s.partial, g.samples, stride, count * g.channels, s.sums(0));
      finish(0, 0, s.sums(0), wbar, bbar);
    }
    return;
  }
  workers.for_samples(g.samples, [&](int64_t w, int64_t n) { reduce_sample(w, n, 0, s.partial + n * stride); });
  total(s.partial, g.samples, stride, count * g.channels, s.sums(0));
  finish(0, 0, s.sums(0), wbar, bbar);
  workers.for_samples(g.samples, [&](int64_t w, int64_t n) { apply(w, n, 0); });
}

template <class T>
void Kernels<T>::combine(const Geometry& g, const Terms<T>& terms, const Op& op, const Scratch<A>& s, T* out) {
  const Workers workers(g.samples);
  const int64_t length = g.length();
  workers.for_samples(g.samples, [&](int64_t w, int64_t n) {
    A* y = open_sample(out, n, length, s.sample(w, 0));
    accumulate(terms, n, length, A(0), y);
    if (op.kind != kIdentity) Sweeps<A>::value(g, op, s, w, y, y);
    write_sample(out, n, length, y);
  });
}

// The moments of sample n: per-channel sum, then per-channel sum of squares about `mean` (a full row).
template <class A>
inline void sum_of(const Geometry& g, const A* h, A* out) {
  reduce<1, A>(g.length(), g.channels, [&]<class V>(int64_t i, int64_t, V* sums) { sums[0] += load<V>(h + i); }, out);
}
template <class A>
inline void squares_about(const Geometry& g, const A* h, const A* mean, A* out) {
  reduce<1, A>(
      g.length(), g.channels,
      [&]<class V>(int64_t i, int64_t j, V* sums) {
        const V d = load<V>(h + i) - load<V>(mean + j);
        sums[0] += d * d;
      },
      out);
}

// GroupNorm statistics of one sample.
template <class A>
inline void group_statistics(const Geometry& g, const NormAct<A>& op, const A* h, int64_t n, const Scratch<A>& s,
                             int64_t worker, A* stats) {
  A *sums = s.sums(worker), *mean = s.row(worker, kMean);
  const A size = set_size(g, op);
  A *means = stats + n * op.groups, *variances = means + g.samples * op.groups;
  sum_of(g, h, sums);
  over_groups(g, op, [&](int64_t group, int64_t begin, int64_t end) {
    A sum = 0;
    for (int64_t c = begin; c < end; ++c) sum += sums[c];
    means[group] = sum / size;
    std::fill(mean + begin, mean + end, means[group]);
  });
  repeat(mean, g.channels);
  squares_about(g, h, mean, sums);
  over_groups(g, op, [&](int64_t group, int64_t begin, int64_t end) {
    A sum = 0;
    for (int64_t c = begin; c < end; ++c) sum += sums[c];
    variances[group] = sum / size;
  });
}

// A sample's own mean, squares about it and deviations from it, to be merged over the batch.
template <class A>
inline void channel_moments(const Geometry& g, const A* h, const Scratch<A>& s, int64_t worker, A* out) {
  A* mean = s.row(worker, kMean);
  sum_of(g, h, out);
  for (int64_t c = 0; c < g.channels; ++c) mean[c] = out[c] = out[c] / A(g.pixels);
  repeat(mean, g.channels);
  reduce<2, A>(
      g.length(), g.channels,
      [&]<class V>(int64_t i, int64_t j, V* sums) {
        const V d = load<V>(h + i) - load<V>(mean + j);
        sums[0] += d * d;
        sums[1] += d;
      },
      out + g.channels);
}

// Merges the samples' moments (equal counts) into the batch statistics, in double and in order. The deviations take out
// of the mean what its sum has rounded: with a spread far below the mean, that is what the gradients' rounding comes
// of.
template <class A>
inline void merge_moments(const Geometry& g, const Scratch<A>& s, A* stats) {
  const int64_t stride = kMaxSums * g.channels;
  const double pixels = double(g.pixels), size = double(g.samples) * pixels;
  for (int64_t c = 0; c < g.channels; ++c) {
    const A *means = s.partial + c, *squares = means + g.channels, *deviations = squares + g.channels;
    double near = 0, off = 0, sum = 0;
    for (int64_t n = 0; n < g.samples; ++n) near += means[n * stride];
    near /= double(g.samples);
    for (int64_t n = 0; n < g.samples; ++n) off += (means[n * stride] - near) * pixels + deviations[n * stride];
    const double mean = std::isfinite(near) ? near + off / size : near;
    for (int64_t n = 0; n < g.samples; ++n) {
      const double beside = means[n * stride] - mean;
      sum += squares[n * stride] + beside * (beside * pixels + 2 * deviations[n * stride]);
    }
    stats[c] = A(mean);
    stats[g.channels + c] = A(sum / size);
  }
}

template <class T>
void Kernels<T>::forward(const Geometry& g, const Terms<T>& terms, const Op& op, const Scratch<A>& s, bool given,
                         A* stats, T* u, T* a) {
  const Workers workers(g.samples);
  const int64_t length = g.length();
  const bool combines = u != nullptr;
  const auto input = [&](int64_t w, int64_t n) -> const A* {
    if (!combines) return read_sample(terms.data[0], n, length, s.sample(w, 0));
    A* sum = open_sample(u, n, length, s.sample(w, 0));
    accumulate(terms, n, length, A(0), sum);
    write_sample(u, n, length, sum);
    return read_sample<T, A>(u, n, length, sum);  // as stored: statistics and backward must be of the same numbers
  };
  const bool batch_first = op.norm == kBatchNorm && !given;
  if (batch_first) {
    workers.for_samples(g.samples, [&](int64_t w, int64_t n) {
      channel_moments(g, input(w, n), s, w, s.partial + n * kMaxSums * g.channels);
    });
    merge_moments(g, s, stats);
  }
  const bool per_sample = op.norm == kGroupNorm;
  if (!per_sample) value_rows(g, op, stats, 0, s, 0);
  workers.for_samples(g.samples, [&](int64_t w, int64_t n) {
    const A* h = batch_first && combines ? read_sample<T, A>(u, n, length, s.sample(w, 0)) : input(w, n);
    if (per_sample && !given) group_statistics(g, op, h, n, s, w, stats);
    if (per_sample) value_rows(g, op, stats, n, s, w);
    A* out = open_sample(a, n, length, s.sample(w, 1));
    Sweeps<A>::value(g, op, s, per_sample ? w : 0, h, out);
    write_sample(a, n, length, out);
  });
}

template <class T>
void Kernels<T>::vjp(const Geometry& g, const T* h_data, const T* cot_data, const A* stats, const Terms<T>& addends,
                     A scale_out, const Op& op, const Scratch<A>& s, T* out_data, A* wbar, A* bbar) {
  const int64_t length = g.length(), period = s.period, channels = g.channels;
  const auto h_of = [&](int64_t w, int64_t n) { return read_sample(h_data, n, length, s.sample(w, 0)); };
  const auto cot_of = [&](int64_t w, int64_t n) { return read_sample(cot_data, n, length, s.sample(w, 1)); };
  const auto reduce_sample = [&](int64_t w, int64_t n, int64_t rows, A* sums) {
    Sweeps<A>::cotangent_sums(g, op, s, rows, h_of(w, n), cot_of(w, n), sums);
  };
  const auto finish = [&](int64_t w, int64_t, const A* sums, A* weight_bar, A* bias_bar) {
    A *along = s.row(w, kAlong), *constant = s.row(w, kConstant);
    const A *rstd = s.row(w, kRstd), *scale = s.row(w, kScale);
    if (op.couples()) {
      const A size = set_size(g, op);
      over_groups(g, op, [&](int64_t, int64_t begin, int64_t end) {
        A mean_v = 0, mean_xv = 0;  // of v = scale n: rstd is constant in a set
        for (int64_t c = begin; c < end; ++c) mean_v += scale[c] * sums[c], mean_xv += scale[c] * sums[channels + c];
        for (int64_t c = begin; c < end; ++c) {
          along[c] = -rstd[c] * rstd[c] * (mean_xv / size);
          constant[c] = -(mean_v / size);
        }
      });
      repeat(along, channels), repeat(constant, channels);
    } else if (!sums) {
      std::fill(along, along + period, A(0)), std::fill(constant, constant + period, A(0));
    }
    if (weight_bar && sums)
      for (int64_t c = 0; c < channels; ++c) weight_bar[c] = rstd[c] * sums[channels + c], bias_bar[c] = sums[c];
  };
  const auto apply = [&](int64_t w, int64_t n, int64_t rows) {
    A* out = open_sample(out_data, n, length, s.sample(w, 2));
    Sweeps<A>::cotangent(g, op, s, rows, h_of(w, n), cot_of(w, n), out);
    if (addends.count > 0 || scale_out != 1) accumulate(addends, n, length, scale_out, out);
    write_sample(out_data, n, length, out);
  };
  drive<2>(g, op, stats, s, wbar, bbar, reduce_sample, finish, apply);
}

template <class T>
void Kernels<T>::dots(const Geometry& g, const T* v_data, const Terms<T>& terms, const Scratch<A>& s, A* out) {
  const int64_t length = g.length(), stride = kMaxSums * g.channels;
  for (int k = 0; k < terms.count; ++k) {
    const Workers workers(g.samples);
    workers.for_samples(g.samples, [&](int64_t w, int64_t n) {
      const A* v = read_sample(v_data, n, length, s.sample(w, 0));
      const A* t = read_sample(terms.data[k], n, length, s.sample(w, 1));
      reduce<1, A>(
          length, g.channels, [&]<class V>(int64_t i, int64_t, V* sum) { sum[0] += load<V>(v + i) * load<V>(t + i); },
          s.partial + n * stride);
    });
    double sum = 0;
    for (int64_t n = 0; n < g.samples; ++n)
      for (int64_t c = 0; c < g.channels; ++c) sum += s.partial[n * stride + c];
    out[k] = A(sum);
  }
}

}  // namespace fastode
