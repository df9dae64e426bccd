// A solve's log, and what the way back reads of the choice of steps, which step_control.h has. Formulas: README.md of
// fastode/ops/schemes/skew_pair.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "../../step_control.h"

namespace fastode::resident {

// (6): the interpolant's weights at the part x of a step, or the derivatives of these in x.
inline std::vector<double> interpolating(const Embedded& scheme, double x, bool rates) {
  const Quartic quartic(x, rates);
  std::vector<double> weights(scheme.stages);
  for (int64_t i = 0; i < scheme.stages; ++i)
    weights[i] = quartic.weight(i, scheme.stages, scheme.b[i], scheme.middle[i]);
  return weights;
}

// The weights of y(t1), which lies at the part x of the last step, or the derivatives of these in x.
inline std::vector<double> at_end(const Embedded& scheme, double x, bool rates) {
  return scheme.steps > 0 ? std::vector<double>(scheme.b, scheme.b + scheme.stages) : interpolating(scheme, x, rates);
}

// Through which sizes a derivative goes.
enum Through : int64_t { kNoSize, kFirstSize, kAllSizes };

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

  void write(std::vector<double>& to) const {
    to.insert(to.end(), {static_cast<double>(attempts.size()), static_cast<double>(end), t, h});
    for (const Halves& both : {first.state, first.slope, first.change}) to.insert(to.end(), {both[0], both[1]});
    for (const Attempt& one : attempts)
      to.insert(to.end(), {one.t, one.h, one.ratio, one.accepted ? 1.0 : 0.0, static_cast<double>(one.half)});
  }

  // Reads one log and moves `from` behind it.
  static SolveLog read(const double*& from) {
    SolveLog log;
    const auto count = static_cast<int64_t>(from[0]);
    log.end = static_cast<SolveEnd>(from[1]), log.t = from[2], log.h = from[3];
    const double* at = from + 4;
    for (Halves* both : {&log.first.state, &log.first.slope, &log.first.change})
      for (double& value : both->value) value = *at++;
    for (int64_t i = 0; i < count; ++i, at += kLogEach)
      log.attempts.push_back({at[0], at[1], at[2], at[3] != 0, static_cast<int64_t>(at[4])});
    from = at;
    return log;
  }
};

}  // namespace fastode::resident
