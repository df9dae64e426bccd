// Included by the .cpp that has the operators.
#pragma once

#include "step.h"

namespace fastode::resident {

// A tensor of the step's layout as a map of the batch.
template <class A>
Map<A> batch_map(const Plane<A>& plane, const Tensor& tensor, int64_t blocks) {
  const int64_t stride = blocks * plane.pixels() * Plane<A>::lanes;
  return {plane.compact(static_cast<A*>(tensor.data_ptr())), stride, blocks, Extent::kBatch, 0, true};
}

template <class A>
Tensor new_batch_map(const Tensor& x, int64_t blocks) {
  return new_map(scalar_type<A>(), x.size(0), kLanes<A>, blocks * x.size(2), x.size(3), true);
}

// A branch whose timed units know their planes, and where it works.
template <class A>
struct StepProgram {
  StepProgram(const Packed<A>& packed, const StepArguments& step, const Tensor& x, A* gradients, Kept* kept, Need need)
      : spec(packed.spec),
        samples(x.size(0)),
        workers(workers_for(samples)),
        blocks(blocks_of<A>(x.size(1))),
        plane(x.size(2), x.size(3), spec.halo),
        schedule(samples, workers, group_for(samples, workers, plane.pixels(), sizeof(A), spec.channels()),
                 need == Need::kCotangent ? workers : 0),
        memory(plane, schedule, spec.couples_samples, kept),
        branch(with_planes(step), schedule, memory, spec.gradients ? gradients : nullptr, need, plane) {}

  const BranchSpec<A>& with_planes(const StepArguments& step) {
    for (size_t k = 0; k < step.timed.size(); ++k) {
      UnitSpec<A>& unit = spec.units[step.timed[k]];
      unit.plane = static_cast<const A*>(step.planes[k].data_ptr());
      unit.moments_at = moments;
      moments += moments_size(spec, unit);
    }
    return spec;
  }

  void finish() {
    schedule.flush();
    branch.close_sums();
    memory.check();
  }

  BranchSpec<A> spec;
  int64_t moments = 0;  // elements of one evaluation's
  const int64_t samples, workers, blocks;
  const Plane<A> plane;
  Schedule schedule;
  Memory<A> memory;
  Branch<A> branch;
};

template <class A>
void run_step(const Packed<A>& packed, const StepArguments& step, const Tensor& x, const Tensor& state,
              const Tensor* first, bool keep, StepMade& made) {
  Kept kept({});
  StepProgram<A> program(packed, step, x, nullptr, keep ? &kept : nullptr, Need::kValue);
  const int64_t stages = step.stages(), blocks = program.blocks;
  const Map<A> start = batch_map<A>(program.plane, state, blocks);
  std::vector<Map<A>> slopes;
  if (step.given) slopes.push_back(batch_map<A>(program.plane, *first, blocks));
  for (int64_t i = step.given; i < stages; ++i) {
    Map<A> point = start;
    if (i > 0) {
      Mix<A> mix{0, {{1, start}}};
      for (int64_t j = 0; j < i; ++j)
        if (step.row(i, j) != 0) mix.terms.push_back({static_cast<A>(step.row(i, j)), slopes[j]});
      const bool leaves = keep || i + 1 == stages;
      if (leaves) made.points.push_back(new_batch_map<A>(x, blocks));
      point = leaves ? batch_map<A>(program.plane, made.points.back(), blocks) : program.memory.take(blocks);
      program.branch.combine(point, mix);
    } else if (keep) {
      made.points.push_back(state);
    }
    made.slopes.push_back(new_batch_map<A>(x, blocks));
    slopes.push_back(batch_map<A>(program.plane, made.slopes.back(), blocks));
    Evaluation<A> e = program.branch.evaluation(keep);
    e.time = static_cast<A>(step.times[i]);
    e.inputs[0] = point;
    if (keep) program.branch.keep_inputs(e);
    program.branch.value(e, point, &slopes.back(), {}, keep);
    program.memory.give(point);
  }
  program.finish();
  made.kept = kept.pieces();
}

template <class A>
void pull_step(const Packed<A>& packed, const StepArguments& step, const Tensor& x, const StepMade& made,
               StepBars& bars, A* gradients) {
  Kept kept(made.kept);
  StepProgram<A> program(packed, step, x, gradients, &kept, Need::kCotangent);
  Branch<A>& branch = program.branch;
  const int64_t stages = step.stages(), blocks = program.blocks, begin = step.given;
  const int64_t evaluations = stages - begin, size = program.moments;
  const auto map = [&](const Tensor& tensor) { return batch_map<A>(program.plane, tensor, blocks); };
  std::vector<A> moments(program.workers * evaluations * size, A(0));
  std::vector<double> products(program.workers, 0.0);
  std::vector<Evaluation<A>> each;
  for (int64_t e = 0; e < evaluations; ++e) {  // in the order in which forward has kept them
    each.push_back(branch.evaluation(true));
    each[e].inputs[0] = map(made.points[e]);
    branch.keep_inputs(each[e]);
    each[e].time = static_cast<A>(step.times[begin + e]);
    each[e].moments = size ? moments.data() + e * size : nullptr;
    each[e].moments_stride = evaluations * size;
  }
  std::vector<Map<A>> of_points(stages);
  Mix<A> total{0, {}};
  if (bars.end) total.terms.push_back({1, map(*bars.end)});
  const auto zero = [&](const Map<A>& to) { branch.combine(to, Mix<A>{0, {}}); };
  for (int64_t i = stages; i-- > 0;) {
    Mix<A> image{0, {}};
    const auto add = [&](const Tensor* bar, const std::vector<double>& weights) {
      if (bar && weights[i] != 0) image.terms.push_back({static_cast<A>(weights[i]), map(*bar)});
    };
    add(bars.end, bars.weights);
    add(bars.error, bars.error_weights);
    for (int64_t l = i + 1; l < stages; ++l)
      if (step.row(l, i) != 0 && of_points[l]) image.terms.push_back({static_cast<A>(step.row(l, i)), of_points[l]});
    if (!bars.slopes.empty() && !image.terms.empty()) {
      const Map<A> bar = branch.map(), slope = map(bars.slopes[i]);
      branch.combine(bar, image);
      branch.each({bar, slope}, [=, &plane = program.plane, sums = products.data()](const Range& range) {
        for (int64_t n = 0; n < range.count; ++n)
          sums[range.part] += inner_product(plane, blocks, bar.at(range, n), slope.at(range, n));
      });
      program.memory.give(bar);
    }
    if (bars.carried && i + 1 == stages) image.terms.push_back({1, map(*bars.carried)});
    if (i < begin) {
      bars.first = new_batch_map<A>(x, blocks);
      const Map<A> to = map(bars.first);
      image.terms.empty() ? zero(to) : branch.combine(to, image);
      break;
    }
    if (image.terms.empty()) continue;
    of_points[i] = branch.cotangent(each[i - begin], image, nullptr, Mix<A>{1, {}}, program.spec.gradients > 0);
    of_points[i].pinned = true;
    total.terms.push_back({1, of_points[i]});
  }
  bars.state = new_batch_map<A>(x, blocks);
  total.terms.empty() ? zero(map(bars.state)) : branch.combine(map(bars.state), total);
  program.finish();
  kept.check();
  bars.moments.assign(evaluations * size, 0.0);
  for (int64_t w = 0; w < program.workers; ++w) {
    bars.product += products[w];
    for (int64_t k = 0; k < evaluations * size; ++k)
      bars.moments[k] += static_cast<double>(moments[w * evaluations * size + k]);
  }
}

}  // namespace fastode::resident
