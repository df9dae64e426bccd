// norm -> activation as single-pass operators: value, cotangent, tangent (dual) and second order.
//
// Everything a normalised set needs besides its elements is a handful of per-channel sums. An operator is therefore
// three functions: `reduce` (the sums of one sample), `finish` (sums -> per-channel rows of coefficients and the
// parameter gradients) and `apply` (an element-wise sweep). `drive` runs them in the order the norm asks for: sample by
// sample while the sample is in cache (GroupNorm), or batch-wide sums first (BatchNorm in training).
// Formulas: fastode/ops/README.md.
#pragma once

#include <cmath>

#include "activation.h"
#include "passes.h"

namespace fastode {

// Coefficient rows a worker holds; each is one period long.
enum Row {
  // The value is (h - mean) * scale + shift, scale = rstd * weight.
  kMean,
  kRstd,
  kScale,
  kShift,
  // Its tangent is (t - tangent mean) * scale + (h - mean) * tangent scale.
  kTangentMean,
  kTangentScale,
  // The cotangent of h is scale * n + (h - mean) * along + constant, n that of the value.
  kAlong,
  kConstant,
  // With m the cotangent of the value's tangent, the cotangents of h and t are
  //   scale * n + (h - mean) * hd + h1 + m * hn + (t - tangent mean) * ht
  //   scale * m + (h - mean) * ht + t1
  kHd = kAlong,
  kH1,
  kHn,
  kHt,
  kT1,
  kRows
};
inline constexpr int kMaxSums = 5;
inline constexpr int kMaxSamples = 6;  // widened samples a worker holds when storage is narrower than the accumulator

struct Geometry {
  int64_t samples, pixels, channels;

  int64_t length() const { return pixels * channels; }
};

template <class A>
struct NormAct {
  NormMode norm;
  int64_t groups;  // = channels for batch and fixed statistics
  A eps;
  int64_t kind;
  ActivationArguments<A> arguments;
  const A* weight;  // may be null: 1
  const A* bias;    // may be null: 0

  bool couples() const { return norm == kGroupNorm || norm == kBatchNorm; }
};

template <class T>
struct Terms {
  using A = typename AccumulatorOf<T>::type;
  int count = 0;
  const T* data[kMostTerms];
  A coefficient[kMostTerms];
};

template <class A>
struct Scratch {
  A* data;  // [workers, per_worker]
  int64_t per_worker, period, length;
  A* partial;  // [samples, kMaxSums * channels]

  A* row(int64_t worker, int which) const { return data + worker * per_worker + which * period; }
  A* sums(int64_t worker) const { return row(worker, kRows); }
  A* sample(int64_t worker, int which) const { return sums(worker) + kMaxSums * period + which * length; }

  template <class T>
  static int64_t elements(const Geometry& g) {
    return (kRows + kMaxSums) * period_of<A>(g.channels) + (std::is_same_v<T, A> ? 0 : kMaxSamples * g.length());
  }
};

// out = scale * out + sum_k coefficient_k term_k over one sample (scale 0: out is only written).
template <class T, class A>
inline void accumulate(const Terms<T>& terms, int64_t n, int64_t length, A scale, A* out) {
  const int64_t from = n * length;
  const auto pass = [&]<int K>(std::integral_constant<int, K>, int first, A beta) {
    const T* t[K];
    A c[K];
    for (int k = 0; k < K; ++k) t[k] = terms.data[first + k] + from, c[k] = terms.coefficient[first + k];
    const auto value = [](T x) {
      if constexpr (std::is_same_v<T, A>)
        return x;
      else
        return widen(x);
    };
    if (beta == 0) {
#pragma GCC ivdep
      for (int64_t i = 0; i < length; ++i) {
        A sum = c[0] * value(t[0][i]);
        for (int k = 1; k < K; ++k) sum += c[k] * value(t[k][i]);
        out[i] = sum;
      }
    } else {
#pragma GCC ivdep
      for (int64_t i = 0; i < length; ++i) {
        A sum = beta * out[i];
        for (int k = 0; k < K; ++k) sum += c[k] * value(t[k][i]);
        out[i] = sum;
      }
    }
  };
  int first = 0;
  for (; terms.count - first > 4; first += 4, scale = 1) pass(std::integral_constant<int, 4>{}, first, scale);
  switch (terms.count - first) {
    case 4:
      pass(std::integral_constant<int, 4>{}, first, scale);
      break;
    case 3:
      pass(std::integral_constant<int, 3>{}, first, scale);
      break;
    case 2:
      pass(std::integral_constant<int, 2>{}, first, scale);
      break;
    case 1:
      pass(std::integral_constant<int, 1>{}, first, scale);
      break;
    default: {
      if (scale != 1)
        for (int64_t i = 0; i < length; ++i) out[i] *= scale;
    }
  }
}

// The sweeps over one sample that depend on the activation, of values in the accumulator's type: what is stored in
// bfloat16 is widened before. `rows` is the worker whose coefficient rows they read; without a norm they read none.
template <class A>
struct Sweeps {
  using Op = NormAct<A>;

  // a = act(norm(h))
  static void value(const Geometry& g, const Op& op, const Scratch<A>& s, int64_t rows, const A* h, A* a);
  // sums [2, channels]: of n and of n (h - mean), n = act'(norm(h)) cot
  static void cotangent_sums(const Geometry& g, const Op& op, const Scratch<A>& s, int64_t rows, const A* h,
                             const A* cot, A* sums);
  // out = the cotangent of h
  static void cotangent(const Geometry& g, const Op& op, const Scratch<A>& s, int64_t rows, const A* h, const A* cot,
                        A* out);
  // a = act(norm(h)) and its tangent for the tangent t of h
  static void dual(const Geometry& g, const Op& op, const Scratch<A>& s, int64_t rows, const A* h, const A* t, A* a,
                   A* adot);
  // For the cotangents `alpha` of a and `beta` of its tangent, and so n and m of the value and of its tangent: sums
  // [5, channels] of n, n (h - mean), m, m (h - mean) and m (t - tangent mean)
  static void second_sums(const Geometry& g, const Op& op, const Scratch<A>& s, int64_t rows, const A* h, const A* t,
                          const A* alpha, const A* beta, A* sums);
  // hbar and, unless it is null, tbar: the cotangents of h and t
  static void second(const Geometry& g, const Op& op, const Scratch<A>& s, int64_t rows, const A* h, const A* t,
                     const A* alpha, const A* beta, A* hbar, A* tbar);
};

template <class T>
struct Kernels {
  using A = typename AccumulatorOf<T>::type;
  using Op = NormAct<A>;

  // out = act(sum_k c_k t_k)
  static void combine(const Geometry& g, const Terms<T>& terms, const Op& op, const Scratch<A>& s, T* out);
  // u (unless it is null: then it is the one term), a and, unless `given`, the statistics
  static void forward(const Geometry& g, const Terms<T>& terms, const Op& op, const Scratch<A>& s, bool given, A* stats,
                      T* u, T* a);
  static void vjp(const Geometry& g, const T* h, const T* cot, const A* stats, const Terms<T>& addends, A scale,
                  const Op& op, const Scratch<A>& s, T* out, A* wbar, A* bbar);
  static void dual(const Geometry& g, const T* h, const T* t, const Op& op, const Scratch<A>& s, bool given, A* stats,
                   A* tstats, T* stacked);
  static void second(const Geometry& g, const T* h, const T* t, const T* cot, const A* stats, const A* tstats,
                     const Terms<T>& addends, A scale, bool tangent, const Op& op, const Scratch<A>& s, T* out, A* wbar,
                     A* bbar);
  // out[k] = <v, t_k>
  static void dots(const Geometry& g, const T* v, const Terms<T>& terms, const Scratch<A>& s, A* out);
};

extern template struct Sweeps<float>;
extern template struct Sweeps<double>;
extern template struct Kernels<float>;
extern template struct Kernels<double>;
extern template struct Kernels<bfloat16>;

}  // namespace fastode
