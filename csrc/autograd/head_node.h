// The node of a network's head: fastode/ops/resident/head.py in C++.
#pragma once
#include "block_node.h"

namespace fastode {

class HeadNode final : public BlockNode {
 public:
  HeadNode(const Given& given, PyObject* constants, std::vector<Tensor> kept)
      : BlockNode("ResidentHeadFunctionBackward", given, std::move(kept), false, constants, {}) {}

  static Tensor run(const Given& given, PyObject* constants, bool lowers) {
    static const Operator forward("fastode::resident_head_forward");
    const bool graph = at::GradMode::is_enabled() && given.any_requires_grad(0);
    std::vector<IValue> found;
    {
      const pybind11::gil_scoped_release unlocked;
      const at::AutoDispatchBelowADInplaceOrView below;
      found = forward(dense(given.tensors[0]), given.tensors[1], bias(given.tensors), lowers);
    }
    const Tensor y = found[0].toTensor();
    if (graph) set_history(y, make_node<HeadNode>(given, constants, std::vector<Tensor>{found[1].toTensor()}));
    return y;
  }

 protected:
  variable_list pull(const variable_list& bars, const variable_list& given, const Wanted& wanted) override {
    static const Operator forward("fastode::resident_head_forward"), backward("fastode::resident_head_backward");
    const Tensor x = dense(given[0]);
    std::vector<Tensor> kept = copy_kept();
    const bool lowers = bars[0].scalar_type() != x.scalar_type();
    if (kept.empty()) kept.push_back(forward(x, given[1], bias(given), lowers)[1].toTensor());
    const auto found =
        backward(x, kept[0], bars[0].contiguous(), given[1], static_cast<bool>(wanted[0]), any_from(wanted, 1));
    variable_list gradients = found[1].toTensorVector();
    gradients.insert(gradients.begin(), found[0].toTensor());
    gradients.resize(given.size());
    return gradients;
  }

 private:
  static IValue bias(const variable_list& given) { return given.size() > 2 ? IValue(given[2]) : IValue(); }
  static Tensor dense(const Tensor& x) { return x.is_contiguous(at::MemoryFormat::ChannelsLast) ? x : x.contiguous(); }
};

}  // namespace fastode
