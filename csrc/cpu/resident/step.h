// One step of an explicit Runge-Kutta scheme for u' = f(t, u) on resident samples, f a branch whose convolutions may
// see the time. Its maps of the batch are tensors [N, lanes, blocks H, W] in channels_last memory, which is compact
// maps one after the other. Equations: README.md of fastode/ops/schemes/ode.
#pragma once

#include "engine.h"

namespace fastode::resident {

// The stages as the operators take them: `rows` [stages, stages] times the step, a time for each stage; of the first
// one, if its slope is `given`, there is no evaluation. `timed` units' convolutions add their `planes` times the time.
struct StepArguments {
  const std::vector<double>& rows;
  const std::vector<double>& times;
  bool given;
  const std::vector<int64_t>& timed;
  const std::vector<Tensor>& planes;

  int64_t stages() const { return static_cast<int64_t>(times.size()); }
  double row(int64_t i, int64_t j) const { return rows[i * stages() + j]; }
};

// What forward makes, of all stages that are evaluated.
struct StepMade {
  std::vector<Tensor> slopes, points, kept;
};

// What backward reads and makes: the cotangents of a step whose end is state + sum of weight * slope and whose error is
// the sum of error_weight * slope, of the state and of the first slope, if that is given.
struct StepBars {
  const std::vector<double>& weights;
  const std::vector<double>& error_weights;
  const Tensor *end, *error, *carried;  // null: zero
  const std::vector<Tensor>& slopes;    // of all stages, for the product; or none
  Tensor state, first;
  double product = 0;           // of every slope and its cotangent without what is carried
  std::vector<double> moments;  // [evaluation, timed unit][kernel height, kernel width, width]
};

template <class A>
void run_step(const Packed<A>& packed, const StepArguments& step, const Tensor& x, const Tensor& state,
              const Tensor* first, bool keep, StepMade& made);

// `gradients`: the workers' accumulators.
template <class A>
void pull_step(const Packed<A>& packed, const StepArguments& step, const Tensor& x, const StepMade& made,
               StepBars& bars, A* gradients);

// Elements of one evaluation's moments in one unit.
template <class A>
int64_t moments_size(const BranchSpec<A>& spec, const UnitSpec<A>& unit) {
  return unit.shape.kernel_h * unit.shape.kernel_w * spec.blocks * kLanes<A>;
}

}  // namespace fastode::resident
