// IE-Skip, forwards and backwards. Derivation: README.md of fastode/ops/schemes/implicit_euler.
#pragma once

#include "programs.h"

namespace fastode::resident {

// K steps of size gamma on |y - x - (1 - theta) s - theta f(y)|^2, s = f(x), from y = x + s.
struct Descent {
  int64_t steps;
  double gamma, theta;
  bool detach;     // the derivative takes the descent's direction as a constant
  bool keeps_all;  // for backward: every unit's input, those of f(x) too, and what each pull-back brings through them

  // Whether the derivative is the residual block's. With theta = 0 the descent starts where it ends.
  bool plain() const { return detach || steps == 0 || theta == 0; }
};

// The points of an IE-Skip and how the descent goes from one to the next.
template <class A>
class DescentPoints {
 public:
  DescentPoints(Branch<A>& branch, const Descent& descent, const Map<A>& input, bool keep)
      : theta_(static_cast<Number<A>>(descent.theta)),
        scale_(2 * static_cast<Number<A>>(descent.gamma) * theta_),
        input_(input),
        keep_(keep && branch.memory().kept),
        hold_first_(descent.keeps_all || !branch.memory().coupled),
        points(descent.steps),
        residuals(descent.steps) {
    Memory<A>& memory = branch.memory();
    if (keep_)
      memory.kept->reserve(branch.room(hold_first_) +
                           descent.steps * (branch.room(true, descent.keeps_all) + 2 * memory.room(input.blocks)));
    at_input = branch.evaluation(keep);
    if (keep_ && hold_first_) branch.keep_inputs(at_input);
    for (int64_t k = 0; k < descent.steps; ++k) {
      at_point.push_back(branch.evaluation(keep));
      if (!keep_) continue;
      points[k] = memory.keep(input.blocks);
      residuals[k] = memory.keep(input.blocks);
      branch.keep_inputs(at_point[k]);
      if (descent.keeps_all) branch.keep_backs(at_point[k]);
    }
  }

  // Finds everything where forward has kept it.
  void find() {
    at_input.inputs[0] = input_;
    for (size_t k = 0; k < points.size(); ++k) at_point[k].inputs[0] = points[k];
  }

  // y_0 = x + f(x), in `to`; with `keep`, for a backward program
  void start(Branch<A>& branch, const Map<A>& to, bool keep) {
    const bool hold = keep && hold_first_;
    if (theta_ == 1) return branch.value(at_input, input_, &to, {1, {{1, input_}}}, hold);
    skip_ = branch.memory().take(input_.blocks);
    branch.value(at_input, input_, &skip_, {}, hold);
    branch.combine(to, {0, {{1, input_}, {1, skip_}}});
  }

  // residual(k) = 2 gamma theta (y - x - (1 - theta) s - theta f(y)) at y = y_k
  void evaluate(Branch<A>& branch, int64_t k) {
    Mix<A> mix{-scale_ * theta_, {{scale_, points[k]}, {-scale_, input_}}};
    if (theta_ != 1) mix.terms.push_back({-scale_ * (1 - theta_), skip_});
    if (!residuals[k]) residuals[k] = branch.memory().take(input_.blocks);
    branch.value(at_point[k], points[k], &residuals[k], mix, true);
  }

  // y_{k + 1} = y_k - 2 gamma (e - theta J^T e), in `to` or where the memory has place
  Map<A> step(Branch<A>& branch, int64_t k, const Map<A>* to) {
    return branch.cotangent(at_point[k], {0, {{1, residuals[k]}}}, to,
                            {1, {{1, points[k]}, {-1 / theta_, residuals[k]}}}, false);
  }

  // Makes again what the pull-back of step k left behind its convolutions, to the same bits.
  void pull_again(Branch<A>& branch, int64_t k) {
    branch.keep_backs(at_point[k]);
    branch.memory().give(branch.cotangent(at_point[k], {0, {{1, residuals[k]}}}, nullptr, {}, false));
  }

  void release(Branch<A>& branch, int64_t k) {
    branch.release(at_point[k]);
    branch.memory().give(residuals[k]);
    residuals[k] = {};
  }

 private:
  Number<A> theta_, scale_;
  Map<A> input_, skip_;
  bool keep_;
  // Whether the unit inputs of f(x) are held until they are needed, at the very end. Where samples are coupled they are
  // maps of the whole batch, and a training step computes them again to save that memory.
  bool hold_first_;

 public:
  std::vector<Map<A>> points, residuals;
  Evaluation<A> at_input;
  std::vector<Evaluation<A>> at_point;
};

template <class A>
class DescentForward {
 public:
  static Need need(const Descent& descent) { return descent.steps > 0 ? Need::kCotangent : Need::kValue; }

  // `descent.detach` is set where nothing is to be kept for backward.
  static void record(Branch<A>& branch, const Ends<A>& ends, const Descent& descent, const Wishes<A>& wishes) {
    Memory<A>& memory = branch.memory();
    DescentPoints<A> at(branch, descent, ends.input, !descent.plain());
    const int64_t steps = descent.steps;
    at.at_input.statistics = wishes.statistics_of(0);
    if (steps > 0 && !at.points[0]) at.points[0] = memory.take(ends.input.blocks);
    at.start(branch, steps > 0 ? at.points[0] : ends.result, false);
    for (int64_t k = 0; k < steps; ++k) {
      at.at_point[k].statistics = wishes.statistics_of(k + 1);
      at.evaluate(branch, k);
      const bool last = k + 1 == steps;
      if (descent.theta == 0) {  // y stays; f was evaluated because its norms' running statistics must see it
        if (last)
          branch.combine(ends.result, {0, {{1, at.points[k]}}});
        else
          at.points[k + 1] = at.points[k];
        at.release(branch, k);
        continue;
      }
      const Map<A> to = last ? ends.result : at.points[k + 1];
      const Map<A> next = at.step(branch, k, to ? &to : nullptr);
      at.release(branch, k);
      memory.give(at.points[k]);
      if (!last) at.points[k + 1] = next;
    }
  }
};

template <class A>
class DescentBackward {
 public:
  static Need need(const Descent& descent) { return descent.plain() ? Need::kCotangent : Need::kSecond; }

  static void record(Branch<A>& branch, const Ends<A>& ends, const Descent& descent, const Wishes<A>& wishes) {
    Memory<A>& memory = branch.memory();
    if (descent.plain()) {
      Evaluation<A> e = branch.evaluation(false);
      branch.value(e, ends.input, nullptr, {}, true);
      branch.cotangent(e, {0, {{1, ends.cotangent}}}, &ends.result, {1, {{1, ends.cotangent}}}, wishes.parameters);
      return;
    }
    const Number<A> gamma = static_cast<Number<A>>(descent.gamma), theta = static_cast<Number<A>>(descent.theta);
    const int64_t steps = descent.steps;
    const bool found = memory.kept != nullptr;
    DescentPoints<A> at(branch, descent, ends.input, true);
    if (found) {
      at.find();
    } else {
      at.points[0] = memory.take(ends.input.blocks);
      at.start(branch, at.points[0], true);
      for (int64_t k = 0; k + 1 < steps; ++k) {
        at.evaluate(branch, k);
        at.points[k + 1] = at.step(branch, k, nullptr);
        at.release(branch, k);
      }
    }
    Map<A> bar = ends.cotangent, pull, sum;
    for (int64_t k = steps; k-- > 0;) {
      // With c the cotangent of the step's output and e the residual: pull = -theta (cotangent of e) = 2 gamma theta (c
      // - theta J c), and the two cotangents of the second-order sweep are pull and 2 gamma theta e.
      if (!found) {
        at.evaluate(branch, k);
        if (descent.keeps_all) at.pull_again(branch, k);
      }
      pull = memory.take(ends.input.blocks);
      branch.tangent(at.at_point[k], bar, pull, {-2 * gamma * theta * theta, {{2 * gamma * theta, bar}}});
      const Map<A> next =
          branch.second(at.at_point[k], pull, at.residuals[k], {1, {{1, bar}, {-1 / theta, pull}}}, wishes.parameters);
      at.release(branch, k);
      memory.give(at.points[k]);
      memory.give(bar);
      bar = next;
      if (k == 0) break;
      Mix<A> total{0, {{1 / theta, pull}}};
      if (sum) total.terms.push_back({1, sum});
      branch.combine(pull, total);
      memory.give(sum);
      sum = pull;
    }
    Mix<A> image{0, {{1, bar}}}, out{1, {{1, bar}, {1 / theta, pull}}};
    if (theta != 1) image.terms.push_back({(1 - theta) / theta, pull});
    if (sum) {
      out.terms.push_back({1, sum});
      if (theta != 1) image.terms.push_back({1 - theta, sum});
    }
    if (!at.at_input.inputs.back()) branch.value(at.at_input, ends.input, nullptr, {}, true);
    branch.cotangent(at.at_input, image, &ends.result, out, wishes.parameters);
  }
};

}  // namespace fastode::resident
