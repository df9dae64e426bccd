// Solves of a skew field by an embedded scheme over all samples: the control between the workers' parts. Included by
// one .cpp per arithmetic type and field.
#pragma once

#include "skew_engine_impl.h"
#include "solve_kept.h"
#include "team.h"

namespace fastode::resident {

// How many numbers the norms of y and of z are means over.
template <class Pair>
std::array<double, 2> entries(const Pair& pair, int64_t samples) {
  const auto [y, z] = pair.entries();
  return {static_cast<double>(samples * y), static_cast<double>(samples * z)};
}

// A step's size as a stage sees it: a tensor of the program's type but where it is given.
template <class A>
double seen(const Embedded& scheme, double size) {
  return scheme.steps > 0 ? size : static_cast<double>(static_cast<A>(size));
}

// The forward of samples that share their steps. `each(f)` calls f(worker, sample, sums) for all of them.
template <class Pair>
class Forward {
  using A = typename Pair::Real;
  using Worker = SkewSolve<Pair>;

 public:
  Forward(const Embedded& scheme, const Pair& pair, const SolveCall& call, int64_t samples, Solve<A>& solve)
      : scheme_(scheme), pair_(pair), call_(call), solve_(solve), entries_(entries(pair, samples)) {
    solve.samples = samples;
  }

  template <class Each>
  void run(const Each& each) {
    choose_first(each);
    SolveLog& log = solve_.log;
    StepMaps<A> spare, next;
    for (;; log.h *= scheme_.steps > 0 ? 1 : next_factor(log.attempts.back().ratio, scheme_.order)) {
      const auto tried = static_cast<int64_t>(log.attempts.size());
      if (scheme_.most >= 0 && tried >= scheme_.most) return void(log.end = kMostAttempts);
      if (scheme_.steps == 0 && (!std::isfinite(log.h) || !(log.t + log.h > log.t))) return void(log.end = kNoStep);
      const bool last = scheme_.steps > 0 ? tried + 1 == scheme_.steps : log.t + log.h >= scheme_.t1;
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
    const bool chooses = scheme_.chooses();
    solve_.start = new_step(pair_, 1, solve_.samples, true);
    Sums sums = each([&](Worker& worker, int64_t n, Sums& sums) { worker.begin(n, solve_, chooses, sums.data()); });
    log.h = scheme_.first_step;
    if (!chooses) return;
    log.first.state = {rms(sums[0], 0), rms(sums[1], 1)}, log.first.slope = {rms(sums[2], 0), rms(sums[3], 1)};
    const double size = log.first.trial();
    solve_.trial = new_step(pair_, 1, solve_.samples, true);
    sums = each([&](Worker& worker, int64_t n, Sums& sums) { worker.try_first(n, solve_, size, sums.data()); });
    log.first.change = {rms(sums[0], 0), rms(sums[1], 1)};
    log.h = log.first.size(scheme_.order);
    if (!call_.keep_trial) solve_.trial = {};
  }

  template <class Each>
  std::array<double, 2> attempt(const Each& each, const StepMaps<A>& to, bool last) {
    const SolveLog& log = solve_.log;
    const double size = seen<A>(scheme_, log.h);
    const ScaledStep step(scheme_, size);
    std::vector<double> weights;
    if (last) weights = at_end(scheme_, (scheme_.t1 - log.t) / log.h, false);
    for (double& weight : weights) weight *= size;
    const Attempted<A> tried{step, last ? weights.data() : nullptr, to};
    const Sums sums =
        each([&](Worker& worker, int64_t n, Sums& sums) { worker.attempt(n, solve_, tried, sums.data()); });
    return {rms(sums[0], 0), rms(sums[1], 1)};
  }

  double rms(double squares, int64_t half) const { return std::sqrt(squares / entries_[half]); }

  const Embedded& scheme_;
  const Pair& pair_;
  const SolveCall& call_;
  Solve<A>& solve_;
  const std::array<double, 2> entries_;
};

// The backward of samples that share their steps, likewise.
template <class Pair>
class Backward {
  using A = typename Pair::Real;
  using Worker = SkewSolve<Pair>;

 public:
  Backward(const Embedded& scheme, const Pair& pair, const SolveCall& call, const Solve<A>& solve)
      : scheme_(scheme), pair_(pair), solve_(solve), entries_(entries(pair, solve.samples)) {
    double t = 0, h = 0;
    for (const Attempt& one : solve.log.attempts)
      if (one.accepted) {
        t = one.t, h = one.h;
        way_.steps.emplace_back(scheme, seen<A>(scheme, h));
      }
    const double at = (scheme.t1 - t) / h;
    way_.interpolating = at_end(scheme, at, false), way_.rates = at_end(scheme, at, true);
    for (double& weight : way_.interpolating) weight *= seen<A>(scheme, h);
    way_.through_first = call.keep_trial && scheme.chooses() && solve.log.attempts[0].accepted;
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
        each([&](Worker& worker, int64_t n, Sums& sums) { worker.back(n, solve_, way_, bars, sums.data()); });
    if (way_.through_first) through_choice(each, bars, sums[0]);
  }

 private:
  template <class Each>
  void through_choice(const Each& each, const StartBars<A>& bars, double size_bar) {
    const FirstStep& first = solve_.log.first;
    FirstStepBar bar(first, scheme_.order, size_bar);
    way_.change = factor(bar.change, first.change, way_.change_half);
    if (way_.change != 0) {
      const Sums sums =
          each([&](Worker& worker, int64_t n, Sums& sums) { worker.back_trial(n, solve_, way_, bars, sums.data()); });
      bar.trial += sums[0];
    }
    bar.settle_trial(first);
    way_.slope = factor(bar.slope, first.slope, way_.slope_half);
    way_.state = factor(bar.state, first.state, way_.state_half);
    each([&](Worker& worker, int64_t n, Sums&) { worker.back_start(n, solve_, way_, bars); });
  }

  // Of the pull-back of a root mean square: its cotangent over the value and over how many numbers it is of.
  double factor(double bar, const std::array<double, 2>& values, int64_t& half) const {
    const Larger larger(values);
    half = larger.half;
    return bar == 0 ? 0 : bar / (larger.value * entries_[half]);
  }

  const Embedded& scheme_;
  const Pair& pair_;
  const Solve<A>& solve_;
  const std::array<double, 2> entries_;
  WayBack way_;
};

// Calls f(solve, each) for the batch as one or for every sample alone, by the worker that has it.
template <class A, class Worker, class F>
void each_solve(std::vector<Solve<A>>& solves, Team<Worker>& team, const F& f) {
  if (solves.size() == 1) return f(solves[0], [&](const auto& phase) { return team.each(phase); });
  team.each([&](Worker& worker, int64_t n, Sums&) {
    f(solves[n], [&](const auto& phase) {
      Sums sums{};
      phase(worker, n, sums);
      return sums;
    });
  });
}

// The solves as forward has logged and kept them.
template <class Pair, class A>
void find_solves(const Pair& pair, const Embedded& scheme, bool keep_trial, int64_t samples,
                 const std::vector<double>& log, std::vector<Tensor>& kept, std::vector<Solve<A>>& solves) {
  size_t next = 0;
  const double* from = log.data();
  for (Solve<A>& solve : solves) {
    solve.samples = samples, solve.log = SolveLog::read(from);
    solve.start = find_step(pair, 1, samples, false, kept, next);
    if (keep_trial && scheme.chooses()) solve.trial = find_step(pair, 1, samples, false, kept, next);
    const auto steps = std::count_if(solve.log.attempts.begin(), solve.log.attempts.end(),
                                     [](const Attempt& one) { return one.accepted; });
    for (int64_t k = 0; k < steps; ++k)
      solve.steps.push_back(find_step(pair, scheme.stages - 1, samples, k + 1 < steps, kept, next));
  }
}

// `gradients`: accumulators of each of the parts.
template <class Pair>
void run_solves(const typename Pair::Spec& spec, int64_t parts, const Embedded& scheme, const SolveCall& call,
                std::vector<double>& log, std::vector<Tensor>& kept, const Tensor& gradients) {
  using A = typename Pair::Real;
  const bool backward = call.cotangent != nullptr;
  if (backward && kept.empty()) {
    const Tensor& like = *call.cotangent;
    const Tensor again = new_contiguous(like.scalar_type(), like.sizes());
    log.clear();
    run_solves<Pair>(spec, parts, scheme, {call.x, nullptr, again, call.per_sample, true, call.keep_trial}, log, kept,
                     gradients);
  }
  const int64_t samples = call.x.size(0), alone = call.per_sample ? samples : 1, together = samples / alone;
  Arena none(nullptr);
  const Pair pair(spec, none, false);
  std::vector<Solve<A>> solves(alone);
  if (backward) find_solves(pair, scheme, call.keep_trial, together, log, kept, solves);
  Team<SkewSolve<Pair>> team(samples, parts, [&](Arena& arena) {
    return SkewSolve<Pair>(spec, scheme, call.x, call.out, call.cotangent, arena,
                           backward ? worker_gradients(spec, gradients, 0) : nullptr);
  });
  each_solve(solves, team, [&](Solve<A>& solve, const auto& each) {
    if (backward)
      Backward<Pair>(scheme, pair, call, solve).run(each);
    else
      Forward<Pair>(scheme, pair, call, together, solve).run(each);
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

template <class A>
void run_solve(const PackedPair<A>& packed, const Embedded& scheme, const SolveCall& call, std::vector<double>& log,
               std::vector<Tensor>& kept, const Tensor& gradients) {
  run_solves<SkewPair<A>>(packed.spec, workers_for(call.x.size(0)), scheme, call, log, kept, gradients);
}

}  // namespace fastode::resident
