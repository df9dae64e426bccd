// The sweeps of norm_act.h, instantiated once per accumulator in norm_act_sweeps_<type>.cpp.
#pragma once

#include "norm_act.h"

namespace fastode {

template <class A>
void Sweeps<A>::value(const Geometry& g, const Op& op, const Scratch<A>& s, int64_t rows, const A* h, A* a) {
  with_activation(op.kind, [&](auto kind) {
    if (op.norm == kNoNorm)
      return sweep<A>(g.length(), s.period, [&]<class V>(int64_t i, int64_t) {
        store<V>(a + i, activate(kind, load<V>(h + i), op.arguments));
      });
    const A *mean = s.row(rows, kMean), *scale = s.row(rows, kScale), *shift = s.row(rows, kShift);
    sweep<A>(g.length(), s.period, [&]<class V>(int64_t i, int64_t j) {
      const V value = (load<V>(h + i) - load<V>(mean + j)) * load<V>(scale + j) + load<V>(shift + j);
      store<V>(a + i, activate(kind, value, op.arguments));
    });
  });
}

template <class A>
void Sweeps<A>::cotangent_sums(const Geometry& g, const Op& op, const Scratch<A>& s, int64_t rows, const A* h,
                               const A* cot, A* sums) {
  const A *mean = s.row(rows, kMean), *scale = s.row(rows, kScale), *shift = s.row(rows, kShift);
  with_activation(op.kind, [&](auto kind) {
    reduce<2, A>(
        g.length(), g.channels,
        [&]<class V>(int64_t i, int64_t j, V* sum) {
          const V d = load<V>(h + i) - load<V>(mean + j);
          const V n =
              activate_first(kind, d * load<V>(scale + j) + load<V>(shift + j), op.arguments) * load<V>(cot + i);
          sum[0] += n;
          sum[1] += n * d;
        },
        sums);
  });
}

template <class A>
void Sweeps<A>::cotangent(const Geometry& g, const Op& op, const Scratch<A>& s, int64_t rows, const A* h, const A* cot,
                          A* out) {
  const bool coupled = op.couples();
  with_activation(op.kind, [&](auto kind) {
    if (op.norm == kNoNorm)
      return sweep<A>(g.length(), s.period, [&]<class V>(int64_t i, int64_t) {
        store<V>(out + i, activate_first(kind, load<V>(h + i), op.arguments) * load<V>(cot + i));
      });
    const A *mean = s.row(rows, kMean), *scale = s.row(rows, kScale), *shift = s.row(rows, kShift);
    const A *along = s.row(rows, kAlong), *constant = s.row(rows, kConstant);
    sweep<A>(g.length(), s.period, [&]<class V>(int64_t i, int64_t j) {
      const V d = load<V>(h + i) - load<V>(mean + j), sc = load<V>(scale + j);
      const V n = activate_first(kind, d * sc + load<V>(shift + j), op.arguments) * load<V>(cot + i);
      // Without coupling nothing of h itself may reach the gradient, or an infinite h would make it NaN.
      store<V>(out + i, coupled ? n * sc + d * load<V>(along + j) + load<V>(constant + j) : n * sc);
    });
  });
}

template <class A>
void Sweeps<A>::dual(const Geometry& g, const Op& op, const Scratch<A>& s, int64_t rows, const A* h, const A* t, A* a,
                     A* adot) {
  const bool coupled = op.couples();
  with_activation(op.kind, [&](auto kind) {
    if (op.norm == kNoNorm)
      return sweep<A>(g.length(), s.period, [&]<class V>(int64_t i, int64_t) {
        const V value = load<V>(h + i);
        V slope;
        store<V>(a + i, activate_with_first(kind, value, op.arguments, slope));
        store<V>(adot + i, slope * load<V>(t + i));
      });
    const A *mean = s.row(rows, kMean), *scale = s.row(rows, kScale), *shift = s.row(rows, kShift);
    const A *mean_t = s.row(rows, kTangentMean), *slope = s.row(rows, kTangentScale);
    sweep<A>(g.length(), s.period, [&]<class V>(int64_t i, int64_t j) {
      const V d = load<V>(h + i) - load<V>(mean + j), sc = load<V>(scale + j);
      const V value = d * sc + load<V>(shift + j);
      const V tangent = load<V>(t + i);
      const V ndot = coupled ? (tangent - load<V>(mean_t + j)) * sc + d * load<V>(slope + j) : tangent * sc;
      V slope;
      store<V>(a + i, activate_with_first(kind, value, op.arguments, slope));
      store<V>(adot + i, slope * ndot);
    });
  });
}

// n and m of one place: of the value and of its tangent, for the cotangents of the activation's results.
template <class V, class Kind>
inline void second_cotangents(Kind kind, V value, V tangent, V alpha, V beta,
                              const ActivationArguments<ScalarOf<V>>& arguments, V& n, V& m) {
  V bend;
  const V slope = activate_first_with_second(kind, value, arguments, bend);
  n = slope * alpha;
  m = slope * beta;
  if constexpr (kHasSecond<Kind>) n += bend * tangent * beta;
}

template <class A>
void Sweeps<A>::second_sums(const Geometry& g, const Op& op, const Scratch<A>& s, int64_t rows, const A* h, const A* t,
                            const A* alpha, const A* beta, A* sums) {
  const bool coupled = op.couples();
  const A *mean = s.row(rows, kMean), *scale = s.row(rows, kScale), *shift = s.row(rows, kShift);
  const A *mean_t = s.row(rows, kTangentMean), *slope = s.row(rows, kTangentScale);
  with_activation(op.kind, [&](auto kind) {
    reduce<5, A>(
        g.length(), g.channels,
        [&]<class V>(int64_t i, int64_t j, V* sum) {
          const V d = load<V>(h + i) - load<V>(mean + j), sc = load<V>(scale + j);
          const V centred = load<V>(t + i) - load<V>(mean_t + j);
          V n, m;
          second_cotangents<V>(kind, d * sc + load<V>(shift + j),
                               coupled ? centred * sc + d * load<V>(slope + j) : centred * sc, load<V>(alpha + i),
                               load<V>(beta + i), op.arguments, n, m);
          sum[0] += n;
          sum[1] += n * d;
          sum[2] += m;
          sum[3] += m * d;
          sum[4] += m * centred;
        },
        sums);
  });
}

template <class A>
void Sweeps<A>::second(const Geometry& g, const Op& op, const Scratch<A>& s, int64_t rows, const A* h, const A* t,
                       const A* alpha, const A* beta, A* hbar, A* tbar) {
  const bool coupled = op.couples();
  with_activation(op.kind, [&](auto kind) {
    if (op.norm == kNoNorm)
      return sweep<A>(g.length(), s.period, [&]<class V>(int64_t i, int64_t) {
        V n, m;
        second_cotangents<V>(kind, load<V>(h + i), load<V>(t + i), load<V>(alpha + i), load<V>(beta + i), op.arguments,
                             n, m);
        store<V>(hbar + i, n);
        if (tbar) store<V>(tbar + i, m);
      });
    const A *mean = s.row(rows, kMean), *scale = s.row(rows, kScale), *shift = s.row(rows, kShift);
    const A *mean_t = s.row(rows, kTangentMean), *slope = s.row(rows, kTangentScale);
    const A *hd = s.row(rows, kHd), *h1 = s.row(rows, kH1), *hn = s.row(rows, kHn), *ht = s.row(rows, kHt),
            *t1 = s.row(rows, kT1);
    sweep<A>(g.length(), s.period, [&]<class V>(int64_t i, int64_t j) {
      const V d = load<V>(h + i) - load<V>(mean + j), sc = load<V>(scale + j);
      const V centred = load<V>(t + i) - load<V>(mean_t + j);
      V n, m;
      second_cotangents<V>(kind, d * sc + load<V>(shift + j),
                           coupled ? centred * sc + d * load<V>(slope + j) : centred * sc, load<V>(alpha + i),
                           load<V>(beta + i), op.arguments, n, m);
      if (!coupled) {
        store<V>(hbar + i, n * sc);
        if (tbar) store<V>(tbar + i, m * sc);
        return;
      }
      const V along = load<V>(ht + j);
      store<V>(hbar + i, n * sc + d * load<V>(hd + j) + load<V>(h1 + j) + m * load<V>(hn + j) + centred * along);
      if (tbar) store<V>(tbar + i, m * sc + d * along + load<V>(t1 + j));
    });
  });
}

}  // namespace fastode
