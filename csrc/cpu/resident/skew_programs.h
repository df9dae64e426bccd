// Whole solutions of the skew pair on one resident sample, and the pair alone, forwards and backwards. Equations:
// README.md of fastode/ops/schemes/skew_pair.
#pragma once

#include "skew.h"

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
      : pair_(spec, arena, backward), march_(march), found_(kept && backward) {
    traces_ = kept ? *kept : scratch_traces(pair_, march, arena, backward);
    in_room_ = !kept && backward && march.evaluations() == 1;
    for (int64_t i = 0; i < march.stages; ++i) {
      if (!spec.tells) s_.push_back(pair_.maps(arena));
      if (backward) bars_.push_back(pair_.maps(arena));
    }
    for (int64_t step = 0; step < (backward ? march.steps : 1); ++step) states_.push_back(pair_.maps(arena));
    if (backward) point_ = pair_.maps(arena), sum_ = pair_.maps(arena);
    for (int64_t step = 0; step < march.steps; ++step)
      for (int64_t i = 0; i < march.stages; ++i) reads_y_ = reads_y_ || pair_.reads(march.want(step, i)).y;
  }

  // Has the convolutions of sample n prefetch `ahead`, with the guides of sample n + 1 at its end.
  void expect(Ahead& ahead, int64_t n) {
    for (const bool y : {true, false}) traces_.expect(y, pair_, ahead, n + 1);
    pair_.ahead = &ahead;
  }

  // The solution from x, sample n of the batch.
  void forward(const View<A>& x, int64_t n, const View<A>& out) {
    // Where no evaluation reads y(0), it is made only at the end, in the result.
    const bool late = !reads_y_ && march_.steps == 1 && !same_start();
    Both<A> state{late ? out : start(x, true), x};
    for (int64_t step = 0; step < march_.steps; ++step) {
      const bool last = step + 1 == march_.steps;
      run_step(step, n, state);
      if (late) repeat(x, out);
      const Both<A>& next = states_[0];
      advance_by(step, n, true, march_.b, march_.stages, state.y, last ? out : next.y);
      if (!last) advance_by(step, n, false, march_.b, march_.stages, state.z, next.z);
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
      advance_by(step, n, true, march_.b, march_.stages, states[step].y, states[step + 1].y);
      advance_by(step, n, false, march_.b, march_.stages, states[step].z, states[step + 1].z);
    }
    y_total_ = {cotangent, true}, z_total_ = {{}, false};
    for (int64_t step = march_.steps; step-- > 0;) {
      restore(step, n);
      pull_step(step, n, states[step], step == 0 ? &out : nullptr, gradients);
    }
    const SkewShape& shape = pair_.spec.shape;
    if (!same_start())
      add_repeated<A>(pair_.y_plane, shape.in_channels, shape.channels, shape.stride, out, y_total_.map);
  }

 private:
  struct Total {
    View<A> map;
    bool present;
  };

  bool same_start() const {
    const SkewShape& shape = pair_.spec.shape;
    return shape.stride == 1 && shape.channels == shape.in_channels;
  }

  // y(0), which is x where the shapes agree.
  View<A> start(const View<A>& x, bool wanted) const {
    if (same_start()) return x;
    if (wanted) repeat(x, states_[0].y);
    return states_[0].y;
  }

  void repeat(const View<A>& x, const View<A>& y) const {
    const SkewShape& shape = pair_.spec.shape;
    repeat_channels<A>(pair_.y_plane, shape.in_channels, shape.channels, shape.stride, x, y);
  }

  Trace<A> trace(int64_t step, int64_t stage, int64_t n) const {
    const int64_t e = step * march_.stages + stage, size = pair_.spec.statistics;
    Trace<A> trace;
    trace.guide = {in_room_ ? pair_.guide_room() : pair_.y_plane.compact(traces_.of(traces_.y[e], pair_.y_size(), n)),
                   pair_.z_plane.compact(traces_.of(traces_.z[e], pair_.z_size(), n))};
    trace.s = s_.empty() ? trace.guide : s_[stage];
    trace.statistics = traces_.of(traces_.statistics + e * size * std::max<int64_t>(1, traces_.samples), size, n);
    trace.made = march_.want(step, stage);
    return trace;
  }

  void restore(int64_t step, int64_t n) const {
    for (int64_t i = 0; i < march_.stages; ++i) {
      Trace<A> found = trace(step, i, n);
      pair_.restore(found);
    }
  }

  // out = base + the sum of row[j] times slope j of one half.
  void advance_by(int64_t step, int64_t n, bool y, const double* row, int64_t count, const View<A>& base,
                  const View<A>& out) const {
    const Plane<A>& plane = y ? pair_.y_plane : pair_.z_plane;
    const int64_t blocks = y ? pair_.y_blocks() : pair_.z_blocks();
    Slope<A> slopes[kSlopes];
    int64_t used = 0;
    View<A> from = base;
    for (int64_t j = 0; j < count; ++j) {
      const Trace<A> made = trace(step, j, n);
      if (row[j] == 0 || !(y ? made.made.y : made.made.z)) continue;
      if (used == kSlopes) {
        advance<A>(plane, blocks, from, slopes, used, out);
        from = out, used = 0;
      }
      slopes[used++] = {static_cast<A>(row[j]), y ? made.s.y : made.s.z,
                        pair_.rows_of(y ? kPostY : kPostZ, made.statistics)};
    }
    advance<A>(plane, blocks, from, slopes, used, out);
  }

  // Where stage i of a step is evaluated, as far as it is read: at the state itself or, made there, in `to`.
  Both<A> point_of(int64_t step, int64_t i, int64_t n, const Both<A>& state, const Both<A>& to) const {
    const double* row = march_.a + i * march_.stages;
    if (std::all_of(row, row + i, [](double a) { return a == 0; })) return state;
    const Want reads = pair_.reads(march_.want(step, i));
    if (reads.y) advance_by(step, n, true, row, i, state.y, to.y);
    if (reads.z) advance_by(step, n, false, row, i, state.z, to.z);
    return to;
  }

  void run_step(int64_t step, int64_t n, const Both<A>& state) const {
    for (int64_t i = 0; i < march_.stages; ++i) {
      const Want want = march_.want(step, i);
      if (!want.any()) continue;
      Trace<A> made = trace(step, i, n);
      pair_.evaluate(point_of(step, i, n, state, pair_.workspace()), made, want);
    }
  }

  // (5): from the totals, the cotangents of y and z at a step's end, to those at its beginning; z's goes to `out` if
  // that is given.
  void pull_step(int64_t step, int64_t n, const Both<A>& state, const View<A>* out, A* gradients) {
    std::vector<Want> present(march_.stages);
    const auto terms = [&](bool y, double of_total, const auto& of_stage, int64_t first) {
      Combine<A> sum;
      const Total& total = y ? y_total_ : z_total_;
      if (total.present) sum.add(static_cast<A>(of_total), total.map);
      for (int64_t l = first; l < march_.stages; ++l)
        if (y ? present[l].y : present[l].z) sum.add(static_cast<A>(of_stage(l)), y ? bars_[l].y : bars_[l].z);
      return sum;
    };
    const auto slope_bar = [&](bool y, int64_t i) {
      return terms(y, march_.b[i], [&](int64_t l) { return march_.a[l * march_.stages + i]; }, i + 1);
    };
    for (int64_t i = march_.stages; i-- > 0;) {
      const Want want = march_.want(step, i);
      const Combine<A> y_bar = slope_bar(true, i), z_bar = slope_bar(false, i);
      const bool first = i == 0;
      Want left;
      Both<A> point;
      const Trace<A> made = trace(step, i, n);
      if (want.any()) {
        point = point_of(step, i, n, state, point_);
        left = pair_.pull(point, made, y_bar, z_bar, gradients, {true, true}, pair_.workspace());
      }
      const auto one = [](int64_t) { return 1.0; };
      for (const bool y : {true, false}) {
        const bool here = y ? left.y : left.z;
        Total& total = y ? y_total_ : z_total_;
        Combine<A> rest = first ? terms(y, 1, one, 1) : Combine<A>{};
        if (first && !y && out && same_start()) rest.add(1, y_total_.map);
        View<A> to = first ? (y ? sum_.y : out ? *out : sum_.z) : (y ? bars_[i].y : bars_[i].z);
        if (here)
          pair_.finish(y, y ? point.y : point.z, made, y ? pair_.workspace().y : pair_.workspace().z, to, rest,
                       gradients);
        else if (first && total.present && rest.count == 1 && (y || !out))
          to = total.map;
        else if (first)
          combine_maps<A>(y ? pair_.y_plane : pair_.z_plane, y ? pair_.y_blocks() : pair_.z_blocks(), to, rest);
        if (first)
          total = {to, here || rest.count > 0};
        else
          (y ? present[i].y : present[i].z) = here;
      }
    }
  }

  SkewPair<A> pair_;
  March march_;
  bool found_, reads_y_ = false, in_room_ = false;
  Traces<A> traces_;
  std::vector<Both<A>> s_, bars_, states_;
  Both<A> point_, sum_;
  Total y_total_ = {}, z_total_ = {};
};

}  // namespace fastode::resident
