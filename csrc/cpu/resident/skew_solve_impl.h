// Solves of a skew field by an embedded scheme over all samples: the control between the workers' parts. Included by
// one .cpp per arithmetic type.
#pragma once

#include "skew_engine_impl.h"
#include "solve_kept.h"
#include "team.h"

namespace fastode::resident {

// A step's size as a stage sees it: a tensor of the program's type but where it is given.
template <class A>
double seen(const Embedded& scheme, double size) {
  return scheme.steps > 0 ? size : static_cast<double>(static_cast<A>(size));
}

// Whether a derivative goes through the error of an attempt with that ratio.
inline bool goes_through(Through through, const Embedded& scheme, double ratio) {
  return through == kAllSizes && NextFactor(ratio, scheme.order).free;
}

// How many numbers the norms of y and of z are means over.
inline Halves entries(const FieldSizes& sizes, int64_t samples) {
  return {{static_cast<double>(samples * sizes.entries[0]), static_cast<double>(samples * sizes.entries[1])}};
}

// The forward of samples that share their steps. `each(f)` calls f(worker, sample, sums) for all of them.
template <class A>
class Forward {
  using Worker = Solver<A>;

 public:
  Forward(const Embedded& scheme, const FieldSizes& sizes, const SolveCall& call, int64_t samples, Solve<A>& solve)
      : scheme_(scheme), sizes_(sizes), call_(call), solve_(solve), entries_(entries(sizes, samples)) {
    solve.samples = samples;
  }

  template <class Each>
  void run(const Each& each) {
    choose_first(each);
    SolveLog& log = solve_.log;
    StepMaps<A> spare, next;
    // The errors of steps from an infinite state may be finite.
    if (!starts_finite_) return void(log.end = kNotFinite);
    for (;; log.h *= scheme_.steps > 0 ? 1 : NextFactor(log.attempts.back().ratio, scheme_.order).value) {
      const auto tried = static_cast<int64_t>(log.attempts.size());
      if (scheme_.steps == 0) log.end = hindrance(tried, scheme_.most, log.t, log.h);
      if (log.end != kReached) return;
      const bool last = scheme_.steps > 0 ? tried + 1 == scheme_.steps : log.t + log.h >= scheme_.t1;
      if (next.y.empty()) next = new_step<A>(sizes_, scheme_.stages - 1, solve_.samples, call_.keep);
      if (!last) give_ends(sizes_, next);
      const Halves norms = attempt(each, next, last);
      const Larger larger(norms);
      const double ratio = larger.value;
      log.attempts.push_back({log.t, log.h, ratio, ratio <= 1, larger.half});
      if (!(ratio <= 1)) {
        if (call_.keep && goes_through(call_.through, scheme_, ratio)) keep_rejected(next);
        continue;
      }
      std::swap(next, spare);  // what has been written
      next = {};
      if (!call_.keep && !solve_.steps.empty()) std::swap(next, solve_.steps.back()), solve_.steps.pop_back();
      solve_.steps.push_back(std::move(spare));
      spare = {};
      if (last) return;
      log.t += log.h;
      if (!is_finite(norms[0]) || !is_finite(norms[1])) return void(log.end = kNotFinite);
    }
  }

 private:
  void keep_rejected(StepMaps<A>& next) {
    next.ends.clear(), next.end_y = next.end_z = nullptr;
    solve_.rejected.push_back(std::move(next));
    next = {};
  }

  template <class Each>
  void choose_first(const Each& each) {
    SolveLog& log = solve_.log;
    const bool chooses = scheme_.chooses();
    solve_.start = new_step<A>(sizes_, 1, solve_.samples, true);
    Sums sums = each([&](Worker& worker, int64_t n, Sums& sums) { worker.begin(n, solve_, chooses, sums.data()); });
    starts_finite_ = is_finite(sums[4]);
    log.h = scheme_.first_step;
    if (!chooses) return;
    log.first.state = halves(sums[0], sums[1]), log.first.slope = halves(sums[2], sums[3]);
    const double size = log.first.trial();
    solve_.trial = new_step<A>(sizes_, 1, solve_.samples, true);
    sums = each([&](Worker& worker, int64_t n, Sums& sums) { worker.try_first(n, solve_, size, sums.data()); });
    log.first.change = halves(sums[0], sums[1]);
    log.h = log.first.size(scheme_.order);
    if (call_.through == kNoSize) solve_.trial = {};
  }

  template <class Each>
  Halves attempt(const Each& each, const StepMaps<A>& to, bool last) {
    const SolveLog& log = solve_.log;
    const double size = seen<A>(scheme_, log.h);
    const ScaledStep step(scheme_, size);
    std::vector<double> weights;
    if (last) weights = at_end(scheme_, (scheme_.t1 - log.t) / log.h, false);
    for (double& weight : weights) weight *= size;
    const Attempted<A> tried{step, last ? weights.data() : nullptr, to};
    const Sums sums =
        each([&](Worker& worker, int64_t n, Sums& sums) { worker.attempt(n, solve_, tried, sums.data()); });
    return halves(sums[0], sums[1]);
  }

  // Root mean squares of both halves.
  Halves halves(double y, double z) const { return {{std::sqrt(y / entries_[0]), std::sqrt(z / entries_[1])}}; }

  const Embedded& scheme_;
  const FieldSizes& sizes_;
  const SolveCall& call_;
  Solve<A>& solve_;
  const Halves entries_;
  bool starts_finite_ = true;
};

// The backward of samples that share their steps, likewise.
template <class A>
class Backward {
  using Worker = Solver<A>;

 public:
  Backward(const Embedded& scheme, const FieldSizes& sizes, const SolveCall& call, const Solve<A>& solve)
      : scheme_(scheme), sizes_(sizes), solve_(solve), entries_(entries(sizes, solve.samples)) {
    make_links(call.through);
    const Link<A>& last = way_.links.back();
    at_ = (scheme.t1 - last.attempt.t) / last.attempt.h;
    way_.interpolating = at_end(scheme, at_, false), way_.rates = at_end(scheme, at_, true);
    for (double& weight : way_.interpolating) weight *= last.size;
    way_.trial = static_cast<double>(static_cast<A>(solve.log.first.trial()));
  }

  // (12), leg by leg: only where an error decides a size must that size's cotangent be there, of all samples.
  template <class Each>
  void run(const Each& each) {
    std::vector<Link<A>>& links = way_.links;
    StartBars<A> bars;
    std::vector<Tensor> room;
    const auto take = [&](int64_t size) {
      return static_cast<A*>(room.emplace_back(new_vector(size * solve_.samples, scalar_type<A>())).data_ptr());
    };
    if (way_.through_place) bars = {solve_.samples, take(sizes_.y), take(sizes_.z), take(sizes_.y), take(sizes_.z)};
    double size_bar = 0, place = 0;
    for (size_t end = links.size(), low; end > 0; end = low) {
      low = weigh_leg(end);
      const Sums sums = each([&](Worker& worker, int64_t n, Sums& sums) {
        worker.back(n, solve_, way_, low, end - 1, bars, sums.data());
      });
      if (end == links.size()) place = sums[1];
      size_bar = sums[0] + links[end - 1].weight * size_bar;
      for (size_t k = low; k < end; ++k)
        if (links[k].attempt.accepted) size_bar -= links[k].weight * place * (k + 1 == links.size() ? at_ : 1);
      if (low > 0) aim(links[low - 1], size_bar);
    }
    if (way_.through_first) through_choice(each, bars, size_bar);
  }

 private:
  void make_links(Through through) {
    const std::vector<Attempt>& attempts = solve_.log.attempts;
    double down = through != kNoSize && scheme_.chooses() ? 1 : 0;
    size_t accepted = 0, rejected = 0;
    for (const Attempt& one : attempts) {
      const bool free = goes_through(through, scheme_, one.ratio) && &one != &attempts.back();
      if (one.accepted || free) {
        const StepMaps<A>& maps = one.accepted ? solve_.steps[accepted] : solve_.rejected[rejected];
        const StepMaps<A>* before = accepted > 0 ? &solve_.steps[accepted - 1] : nullptr;
        const double size = seen<A>(scheme_, one.h);
        way_.links.push_back({one, ScaledStep(scheme_, size), size, maps, before, free, down});
        down = 1, ++(one.accepted ? accepted : rejected);
      }
      down *= through == kAllSizes ? NextFactor(one.ratio, scheme_.order).value : 0;
    }
    way_.through_first = way_.links[0].down != 0;
    way_.through_place = way_.through_first || std::any_of(way_.links.begin(), way_.links.end(),
                                                           [](const Link<A>& link) { return link.free; });
  }

  // Weighs the links of the leg that goes down from before `end`, and returns the last of them.
  size_t weigh_leg(size_t end) {
    size_t low = end - 1;
    while (low > 0 && !way_.links[low - 1].free) --low;
    double weight = 1;
    for (size_t k = low; k < end; ++k) way_.links[k].weight = weight *= way_.links[k].down;
    return low;
  }

  // The pull-back of a link's error, for the cotangent of its size but for what comes through its error.
  void aim(Link<A>& link, double size_bar) const {
    const Attempt& one = link.attempt;
    const double ratio_bar = -size_bar * one.h / (static_cast<double>(scheme_.order) * one.ratio);
    link.error = ratio_bar / (one.ratio * entries_[one.half]);
  }

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
  double factor(double bar, const Halves& values, int64_t& half) const {
    const Larger larger(values);
    half = larger.half;
    return bar == 0 ? 0 : bar / (larger.value * entries_[half]);
  }

  const Embedded& scheme_;
  const FieldSizes& sizes_;
  const Solve<A>& solve_;
  const Halves entries_;
  WayBack<A> way_;
  double at_ = 0;  // the part of the last step at which t1 lies
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
template <class A>
void find_solves(const FieldSizes& sizes, const Embedded& scheme, Through through, int64_t samples,
                 const std::vector<double>& log, std::vector<Tensor>& kept, std::vector<Solve<A>>& solves) {
  size_t next = 0;
  const double* from = log.data();
  for (Solve<A>& solve : solves) {
    solve.samples = samples, solve.log = SolveLog::read(from);
    solve.start = find_step<A>(sizes, 1, samples, false, kept, next);
    if (through != kNoSize && scheme.chooses()) solve.trial = find_step<A>(sizes, 1, samples, false, kept, next);
    const auto find = [&](bool ends) { return find_step<A>(sizes, scheme.stages - 1, samples, ends, kept, next); };
    const std::vector<Attempt>& attempts = solve.log.attempts;
    for (const Attempt& one : attempts)
      if (one.accepted) solve.steps.push_back(find(&one != &attempts.back()));
    for (const Attempt& one : attempts)
      if (!one.accepted && goes_through(through, scheme, one.ratio)) solve.rejected.push_back(find(false));
  }
}

template <class A>
void run_solves(const FieldSizes& sizes, int64_t parts, const Embedded& scheme, const SolveCall& call,
                std::vector<double>& log, std::vector<Tensor>& kept, const MakeSolver<A>& make) {
  const bool backward = call.cotangent != nullptr;
  if (backward && kept.empty()) {
    const Tensor& like = *call.cotangent;
    const Tensor again = new_contiguous(like.scalar_type(), like.sizes());
    log.clear();
    run_solves<A>(sizes, parts, scheme, {call.x, nullptr, again, call.per_sample, true, call.through}, log, kept, make);
  }
  const int64_t samples = call.x.size(0), alone = call.per_sample ? samples : 1, together = samples / alone;
  std::vector<Solve<A>> solves(alone);
  if (backward) find_solves(sizes, scheme, call.through, together, log, kept, solves);
  Team<Solver<A>> team(samples, parts, [&](Arena& arena) { return make(call, arena); });
  each_solve(solves, team, [&](Solve<A>& solve, const auto& each) {
    if (backward)
      Backward<A>(scheme, sizes, call, solve).run(each);
    else
      Forward<A>(scheme, sizes, call, together, solve).run(each);
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
    for (const StepMaps<A>& step : solve.rejected) leave(step.pieces);
  }
}

template <class A>
void run_solve(const PackedPair<A>& packed, const Embedded& scheme, const SolveCall& call, std::vector<double>& log,
               std::vector<Tensor>& kept, const Tensor& gradients) {
  run_solves_of<SkewPair<A>>(packed.spec, workers_for(call.x.size(0)), scheme, call, log, kept, gradients);
}

}  // namespace fastode::resident
