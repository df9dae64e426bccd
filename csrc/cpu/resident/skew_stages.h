// The stages of one step of a skew field on one resident sample, forwards and backwards: what solutions by equal steps
// and by error share, of the pair (skew.h) and of the field of two matrix products (linear.h). Equations: README.md of
// fastode/ops/schemes/skew_pair.
#pragma once

#include "skew.h"

namespace fastode::resident {

// An explicit Runge-Kutta scheme, `a` [stages, stages], `b` and, if given, `error` [stages], all times a step's size.
struct StepTable {
  int64_t stages;
  const double *a, *b;
  const double* error = nullptr;

  const double* row(int64_t stage) const { return a + stage * stages; }
};

// A cotangent that may be zero.
template <class A>
struct Total {
  View<A> map = {};
  bool present = false;
};

// Pair: SkewPair or LinearPair.
template <class Pair>
class SkewStages {
 public:
  using A = typename Pair::Real;

  // For steps of at most `stages` stages; `with_errors`: the errors of steps may have cotangents, too.
  SkewStages(const typename Pair::Spec& spec, int64_t stages, Arena& arena, bool backward, bool with_errors = false)
      : pair(spec, arena, backward), made(stages), present_(stages) {
    for (int64_t i = 0; i < stages; ++i) {
      if (!spec.tells) s_.push_back(pair.maps(arena));
      if (backward) bars_.push_back(pair.maps(arena));
    }
    if (backward) point_ = pair.maps(arena), sum_ = pair.maps(arena);
    if (backward && stages + with_errors >= Combine<A>::capacity) part_ = pair.maps(arena);
  }

  // Whether y(0) is x.
  bool same_start() const { return pair.same_start(); }

  // Adds to `out`, x's cotangent by z(0), that by y(0), where the last pull has not.
  void add_start(const View<A>& out) const {
    if (!same_start()) pair.add_start(out, y_total.map);
  }

  int64_t blocks(bool y) const { return y ? pair.y_blocks() : pair.z_blocks(); }
  const Plane<A>& plane(bool y) const { return y ? pair.y_plane : pair.z_plane; }

  // Says where the trace of a stage lies; `wanted`: which of its slopes are made, or have been.
  void place(int64_t stage, const View<A>& y, const View<A>& z, A* statistics, Want wanted) {
    Trace<A>& trace = made[stage];
    trace.guide = {y, z};
    trace.s = s_.empty() ? trace.guide : s_[stage];
    trace.statistics = statistics;
    trace.made = wanted;
  }

  // act(h) of stages that have been evaluated before.
  void restore(int64_t first, int64_t end) {
    for (int64_t i = first; i < end; ++i) pair.restore(made[i]);
  }

  // Calls f(slopes, how many, whether no more follow) for the slopes that a row names, kSlopes at a time at most, and
  // at least once.
  template <class F>
  void each_slopes(bool y, const double* row, int64_t count, const F& f) const {
    Slope<A> slopes[kSlopes];
    int64_t used = 0;
    for (int64_t j = 0; j < count; ++j) {
      const Trace<A>& trace = made[j];
      if (row[j] == 0 || !(y ? trace.made.y : trace.made.z)) continue;
      if (used == kSlopes) f(slopes, used, false), used = 0;
      slopes[used++] = {static_cast<A>(row[j]), y ? trace.s.y : trace.s.z,
                        pair.rows_of(y ? kPostY : kPostZ, trace.statistics)};
    }
    f(slopes, used, true);
  }

  // out = base + the sum of row[j] times slope j of one half.
  void advance_by(bool y, const double* row, int64_t count, const View<A>& base, const View<A>& out) const {
    View<A> from = base;
    each_slopes(y, row, count, [&](const Slope<A>* slopes, int64_t used, bool) {
      advance<A>(plane(y), blocks(y), from, slopes, used, out);
      from = out;
    });
  }

  // Calls f(a map, slopes, how many): together base + the sum of row[j] times slope j, of one half; writes to the
  // workspace.
  template <class F>
  void with_sum(bool y, const double* row, int64_t count, const View<A>& base, const F& f) const {
    View<A> from = base;
    const View<A> part = y ? pair.workspace().y : pair.workspace().z;
    each_slopes(y, row, count, [&](const Slope<A>* slopes, int64_t used, bool last) {
      if (last)
        f(from, slopes, used);
      else
        advance<A>(plane(y), blocks(y), from, slopes, used, part), from = part;
    });
  }

  // The sum of the squares of (base + the sum of row[j] times slope j) / tolerance, of one half.
  double squares(bool y, const double* row, int64_t count, const View<A>& base, const Tolerance<A>& tolerance) const {
    double sum = 0;
    with_sum(y, row, count, base, [&](const View<A>& from, const Slope<A>* slopes, int64_t used) {
      sum = scaled_squares<A>(plane(y), blocks(y), from, slopes, used, tolerance);
    });
    return sum;
  }

  // (11): the cotangents that a step's error, of one half, gives it, the step's start and its end.
  void pull_errors(bool y, const StepTable& table, double factor, const Tolerance<A>& tolerance,
                   const ErrorBars<A>& bars) const {
    with_sum(y, table.error, table.stages, nothing(), [&](const View<A>& from, const Slope<A>* slopes, int64_t used) {
      pull_error<A>(plane(y), blocks(y), static_cast<A>(factor), from, slopes, used, tolerance, bars);
    });
  }

  // The inner product of a map with the sum of row[j] times slope j, of one half; writes to the workspace.
  double product_with(bool y, const double* row, int64_t count, const View<A>& map) const {
    const View<A> sum = y ? pair.workspace().y : pair.workspace().z;
    advance_by(y, row, count, nothing(), sum);
    return inner_product<A>(plane(y), blocks(y), sum, map);
  }

  // A map of zeros, to read.
  View<A> nothing() const { return {const_cast<A*>(pair.spec.zeros), 0, 0, 0}; }

  // Where stage i is evaluated, as far as it is read: at the state itself or, made there, in `to`.
  Both<A> point_of(const StepTable& table, int64_t i, const Both<A>& state, const Both<A>& to) const {
    const double* row = table.row(i);
    if (std::all_of(row, row + i, [](double a) { return a == 0; })) return state;
    const Want reads = pair.reads(made[i].made);
    if (reads.y) advance_by(true, row, i, state.y, to.y);
    if (reads.z) advance_by(false, row, i, state.z, to.z);
    return to;
  }

  // Evaluates a stage; its point is made in `to`.
  void evaluate(const StepTable& table, int64_t i, const Both<A>& state, const Both<A>& to) {
    const Want want = made[i].made;
    if (want.any()) pair.evaluate(point_of(table, i, state, to), made[i], want);
  }

  // (5) and (7): from the totals, the cotangents of y and z at a step's end, to those at its beginning, through the
  // stages from the last down to `low`. `carried` are further cotangents of the last stage's slopes; where `low` is 1,
  // those of stage 0's take their place. `errors` are cotangents of the table's error. `out`: where z's total goes, to
  // which y's is added where both start as x.
  void pull(const StepTable& table, int64_t low, const Both<A>& state, const View<A>* out, A* gradients) {
    std::fill(present_.begin(), present_.end(), Want{});
    for (int64_t i = table.stages; i-- > low;) {
      Combine<A> bars[2] = {slope_bar(table, true, i), slope_bar(table, false, i)};
      Want left;
      Both<A> point;
      if (made[i].made.any()) {
        pair.product = i + 1 < table.stages ? product : nullptr;
        point = point_of(table, i, state, point_);
        left = pair.pull(point, made[i], bars[0], bars[1], gradients, {true, true}, pair.workspace());
      }
      for (const bool y : {true, false}) {
        const bool here = y ? left.y : left.z;
        const auto finish = [&](const View<A>& to, const Combine<A>& rest) {
          pair.finish(y, y ? point.y : point.z, made[i], y ? pair.workspace().y : pair.workspace().z, to, rest,
                      gradients);
        };
        if (i == 0)
          end_at_start(table, y, out, here, finish);
        else if (here)
          finish(y ? bars_[i].y : bars_[i].z, {});
        (y ? present_[i].y : present_[i].z) = here;
      }
      carried_y = carried_z = {};
    }
    for (const bool y : {true, false})
      if (low > 0) carry(table, y);
  }

  Pair pair;
  std::vector<Trace<A>> made;  // of the step at hand
  double* product =
      nullptr;  // where pull adds the inner products of slopes and cotangents up, but of stage 0, the last
  Total<A> y_total, z_total, carried_y, carried_z, error_y, error_z;

 private:
  // of_total times the total, of_error times the error's cotangent, and of_stage(l) times the cotangent of the point of
  // stage l from `first` on.
  template <class F>
  Combine<A> terms(const StepTable& table, bool y, double of_total, double of_error, const F& of_stage, int64_t first) {
    Combine<A> sum;
    const auto add = [&](double coefficient, const View<A>& map) {
      if (coefficient == 0) return;
      // One place stays free, for a further term of the caller's.
      if (sum.count == Combine<A>::capacity - 1) {
        const View<A> part = y ? part_.y : part_.z;
        combine_maps<A>(plane(y), blocks(y), part, sum);
        sum = {}, sum.add(1, part);
      }
      sum.add(static_cast<A>(coefficient), map);
    };
    const Total<A>& total = y ? y_total : z_total;
    if (total.present) add(of_total, total.map);
    const Total<A>& error = y ? error_y : error_z;
    if (error.present) add(of_error, error.map);
    for (int64_t l = first; l < table.stages; ++l)
      if (y ? present_[l].y : present_[l].z) add(of_stage(l), y ? bars_[l].y : bars_[l].z);
    return sum;
  }

  Combine<A> slope_bar(const StepTable& table, bool y, int64_t i) {
    const double of_error = table.error ? table.error[i] : 0;
    Combine<A> sum = terms(table, y, table.b[i], of_error, [&](int64_t l) { return table.row(l)[i]; }, i + 1);
    const Total<A>& carried = y ? carried_y : carried_z;
    if (i + 1 == table.stages && carried.present) sum.add(1, carried.map);
    return sum;
  }

  Combine<A> all_terms(const StepTable& table, bool y) {
    return terms(table, y, 1, 0, [](int64_t) { return 1.0; }, 1);
  }

  // The total at the step's start, stage 0's part of it by `finish` if that is `here`.
  template <class F>
  void end_at_start(const StepTable& table, bool y, const View<A>* out, bool here, const F& finish) {
    Total<A>& total = y ? y_total : z_total;
    Combine<A> rest = all_terms(table, y);
    if (!y && out && same_start()) rest.add(1, y_total.map);
    View<A> to = y ? sum_.y : out ? *out : sum_.z;
    if (here)
      finish(to, rest);
    else if (total.present && rest.count == 1 && (y || !out))
      to = total.map;
    else
      combine_maps<A>(plane(y), blocks(y), to, rest);
    total = {to, here || rest.count > 0};
  }

  // The total at the step's start but for stage 0, whose slope's cotangent is left in `carried`.
  void carry(const StepTable& table, bool y) {
    Total<A>&total = y ? y_total : z_total, &carried = y ? carried_y : carried_z;
    const Combine<A> bar = slope_bar(table, y, 0);
    carried = {y ? bars_[0].y : bars_[0].z, bar.count > 0};
    if (carried.present) combine_maps<A>(plane(y), blocks(y), carried.map, bar);
    const Combine<A> sum = all_terms(table, y);
    const bool alone = total.present && sum.count == 1;
    if (!alone) {
      const View<A> to = y ? sum_.y : sum_.z;
      if (sum.count > 0) combine_maps<A>(plane(y), blocks(y), to, sum);
      total = {to, sum.count > 0};
    }
  }

  std::vector<Want> present_;  // of the stages, whose points have a cotangent in bars_
  std::vector<Both<A>> s_, bars_;
  Both<A> point_, sum_, part_;
};

}  // namespace fastode::resident
