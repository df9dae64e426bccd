// How a solve chooses its steps, as torchdiffeq does: the first size, which attempts are accepted, the next size, and
// the weights of the interpolant. No mathematics of a field. Formulas: fastode/reference/adaptive.py, and README.md of
// fastode/ops/schemes/skew_pair, (6).
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace fastode::resident {

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

// Of the two halves of a state, as Python's max takes it: NaN only where it comes first.
struct Larger {
  int64_t half;
  double value;

  explicit Larger(const std::array<double, 2>& values) : half(values[1] > values[0]), value(values[half]) {}
};

// Root mean squares of the first step's choice: of the state, of its slopes, and of the change of the slopes, each in
// units of the tolerance.
struct FirstStep {
  std::array<double, 2> state = {}, slope = {}, change = {};

  // Of the Euler step that tries the field.
  double trial() const {
    const double d0 = Larger(state).value, d1 = Larger(slope).value;
    return tries_anyhow() ? 1e-6 : 0.01 * d0 / d1;
  }
  bool tries_anyhow() const { return Larger(state).value < 1e-5 || Larger(slope).value < 1e-5; }
  double curvature() const { return Larger(change).value / trial(); }
  bool stands_still() const { return Larger(slope).value <= 1e-15 && curvature() <= 1e-15; }
  double by_order(int64_t order) const {
    if (stands_still()) return std::max(1e-3 * trial(), 1e-6);
    return std::pow(0.01 / Larger({Larger(slope).value, curvature()}).value, 1 / static_cast<double>(order));
  }
  double size(int64_t order) const {
    const double bound = 100 * trial(), by = by_order(order);
    return std::isnan(bound) || std::isnan(by) ? std::numeric_limits<double>::quiet_NaN() : std::min(bound, by);
  }
};

// The cotangents of a FirstStep's six numbers and of the trial's size, of those that are not zero.
struct FirstStepBar {
  double trial = 0, state = 0, slope = 0, change = 0;

  // For the cotangent of the size.
  FirstStepBar(const FirstStep& first, int64_t order, double size_bar) {
    const double bound = 100 * first.trial(), by = first.by_order(order);
    const double share = bound < by ? 0 : bound > by ? 1 : 0.5;  // of by_order's
    trial = 100 * (1 - share) * size_bar;
    const double by_bar = share * size_bar;
    if (first.stands_still()) {
      if (1e-3 * first.trial() >= 1e-6) trial += 1e-3 * by_bar;
      return;
    }
    const double d1 = Larger(first.slope).value, d2 = first.curvature();
    const double bar = -by_bar * by / (static_cast<double>(order) * std::max(d1, d2));
    if (d2 > d1)
      change = bar / first.trial(), trial -= bar * d2 / first.trial();
    else
      slope = bar;
  }

  // Carries the trial's cotangent on, when all of it is there.
  void settle_trial(const FirstStep& first) {
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

  NextFactor(double ratio, int64_t order) {
    constexpr double safety = 0.9, most_shrinkage = 0.2;
    if (ratio == 0) return;
    const double most_growth = value, least = ratio < 1 ? 1 : most_shrinkage;
    const double factor = safety / std::pow(ratio, 1 / static_cast<double>(order));
    free = !(factor < least || factor > most_growth);
    value = factor < least ? least : factor > most_growth ? most_growth : factor;  // NaN stays
  }
};

// (6): the interpolant's weights at the part x of a step, or the derivatives of these in x.
inline std::vector<double> interpolating(const Embedded& scheme, double x, bool rates) {
  const double p4 = rates ? 4 * x * x * x : x * x * x * x, p3 = rates ? 3 * x * x : x * x * x;
  const double p2 = rates ? 2 * x : x * x, p1 = rates ? 1 : x;
  const double end = -8 * p4 + 14 * p3 - 5 * p2, middle = 16 * p4 - 32 * p3 + 16 * p2;
  std::vector<double> weights(scheme.stages);
  for (int64_t i = 0; i < scheme.stages; ++i) weights[i] = end * scheme.b[i] + middle * scheme.middle[i];
  weights.front() += -2 * p4 + 5 * p3 - 4 * p2 + p1;
  weights.back() += 2 * p4 - 3 * p3 + p2;
  return weights;
}

// The weights of y(t1), which lies at the part x of the last step, or the derivatives of these in x.
inline std::vector<double> at_end(const Embedded& scheme, double x, bool rates) {
  return scheme.steps > 0 ? std::vector<double>(scheme.b, scheme.b + scheme.stages) : interpolating(scheme, x, rates);
}

// Through which sizes a derivative goes.
enum Through : int64_t { kNoSize, kFirstSize, kAllSizes };

enum SolveEnd : int64_t { kReached, kMostAttempts, kNoStep, kNotFinite };

struct Attempt {
  double t, h, ratio;
  bool accepted;
  int64_t half;  // the one whose error is the larger
};

// What a solve did: how it ended, the first step's choice, and its attempts. Backward takes the same steps from it.
struct SolveLog {
  SolveEnd end = kReached;
  double t = 0, h = 0;  // where it stands
  FirstStep first;
  std::vector<Attempt> attempts;

  static constexpr int64_t kHead = 10, kEach = 5;

  void write(std::vector<double>& to) const {
    to.insert(to.end(), {static_cast<double>(attempts.size()), static_cast<double>(end), t, h});
    for (const auto& both : {first.state, first.slope, first.change}) to.insert(to.end(), both.begin(), both.end());
    for (const Attempt& one : attempts)
      to.insert(to.end(), {one.t, one.h, one.ratio, one.accepted ? 1.0 : 0.0, static_cast<double>(one.half)});
  }

  // Reads one log and moves `from` behind it.
  static SolveLog read(const double*& from) {
    SolveLog log;
    const auto count = static_cast<int64_t>(from[0]);
    log.end = static_cast<SolveEnd>(from[1]), log.t = from[2], log.h = from[3];
    const double* at = from + 4;
    for (auto* both : {&log.first.state, &log.first.slope, &log.first.change})
      for (double& value : *both) value = *at++;
    for (int64_t i = 0; i < count; ++i, at += kEach)
      log.attempts.push_back({at[0], at[1], at[2], at[3] != 0, static_cast<int64_t>(at[4])});
    from = at;
    return log;
  }
};

}  // namespace fastode::resident
