// Whole blocks on resident samples: IE-Skip and the explicit schemes in Shu-Osher form, forwards and backwards.
// Derivations: the README.md of fastode/ops/implicit_euler and fastode/ops/runge_kutta.
//
// A program owns its maps. `input` and `cotangent` are filled before `run`, `result` is read after it. Where the memory
// has a place for what is kept, a forward program leaves its evaluations there, and the backward one, made with the
// same pieces, finds them instead of computing them again.
#pragma once

#include "branch.h"

namespace fastode::resident {

// K steps of size gamma on |y - x - (1 - theta) s - theta f(y)|^2, s = f(x), from y = x + s.
struct Descent {
  int64_t steps;
  double gamma, theta;
  bool detach;  // the derivative takes the descent's direction as a constant

  // Whether the derivative is the residual block's. With theta = 0 the descent starts where it ends.
  bool plain() const { return detach || steps == 0 || theta == 0; }
};

// u_i = sum_k alpha[i, k] u_k + beta[i, k] F(u_k), rows i = 1 ... stages, both [stages, stages].
struct Scheme {
  int64_t stages;
  const double *alpha, *beta;

  double a(int64_t i, int64_t k) const { return alpha[(i - 1) * stages + k]; }
  double b(int64_t i, int64_t k) const { return beta[(i - 1) * stages + k]; }
  // Whether F(u_k) is used by another stage than the one right after it.
  bool reused(int64_t k) const {
    for (int64_t i = k + 2; i <= stages; ++i)
      if (b(i, k) != 0) return true;
    return false;
  }
};

// What a program is asked for beside its result: gradients of the parameters; statistics of batch norms, evaluation by
// evaluation; and per worker the inner products that make up the gradient of a scheme's coefficients [2, stages,
// stages].
template <class A>
struct Wishes {
  bool parameters = false;
  A* statistics = nullptr;
  int64_t statistics_stride = 0;
  double* products = nullptr;
  int64_t products_stride = 0;
};

// The points of an IE-Skip and how the descent goes from one to the next.
template <class A>
class DescentPoints {
 public:
  // Without a place to keep them, a forward program writes every point over the one before.
  DescentPoints(Branch<A>& branch, const Memory& memory, const Descent& descent, const Map<A>& input, bool forward)
      : descent_(descent), input_(input), at_input(branch.evaluation(memory, !descent.plain())) {
    const bool keep = !descent.plain(), separate = keep && (memory.kept || !forward);
    if (descent.steps > 0 && (forward || keep)) {
      for (int64_t k = 0; k < (separate ? descent.steps : 1); ++k) {
        points.push_back(branch.map(memory, keep));
        if (k == 0 || memory.kept) {
          at_point.push_back(branch.evaluation(memory, keep));
          residuals.push_back(branch.map(memory, keep));
        }
      }
    }
    if (descent.theta != 1) skip_ = branch.map(memory);
  }

  const Map<A>& point(int64_t k) const { return points[points.size() > 1 ? k : 0]; }
  const Map<A>& residual(int64_t k) const { return residuals[residuals.size() > 1 ? k : 0]; }
  Evaluation<A>& evaluation(int64_t k) { return at_point[at_point.size() > 1 ? k : 0]; }

  // y_0 = x + f(x)
  void start(const Branch<A>& branch, const Map<A>& to) {
    if (descent_.theta == 1) return branch.value(at_input, input_, &to, {1, {{1, input_}}});
    branch.value(at_input, input_, &skip_, {});
    branch.combine(to, {0, {{1, input_}, {1, skip_}}});
  }

  // residual(k) = 2 gamma theta (y - x - (1 - theta) s - theta f(y)) at y = y_k
  void evaluate(const Branch<A>& branch, int64_t k) {
    const A theta = static_cast<A>(descent_.theta), scale = 2 * static_cast<A>(descent_.gamma) * theta;
    Mix<A> mix{-scale * theta, {{scale, point(k)}, {-scale, input_}}};
    if (theta != 1) mix.terms.push_back({-scale * (1 - theta), skip_});
    branch.value(evaluation(k), point(k), &residual(k), mix);
  }

  // y_{k + 1} = y_k - 2 gamma (e - theta J^T e)
  void step(const Branch<A>& branch, int64_t k, const Map<A>& to) {
    const A theta = static_cast<A>(descent_.theta);
    if (theta == 0) return branch.combine(to, {0, {{1, point(k)}}});
    branch.cotangent(evaluation(k), residual(k), to, {1, {{1, point(k)}, {-1 / theta, residual(k)}}}, false);
  }

 private:
  Descent descent_;
  Map<A> input_, skip_;

 public:
  Evaluation<A> at_input;
  std::vector<Evaluation<A>> at_point;
  std::vector<Map<A>> points, residuals;
};

template <class A>
class DescentForward {
 public:
  DescentForward(const BranchSpec<A>& spec, const Plane<A>& plane, const Executor<A>& executor, const Memory& memory,
                 const Descent& descent, const Wishes<A>& wishes)
      : branch(spec, plane, executor, memory, descent.steps > 0 ? Need::kCotangent : Need::kValue),
        input(branch.map(memory)),
        result(branch.map(memory)),
        descent_(descent),
        wishes_(wishes),
        points_(branch, memory, descent, input, true) {}

  void run() {
    points_.at_input.statistics = wishes_.statistics;
    points_.start(branch, descent_.steps > 0 ? points_.point(0) : result);
    for (int64_t k = 0; k < descent_.steps; ++k) {
      points_.evaluation(k).statistics =
          wishes_.statistics ? wishes_.statistics + (k + 1) * wishes_.statistics_stride : nullptr;
      points_.evaluate(branch, k);
      points_.step(branch, k, k + 1 == descent_.steps ? result : points_.point(k + 1));
    }
  }

  Branch<A> branch;
  Map<A> input, cotangent, result;

 private:
  Descent descent_;
  Wishes<A> wishes_;
  DescentPoints<A> points_;
};

template <class A>
class DescentBackward {
 public:
  DescentBackward(const BranchSpec<A>& spec, const Plane<A>& plane, const Executor<A>& executor, const Memory& memory,
                  const Descent& descent, const Wishes<A>& wishes)
      : branch(spec, plane, executor, memory, descent.plain() ? Need::kCotangent : Need::kSecond),
        input(branch.map(memory)),
        cotangent(branch.map(memory)),
        result(cotangent),
        descent_(descent),
        parameters_(wishes.parameters),
        found_(memory.kept != nullptr),
        points_(branch, memory, descent, input, false) {
    if (descent.plain()) return;
    pull_ = branch.map(memory);
    if (descent.steps > 1) sum_ = branch.map(memory);
    if (descent.theta != 1) skip_cotangent_ = branch.map(memory);
  }

  void run() {
    if (descent_.plain()) {
      branch.value(points_.at_input, input, nullptr, {});
      branch.cotangent(points_.at_input, cotangent, result, {1, {{1, cotangent}}}, parameters_);
      return;
    }
    const A gamma = static_cast<A>(descent_.gamma), theta = static_cast<A>(descent_.theta);
    const int64_t steps = descent_.steps;
    if (found_) {
      points_.at_input.inputs[0] = input;
      for (int64_t k = 0; k < steps; ++k) points_.evaluation(k).inputs[0] = points_.point(k);
    } else {
      points_.start(branch, points_.point(0));
      for (int64_t k = 0; k + 1 < steps; ++k) {
        points_.evaluate(branch, k);
        points_.step(branch, k, points_.point(k + 1));
      }
    }
    for (int64_t k = steps; k-- > 0;) {
      // With c the cotangent of the step's output and e the residual: pull = -theta (cotangent of e) = 2 gamma theta (c
      // - theta J c), and the two cotangents of the second-order sweep are pull and 2 gamma theta e.
      if (!found_) points_.evaluate(branch, k);
      Evaluation<A>& e = points_.evaluation(k);
      branch.tangent(e, cotangent, pull_, {-2 * gamma * theta * theta, {{2 * gamma * theta, cotangent}}});
      branch.second(e, pull_, points_.residual(k), cotangent, {1, {{1, cotangent}, {-1 / theta, pull_}}}, parameters_);
      if (k > 0) {
        Mix<A> sum{0, {{1 / theta, pull_}}};
        if (k + 1 < steps) sum.terms.push_back({1, sum_});
        branch.combine(sum_, sum);
      }
    }
    Mix<A> out{1, {{1, cotangent}, {1 / theta, pull_}}};
    if (steps > 1) out.terms.push_back({1, sum_});
    if (theta != 1) {
      Mix<A> skip{0, {{1, cotangent}, {(1 - theta) / theta, pull_}}};
      if (steps > 1) skip.terms.push_back({1 - theta, sum_});
      branch.combine(skip_cotangent_, skip);
    }
    branch.cotangent(points_.at_input, theta == 1 ? cotangent : skip_cotangent_, result, out, parameters_);
  }

  Branch<A> branch;
  Map<A> input, cotangent, result;

 private:
  Descent descent_;
  bool parameters_, found_;
  DescentPoints<A> points_;
  Map<A> pull_, sum_, skip_cotangent_;
};

// The stages of a scheme. With `separate` each keeps its point and its evaluation.
template <class A>
class Stages {
 public:
  Stages(Branch<A>& branch, const Memory& memory, const Map<A>& input, const Scheme& scheme, bool separate, bool images)
      : scheme_(scheme), separate_(separate), images_(images) {
    points.push_back(input);
    for (int64_t k = 0; k < scheme.stages; ++k) {
      if (k > 0) points.push_back(branch.map(memory, true));
      values.push_back(keeps(k) ? branch.map(memory, images) : Map<A>{});
      if (separate || k == 0) evaluations.push_back(branch.evaluation(memory, true));
    }
  }

  // Runs every stage; `result` is null if it is not wanted.
  void run(const Branch<A>& branch, const Map<A>* result, const Wishes<A>& wishes) {
    for (int64_t k = 0; k < scheme_.stages; ++k) {
      const int64_t i = k + 1;
      const Map<A>* to = i == scheme_.stages ? result : &points[i];
      Evaluation<A>& e = evaluations[separate_ ? k : 0];
      e.statistics = wishes.statistics ? wishes.statistics + k * wishes.statistics_stride : nullptr;
      Mix<A> mix{static_cast<A>(scheme_.b(i, k)), {}};
      for (int64_t j = 0; j <= k; ++j) {
        if (scheme_.a(i, j) != 0) mix.terms.push_back({static_cast<A>(scheme_.a(i, j)), points[j]});
        if (j < k && scheme_.b(i, j) != 0) mix.terms.push_back({static_cast<A>(scheme_.b(i, j)), values[j]});
      }
      if (!keeps(k)) {
        branch.value(e, points[k], to, mix);
        continue;
      }
      branch.value(e, points[k], &values[k], {});
      if (!to) continue;
      mix.terms.push_back({mix.scale, values[k]});
      mix.scale = 0;
      branch.combine(*to, mix);
    }
  }

  bool keeps(int64_t k) const { return images_ || scheme_.reused(k); }

  std::vector<Map<A>> points, values;
  std::vector<Evaluation<A>> evaluations;

 private:
  Scheme scheme_;
  bool separate_, images_;
};

template <class A>
class SchemeForward {
 public:
  SchemeForward(const BranchSpec<A>& spec, const Plane<A>& plane, const Executor<A>& executor, const Memory& memory,
                const Scheme& scheme, const Wishes<A>& wishes)
      : branch(spec, plane, executor, memory, Need::kValue),
        input(branch.map(memory)),
        result(branch.map(memory)),
        wishes_(wishes),
        stages_(branch, memory, input, scheme, memory.kept != nullptr, wishes.products_stride > 0) {}

  void run() { stages_.run(branch, &result, wishes_); }

  Branch<A> branch;
  Map<A> input, cotangent, result;

 private:
  Wishes<A> wishes_;
  Stages<A> stages_;
};

template <class A>
class SchemeBackward {
 public:
  SchemeBackward(const BranchSpec<A>& spec, const Plane<A>& plane, const Executor<A>& executor, const Memory& memory,
                 const Scheme& scheme, const Wishes<A>& wishes)
      : branch(spec, plane, executor, memory, Need::kCotangent),
        input(branch.map(memory)),
        cotangent(branch.map(memory)),
        plane_(plane),
        scheme_(scheme),
        wishes_(wishes),
        found_(memory.kept != nullptr),
        stages_(branch, memory, input, scheme, true, wishes.products_stride > 0) {
    for (int64_t k = 0; k < scheme.stages; ++k) bars_.push_back(branch.map(memory));
    bars_.push_back(cotangent);
    result = bars_[0];
  }

  void run() {
    if (found_)
      for (int64_t k = 0; k < scheme_.stages; ++k) stages_.evaluations[k].inputs[0] = stages_.points[k];
    else
      stages_.run(branch, nullptr, {});
    for (int64_t k = scheme_.stages; k-- > 0;) {
      if (wishes_.products) products(k + 1);
      Mix<A> image{0, {}}, out{1, {}};
      for (int64_t i = k + 1; i <= scheme_.stages; ++i) {
        if (scheme_.b(i, k) != 0) image.terms.push_back({static_cast<A>(scheme_.b(i, k)), bars_[i]});
        if (scheme_.a(i, k) != 0) out.terms.push_back({static_cast<A>(scheme_.a(i, k)), bars_[i]});
      }
      const bool plain = image.terms.size() == 1 && image.terms[0].first == 1;
      // The cotangent of F(u_k) lies where that of u_k will: the sweep reads the one before it writes the other.
      if (!plain) branch.combine(bars_[k], image);
      branch.cotangent(stages_.evaluations[k], plain ? image.terms[0].second : bars_[k], bars_[k], out,
                       wishes_.parameters);
    }
  }

  Branch<A> branch;
  Map<A> input, cotangent, result;

 private:
  // Row i of the coefficients' gradient: inner products of the cotangent of u_i with every u_k and F(u_k).
  void products(int64_t i) const {
    const int64_t s = scheme_.stages;
    branch.each([&](const Range& range) {
      double* alpha = wishes_.products + range.worker * wishes_.products_stride + (i - 1) * s;
      double* beta = alpha + s * s;
      for (int64_t n = 0; n < range.count; ++n) {
        const View<A> bar = bars_[i].at(range, n);
        for (int64_t k = 0; k < i; ++k) {
          alpha[k] += inner_product(plane_, input.blocks, bar, stages_.points[k].at(range, n));
          beta[k] += inner_product(plane_, input.blocks, bar, stages_.values[k].at(range, n));
        }
      }
    });
  }

  Plane<A> plane_;
  Scheme scheme_;
  Wishes<A> wishes_;
  bool found_;
  Stages<A> stages_;
  std::vector<Map<A>> bars_;
};

}  // namespace fastode::resident
