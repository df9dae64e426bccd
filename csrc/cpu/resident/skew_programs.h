// Whole solutions of the skew pair on one resident sample, and the pair alone, forwards and backwards. Equations:
// README.md of fastode/ops/schemes/skew_pair.
#pragma once

#include "skew_stages.h"

namespace fastode::resident {

// Equal steps of an explicit Runge-Kutta scheme with `a` [stages, stages] and `b` [stages], both times the step; `used`
// [steps, stages, 2] says which slopes the result depends on.
struct March {
  int64_t steps, stages;
  const double *a, *b;
  const int64_t* used;

  Want want(int64_t step, int64_t stage) const {
    const int64_t* pair = used + 2 * (step * stages + stage);
    return {pair[0] != 0, pair[1] != 0};
  }
  int64_t evaluations() const { return steps * stages; }
  StepTable table() const { return {stages, a, b}; }
};

// The guides and statistics of evaluations: of the whole batch where backward finds them, else of the sample at hand.
template <class A>
struct Traces {
  std::vector<A*> y, z;  // one for each evaluation, null where there is none
  A* statistics = nullptr;
  int64_t samples = 0;  // 0: of the sample at hand

  A* of(A* base, int64_t size, int64_t n) const { return base && samples ? base + n * size : base; }

  // Has one half of the guides of sample n prefetched.
  void expect(bool half_y, const SkewPair<A>& pair, Ahead& ahead, int64_t n) const {
    const int64_t size = half_y ? pair.y_size() : pair.z_size();
    for (const A* base : half_y ? y : z)
      if (base && n < samples) ahead.add(reinterpret_cast<const char*>(base + n * size), size * sizeof(A));
  }
};

// Guides and statistics in the arena: of every evaluation if `separate`, else the steps share those of one step.
template <class A>
Traces<A> scratch_traces(const SkewPair<A>& pair, const March& march, Arena& arena, bool separate) {
  Traces<A> traces;
  for (int64_t e = 0; e < march.evaluations(); ++e) {
    if (!separate && e >= march.stages) {
      traces.y.push_back(traces.y[e - march.stages]), traces.z.push_back(traces.z[e - march.stages]);
      continue;
    }
    traces.y.push_back(arena.take<A>(pair.y_size()));
    traces.z.push_back(arena.take<A>(pair.z_size()));
  }
  traces.statistics = arena.take<A>(march.evaluations() * pair.spec.statistics);
  return traces;
}

template <class A>
class SkewMarch {
 public:
  // `kept`: where forward leaves, and backward finds, what it may; null for neither.
  SkewMarch(const PairSpec<A>& spec, const March& march, Arena& arena, const Traces<A>* kept, bool backward)
      : stages_(spec, march.stages, arena, backward), march_(march), found_(kept && backward) {
    const SkewPair<A>& pair = stages_.pair;
    traces_ = kept ? *kept : scratch_traces(pair, march, arena, backward);
    in_room_ = !kept && backward && march.evaluations() == 1;
    for (int64_t step = 0; step < (backward ? march.steps : 1); ++step) states_.push_back(pair.maps(arena));
    for (int64_t step = 0; step < march.steps; ++step)
      for (int64_t i = 0; i < march.stages; ++i) reads_y_ = reads_y_ || pair.reads(march.want(step, i)).y;
  }

  // Has the convolutions of sample n prefetch `ahead`, with the guides of sample n + 1 at its end.
  void expect(Ahead& ahead, int64_t n) {
    for (const bool y : {true, false}) traces_.expect(y, stages_.pair, ahead, n + 1);
    stages_.pair.ahead = &ahead;
  }
  void expect_nothing() { stages_.pair.ahead = nullptr; }

  // The solution from x, sample n of the batch.
  void forward(const View<A>& x, int64_t n, const View<A>& out) {
    // Where no evaluation reads y(0), it is made only at the end, in the result.
    const bool late = !reads_y_ && march_.steps == 1 && !stages_.same_start();
    Both<A> state{late ? out : start(x, true), x};
    for (int64_t step = 0; step < march_.steps; ++step) {
      const bool last = step + 1 == march_.steps;
      run_step(step, n, state);
      if (late) stages_.pair.start(x, out);
      const Both<A>& next = states_[0];
      end_step(true, state.y, last ? out : next.y);
      if (!last) end_step(false, state.z, next.z);
      state = next;
    }
  }

  // The cotangent of x for the cotangent of the solution; parameters' gradients are added.
  void backward(const View<A>& x, int64_t n, const View<A>& cotangent, const View<A>& out, A* gradients) {
    std::vector<Both<A>> states{{start(x, reads_y_ || march_.steps > 1), x}};
    for (int64_t step = 0; step < march_.steps; ++step) {
      if (!found_)
        run_step(step, n, states[step]);
      else if (step + 1 < march_.steps)
        restore(step, n);
      if (step + 1 == march_.steps) break;
      states.push_back(states_[step + 1]);
      end_step(true, states[step].y, states[step + 1].y);
      end_step(false, states[step].z, states[step + 1].z);
    }
    stages_.y_total = {cotangent, true}, stages_.z_total = {};
    for (int64_t step = march_.steps; step-- > 0;) {
      restore(step, n);
      stages_.pull(march_.table(), 0, states[step], step == 0 ? &out : nullptr, gradients);
    }
    stages_.add_start(out);
  }

 private:
  // y(0), which is x where the shapes agree.
  View<A> start(const View<A>& x, bool wanted) const {
    if (stages_.same_start()) return x;
    if (wanted) stages_.pair.start(x, states_[0].y);
    return states_[0].y;
  }

  // Places the step's traces.
  void take(int64_t step, int64_t n) {
    const SkewPair<A>& pair = stages_.pair;
    for (int64_t i = 0; i < march_.stages; ++i) {
      const int64_t e = step * march_.stages + i, size = pair.spec.statistics;
      stages_.place(i, in_room_ ? pair.guide_room() : pair.y_plane.compact(traces_.of(traces_.y[e], pair.y_size(), n)),
                    pair.z_plane.compact(traces_.of(traces_.z[e], pair.z_size(), n)),
                    traces_.of(traces_.statistics + e * size * std::max<int64_t>(1, traces_.samples), size, n),
                    march_.want(step, i));
    }
  }

  void restore(int64_t step, int64_t n) {
    take(step, n);
    stages_.restore(0, march_.stages);
  }

  void run_step(int64_t step, int64_t n, const Both<A>& state) {
    take(step, n);
    for (int64_t i = 0; i < march_.stages; ++i) stages_.evaluate(march_.table(), i, state, stages_.pair.workspace());
  }

  void end_step(bool y, const View<A>& from, const View<A>& to) const {
    stages_.advance_by(y, march_.b, march_.stages, from, to);
  }

  SkewStages<SkewPair<A>> stages_;
  March march_;
  bool found_, reads_y_ = false, in_room_ = false;
  Traces<A> traces_;
  std::vector<Both<A>> states_;
};

}  // namespace fastode::resident
