// What a solve with steps by error knows of its steps, forwards and backwards. Equations: README.md of
// fastode/ops/schemes/skew_pair.
#pragma once

#include "control.h"
#include "engine.h"

namespace fastode::resident {

// What the evaluations of a step leave for all samples that share it, and the state at its end.
template <class A>
struct StepMaps {
  int64_t samples = 0;
  std::vector<A*> y, z;     // guides of each evaluation; null: of the worker's sample at hand
  A* statistics = nullptr;  // [evaluation, sample]
  A *end_y = nullptr, *end_z = nullptr;
  std::vector<Tensor> pieces, ends;

  int64_t at(int64_t n) const { return samples > 1 ? n : 0; }
};

// Samples that take the same steps: the batch, or one of it alone.
template <class A>
struct Solve {
  int64_t samples = 0;
  SolveLog log;
  StepMaps<A> start, trial;           // the evaluations that choose the first step
  std::vector<StepMaps<A>> steps;     // the accepted ones; the last of them where nothing is left to backward
  std::vector<StepMaps<A>> rejected;  // those that a derivative goes through, without their ends
};

// A step's rows, times its size.
struct ScaledStep {
  std::vector<double> a, b, error;

  ScaledStep(const Embedded& scheme, double size) {
    const int64_t stages = scheme.stages;
    for (int64_t i = 0; i < stages * stages; ++i) a.push_back(size * scheme.a[i]);
    for (int64_t i = 0; i < stages; ++i) b.push_back(size * scheme.b[i]), error.push_back(size * scheme.error[i]);
  }
};

// One attempt of a step, to be left in `to`.
template <class A>
struct Attempted {
  const ScaledStep& step;
  const double* interpolating;  // where t1 lies in it: the weights of y(t1), times the size; else null
  const StepMaps<A>& to;
};

// An attempt that the way back goes through: an accepted one, or a rejected one whose error decides the next size.
template <class A>
struct Link {
  Attempt attempt;
  ScaledStep step;
  double size;  // what a stage sees
  const StepMaps<A>& maps;
  const StepMaps<A>* before;  // of the last accepted step; null for the first
  bool free;                  // whether the next size goes by this one's error
  double down;                // by what this one's size grows with that of the link before, or with the first one's
  double weight = 0;          // by what its size's cotangent counts where a leg ends
  double error = 0;           // factor of the pull-back of its error
};

// What the way back knows of a solve: its links, the interpolant's rows in the last one, and what leads to the first
// step's size where the derivative goes through it.
template <class A>
struct WayBack {
  std::vector<Link<A>> links;
  std::vector<double> interpolating, rates;
  bool through_first = false, through_place = false;  // place: where t1 lies in the last step
  double trial = 0;                                   // size of the Euler step that tries the field
  int64_t change_half = 0, slope_half = 0, state_half = 0;
  double change = 0, slope = 0, state = 0;  // factors of the pull-backs of the three norms
};

// The cotangents of the state and of its slopes where a leg of the way back ends, of all samples.
template <class A>
struct StartBars {
  int64_t samples = 0;
  A *y = nullptr, *z = nullptr, *slope_y = nullptr, *slope_z = nullptr;
};

}  // namespace fastode::resident
