// Solves of the skew pair with steps by error over all samples: the control between the workers' parts. Included by one
// .cpp per arithmetic type.
#pragma once

#include <memory>

#include "skew_engine_impl.h"
#include "skew_solve.h"

namespace fastode::resident {

// Y's and z's sums, or what a phase adds up else.
using Sums = std::array<double, 4>;

// The workers of a call, which stay for all of its phases: a batch whose samples share their steps is gone over once
// for each attempt.
template <class A>
class Team {
 public:
  // `make(arena, worker)` makes a SkewSolve; first without memory, to count it.
  template <class Make>
  Team(int64_t samples, const Make& make) : samples_(samples), count_(workers_for(samples)) {
    Arena none(nullptr);
    make(none, 0);
    char* scratch = static_cast<char*>(memory_.take(count_ * none.used()));
    for (int64_t w = 0; w < count_; ++w) arenas_.emplace_back(scratch + w * none.used());
    for (int64_t w = 0; w < count_; ++w) workers_.push_back(std::make_unique<SkewSolve<A>>(make(arenas_[w], w)));
  }

  // Calls f(worker, sample, sums) for all samples and returns the sums, added up in the workers' order. The samples are
  // gone over upwards and downwards in turn: the last ones of a phase are in the cache when the next begins.
  template <class F>
  Sums each(const F& f) {
    std::vector<Sums> parts(count_, Sums{});
    in_parallel(count_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t w = begin; w < end; ++w) {
        const int64_t first = w * samples_ / count_, last = (w + 1) * samples_ / count_;
        Sums sums{};
        for (int64_t k = 0; k < last - first; ++k) f(*workers_[w], down_ ? last - 1 - k : first + k, sums);
        parts[w] = sums;
      }
    });
    down_ = !down_;
    Sums total{};
    for (const Sums& part : parts)
      for (size_t i = 0; i < total.size(); ++i) total[i] += part[i];
    return total;
  }

  void check() const {
    for (const Arena& arena : arenas_) arena.check();
  }

 private:
  int64_t samples_, count_;
  CallMemory memory_;
  std::vector<Arena> arenas_;
  std::vector<std::unique_ptr<SkewSolve<A>>> workers_;
  bool down_ = false;
};

// Maps for what a step's evaluations leave: all of them or, for the next step alone, the last.
template <class A>
StepMaps<A> new_step(const SkewPair<A>& pair, int64_t evaluations, int64_t samples, bool all) {
  StepMaps<A> step;
  step.samples = samples;
  const auto take = [&](int64_t size) {
    return static_cast<A*>(step.pieces.emplace_back(new_vector(size * samples, scalar_type<A>())).data_ptr());
  };
  for (int64_t e = 0; e < evaluations; ++e) {
    const bool left = all || e + 1 == evaluations;
    step.y.push_back(left ? take(pair.y_size()) : nullptr);
    step.z.push_back(left ? take(pair.z_size()) : nullptr);
  }
  step.statistics = take(evaluations * pair.spec.statistics);
  return step;
}

template <class A>
void give_ends(const SkewPair<A>& pair, StepMaps<A>& step) {
  if (step.end_y) return;
  const auto take = [&](int64_t size) {
    return static_cast<A*>(step.ends.emplace_back(new_vector(size * step.samples, scalar_type<A>())).data_ptr());
  };
  step.end_y = take(pair.y_size()), step.end_z = take(pair.z_size());
}

// What new_step and give_ends made, found again; `next` moves on.
template <class A>
StepMaps<A> find_step(int64_t evaluations, int64_t samples, bool ends, const std::vector<Tensor>& kept, size_t& next) {
  StepMaps<A> step;
  step.samples = samples;
  const auto take = [&] { return static_cast<A*>(kept[next++].data_ptr()); };
  for (int64_t e = 0; e < evaluations; ++e) step.y.push_back(take()), step.z.push_back(take());
  step.statistics = take();
  if (ends) step.end_y = take(), step.end_z = take();
  return step;
}

// How many numbers the norms of y and of z are means over.
template <class A>
std::array<double, 2> entries(const SkewPair<A>& pair, int64_t samples) {
  const SkewShape& shape = pair.spec.shape;
  return {static_cast<double>(samples * shape.channels * pair.y_plane.pixels()),
          static_cast<double>(samples * shape.in_channels * pair.z_plane.pixels())};
}

// The forward of samples that share their steps. `each(f)` calls f(worker, sample, sums) for all of them.
template <class A>
class Forward {
 public:
  Forward(const Embedded& scheme, const SkewPair<A>& pair, const SolveCall& call, int64_t samples, Solve<A>& solve)
      : scheme_(scheme), pair_(pair), call_(call), solve_(solve), entries_(entries(pair, samples)) {
    solve.samples = samples;
  }

  template <class Each>
  void run(const Each& each) {
    choose_first(each);
    SolveLog& log = solve_.log;
    StepMaps<A> spare, next;
    for (;; log.h *= next_factor(log.attempts.back().ratio, scheme_.order)) {
      if (scheme_.most >= 0 && static_cast<int64_t>(log.attempts.size()) >= scheme_.most)
        return void(log.end = kMostAttempts);
      if (!std::isfinite(log.h) || !(log.t + log.h > log.t)) return void(log.end = kNoStep);
      const bool last = log.t + log.h >= scheme_.t1;
      if (next.y.empty()) next = new_step(pair_, scheme_.stages - 1, solve_.samples, call_.keep);
      if (!last) give_ends(pair_, next);
      const std::array<double, 2> norms = attempt(each, next, last);
      const double ratio = Larger(norms).value;
      log.attempts.push_back({log.t, log.h, ratio, ratio <= 1});
      if (!(ratio <= 1)) continue;
      std::swap(next, spare);  // what has been written
      next = {};
      if (!call_.keep && !solve_.steps.empty()) std::swap(next, solve_.steps.back()), solve_.steps.pop_back();
      solve_.steps.push_back(std::move(spare));
      spare = {};
      if (last) return;
      log.t += log.h;
      if (!std::isfinite(norms[0]) || !std::isfinite(norms[1])) return void(log.end = kNotFinite);
    }
  }

 private:
  template <class Each>
  void choose_first(const Each& each) {
    SolveLog& log = solve_.log;
    const bool chooses = scheme_.first_step == 0;
    solve_.start = new_step(pair_, 1, solve_.samples, true);
    Sums sums =
        each([&](SkewSolve<A>& worker, int64_t n, Sums& sums) { worker.begin(n, solve_, chooses, sums.data()); });
    log.h = scheme_.first_step;
    if (!chooses) return;
    log.first.state = {rms(sums[0], 0), rms(sums[1], 1)}, log.first.slope = {rms(sums[2], 0), rms(sums[3], 1)};
    const double size = log.first.trial();
    solve_.trial = new_step(pair_, 1, solve_.samples, true);
    sums = each([&](SkewSolve<A>& worker, int64_t n, Sums& sums) { worker.try_first(n, solve_, size, sums.data()); });
    log.first.change = {rms(sums[0], 0), rms(sums[1], 1)};
    log.h = log.first.size(scheme_.order);
    if (!call_.keep_trial) solve_.trial = {};
  }

  template <class Each>
  std::array<double, 2> attempt(const Each& each, const StepMaps<A>& to, bool last) {
    const SolveLog& log = solve_.log;
    const double size = static_cast<double>(static_cast<A>(log.h));  // what a stage sees
    const ScaledStep step(scheme_, size);
    std::vector<double> weights;
    if (last) weights = interpolating(scheme_, (scheme_.t1 - log.t) / log.h, false);
    for (double& weight : weights) weight *= size;
    const Attempted<A> tried{step, last ? weights.data() : nullptr, to};
    const Sums sums =
        each([&](SkewSolve<A>& worker, int64_t n, Sums& sums) { worker.attempt(n, solve_, tried, sums.data()); });
    return {rms(sums[0], 0), rms(sums[1], 1)};
  }

  double rms(double squares, int64_t half) const { return std::sqrt(squares / entries_[half]); }

  const Embedded& scheme_;
  const SkewPair<A>& pair_;
  const SolveCall& call_;
  Solve<A>& solve_;
  const std::array<double, 2> entries_;
};

// The backward of samples that share their steps, likewise.
template <class A>
class Backward {
 public:
  Backward(const Embedded& scheme, const SkewPair<A>& pair, const SolveCall& call, const Solve<A>& solve)
      : scheme_(scheme), pair_(pair), solve_(solve), entries_(entries(pair, solve.samples)) {
    double t = 0, h = 0;
    for (const Attempt& one : solve.log.attempts)
      if (one.accepted) {
        t = one.t, h = one.h;
        way_.steps.emplace_back(scheme, static_cast<double>(static_cast<A>(h)));
      }
    const double at = (scheme.t1 - t) / h;
    way_.interpolating = interpolating(scheme, at, false), way_.rates = interpolating(scheme, at, true);
    for (double& weight : way_.interpolating) weight *= static_cast<double>(static_cast<A>(h));
    way_.through_first = call.keep_trial && scheme.first_step == 0 && solve.log.attempts[0].accepted;
    way_.first_size = static_cast<double>(static_cast<A>(solve.log.attempts[0].h));
    way_.share = way_.steps.size() == 1 ? at : 1;
    way_.trial = static_cast<double>(static_cast<A>(solve.log.first.trial()));
  }

  template <class Each>
  void run(const Each& each) {
    StartBars<A> bars;
    std::vector<Tensor> room;
    const auto take = [&](int64_t size) {
      return static_cast<A*>(room.emplace_back(new_vector(size * solve_.samples, scalar_type<A>())).data_ptr());
    };
    if (way_.through_first)
      bars = {solve_.samples, take(pair_.y_size()), take(pair_.z_size()), take(pair_.y_size()), take(pair_.z_size())};
    const Sums sums =
        each([&](SkewSolve<A>& worker, int64_t n, Sums& sums) { worker.back(n, solve_, way_, bars, sums.data()); });
    if (way_.through_first) through_choice(each, bars, sums[0]);
  }

 private:
  template <class Each>
  void through_choice(const Each& each, const StartBars<A>& bars, double size_bar) {
    const FirstStep& first = solve_.log.first;
    FirstStepBar bar(first, scheme_.order, size_bar);
    way_.change = factor(bar.change, first.change, way_.change_half);
    if (way_.change != 0) {
      const Sums sums = each(
          [&](SkewSolve<A>& worker, int64_t n, Sums& sums) { worker.back_trial(n, solve_, way_, bars, sums.data()); });
      bar.trial += sums[0];
    }
    bar.settle_trial(first);
    way_.slope = factor(bar.slope, first.slope, way_.slope_half);
    way_.state = factor(bar.state, first.state, way_.state_half);
    each([&](SkewSolve<A>& worker, int64_t n, Sums&) { worker.back_start(n, solve_, way_, bars); });
  }

  // Of the pull-back of a root mean square: its cotangent over the value and over how many numbers it is of.
  double factor(double bar, const std::array<double, 2>& values, int64_t& half) const {
    const Larger larger(values);
    half = larger.half;
    return bar == 0 ? 0 : bar / (larger.value * entries_[half]);
  }

  const Embedded& scheme_;
  const SkewPair<A>& pair_;
  const Solve<A>& solve_;
  const std::array<double, 2> entries_;
  WayBack way_;
};

// Calls f(solve, each) for the batch as one or for every sample alone, by the worker that has it.
template <class A, class F>
void each_solve(std::vector<Solve<A>>& solves, Team<A>& team, const F& f) {
  if (solves.size() == 1) return f(solves[0], [&](const auto& phase) { return team.each(phase); });
  team.each([&](SkewSolve<A>& worker, int64_t n, Sums&) {
    f(solves[n], [&](const auto& phase) {
      Sums sums{};
      phase(worker, n, sums);
      return sums;
    });
  });
}

template <class A>
void run_solve(const PackedPair<A>& packed, const Embedded& scheme, const SolveCall& call, std::vector<double>& log,
               std::vector<Tensor>& kept, const Tensor& gradients) {
  const bool backward = call.cotangent != nullptr;
  if (backward && kept.empty()) {
    const Tensor& like = *call.cotangent;
    const Tensor again = new_map(like.scalar_type(), like.size(0), like.size(1), like.size(2), like.size(3), false);
    log.clear();
    run_solve(packed, scheme, {call.x, nullptr, again, call.per_sample, true, call.keep_trial}, log, kept, gradients);
  }
  const int64_t samples = call.x.size(0), alone = call.per_sample ? samples : 1, together = samples / alone;
  Arena none(nullptr);
  const SkewPair<A> pair(packed.spec, none, false);
  std::vector<Solve<A>> solves(alone);
  if (backward) {
    size_t next = 0;
    const double* from = log.data();
    for (Solve<A>& solve : solves) {
      solve.samples = together, solve.log = SolveLog::read(from);
      solve.start = find_step<A>(1, together, false, kept, next);
      if (call.keep_trial && scheme.first_step == 0) solve.trial = find_step<A>(1, together, false, kept, next);
      const auto steps = std::count_if(solve.log.attempts.begin(), solve.log.attempts.end(),
                                       [](const Attempt& one) { return one.accepted; });
      for (int64_t k = 0; k < steps; ++k)
        solve.steps.push_back(find_step<A>(scheme.stages - 1, together, k + 1 < steps, kept, next));
    }
  }
  Team<A> team(samples, [&](Arena& arena, int64_t w) {
    return SkewSolve<A>(packed.spec, scheme, call.x, call.out, call.cotangent, arena,
                        backward ? worker_gradients(packed.spec, gradients, w) : nullptr);
  });
  each_solve(solves, team, [&](Solve<A>& solve, const auto& each) {
    if (backward)
      Backward<A>(scheme, pair, call, solve).run(each);
    else
      Forward<A>(scheme, pair, call, together, solve).run(each);
  });
  team.check();
  if (backward) return;
  for (Solve<A>& solve : solves) {
    solve.log.write(log);
    if (!call.keep) continue;
    const auto leave = [&](const std::vector<Tensor>& pieces) {
      kept.insert(kept.end(), pieces.begin(), pieces.end());
    };
    leave(solve.start.pieces), leave(solve.trial.pieces);
    for (size_t k = 0; k < solve.steps.size(); ++k) {
      leave(solve.steps[k].pieces);
      if (k + 1 < solve.steps.size()) leave(solve.steps[k].ends);
    }
  }
}

}  // namespace fastode::resident
