// The definitions behind norm_act.h, instantiated once per storage type in norm_act_<type>.cpp.
#pragma once

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
  with_activation(op.kind, [&](auto kind) {
    workers.for_samples(g.samples, [&](int64_t w, int64_t n) {
      A* y = open_sample(out, n, length, s.sample(w, 0));
      accumulate(terms, n, length, A(0), y);
      if constexpr (kind != kIdentity) {
        sweep<A>(length, period_of<A>(g.channels), [&]<class V>(int64_t i, int64_t) {
          store<V>(y + i, activate<kind, V>(load<V>(y + i), op.arguments));
        });
      }
      write_sample(out, n, length, y);
    });
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

// A sample's own mean and squares about it, to be merged over the batch.
template <class A>
inline void channel_moments(const Geometry& g, const A* h, const Scratch<A>& s, int64_t worker, A* out) {
  A* mean = s.row(worker, kMean);
  sum_of(g, h, out);
  for (int64_t c = 0; c < g.channels; ++c) mean[c] = out[c] = out[c] / A(g.pixels);
  repeat(mean, g.channels);
  squares_about(g, h, mean, out + g.channels);
}

// Merges the samples' moments (equal counts) into the batch statistics, in double and in order.
template <class A>
inline void merge_moments(const Geometry& g, const Scratch<A>& s, A* stats) {
  const int64_t stride = kMaxSums * g.channels;
  for (int64_t c = 0; c < g.channels; ++c) {
    double mean = 0, squares = 0;
    for (int64_t n = 0; n < g.samples; ++n) mean += s.partial[n * stride + c];
    mean /= double(g.samples);
    for (int64_t n = 0; n < g.samples; ++n) {
      const double off = s.partial[n * stride + c] - mean;
      squares += s.partial[n * stride + g.channels + c] + off * off * double(g.pixels);
    }
    stats[c] = A(mean);
    stats[g.channels + c] = A(squares / (double(g.samples) * double(g.pixels)));
  }
}

template <class T>
void Kernels<T>::forward(const Geometry& g, const Terms<T>& terms, const Op& op, const Scratch<A>& s, bool given,
                         A* stats, T* u, T* a) {
  const Workers workers(g.samples);
  const int64_t length = g.length(), period = s.period;
  const bool combines = terms.count > 1;
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
  with_activation(op.kind, [&](auto kind) {
    workers.for_samples(g.samples, [&](int64_t w, int64_t n) {
      const A* h = batch_first && combines ? read_sample<T, A>(u, n, length, s.sample(w, 0)) : input(w, n);
      if (per_sample && !given) group_statistics(g, op, h, n, s, w, stats);
      if (per_sample) value_rows(g, op, stats, n, s, w);
      const int64_t rows = per_sample ? w : 0;
      const A *mean = s.row(rows, kMean), *scale = s.row(rows, kScale), *shift = s.row(rows, kShift);
      A* out = open_sample(a, n, length, s.sample(w, 1));
      if (op.norm == kNoNorm) {
        sweep<A>(length, period, [&]<class V>(int64_t i, int64_t) {
          store<V>(out + i, activate<kind, V>(load<V>(h + i), op.arguments));
        });
      } else {
        sweep<A>(length, period, [&]<class V>(int64_t i, int64_t j) {
          const V value = (load<V>(h + i) - load<V>(mean + j)) * load<V>(scale + j) + load<V>(shift + j);
          store<V>(out + i, activate<kind, V>(value, op.arguments));
        });
      }
      write_sample(a, n, length, out);
    });
  });
}

template <class T>
void Kernels<T>::vjp(const Geometry& g, const T* h_data, const T* cot_data, const A* stats, const Terms<T>& addends,
                     A scale_out, const Op& op, const Scratch<A>& s, T* out_data, A* wbar, A* bbar) {
  const bool coupled = op.couples();
  const int64_t length = g.length(), period = s.period, channels = g.channels;
  const bool normed = op.norm != kNoNorm;
  const auto h_of = [&](int64_t w, int64_t n) { return read_sample(h_data, n, length, s.sample(w, 0)); };
  const auto cot_of = [&](int64_t w, int64_t n) { return read_sample(cot_data, n, length, s.sample(w, 1)); };
  constexpr int kAlong = kRow6, kConstant = kRow7;

  with_activation(op.kind, [&](auto kind) {
    // sums: nbar, nbar (h - mean)
    const auto reduce_sample = [&](int64_t w, int64_t n, int64_t rows, A* sums) {
      const A *h = h_of(w, n), *cot = cot_of(w, n);
      const A *mean = s.row(rows, kMean), *scale = s.row(rows, kScale), *shift = s.row(rows, kShift);
      reduce<2, A>(
          length, channels,
          [&]<class V>(int64_t i, int64_t j, V* sum) {
            const V d = load<V>(h + i) - load<V>(mean + j);
            const V nbar =
                activate_first<kind, V>(d * load<V>(scale + j) + load<V>(shift + j), op.arguments) * load<V>(cot + i);
            sum[0] += nbar;
            sum[1] += nbar * d;
          },
          sums);
    };
    const auto finish = [&](int64_t w, int64_t, const A* sums, A* weight_bar, A* bias_bar) {
      A *along = s.row(w, kAlong), *constant = s.row(w, kConstant);
      const A *rstd = s.row(w, kRstd), *scale = s.row(w, kScale);
      if (op.couples()) {
        const A size = set_size(g, op);
        over_groups(g, op, [&](int64_t, int64_t begin, int64_t end) {
          A mean_v = 0, mean_xv = 0;  // of v = scale nbar: rstd is constant in a set
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
      const A *h = h_of(w, n), *cot = cot_of(w, n);
      A* out = open_sample(out_data, n, length, s.sample(w, 2));
      if (!normed) {
        sweep<A>(length, period, [&]<class V>(int64_t i, int64_t) {
          store<V>(out + i, activate_first<kind, V>(load<V>(h + i), op.arguments) * load<V>(cot + i));
        });
      } else {
        const A *mean = s.row(rows, kMean), *scale = s.row(rows, kScale), *shift = s.row(rows, kShift);
        const A *along = s.row(rows, kAlong), *constant = s.row(rows, kConstant);
        sweep<A>(length, period, [&]<class V>(int64_t i, int64_t j) {
          const V d = load<V>(h + i) - load<V>(mean + j), sc = load<V>(scale + j);
          const V nbar = activate_first<kind, V>(d * sc + load<V>(shift + j), op.arguments) * load<V>(cot + i);
          // Without coupling nothing of h itself may reach the gradient, or an infinite h would make it NaN.
          store<V>(out + i, coupled ? nbar * sc + d * load<V>(along + j) + load<V>(constant + j) : nbar * sc);
        });
      }
      if (addends.count > 0 || scale_out != 1) accumulate(addends, n, length, scale_out, out);
      write_sample(out_data, n, length, out);
    };
    drive<2>(g, op, stats, s, wbar, bbar, reduce_sample, finish, apply);
  });
}

// Rows of the tangent map ndot = (t - mean_t) * scale + (h - mean) * tangent_scale, from the tangent statistics.
template <class A>
inline void tangent_rows(const Geometry& g, const NormAct<A>& op, const A* tstats, int64_t set, const Scratch<A>& s,
                         int64_t worker) {
  A *mean_t = s.row(worker, kTangentMean), *slope = s.row(worker, kTangentScale);
  if (!op.couples()) {
    std::fill(mean_t, mean_t + s.period, A(0)), std::fill(slope, slope + s.period, A(0));
    return;
  }
  const Statistics<A> t(tstats, g, op, set);
  const A *rstd = s.row(worker, kRstd), *scale = s.row(worker, kScale);
  const int64_t per_group = g.channels / op.groups;
  for (int64_t c = 0; c < g.channels; ++c) {
    mean_t[c] = t.first[c / per_group];
    slope[c] = -scale[c] * rstd[c] * t.second[c / per_group];
  }
  repeat(mean_t, g.channels), repeat(slope, g.channels);
}

template <class T>
void Kernels<T>::dual(const Geometry& g, const T* h_data, const T* t_data, const Op& op, const Scratch<A>& s,
                      bool given, A* stats, A* tstats, T* stacked) {
  const bool coupled = op.couples();
  const int64_t length = g.length(), period = s.period, channels = g.channels;
  const auto h_of = [&](int64_t w, int64_t n) { return read_sample(h_data, n, length, s.sample(w, 0)); };
  const auto t_of = [&](int64_t w, int64_t n) { return read_sample(t_data, n, length, s.sample(w, 1)); };
  const Workers workers(g.samples);
  if (op.couples() && !given) {
    workers.for_samples(g.samples, [&](int64_t w, int64_t n) {
      if (op.norm == kGroupNorm)
        group_statistics(g, op, h_of(w, n), n, s, w, stats);
      else
        channel_moments(g, h_of(w, n), s, w, s.partial + n * kMaxSums * channels);
    });
    if (op.norm == kBatchNorm) merge_moments(g, s, stats);
  }
  // sums: t, t (h - mean)
  const auto reduce_sample = [&](int64_t w, int64_t n, int64_t rows, A* sums) {
    const A *h = h_of(w, n), *t = t_of(w, n), *mean = s.row(rows, kMean);
    reduce<2, A>(
        length, channels,
        [&]<class V>(int64_t i, int64_t j, V* sum) {
          const V tangent = load<V>(t + i);
          sum[0] += tangent;
          sum[1] += tangent * (load<V>(h + i) - load<V>(mean + j));
        },
        sums);
  };
  const auto finish = [&](int64_t w, int64_t set, const A* sums, A*, A*) {
    if (op.couples()) {
      const A size = set_size(g, op);
      const A* rstd = s.row(w, kRstd);
      A *mean_t = tstats + set * op.groups, *mean_xt = mean_t + (op.norm == kGroupNorm ? g.samples : 1) * op.groups;
      over_groups(g, op, [&](int64_t group, int64_t begin, int64_t end) {
        A sum_t = 0, sum_dt = 0;
        for (int64_t c = begin; c < end; ++c) sum_t += sums[c], sum_dt += sums[channels + c];
        mean_t[group] = sum_t / size;
        mean_xt[group] = rstd[begin] * sum_dt / size;
      });
    }
    tangent_rows(g, op, tstats, set, s, w);
  };
  with_activation(op.kind, [&](auto kind) {
    const auto apply = [&](int64_t w, int64_t n, int64_t rows) {
      const A *h = h_of(w, n), *t = t_of(w, n);
      A *a = open_sample(stacked, n, length, s.sample(w, 2)),
        *adot = open_sample(stacked, g.samples + n, length, s.sample(w, 3));
      if (op.norm == kNoNorm) {
        sweep<A>(length, period, [&]<class V>(int64_t i, int64_t) {
          const V value = load<V>(h + i);
          store<V>(a + i, activate<kind, V>(value, op.arguments));
          store<V>(adot + i, activate_first<kind, V>(value, op.arguments) * load<V>(t + i));
        });
      } else {
        const A *mean = s.row(rows, kMean), *scale = s.row(rows, kScale), *shift = s.row(rows, kShift);
        const A *mean_t = s.row(rows, kTangentMean), *slope = s.row(rows, kTangentScale);
        sweep<A>(length, period, [&]<class V>(int64_t i, int64_t j) {
          const V d = load<V>(h + i) - load<V>(mean + j), sc = load<V>(scale + j);
          const V value = d * sc + load<V>(shift + j);
          const V tangent = load<V>(t + i);
          const V ndot = coupled ? (tangent - load<V>(mean_t + j)) * sc + d * load<V>(slope + j) : tangent * sc;
          store<V>(a + i, activate<kind, V>(value, op.arguments));
          store<V>(adot + i, activate_first<kind, V>(value, op.arguments) * ndot);
        });
      }
      write_sample(stacked, n, length, a);
      write_sample(stacked, g.samples + n, length, adot);
    };
    drive<2>(g, op, stats, s, static_cast<A*>(nullptr), static_cast<A*>(nullptr), reduce_sample, finish, apply);
  });
}

template <class T>
void Kernels<T>::second(const Geometry& g, const T* h_data, const T* t_data, const T* cot_data, const A* stats,
                        const A* tstats, const Terms<T>& addends, A scale_out, bool tangent, const Op& op,
                        const Scratch<A>& s, T* out_data, A* wbar, A* bbar) {
  const bool coupled = op.couples();
  const int64_t length = g.length(), period = s.period, channels = g.channels;
  const auto h_of = [&](int64_t w, int64_t n) { return read_sample(h_data, n, length, s.sample(w, 0)); };
  const auto t_of = [&](int64_t w, int64_t n) { return read_sample(t_data, n, length, s.sample(w, 1)); };
  const auto value_cot = [&](int64_t w, int64_t n) { return read_sample(cot_data, n, length, s.sample(w, 2)); };
  const auto tangent_cot = [&](int64_t w, int64_t n) {
    return read_sample(cot_data, g.samples + n, length, s.sample(w, 3));
  };
  // hbar = scale nbar + hd (h - mean) + h1 + hn nbardot + ht (t - mean_t);  tbar = scale nbardot + td (h - mean) + t1
  constexpr int kHd = kRow6, kH1 = kRow7, kHn = kRow8, kHt = kRow9, kT1 = kRow10;

  with_activation(op.kind, [&](auto kind) {
    // nbar and nbardot of one place: value n, tangent ndot, cotangents alpha (of a) and beta (of adot)
    const auto cotangents = [&]<class V>(V n, V ndot, V alpha, V beta, V& nbar, V& nbardot) {
      const V slope = activate_first<kind, V>(n, op.arguments);
      nbar = slope * alpha;
      nbardot = slope * beta;
      if constexpr (kHasSecond<kind>) nbar += activate_second<kind, V>(n, op.arguments) * ndot * beta;
    };
    const auto reduce_sample = [&](int64_t w, int64_t n, int64_t rows, A* sums) {
      if (rows == w && op.norm == kGroupNorm) tangent_rows(g, op, tstats, n, s, w);
      const A *h = h_of(w, n), *t = t_of(w, n), *alpha = value_cot(w, n), *beta = tangent_cot(w, n);
      const A *mean = s.row(rows, kMean), *scale = s.row(rows, kScale), *shift = s.row(rows, kShift);
      const A *mean_t = s.row(rows, kTangentMean), *slope = s.row(rows, kTangentScale);
      reduce<5, A>(
          length, channels,
          [&]<class V>(int64_t i, int64_t j, V* sum) {
            const V d = load<V>(h + i) - load<V>(mean + j), sc = load<V>(scale + j);
            const V centred = load<V>(t + i) - load<V>(mean_t + j);
            V nbar, nbardot;
            cotangents.template operator()<V>(d * sc + load<V>(shift + j),
                                              coupled ? centred * sc + d * load<V>(slope + j) : centred * sc,
                                              load<V>(alpha + i), load<V>(beta + i), nbar, nbardot);
            sum[0] += nbar;
            sum[1] += nbar * d;
            sum[2] += nbardot;
            sum[3] += nbardot * d;
            sum[4] += nbardot * centred;
          },
          sums);
    };
    const auto finish = [&](int64_t w, int64_t set, const A* sums, A* weight_bar, A* bias_bar) {
      const A *rstd = s.row(w, kRstd), *scale = s.row(w, kScale);
      if (!op.couples()) {
        if (!sums)
          for (int row : {kHd, kH1, kHn, kHt, kT1}) std::fill(s.row(w, row), s.row(w, row) + period, A(0));
        if (weight_bar && sums)
          for (int64_t c = 0; c < channels; ++c) {
            weight_bar[c] = rstd[c] * (sums[channels + c] + sums[4 * channels + c]);
            bias_bar[c] = sums[c];
          }
        return;
      }
      const A size = set_size(g, op);
      const Statistics<A> tangent_stats(tstats, g, op, set);
      A *hd = s.row(w, kHd), *h1 = s.row(w, kH1), *hn = s.row(w, kHn), *ht = s.row(w, kHt), *t1 = s.row(w, kT1);
      over_groups(g, op, [&](int64_t group, int64_t begin, int64_t end) {
        // Means over the set of v = w nbar and c = w nbardot, times rstd (scale = rstd w).
        A v = 0, dv = 0, c_ = 0, dc = 0, tc = 0;
        for (int64_t c = begin; c < end; ++c) {
          v += scale[c] * sums[c];
          dv += scale[c] * sums[channels + c];
          c_ += scale[c] * sums[2 * channels + c];
          dc += scale[c] * sums[3 * channels + c];
          tc += scale[c] * sums[4 * channels + c];
        }
        v /= size, dv /= size, c_ /= size, dc /= size, tc /= size;
        const A r = rstd[begin], mean_xt = tangent_stats.second[group];
        const A phi = tc - mean_xt * r * dc;  // <c, P(t)> / size
        for (int64_t c = begin; c < end; ++c) {
          hd[c] = r * r * (-dv - phi + A(2) * r * mean_xt * dc);
          h1[c] = -v + r * mean_xt * c_;
          hn[c] = -r * mean_xt * scale[c];
          ht[c] = -r * r * dc;
          t1[c] = -c_;
          if (weight_bar) {
            weight_bar[c] = r * (sums[channels + c] + sums[4 * channels + c] - mean_xt * r * sums[3 * channels + c]);
            bias_bar[c] = sums[c];
          }
        }
      });
      for (A* row : {hd, h1, hn, ht, t1}) repeat(row, channels);
    };
    const auto apply = [&](int64_t w, int64_t n, int64_t rows) {
      const A *h = h_of(w, n), *t = t_of(w, n), *alpha = value_cot(w, n), *beta = tangent_cot(w, n);
      A* hbar = open_sample(out_data, n, length, s.sample(w, 4));
      A* tbar = tangent ? open_sample(out_data, g.samples + n, length, s.sample(w, 5)) : nullptr;
      if (op.norm == kNoNorm) {
        sweep<A>(length, period, [&]<class V>(int64_t i, int64_t) {
          V nbar, nbardot;
          cotangents.template operator()<V>(load<V>(h + i), load<V>(t + i), load<V>(alpha + i), load<V>(beta + i), nbar,
                                            nbardot);
          store<V>(hbar + i, nbar);
          if (tbar) store<V>(tbar + i, nbardot);
        });
      } else {
        const A *mean = s.row(rows, kMean), *scale = s.row(rows, kScale), *shift = s.row(rows, kShift);
        const A *mean_t = s.row(rows, kTangentMean), *slope = s.row(rows, kTangentScale);
        const A *hd = s.row(rows, kHd), *h1 = s.row(rows, kH1), *hn = s.row(rows, kHn), *ht = s.row(rows, kHt),
                *t1 = s.row(rows, kT1);
        sweep<A>(length, period, [&]<class V>(int64_t i, int64_t j) {
          const V d = load<V>(h + i) - load<V>(mean + j), sc = load<V>(scale + j);
          const V centred = load<V>(t + i) - load<V>(mean_t + j);
          V nbar, nbardot;
          cotangents.template operator()<V>(d * sc + load<V>(shift + j),
                                            coupled ? centred * sc + d * load<V>(slope + j) : centred * sc,
                                            load<V>(alpha + i), load<V>(beta + i), nbar, nbardot);
          if (!coupled) {
            store<V>(hbar + i, nbar * sc);
            if (tbar) store<V>(tbar + i, nbardot * sc);
            return;
          }
          const V along = load<V>(ht + j);
          store<V>(hbar + i,
                   nbar * sc + d * load<V>(hd + j) + load<V>(h1 + j) + nbardot * load<V>(hn + j) + centred * along);
          if (tbar) store<V>(tbar + i, nbardot * sc + d * along + load<V>(t1 + j));
        });
      }
      if (addends.count > 0 || scale_out != 1) accumulate(addends, n, length, scale_out, hbar);
      write_sample(out_data, n, length, hbar);
      if (tbar) write_sample(out_data, g.samples + n, length, tbar);
    };
    if (op.norm == kBatchNorm || op.norm == kFixedNorm) {
      value_rows(g, op, stats, 0, s, 0);
      tangent_rows(g, op, tstats, 0, s, 0);
    }
    drive<5>(g, op, stats, s, wbar, bbar, reduce_sample, finish, apply);
  });
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
