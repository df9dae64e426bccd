// The nodes of the skew field of two matrix products and of its solution: fastode/ops/resident/linear.py in C++.
#pragma once
#include "skew_nodes.h"

namespace fastode {

// How a field is solved, as the operators take it, made once; and whether the end depends on a slope of z.
struct SolverProgram {
  IValue table, solver, limits, per_sample, through;
  bool reads_slope_of_z = true;
};

// The operator's gradients of the parameters, of which it gives none or all, those that are asked for.
inline void append_asked(variable_list& gradients, const variable_list& bars, const Wanted& asked) {
  for (size_t i = 0; i < asked.size(); ++i) gradients.push_back(asked[i] && !bars.empty() ? bars[i] : Tensor());
}

// (dy, dz) at (y, z).
class LinearNode final : public BlockNode {
 public:
  using Result = PairNode::Result;

  explicit LinearNode(const PairCall& call)
      : BlockNode("ResidentLinearFunctionBackward", call.given, {}, false, call.constants,
                  {call.program.integers, call.program.numbers}),
        damped_(call.program.numbers.toDoubleList().get(0) != 0) {}

  static Result run(const PairCall& call, bool graph) {
    static const Operator forward("fastode::resident_linear_forward");
    const variable_list& given = call.given.tensors;
    std::vector<IValue> found;
    {
      const pybind11::gil_scoped_release unlocked;
      const at::AutoDispatchBelowADInplaceOrView below;
      found = forward(given[0], given[1], call.given.from(kInputs), call.program.integers, call.program.numbers);
    }
    const Result result{found[0].toTensor(), found[1].toTensor()};
    if (!graph) return result;
    const NodePointer node = make_node<LinearNode>(call);
    set_history(result.dy, node);
    set_history(result.dz, node);
    return result;
  }

 protected:
  variable_list pull(const variable_list& bars, const variable_list& given, const Wanted& wanted) override {
    static const Operator backward("fastode::resident_linear_backward");
    const bool has_y = bars[0].defined(), has_z = bars[1].defined();
    // dy reads z, and dz reads y; the damping makes each read itself, too. The biases are of one slope each.
    const bool need_y = wanted[0] && (has_z || damped_), need_z = wanted[1] && (has_y || damped_);
    Wanted asked(wanted.begin() + kInputs, wanted.end());
    if (asked.size() > 1) asked[1] = asked[1] && has_y, asked[2] = asked[2] && has_z;
    const auto found = backward(given[0], given[1], optional(bars[0]), optional(bars[1]),
                                variable_list(given.begin() + kInputs, given.end()), rule()[0], rule()[1], need_y,
                                need_z, any_from(asked, 0));
    variable_list gradients{need_y ? found[0].toTensor() : Tensor(), need_z ? found[1].toTensor() : Tensor()};
    append_asked(gradients, found[2].toTensorVector(), asked);
    return gradients;
  }

 private:
  static constexpr size_t kInputs = 2;

  static IValue optional(const Tensor& bar) { return bar.defined() ? IValue(bar) : IValue(); }

  bool damped_;
};

// y(t1) from x. What it keeps begins with the log of the solves.
class LinearSolveNode final : public BlockNode {
 public:
  struct Result {
    Tensor end, log;
  };

  LinearSolveNode(const PairCall& call, const SolverProgram& solver, std::vector<Tensor> kept)
      : BlockNode("ResidentLinearSolveFunctionBackward", call.given, std::move(kept), false, call.constants,
                  {call.program.integers, call.program.numbers, solver.table, solver.solver, solver.limits,
                   solver.per_sample, solver.through}),
        reads_slope_of_z_(solver.reads_slope_of_z) {}

  static Result run(const PairCall& call, const SolverProgram& solver, bool graph) {
    static const Operator forward("fastode::resident_linear_solve_forward");
    std::vector<IValue> found;
    {
      const pybind11::gil_scoped_release unlocked;
      const at::AutoDispatchBelowADInplaceOrView below;
      found = forward(call.given.tensors[0], call.given.from(1), call.program.integers, call.program.numbers,
                      solver.table, solver.solver, solver.limits, solver.per_sample, pieces_if(graph),
                      graph ? solver.through : IValue(0), false);
    }
    const Result result{found[0].toTensor(), found[1].toTensor()};
    if (!graph) return result;
    std::vector<Tensor> kept{result.log};
    for (const Tensor& each : found[2].toTensorVector()) kept.push_back(each);
    set_history(result.end, make_node<LinearSolveNode>(call, solver, std::move(kept)));
    return result;
  }

 protected:
  variable_list pull(const variable_list& bars, const variable_list& given, const Wanted& wanted) override {
    static const Operator backward("fastode::resident_linear_solve_backward");
    Wanted asked(wanted.begin() + 1, wanted.end());
    if (asked.size() > 1) asked[2] = asked[2] && reads_slope_of_z_;
    variable_list kept = copy_kept();
    // Without what was kept the operator takes the steps again.
    const Tensor log = kept.empty() ? at::empty({0}, at::kDouble) : kept[0];
    if (!kept.empty()) kept.erase(kept.begin());
    const auto found = backward(given[0], bars[0], log, kept, variable_list(given.begin() + 1, given.end()), rule()[0],
                                rule()[1], rule()[2], rule()[3], rule()[4], rule()[5], rule()[6], any_from(asked, 0));
    variable_list gradients{found[0].toTensor()};
    append_asked(gradients, found[1].toTensorVector(), asked);
    return gradients;
  }

 private:
  bool reads_slope_of_z_;
};

}  // namespace fastode
