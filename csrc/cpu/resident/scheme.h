// Explicit schemes in Shu-Osher form, forwards and backwards. Derivation: README.md of fastode/ops/schemes/runge_kutta.
#pragma once

#include "programs.h"
#include "tableau.h"

namespace fastode::resident {

// The stages of a scheme: the points u_k, and F(u_k) until no later stage reads it. Backward needs the inputs of every
// unit at every u_k. With frozen parameters they are kept for all stages, because to compute them again would be most
// of backward's work; else only for the last stage, and backward computes the others again, all but F's last
// convolution.
template <class A>
class Stages {
 public:
  // `keep`: for a backward program, here or later.
  Stages(Branch<A>& branch, const Scheme& scheme, const Map<A>& input, bool keep)
      : scheme_(scheme),
        keep_(keep),
        // A worker's own maps lie in the cache, where it costs nothing to hold them.
        hold_all_(keep && (scheme.keeps_all || (!branch.memory().kept && !branch.memory().coupled))),
        values_(scheme.stages),
        points(scheme.stages) {
    Memory<A>& memory = branch.memory();
    const bool left = keep && memory.kept;
    points[0] = input;
    if (left) {
      int64_t bytes = (scheme.stages - 1) * memory.room(input.blocks);
      for (int64_t k = 0; k < scheme.stages; ++k) bytes += branch.room(holds(k));
      memory.kept->reserve(bytes);
    }
    for (int64_t k = 0; k < scheme.stages; ++k) {
      evaluations.push_back(branch.evaluation(keep));
      evaluations[k].inputs[0] = points[k];
      if (!left) continue;
      if (k > 0) evaluations[k].inputs[0] = points[k] = memory.keep(input.blocks);
      if (holds(k)) branch.keep_inputs(evaluations[k]);
    }
  }

  // Runs every stage; `result` is where u_s goes, or null if nobody reads it.
  void run(Branch<A>& branch, const Map<A>* result, const Wishes<A>& wishes) {
    Memory<A>& memory = branch.memory();
    for (int64_t k = 0; k < scheme_.stages; ++k) {
      const int64_t i = k + 1;
      const bool last = i == scheme_.stages;
      Evaluation<A>& e = evaluations[k];
      e.statistics = wishes.statistics_of(k);
      Mix<A> mix{static_cast<Number<A>>(scheme_.b(i, k)), {}};
      for (int64_t j = 0; j <= k; ++j) {
        if (scheme_.a(i, j) != 0) mix.terms.push_back({static_cast<Number<A>>(scheme_.a(i, j)), points[j]});
        if (j < k && scheme_.b(i, j) != 0) mix.terms.push_back({static_cast<Number<A>>(scheme_.b(i, j)), values_[j]});
      }
      const bool image = scheme_.reused(k);
      if (image) values_[k] = memory.take(points[0].blocks);
      const Map<A> value = values_[k];
      if (image) branch.value(e, points[k], &value, {}, holds(k));
      std::vector<Map<A>> dead = take_dead(i);
      if (!last && !points[i] && !dead.empty()) {  // u_i goes over a map that is read here for the last time
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
      dead.push_back(std::exchange(values_[k], {}));
    }
    std::erase_if(dead, [](const Map<A>& map) { return !map; });
    return dead;
  }

  Scheme scheme_;
  bool keep_, hold_all_;
  std::vector<Map<A>> values_;

 public:
  std::vector<Map<A>> points;
  std::vector<Evaluation<A>> evaluations;
};

template <class A>
class SchemeForward {
 public:
  static Need need(const Scheme&) { return Need::kValue; }

  static void record(Branch<A>& branch, const Ends<A>& ends, const Scheme& scheme, const Wishes<A>& wishes) {
    Stages<A> stages(branch, scheme, ends.input, branch.memory().kept != nullptr);
    stages.run(branch, &ends.result, wishes);
  }
};

template <class A>
class SchemeBackward {
 public:
  static Need need(const Scheme&) { return Need::kCotangent; }

  static void record(Branch<A>& branch, const Ends<A>& ends, const Scheme& scheme, const Wishes<A>& wishes) {
    Memory<A>& memory = branch.memory();
    Stages<A> stages(branch, scheme, ends.input, true);
    if (!memory.kept) stages.run(branch, nullptr, {});
    std::vector<Map<A>> bars(scheme.stages + 1);
    bars.back() = ends.cotangent;
    for (int64_t k = scheme.stages; k-- > 0;) {
      Mix<A> image{0, {}}, out{1, {}};
      for (int64_t i = k + 1; i <= scheme.stages; ++i) {
        if (scheme.b(i, k) != 0) image.terms.push_back({static_cast<Number<A>>(scheme.b(i, k)), bars[i]});
        if (scheme.a(i, k) != 0) out.terms.push_back({static_cast<Number<A>>(scheme.a(i, k)), bars[i]});
      }
      stages.recall(branch, k);
      const Along<A> along = wishes.products ? products(branch, scheme, stages, bars, k, wishes) : Along<A>{};
      const Map<A>* to = k == 0 ? &ends.result : nullptr;
      bars[k] = branch.cotangent(stages.evaluations[k], image, to, out, wishes.parameters, along);
      if (wishes.products && k > 0) product(branch, bars[k], stages.points[k], (k - 1) * scheme.stages + k, wishes);
      stages.release(branch, k);
      for (int64_t i = k + 1; i <= scheme.stages; ++i) {
        bool needed = wishes.products && k > 0;
        for (int64_t j = 0; j < k; ++j) needed = needed || scheme.uses(i, j);
        if (!needed) memory.give(bars[i]), bars[i] = {};
      }
    }
  }

 private:
  static void product(Branch<A>& branch, const Map<A>& bar, const Map<A>& other, int64_t at, const Wishes<A>& wishes) {
    branch.each({bar, other}, [=, &plane = branch.plane()](const Range& range) {
      double* sum = wishes.products + range.part * wishes.products_stride + at;
      for (int64_t n = 0; n < range.count; ++n)
        *sum += inner_product(plane, bar.blocks, bar.at(range, n), other.at(range, n));
    });
  }

  // Column k of the coefficients' gradient: the inner products of every later u_i's cotangent with u_k, and with F(u_k)
  // unless `Scheme::complete` derives those. Where u_s alone has F(u_k) the pull-back finds the product on its way;
  // elsewhere F(u_k) is computed again, because to keep it would cost a map of the batch for each stage.
  static Along<A> products(Branch<A>& branch, const Scheme& scheme, const Stages<A>& stages,
                           const std::vector<Map<A>>& bars, int64_t k, const Wishes<A>& wishes) {
    const int64_t s = scheme.stages;
    for (int64_t i = k + 1; i <= s; ++i) product(branch, bars[i], stages.points[k], (i - 1) * s + k, wishes);
    if (scheme.leads(k)) return {};
    double* sums = wishes.products + s * s + k;
    if (k + 1 == s && scheme.b(s, k) != 0 && branch.finds_image())
      return {1 / scheme.b(s, k), sums + k * s, wishes.products_stride};
    const auto add = [=, &plane = branch.plane()](const Range& range, int64_t n, const View<A>& image) {
      for (int64_t i = k + 1; i <= s; ++i)
        sums[range.part * wishes.products_stride + (i - 1) * s] +=
            inner_product(plane, bars[i].blocks, bars[i].at(range, n), image);
    };
    branch.each_image(stages.evaluations[k], add);
    return {};
  }
};

}  // namespace fastode::resident
