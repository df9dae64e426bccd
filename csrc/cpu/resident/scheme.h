// Explicit schemes in Shu-Osher form, forwards and backwards. Derivation: README.md of fastode/ops/runge_kutta.
#pragma once

#include "programs.h"

namespace fastode::resident {

// u_i = sum_k alpha[i, k] u_k + beta[i, k] F(u_k), rows i = 1 ... stages, both [stages, stages].
struct Scheme {
  int64_t stages;
  const double *alpha, *beta;

  double a(int64_t i, int64_t k) const { return alpha[(i - 1) * stages + k]; }
  double b(int64_t i, int64_t k) const { return beta[(i - 1) * stages + k]; }
  bool uses(int64_t i, int64_t k) const { return a(i, k) != 0 || b(i, k) != 0; }
  // Whether F(u_k) is used by another stage than the one right after it.
  bool reused(int64_t k) const {
    for (int64_t i = k + 2; i <= stages; ++i)
      if (b(i, k) != 0) return true;
    return false;
  }
};

// The stages of a scheme: u_k and, where they are wanted later, F(u_k). What an evaluation went through stays only of
// the last one, where the way back begins; of the others backward computes it again, by one convolution less than F
// has.
template <class A>
class Stages {
 public:
  // `keep`: for a backward program, here or later. `images`: every F(u_k) is wanted.
  Stages(Branch<A>& branch, const Scheme& scheme, const Map<A>& input, bool keep, bool images)
      : scheme_(scheme),
        keep_(keep),
        images_(images),
        // What lies in the cache costs nothing to hold.
        hold_all_(keep && !branch.memory().kept && !branch.memory().coupled),
        points(scheme.stages),
        values(scheme.stages) {
    Memory<A>& memory = branch.memory();
    const bool left = keep && memory.kept;
    points[0] = input;
    for (int64_t k = 0; k < scheme.stages; ++k) {
      evaluations.push_back(branch.evaluation(keep));
      evaluations[k].inputs[0] = points[k];
      if (!left) continue;
      if (k > 0) evaluations[k].inputs[0] = points[k] = memory.keep(input.blocks);
      if (images) values[k] = memory.keep(input.blocks);
      if (k + 1 == scheme.stages) branch.keep_inputs(evaluations[k]);
    }
  }

  // Runs every stage; `result` is null if it is not wanted.
  void run(Branch<A>& branch, const Map<A>* result, const Wishes<A>& wishes) {
    Memory<A>& memory = branch.memory();
    for (int64_t k = 0; k < scheme_.stages; ++k) {
      const int64_t i = k + 1;
      const bool last = i == scheme_.stages;
      Evaluation<A>& e = evaluations[k];
      e.statistics = wishes.statistics_of(k);
      Mix<A> mix{static_cast<A>(scheme_.b(i, k)), {}};
      for (int64_t j = 0; j <= k; ++j) {
        if (scheme_.a(i, j) != 0) mix.terms.push_back({static_cast<A>(scheme_.a(i, j)), points[j]});
        if (j < k && scheme_.b(i, j) != 0) mix.terms.push_back({static_cast<A>(scheme_.b(i, j)), values[j]});
      }
      const bool image = images_ || scheme_.reused(k);
      if (image && !values[k]) values[k] = memory.take(points[0].blocks);
      const Map<A> value = values[k];
      if (image) branch.value(e, points[k], &value, {}, holds(k));
      std::vector<Map<A>> dead = take_dead(i);
      if (!last && !points[i] && !dead.empty()) {  // the result goes where a term is read for the last time
        points[i] = dead.back();
        dead.pop_back();
      }
      if (!last && !points[i]) points[i] = memory.take(points[0].blocks);
      const Map<A>* to = last ? result : &points[i];
      if (!image) {
        branch.value(e, e.inputs[0], to, mix, holds(k));
      } else if (to) {
        mix.terms.push_back({mix.scale, value});
        mix.scale = 0;
        branch.combine(*to, mix);
      }
      for (const Map<A>& map : dead) memory.give(map);
      if (!last) evaluations[i].inputs[0] = points[i];
    }
  }

  // Makes sure that all that evaluation k went through is there.
  void recall(Branch<A>& branch, int64_t k) {
    if (!evaluations[k].inputs.back()) branch.value(evaluations[k], points[k], nullptr, {}, true);
  }

  void release(Branch<A>& branch, int64_t k) {
    branch.release(evaluations[k]);
    branch.memory().give(values[k]);
    if (k > 0) branch.memory().give(points[k]);
  }

 private:
  bool holds(int64_t k) const { return hold_all_ || (keep_ && k + 1 == scheme_.stages); }

  // The maps that no stage after i and no backward program asks for.
  std::vector<Map<A>> take_dead(int64_t i) {
    std::vector<Map<A>> dead;
    for (int64_t k = 0; k < i; ++k) {
      bool used = false;
      for (int64_t later = i + 1; later <= scheme_.stages; ++later) used = used || scheme_.uses(later, k);
      if (used) continue;
      if (k > 0 && !keep_) dead.push_back(std::exchange(points[k], {}));
      if (values[k] && !(keep_ && images_)) dead.push_back(std::exchange(values[k], {}));
    }
    std::erase_if(dead, [](const Map<A>& map) { return !map; });
    return dead;
  }

  Scheme scheme_;
  bool keep_, images_, hold_all_;

 public:
  std::vector<Map<A>> points, values;
  std::vector<Evaluation<A>> evaluations;
};

template <class A>
class SchemeForward {
 public:
  static Need need(const Scheme&) { return Need::kValue; }

  static void record(Branch<A>& branch, const Ends<A>& ends, const Scheme& scheme, const Wishes<A>& wishes) {
    Stages<A> stages(branch, scheme, ends.input, branch.memory().kept != nullptr, wishes.products_stride > 0);
    stages.run(branch, &ends.result, wishes);
  }
};

template <class A>
class SchemeBackward {
 public:
  static Need need(const Scheme&) { return Need::kCotangent; }

  static void record(Branch<A>& branch, const Ends<A>& ends, const Scheme& scheme, const Wishes<A>& wishes) {
    Memory<A>& memory = branch.memory();
    Stages<A> stages(branch, scheme, ends.input, true, wishes.products_stride > 0);
    if (!memory.kept) stages.run(branch, nullptr, {.products_stride = wishes.products_stride});
    std::vector<Map<A>> bars(scheme.stages + 1);
    bars.back() = ends.cotangent;
    for (int64_t k = scheme.stages; k-- > 0;) {
      if (wishes.products) products(branch, stages, bars[k + 1], k + 1, wishes);
      Mix<A> image{0, {}}, out{1, {}};
      for (int64_t i = k + 1; i <= scheme.stages; ++i) {
        if (scheme.b(i, k) != 0) image.terms.push_back({static_cast<A>(scheme.b(i, k)), bars[i]});
        if (scheme.a(i, k) != 0) out.terms.push_back({static_cast<A>(scheme.a(i, k)), bars[i]});
      }
      stages.recall(branch, k);
      bars[k] = branch.cotangent(stages.evaluations[k], image, k == 0 ? &ends.result : nullptr, out, wishes.parameters);
      stages.release(branch, k);
      for (int64_t i = k + 1; i <= scheme.stages; ++i) {
        bool needed = false;
        for (int64_t j = 0; j < k; ++j) needed = needed || scheme.uses(i, j);
        if (!needed) memory.give(bars[i]), bars[i] = {};
      }
    }
  }

 private:
  // Row i of the coefficients' gradient: inner products of the cotangent of u_i with every u_k and F(u_k).
  static void products(Branch<A>& branch, const Stages<A>& stages, const Map<A>& bar, int64_t i,
                       const Wishes<A>& wishes) {
    const int64_t s = static_cast<int64_t>(stages.points.size());
    branch.each({bar},
                [=, &plane = branch.plane(), points = stages.points, values = stages.values](const Range& range) {
                  double* alpha = wishes.products + range.worker * wishes.products_stride + (i - 1) * s;
                  double* beta = alpha + s * s;
                  for (int64_t n = 0; n < range.count; ++n) {
                    for (int64_t k = 0; k < i; ++k) {
                      alpha[k] += inner_product(plane, bar.blocks, bar.at(range, n), points[k].at(range, n));
                      beta[k] += inner_product(plane, bar.blocks, bar.at(range, n), values[k].at(range, n));
                    }
                  }
                });
  }
};

}  // namespace fastode::resident
