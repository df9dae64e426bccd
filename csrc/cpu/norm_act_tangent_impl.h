// The definitions behind norm_act.h, continued: the tangent beside the value, and the cotangents of both.
#pragma once

#include "norm_act_impl.h"

namespace fastode {

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
  const int64_t length = g.length(), channels = g.channels;
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
  const auto apply = [&](int64_t w, int64_t n, int64_t rows) {
    A *a = open_sample(stacked, n, length, s.sample(w, 2)),
      *adot = open_sample(stacked, g.samples + n, length, s.sample(w, 3));
    Sweeps<A>::dual(g, op, s, rows, h_of(w, n), t_of(w, n), a, adot);
    write_sample(stacked, n, length, a);
    write_sample(stacked, g.samples + n, length, adot);
  };
  drive<2>(g, op, stats, s, static_cast<A*>(nullptr), static_cast<A*>(nullptr), reduce_sample, finish, apply);
}

template <class T>
void Kernels<T>::second(const Geometry& g, const T* h_data, const T* t_data, const T* cot_data, const A* stats,
                        const A* tstats, const Terms<T>& addends, A scale_out, bool tangent, const Op& op,
                        const Scratch<A>& s, T* out_data, A* wbar, A* bbar) {
  const int64_t length = g.length(), period = s.period, channels = g.channels;
  const auto h_of = [&](int64_t w, int64_t n) { return read_sample(h_data, n, length, s.sample(w, 0)); };
  const auto t_of = [&](int64_t w, int64_t n) { return read_sample(t_data, n, length, s.sample(w, 1)); };
  const auto value_cot = [&](int64_t w, int64_t n) { return read_sample(cot_data, n, length, s.sample(w, 2)); };
  const auto tangent_cot = [&](int64_t w, int64_t n) {
    return read_sample(cot_data, g.samples + n, length, s.sample(w, 3));
  };
  const auto reduce_sample = [&](int64_t w, int64_t n, int64_t rows, A* sums) {
    if (rows == w && op.norm == kGroupNorm) tangent_rows(g, op, tstats, n, s, w);
    Sweeps<A>::second_sums(g, op, s, rows, h_of(w, n), t_of(w, n), value_cot(w, n), tangent_cot(w, n), sums);
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
      // rstd times the means over the set of v = weight n and c = weight m, and of their products with x and t.
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
    A* hbar = open_sample(out_data, n, length, s.sample(w, 4));
    A* tbar = tangent ? open_sample(out_data, g.samples + n, length, s.sample(w, 5)) : nullptr;
    Sweeps<A>::second(g, op, s, rows, h_of(w, n), t_of(w, n), value_cot(w, n), tangent_cot(w, n), hbar, tbar);
    if (addends.count > 0 || scale_out != 1) accumulate(addends, n, length, scale_out, hbar);
    write_sample(out_data, n, length, hbar);
    if (tbar) write_sample(out_data, g.samples + n, length, tbar);
  };
  if (op.norm == kBatchNorm || op.norm == kFixedNorm) {
    value_rows(g, op, stats, 0, s, 0);
    tangent_rows(g, op, tstats, 0, s, 0);
  }
  drive<5>(g, op, stats, s, wbar, bbar, reduce_sample, finish, apply);
}

}  // namespace fastode
