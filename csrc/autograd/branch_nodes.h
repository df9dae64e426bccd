// The nodes of IE-Skip and of the explicit schemes: fastode/ops/resident/functions.py in C++.
#pragma once
#include "../environment.h"
#include "block_node.h"

namespace fastode {

// What a block around a branch is called with in Python, beside its scheme.
struct BranchCall {
  const Program& program;
  PyObject* constants;
  Given given;
};

// y in the memory format that element-wise PyTorch gives a result of x.
inline Tensor like_reference(const Tensor& y, const Tensor& x) {
  if (y.strides() == x.strides()) return y;
  const Tensor wanted = at::empty_like(x, y.options());
  return y.strides() == wanted.strides() ? y : wanted.copy_(y);
}

struct BranchResult {
  Tensor y, statistics;
};

// Runs forward(keep, keep_all) and makes the node of its result, if it is to have one.
template <class Family>
BranchResult run_branch(const BranchCall& call, const typename Family::Rule& rule) {
  const Given& given = call.given;
  const bool graph = at::GradMode::is_enabled() && given.any_requires_grad(0);
  const bool keep_all = !asks_for_less_memory() || !(graph && given.any_requires_grad(1));
  std::vector<IValue> found;
  BranchResult result;
  {
    const pybind11::gil_scoped_release unlocked;
    const at::AutoDispatchBelowADInplaceOrView below;
    found = Family::forward(call, rule, graph, keep_all);
    result = {like_reference(found[0].toTensor(), given.tensors[0]), found[1].toTensor()};
  }
  if (graph) set_history(result.y, make_node<Family>(call, rule, found[2].toTensorVector(), keep_all));
  return result;
}

class DescentNode final : public BlockNode {
 public:
  struct Rule {
    int64_t steps;
    double step_size, theta;
    bool detach;
  };

  DescentNode(const BranchCall& call, const Rule& rule, std::vector<Tensor> kept, bool kept_all)
      : BlockNode("ResidentIESkipFunctionBackward", call.given, std::move(kept), kept_all, call.constants,
                  {call.program.integers, call.program.numbers, rule.steps, rule.step_size, rule.theta, rule.detach}) {}

  static std::vector<IValue> forward(const BranchCall& call, const Rule& rule, bool keep, bool keep_all) {
    static const Operator forward("fastode::resident_ie_forward");
    return forward(call.given.tensors[0], call.given.from(1), call.program.integers, call.program.numbers, rule.steps,
                   rule.step_size, rule.theta, pieces_if(keep && !rule.detach), keep_all);
  }

 protected:
  variable_list pull(const variable_list& bars, const variable_list& given, const Wanted& wanted) override {
    static const Operator backward("fastode::resident_ie_backward");
    const auto found =
        backward(given[0], bars[0], take_kept(), variable_list(given.begin() + 1, given.end()), rule()[0], rule()[1],
                 rule()[2], rule()[3], rule()[4], rule()[5], any_from(wanted, 1), kept_all());
    variable_list gradients = found[1].toTensorVector();
    gradients.insert(gradients.begin(), found[0].toTensor());
    gradients.resize(given.size());
    return gradients;
  }
};

class SchemeNode final : public BlockNode {
 public:
  struct Rule {};  // the coefficients are a tensor, the second input

  SchemeNode(const BranchCall& call, const Rule&, std::vector<Tensor> kept, bool kept_all)
      : BlockNode("ResidentShuOsherFunctionBackward", call.given, std::move(kept), kept_all, call.constants,
                  {call.program.integers, call.program.numbers}) {}

  static std::vector<IValue> forward(const BranchCall& call, const Rule&, bool keep, bool keep_all) {
    static const Operator forward("fastode::resident_rk_forward");
    return forward(call.given.tensors[0], call.given.from(2), call.program.integers, call.program.numbers,
                   call.given.tensors[1].contiguous(), pieces_if(keep), keep_all);
  }

 protected:
  variable_list pull(const variable_list& bars, const variable_list& given, const Wanted& wanted) override {
    static const Operator backward("fastode::resident_rk_backward");
    const Tensor& table = given[1];
    const auto found =
        backward(given[0], bars[0], take_kept(), variable_list(given.begin() + 2, given.end()), rule()[0], rule()[1],
                 table.contiguous(), any_from(wanted, 2), static_cast<bool>(wanted[1]), kept_all());
    const variable_list parameters = found[1].toTensorVector();
    variable_list gradients{found[0].toTensor(), Tensor()};
    if (wanted[1]) gradients[1] = found[2].toTensor().view(table.sizes()).to(table.scalar_type());
    gradients.insert(gradients.end(), parameters.begin(), parameters.end());
    gradients.resize(given.size());
    return gradients;
  }
};

}  // namespace fastode
