// What a solve with steps by error knows of its steps, forwards and backwards. Equations: README.md of
// fastode/ops/schemes/skew_pair.
#pragma once

#include <array>

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

// What a solve's control knows of a field.
struct FieldSizes {
  int64_t y, z;                    // elements of a sample's maps
  int64_t statistics;              // elements of an evaluation's
  std::array<int64_t, 2> entries;  // of y and z, their padding left out
};

// What a worker does for a sample between two looks at the batch.
template <class A>
class Solver {
 public:
  virtual ~Solver() = default;

  // Says to which part of the batch the next samples belong, each of which has accumulators of its own.
  virtual void enter(int64_t part) = 0;

  // ---- forwards. Each adds sums of squares to `sums`, y's before z's.

  // The slopes at time 0; of the state and of the slopes, if asked for. Behind them zero_of(z), which x is, where
  // errors are measured.
  virtual void begin(int64_t n, const Solve<A>& solve, bool chooses, double* sums) = 0;

  // The slopes after an Euler step of that size; of their change.
  virtual void try_first(int64_t n, const Solve<A>& solve, double size, double* sums) = 0;

  // One attempt; of the error. The result goes where it belongs if t1 lies in the step.
  virtual void attempt(int64_t n, const Solve<A>& solve, const Attempted<A>& tried, double* sums) = 0;

  // ---- backwards

  // A leg of the way from the result's cotangent to that of x: the links from `top` down to `low`. Where others follow,
  // or the derivative goes on to the first step's size, it ends in `bars`, and the next one begins there. Adds to
  // `sums` what the links add to the cotangent of the size that decides theirs, and to that of the place of t1.
  virtual void back(int64_t n, const Solve<A>& solve, const WayBack<A>& way, size_t low, size_t top,
                    const StartBars<A>& bars, double* sums) = 0;

  // Through the change of the slopes, whose norm's factor the way back has; adds to `sum` what that adds to the trial's
  // cotangent.
  virtual void back_trial(int64_t n, const Solve<A>& solve, const WayBack<A>& way, const StartBars<A>& bars,
                          double* sum) = 0;

  // Through the norms of the state and of its slopes, and the slopes themselves.
  virtual void back_start(int64_t n, const Solve<A>& solve, const WayBack<A>& way, const StartBars<A>& bars) = 0;
};

}  // namespace fastode::resident
