// How a solve chooses its steps, as torchdiffeq does: the first size, which attempts are accepted, the next size, and
// the weights of the interpolant; and the way back through the first size. No mathematics of a field, and the same on
// the CPU and on a card. Formulas: fastode/reference/adaptive.py, and README.md of fastode/ops/schemes/skew_pair, (6)
// and (9).
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#ifdef __CUDACC__
#define FASTODE_ANYWHERE __host__ __device__
#else
#define FASTODE_ANYWHERE
#endif

namespace fastode::resident {

// How a solve ended. kNoRoom: it accepted more steps than it can leave to a backward.
enum SolveEnd : int64_t { kReached, kMostAttempts, kNoStep, kNotFinite, kNoRoom };

// The numbers of a log before its attempts, and of each of these; control.h has their order.
inline constexpr int64_t kLogHead = 10, kLogEach = 5;

FASTODE_ANYWHERE inline bool is_finite(double x) { return x - x == 0; }

// An embedded Runge-Kutta scheme, and how far and how exactly it is to go. Rows are [stages].
struct Embedded {
  int64_t stages, order;
  bool ends_in_solution;  // whether the last stage's point is the solution
  const double *a, *b, *error, *middle;
  double rtol, atol, t1;
  double first_step;  // 0: chosen by the field
  int64_t most;       // attempts; negative: any number
  int64_t steps;      // 0: by error; else so many of equal size, each of `first_step`

  // Whether the first step's size depends on the field.
  bool chooses() const { return steps == 0 && first_step == 0; }
  // Whether y(t1) depends on the slope of z in that stage of the last step: where a later one's point has it.
  bool ends_by_z(int64_t stage) const {
    for (int64_t i = stage + 1; i + 1 < stages; ++i)
      if (a[i * stages + stage] != 0) return true;
    return steps == 0;
  }
};

// `table` [stages + 3, stages]: the rows of a, then b, the error's and the middle's weights. `numbers`: rtol, atol, t1,
// and the first step's size or 0. `integers`: the order, the most attempts or -1, whether the last stage is the
// solution, and the number of steps of equal size or 0.
inline Embedded embedded_of(const std::vector<double>& table, const std::vector<double>& numbers,
                            const std::vector<int64_t>& integers) {
  int64_t stages = 1;
  while ((stages + 3) * stages < static_cast<int64_t>(table.size())) ++stages;
  const double* rows = table.data() + stages * stages;
  return {stages,     integers[0], integers[2] != 0, table.data(), rows,        rows + stages, rows + 2 * stages,
          numbers[0], numbers[1],  numbers[2],       numbers[3],   integers[1], integers[3]};
}

// A number of y's and one of z's.
struct Halves {
  double value[2] = {};

  FASTODE_ANYWHERE double operator[](int64_t half) const { return value[half]; }
};

// Of the two halves of a state, as Python's max takes it: NaN only where it comes first.
struct Larger {
  int64_t half;
  double value;

  FASTODE_ANYWHERE explicit Larger(const Halves& values)
      : half(values[1] > values[0]), value(half ? values[1] : values[0]) {}
};

// Root mean squares of the first step's choice: of the state, of its slopes, and of the change of the slopes, each in
// units of the tolerance.
struct FirstStep {
  Halves state, slope, change;

  // Of the Euler step that tries the field.
  FASTODE_ANYWHERE double trial() const {
    const double d0 = Larger(state).value, d1 = Larger(slope).value;
    return tries_anyhow() ? 1e-6 : 0.01 * d0 / d1;
  }
  FASTODE_ANYWHERE bool tries_anyhow() const { return Larger(state).value < 1e-5 || Larger(slope).value < 1e-5; }
  FASTODE_ANYWHERE double curvature() const { return Larger(change).value / trial(); }
  FASTODE_ANYWHERE bool stands_still() const { return Larger(slope).value <= 1e-15 && curvature() <= 1e-15; }
  FASTODE_ANYWHERE double by_order(int64_t order) const {
    if (stands_still()) return 1e-3 * trial() > 1e-6 ? 1e-3 * trial() : 1e-6;
    return std::pow(0.01 / Larger(Halves{{Larger(slope).value, curvature()}}).value, 1 / static_cast<double>(order));
  }
  FASTODE_ANYWHERE double size(int64_t order) const {
    const double bound = 100 * trial(), by = by_order(order);
    return bound <= by ? bound : by < bound ? by : bound + by;  // NaN stays
  }
};

// The cotangents of a FirstStep's six numbers and of the trial's size, of those that are not zero.
struct FirstStepBar {
  double trial = 0, state = 0, slope = 0, change = 0;

  // For the cotangent of the size.
  FASTODE_ANYWHERE FirstStepBar(const FirstStep& first, int64_t order, double size_bar) {
    const double bound = 100 * first.trial(), by = first.by_order(order);
    const double share = bound < by ? 0 : bound > by ? 1 : 0.5;  // of by_order's
    trial = 100 * (1 - share) * size_bar;
    const double by_bar = share * size_bar;
    if (first.stands_still()) {
      if (1e-3 * first.trial() >= 1e-6) trial += 1e-3 * by_bar;
      return;
    }
    const double d1 = Larger(first.slope).value, d2 = first.curvature();
    const double bar = -by_bar * by / (static_cast<double>(order) * (d2 > d1 ? d2 : d1));
    if (d2 > d1)
      change = bar / first.trial(), trial -= bar * d2 / first.trial();
    else
      slope = bar;
  }

  // Carries the trial's cotangent on, when all of it is there.
  FASTODE_ANYWHERE void settle_trial(const FirstStep& first) {
    if (first.tries_anyhow() || trial == 0) return;
    const double d1 = Larger(first.slope).value;
    state += 0.01 * trial / d1;
    slope -= trial * first.trial() / d1;
  }
};

// By what the next step is longer after an error ratio, and whether the ratio decides it or a bound does.
struct NextFactor {
  double value = 10;
  bool free = false;

  FASTODE_ANYWHERE NextFactor(double ratio, int64_t order) {
    constexpr double safety = 0.9, most_shrinkage = 0.2;
    if (ratio == 0) return;
    const double most_growth = value, least = ratio < 1 ? 1 : most_shrinkage;
    const double factor = safety / std::pow(ratio, 1 / static_cast<double>(order));
    free = !(factor < least || factor > most_growth);
    value = factor < least ? least : factor > most_growth ? most_growth : factor;  // NaN stays
  }
};

// What ends a solve before another attempt of that size, after so many of at most `most` (negative: any number);
// kReached: nothing does.
FASTODE_ANYWHERE inline SolveEnd hindrance(int64_t tried, int64_t most, double t, double h) {
  if (most >= 0 && tried >= most) return kMostAttempts;
  return is_finite(h) && t + h > t ? kReached : kNoStep;
}

// (6): what the interpolant's weights at the part x of a step are made of, or the derivatives of these in x.
struct Quartic {
  double end, middle, first, last;

  FASTODE_ANYWHERE explicit Quartic(double x, bool rates = false) {
    const double p4 = rates ? 4 * x * x * x : x * x * x * x, p3 = rates ? 3 * x * x : x * x * x;
    const double p2 = rates ? 2 * x : x * x, p1 = rates ? 1 : x;
    end = -8 * p4 + 14 * p3 - 5 * p2, middle = 16 * p4 - 32 * p3 + 16 * p2;
    first = -2 * p4 + 5 * p3 - 4 * p2 + p1, last = 2 * p4 - 3 * p3 + p2;
  }

  // The weight of stage i, whose weights of the solution and of the middle are given.
  FASTODE_ANYWHERE double weight(int64_t i, int64_t stages, double b, double half_way) const {
    return end * b + middle * half_way + (i == 0 ? first : 0) + (i + 1 == stages ? last : 0);
  }
};

}  // namespace fastode::resident
