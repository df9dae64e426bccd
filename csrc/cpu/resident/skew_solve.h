// A skew field's solution by an embedded scheme on one resident sample: what a worker does between two looks at the
// batch, forwards and backwards. Equations: README.md of fastode/ops/schemes/skew_pair.
#pragma once

#include <functional>
#include <memory>

#include "skew_engine.h"
#include "skew_stages.h"
#include "solve_steps.h"

namespace fastode::resident {

template <class Pair>
class SkewSolve final : public Solver<typename Pair::Real> {
 public:
  using A = typename Pair::Real;

  // `gradients`: the accumulators of all parts.
  SkewSolve(const typename Pair::Spec& spec, const Embedded& scheme, const Tensor& x, const Tensor& out,
            const Tensor* cotangent, bool with_errors, Arena& arena, A* gradients)
      : stages_(spec, scheme.stages, arena, cotangent, with_errors),
        scheme_(scheme),
        x_(x, arena),
        out_(out, arena),
        cotangent_(cotangent ? *cotangent : out, arena),
        all_gradients_(gradients),
        gradients_(gradients) {
    const Pair& pair = stages_.pair;
    if (!stages_.same_start()) start_y_ = pair.y_map(arena);
    if (cotangent) {
      bar_ = pair.maps(arena);
      if (with_errors) start_bar_ = pair.maps(arena), end_bar_ = pair.maps(arena);
      return;
    }
    for (int64_t i = 1; i < scheme.stages; ++i) guides_.push_back(pair.maps(arena));
    end_ = pair.maps(arena);
  }

  void enter(int64_t part) override {
    if (all_gradients_) gradients_ = all_gradients_ + part * stages_.pair.spec.gradients;
  }

  void begin(int64_t n, const Solve<A>& solve, bool chooses, double* sums) override {
    const Both<A> state = start(n);
    if (scheme_.steps == 0) sums[4] += zero_of<A>(stages_.plane(false), stages_.blocks(false), state.z);
    put(0, solve.start, 0, n);
    stages_.made[0].made.z = scheme_.steps != 1 || scheme_.ends_by_z(0);
    stages_.evaluate(table_of_one(), 0, state, stages_.pair.workspace());
    for (const bool y : {true, false}) {
      if (!chooses) break;
      sums[!y] += stages_.squares(y, kFirst, 0, y ? state.y : state.z, tolerance(y, state, state));
      sums[2 + !y] += stages_.squares(y, kFirst, 1, stages_.nothing(), tolerance(y, state, state));
    }
  }

  void try_first(int64_t n, const Solve<A>& solve, double size, double* sums) override {
    const Both<A> state = start(n);
    put_choice(n, solve);
    const double a[] = {0, 0, size, 0};
    stages_.evaluate({2, a, kNone}, 1, state, stages_.pair.workspace());
    for (const bool y : {true, false})
      sums[!y] += stages_.squares(y, kChange, 2, stages_.nothing(), tolerance(y, state, state));
  }

  void attempt(int64_t n, const Solve<A>& solve, const Attempted<A>& tried, double* sums) override {
    const int64_t stages = scheme_.stages;
    const StepMaps<A>* before = solve.steps.empty() ? nullptr : &solve.steps.back();
    const Both<A> state = before ? end_of(*before, n) : start(n);
    const Both<A> end = tried.to.end_y ? end_of(tried.to, n) : end_;
    put_first(before, solve, n);
    for (int64_t i = 1; i < stages; ++i) put(i, tried.to, i - 1, n);
    stages_.restore(0, 1);
    const ScaledStep& step = tried.step;
    const StepTable table{stages, step.a.data(), step.b.data()};
    // By steps of equal size nothing reads the slope at t1.
    const bool to_end = scheme_.steps == 0 || !tried.interpolating;
    for (int64_t i = 1; i < stages - !to_end; ++i) {
      stages_.made[i].made.z = to_end || scheme_.ends_by_z(i);
      stages_.evaluate(table, i, state, scheme_.ends_in_solution && i + 1 == stages ? end : stages_.pair.workspace());
    }
    for (const bool y : {true, false}) {
      if (scheme_.steps > 0) break;  // which have no error, and end in the solution
      if (!scheme_.ends_in_solution) stages_.advance_by(y, table.b, stages, y ? state.y : state.z, y ? end.y : end.z);
      sums[!y] += stages_.squares(y, step.error.data(), stages, stages_.nothing(), tolerance(y, state, end));
    }
    if (!tried.interpolating) return;
    stages_.advance_by(true, tried.interpolating, stages, state.y, out_.view(n));
    out_.store(n);
  }

  void back(int64_t n, const Solve<A>& solve, const WayBack<A>& way, size_t low, size_t top, const StartBars<A>& bars,
            double* sums) override {
    const bool first_leg = top + 1 == way.links.size();
    if (first_leg)
      stages_.y_total = {cotangent_.load(n), true}, stages_.z_total = stages_.carried_y = stages_.carried_z = {};
    else
      find_bars(n, bars);
    for (size_t k = top + 1; k-- > low;) {
      const Link<A>& link = way.links[k];
      const bool last = k + 1 == way.links.size();
      if (!link.attempt.accepted && link.error == 0) continue;
      const Both<A> state = link.before ? end_of(*link.before, n) : start(n);
      put_first(link.before, solve, n);
      for (int64_t i = 1; i < scheme_.stages; ++i) put(i, link.maps, i - 1, n);
      stages_.restore(0, scheme_.stages);
      const StepTable table{scheme_.stages, link.step.a.data(), (last ? way.interpolating : link.step.b).data(),
                            link.step.error.data()};
      if (way.through_place && last)
        sums[1] += stages_.product_with(true, way.rates.data(), scheme_.stages, stages_.y_total.map);
      if (link.error == 0)
        pull_sized(table, state, link, sums);
      else
        pull_with_error(n, table, state, link, bars, sums);
    }
    if (low == 0 && !way.through_first) return end_at_start(n, solve);
    for (const bool y : {true, false}) {
      store(y, y ? stages_.y_total : stages_.z_total, state_of(y, bars, n));
      store(y, y ? stages_.carried_y : stages_.carried_z, slope_of(y, bars, n));
    }
  }

  void back_trial(int64_t n, const Solve<A>& solve, const WayBack<A>& way, const StartBars<A>& bars,
                  double* sum) override {
    const Both<A> state = start(n);
    put_choice(n, solve);
    stages_.restore(0, 2);
    const bool y = way.change_half == 0;
    const View<A> change = y ? stages_.pair.workspace().y : stages_.pair.workspace().z, bar = y ? bar_.y : bar_.z;
    stages_.advance_by(y, kChange, 2, stages_.nothing(), change);
    combine_maps<A>(stages_.plane(y), stages_.blocks(y), bar, {});
    find_totals(n, bars);
    pull_scaled_squares<A>(stages_.plane(y), stages_.blocks(y), static_cast<A>(way.change), change,
                           tolerance(y, state, state), bar, y ? stages_.y_total.map : stages_.z_total.map);
    add(y, slope_of(y, bars, n), -1, bar);
    stages_.carried_y = stages_.carried_z = {};
    (y ? stages_.carried_y : stages_.carried_z) = {bar, true};
    const double a[] = {0, 0, way.trial, 0};
    stages_.pull({2, a, kNone}, 1, state, nullptr, gradients_);
    for (const bool half : {true, false}) {
      const Total<A>& slope = half ? stages_.carried_y : stages_.carried_z;
      store(half, half ? stages_.y_total : stages_.z_total, state_of(half, bars, n));
      if (!slope.present) continue;
      *sum += stages_.product_with(half, kFirst, 1, slope.map) / way.trial;
      add(half, slope_of(half, bars, n), 1, slope.map);
    }
  }

  void back_start(int64_t n, const Solve<A>& solve, const WayBack<A>& way, const StartBars<A>& bars) override {
    const Both<A> state = start(n);
    put(0, solve.start, 0, n);
    stages_.restore(0, 1);
    find_bars(n, bars);
    const auto through = [&](double factor, int64_t half, bool of_slope) {
      if (factor == 0) return;
      const bool y = half == 0;
      const View<A> total = y ? stages_.y_total.map : stages_.z_total.map;
      View<A> value = y ? state.y : state.z, bar = total;
      if (of_slope) {
        value = y ? stages_.pair.workspace().y : stages_.pair.workspace().z;
        bar = y ? stages_.carried_y.map : stages_.carried_z.map;
        stages_.advance_by(y, kFirst, 1, stages_.nothing(), value);
      }
      pull_scaled_squares<A>(stages_.plane(y), stages_.blocks(y), static_cast<A>(factor), value,
                             tolerance(y, state, state), bar, total);
    };
    through(way.slope, way.slope_half, true);
    through(way.state, way.state_half, false);
    end_at_start(n, solve);
  }

 private:
  static constexpr double kNone[] = {0, 0}, kFirst[] = {1}, kChange[] = {-1, 1};

  static StepTable table_of_one() { return {1, kNone, kNone}; }

  Tolerance<A> tolerance(bool y, const Both<A>& start, const Both<A>& end) const {
    return {static_cast<A>(scheme_.rtol), static_cast<A>(scheme_.atol), y ? start.y : start.z, y ? end.y : end.z};
  }

  Both<A> start(int64_t n) {
    const View<A> x = x_.load(n);
    if (stages_.same_start()) return {x, x};
    stages_.pair.start(x, start_y_);
    return {start_y_, x};
  }

  View<A> map_of(bool y, A* base, int64_t n) const {
    const Pair& pair = stages_.pair;
    return y ? pair.y_plane.compact(base + n * pair.y_size()) : pair.z_plane.compact(base + n * pair.z_size());
  }

  View<A> state_of(bool y, const StartBars<A>& bars, int64_t n) const {
    return map_of(y, y ? bars.y : bars.z, bars.samples > 1 ? n : 0);
  }
  View<A> slope_of(bool y, const StartBars<A>& bars, int64_t n) const {
    return map_of(y, y ? bars.slope_y : bars.slope_z, bars.samples > 1 ? n : 0);
  }

  Both<A> end_of(const StepMaps<A>& step, int64_t n) const {
    return {map_of(true, step.end_y, step.at(n)), map_of(false, step.end_z, step.at(n))};
  }

  // Says where the trace of a stage lies: evaluation e of a step's.
  void put(int64_t stage, const StepMaps<A>& maps, int64_t e, int64_t n) {
    const int64_t at = maps.at(n), size = stages_.pair.spec.statistics;
    const bool left = maps.y[e] != nullptr;
    stages_.place(stage, left ? map_of(true, maps.y[e], at) : guides_[stage - 1].y,
                  left ? map_of(false, maps.z[e], at) : guides_[stage - 1].z,
                  maps.statistics + (e * maps.samples + at) * size, {true, true});
  }

  // Stage 0 of a step: the last evaluation of the one before, or that at time 0.
  void put_first(const StepMaps<A>* before, const Solve<A>& solve, int64_t n) {
    const StepMaps<A>& maps = before ? *before : solve.start;
    put(0, maps, static_cast<int64_t>(maps.y.size()) - 1, n);
  }

  void put_choice(int64_t n, const Solve<A>& solve) {
    put(0, solve.start, 0, n), put(1, solve.trial, 0, n);
    stages_.restore(0, 1);
  }

  // (8) but for the interpolant's part: the pull-back of a step, whose slopes and their cotangents multiplied, over the
  // size, are the cotangent of it. Where that is not asked for, the pull-back alone.
  void pull_sized(const StepTable& table, const Both<A>& state, const Link<A>& link, double* sum) {
    if (link.weight == 0) return stages_.pull(table, 1, state, nullptr, gradients_);
    double total = 0;
    // Of the last stage, without what the next step has carried back.
    const auto add_last = [&](bool y, const double* weights, const Total<A>& bar) {
      std::vector<double> row(table.stages, 0.0);
      row.back() = weights[table.stages - 1];
      if (bar.present && row.back() != 0) total += stages_.product_with(y, row.data(), table.stages, bar.map);
    };
    for (const bool y : {true, false}) {
      add_last(y, table.b, y ? stages_.y_total : stages_.z_total);
      add_last(y, table.error, y ? stages_.error_y : stages_.error_z);
    }
    stages_.product = &total;
    stages_.pull(table, 1, state, nullptr, gradients_);
    stages_.product = stages_.pair.product = nullptr;
    for (const bool y : {true, false}) {
      const Total<A>& bar = y ? stages_.carried_y : stages_.carried_z;
      if (bar.present) total += stages_.product_with(y, kFirst, 1, bar.map);
    }
    *sum += link.weight * total / link.size;
  }

  // As pull_sized() where a leg begins, which also goes through the step's error; a rejected attempt adds its part to
  // what is there of its start.
  void pull_with_error(int64_t n, const StepTable& table, const Both<A>& state, const Link<A>& link,
                       const StartBars<A>& bars, double* sum) {
    const bool y = link.attempt.half == 0, accepted = link.attempt.accepted;
    const View<A> error = y ? bar_.y : bar_.z, start = y ? start_bar_.y : start_bar_.z;
    const View<A> end_bar = y ? end_bar_.y : end_bar_.z;
    if (!accepted) stages_.advance_by(y, table.b, table.stages, y ? state.y : state.z, end_bar);
    const Both<A> end = accepted ? end_of(link.maps, n) : end_bar_;
    stages_.pull_errors(y, table, link.error, tolerance(y, state, end), {error, start, end_bar});
    (y ? stages_.error_y : stages_.error_z) = {error, true};
    Total<A>& total = y ? stages_.y_total : stages_.z_total;
    if (accepted) {
      add(y, total.map, 1, end_bar);
    } else {
      stages_.y_total = stages_.z_total = stages_.carried_y = stages_.carried_z = {};
      total = {end_bar, true};
    }
    pull_sized(table, state, link, sum);
    stages_.error_y = stages_.error_z = {};
    add(y, total.map, 1, start);
    if (accepted) return;
    for (const bool half : {true, false}) {
      const Total<A>& of_state = half ? stages_.y_total : stages_.z_total;
      const Total<A>& of_slope = half ? stages_.carried_y : stages_.carried_z;
      if (of_state.present) add(half, state_of(half, bars, n), 1, of_state.map);
      if (of_slope.present) add(half, slope_of(half, bars, n), 1, of_slope.map);
    }
    find_bars(n, bars);
  }

  void end_at_start(int64_t n, const Solve<A>& solve) {
    const Both<A> state = start(n);
    put(0, solve.start, 0, n);
    stages_.restore(0, 1);
    const View<A> out = out_.view(n);
    stages_.pull(table_of_one(), 0, state, &out, gradients_);
    stages_.add_start(out);
    out_.store(n);
  }

  void find_totals(int64_t n, const StartBars<A>& bars) {
    stages_.y_total = {state_of(true, bars, n), true}, stages_.z_total = {state_of(false, bars, n), true};
  }

  void find_bars(int64_t n, const StartBars<A>& bars) {
    find_totals(n, bars);
    stages_.carried_y = {slope_of(true, bars, n), true}, stages_.carried_z = {slope_of(false, bars, n), true};
  }

  void store(bool y, const Total<A>& total, const View<A>& to) const {
    Combine<A> sum;
    if (total.present) sum.add(1, total.map);
    combine_maps<A>(stages_.plane(y), stages_.blocks(y), to, sum);
  }

  void add(bool y, const View<A>& to, A factor, const View<A>& map) const {
    combine_maps<A>(stages_.plane(y), stages_.blocks(y), to, Combine<A>{}.add(1, to).add(factor, map));
  }

  SkewStages<Pair> stages_;
  const Embedded& scheme_;
  typename PortOf<Pair>::Type x_, out_, cotangent_;
  A *all_gradients_, *gradients_;
  View<A> start_y_ = {};
  std::vector<Both<A>> guides_;  // of evaluations that are not left to anyone
  Both<A> end_, bar_, start_bar_, end_bar_;
};

template <class Pair>
FieldSizes sizes_of(const typename Pair::Spec& spec) {
  Arena none(nullptr);
  const Pair pair(spec, none, false);
  return {pair.y_size(), pair.z_size(), spec.statistics, pair.entries()};
}

// Makes a worker of a call.
template <class A>
using MakeSolver = std::function<std::unique_ptr<Solver<A>>(const SolveCall&, Arena&)>;

// Solves of a field by its workers; the batch is in `parts`.
template <class A>
void run_solves(const FieldSizes& sizes, int64_t parts, const Embedded& scheme, const SolveCall& call,
                std::vector<double>& log, std::vector<Tensor>& kept, const MakeSolver<A>& make);

// `gradients`: accumulators of each of the parts.
template <class Pair>
void run_solves_of(const typename Pair::Spec& spec, int64_t parts, const Embedded& scheme, const SolveCall& call,
                   std::vector<double>& log, std::vector<Tensor>& kept, const Tensor& gradients) {
  using A = typename Pair::Real;
  run_solves<A>(sizes_of<Pair>(spec), parts, scheme, call, log, kept, [&](const SolveCall& one, Arena& arena) {
    A* to = one.cotangent ? worker_gradients(spec, gradients, 0) : nullptr;
    return std::make_unique<SkewSolve<Pair>>(spec, scheme, one.x, one.out, one.cotangent, one.through == kAllSizes,
                                             arena, to);
  });
}

}  // namespace fastode::resident
