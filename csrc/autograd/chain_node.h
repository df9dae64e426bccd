// The node of chains, and of blocks that may change the shape: fastode/ops/resident/chain.py in C++.
#pragma once
#include "branch_nodes.h"

namespace fastode {

// What describes a chain to its operators, made once.
struct ChainProgram {
  IValue integers, numbers, strides, lengths, step, act, p, q;
  bool reads_result = false;  // backward tells the last activation's slope from what forward returned
};

struct ChainCall {
  const ChainProgram& program;
  PyObject* constants;  // as a BranchCall has them
  IValue shape;         // of the result, without the samples
  Given given;
};

class ChainNode final : public BlockNode {
 public:
  ChainNode(const ChainCall& call, std::vector<Tensor> kept)
      : BlockNode("ResidentChainFunctionBackward", call.given, std::move(kept), false, call.constants,
                  {call.program.integers, call.program.numbers, call.program.strides, call.program.lengths,
                   call.program.step, call.program.act, call.program.p, call.program.q}) {}

  static BranchResult run(const ChainCall& call) {
    static const Operator forward("fastode::resident_chain_forward");
    const ChainProgram& chain = call.program;
    const variable_list& given = call.given.tensors;
    const bool graph = at::GradMode::is_enabled() && call.given.any_requires_grad(0);
    // The input, or a weight by which convolutions would give a result in channels_last.
    bool last = is_channels_last(given[0]);
    for (size_t i = 1; i < given.size() && !last; ++i) last = given[i].dim() == 4 && is_channels_last(given[i]);
    std::vector<IValue> found;
    {
      const pybind11::gil_scoped_release unlocked;
      const at::AutoDispatchBelowADInplaceOrView below;
      found = forward(given[0], call.given.from(1), chain.integers, chain.numbers, chain.strides, chain.lengths,
                      chain.step, chain.act, chain.p, chain.q, call.shape, pieces_if(graph), last);
    }
    BranchResult result{found[0].toTensor(), found[1].toTensor()};
    if (!graph) return result;
    const NodePointer node = make_node<ChainNode>(call, found[2].toTensorVector());
    set_history(result.y, node);
    if (chain.reads_result) static_cast<ChainNode*>(node.get())->save_result(result.y);
    return result;
  }

 protected:
  variable_list pull(const variable_list& bars, const variable_list& given, const Wanted& wanted) override {
    static const Operator backward("fastode::resident_chain_backward");
    const Tensor y = result();
    const auto found =
        backward(given[0], y.defined() ? y : given[0], bars[0], take_kept(),
                 variable_list(given.begin() + 1, given.end()), rule()[0], rule()[1], rule()[2], rule()[3], rule()[4],
                 rule()[5], rule()[6], rule()[7], static_cast<bool>(wanted[0]), any_from(wanted, 1));
    variable_list gradients = found[1].toTensorVector();
    gradients.insert(gradients.begin(), found[0].toTensor());
    gradients.resize(given.size());
    return gradients;
  }
};

}  // namespace fastode
