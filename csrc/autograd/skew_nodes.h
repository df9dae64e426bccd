// The nodes of the skew pair and of its solution by equal steps: fastode/ops/resident/skew.py in C++.
#pragma once
#include <algorithm>
#include <array>

#include "block_node.h"

namespace fastode {

// What a pair, or a solution of one, is called with in Python.
struct PairCall {
  const Program& program;
  PyObject* constants;
  Given given;
};

// Which gradients an operator is to make beside those of its inputs.
struct Asked {
  Wanted tensors;  // of W's weight and the norms' tensors that are present
  bool weight, norms;
};

class PairNodeBase : public BlockNode {
 protected:
  static constexpr size_t kTensorsPerNorm = 4;
  using Used = std::array<bool, 4>;

  PairNodeBase(const char* name, const PairCall& call, size_t inputs, std::vector<Tensor> kept,
               std::vector<IValue> rule)
      : BlockNode(name, call.given, std::move(kept), false, call.constants, std::move(rule)),
        inputs_(inputs),
        damped_(call.program.numbers.toDoubleList().get(0) != 0) {}

  // Which of the four norms (before W on y and z, after the activation on each) those slopes depend on, and so which
  // halves of the point.
  Used norms_used(bool slope_y, bool slope_z) const {
    return {slope_z || (damped_ && slope_y), slope_y || (damped_ && slope_z), slope_y, slope_z};
  }

  // Of W's weight and the norms' tensors, those that have a gradient: not one that nothing depends on.
  Asked asked_of(const Used& used, const Wanted& wanted) const {
    Asked asked{{wanted[inputs_]}, wanted[inputs_], false};
    size_t next = inputs_ + 1;
    for (size_t place = next; place < present().size(); ++place) {
      if (!present()[place]) continue;
      asked.tensors.push_back(wanted[next++] && used[(place - inputs_ - 1) / kTensorsPerNorm]);
      asked.norms |= asked.tensors.back();
    }
    return asked;
  }

  // Adds an operator's gradients of the weight and the norms to those of the inputs; it gives none, or all.
  static void append(variable_list& gradients, const variable_list& bars, const Asked& asked) {
    for (size_t i = 0; i < asked.tensors.size(); ++i)
      gradients.push_back(asked.tensors[i] && !bars.empty() ? bars[i] : Tensor());
  }

  static IValue optional(const Tensor& bar) { return bar.defined() ? IValue(bar) : IValue(); }

 private:
  size_t inputs_;
  bool damped_;
};

// (dy, dz) at (y, z). What it keeps begins with the slopes, where signs are kept, which are read beside them.
class PairNode final : public PairNodeBase {
 public:
  struct Result {
    Tensor dy, dz;
  };

  PairNode(const PairCall& call, std::vector<Tensor> kept, size_t signs)
      : PairNodeBase("ResidentSkewFunctionBackward", call, 2, std::move(kept),
                     {call.program.integers, call.program.numbers}),
        signs_(signs) {}

  static Result run(const PairCall& call, bool graph) {
    static const Operator forward("fastode::resident_skew_forward");
    const variable_list& given = call.given.tensors;
    std::vector<IValue> found;
    {
      const pybind11::gil_scoped_release unlocked;
      const at::AutoDispatchBelowADInplaceOrView below;
      const bool weight_last = is_channels_last(given[2]);
      // The memory formats that PyTorch's convolution and its transpose give the slopes.
      found =
          forward(given[0], given[1], call.given.from(2), call.program.integers, call.program.numbers, pieces_if(graph),
                  graph, weight_last || is_channels_last(given[1]), weight_last || is_channels_last(given[0]));
    }
    const Result result{found[0].toTensor(), found[1].toTensor()};
    if (!graph) return result;
    const variable_list signs = found[3].toTensorVector(), rest = found[2].toTensorVector();
    variable_list kept;
    // These are the user's, who may write to them: an alias has their version.
    if (!signs.empty()) kept = {result.dy.detach(), result.dz.detach()};
    kept.insert(kept.end(), signs.begin(), signs.end());
    kept.insert(kept.end(), rest.begin(), rest.end());
    const NodePointer node = make_node<PairNode>(call, std::move(kept), signs.size());
    set_history(result.dy, node);
    set_history(result.dz, node);
    return result;
  }

 protected:
  variable_list pull(const variable_list& bars, const variable_list& given, const Wanted& wanted) override {
    static const Operator backward("fastode::resident_skew_backward");
    variable_list slopes, signs, rest = copy_kept();
    if (signs_ != 0 && !rest.empty()) {
      slopes.assign(rest.begin(), rest.begin() + 2);
      signs.assign(rest.begin() + 2, rest.begin() + 2 + signs_);
      rest.erase(rest.begin(), rest.begin() + 2 + signs_);
      // Written over since: everything is evaluated again.
      if (slopes[0]._version() != 0 || slopes[1]._version() != 0) slopes.clear(), signs.clear(), rest.clear();
    }
    const Used used = norms_used(bars[0].defined(), bars[1].defined());
    const bool need_y = wanted[0] && used[0], need_z = wanted[1] && used[1];
    const Asked asked = asked_of(used, wanted);
    const auto found = backward(given[0], given[1], optional(bars[0]), optional(bars[1]), rest, signs, slopes,
                                variable_list(given.begin() + 2, given.end()), rule()[0], rule()[1], need_y, need_z,
                                asked.weight, asked.norms);
    variable_list gradients{need_y ? found[0].toTensor() : Tensor(), need_z ? found[1].toTensor() : Tensor()};
    append(gradients, found[2].toTensorVector(), asked);
    return gradients;
  }

 private:
  size_t signs_;
};

// y at the end of equal steps from x.
class MarchNode final : public PairNodeBase {
 public:
  MarchNode(const PairCall& call, std::vector<Tensor> kept)
      : PairNodeBase(
            "ResidentMarchFunctionBackward", call, 1, std::move(kept),
            {call.program.integers, call.program.numbers, call.program.table, call.program.steps, call.program.used}) {}

  static Tensor run(const PairCall& call, bool graph) {
    static const Operator forward("fastode::resident_march_forward");
    const Tensor& x = call.given.tensors[0];
    const Program& program = call.program;
    std::vector<IValue> found;
    {
      const pybind11::gil_scoped_release unlocked;
      const at::AutoDispatchBelowADInplaceOrView below;
      found = forward(x, call.given.from(1), program.integers, program.numbers, program.table, program.steps,
                      program.used, pieces_if(graph), is_channels_last(x));
    }
    const Tensor end = found[0].toTensor();
    if (graph) set_history(end, make_node<MarchNode>(call, found[1].toTensorVector()));
    return end;
  }

 protected:
  variable_list pull(const variable_list& bars, const variable_list& given, const Wanted& wanted) override {
    static const Operator backward("fastode::resident_march_backward");
    const auto halves = rule()[4].toIntVector();  // of y and of z, slope by slope
    bool any_y = false, any_z = false;
    for (size_t i = 0; i + 1 < halves.size(); i += 2) any_y |= halves[i] != 0, any_z |= halves[i + 1] != 0;
    const Asked asked = asked_of(norms_used(any_y, any_z), wanted);
    const auto found = backward(given[0], bars[0], copy_kept(), variable_list(given.begin() + 1, given.end()),
                                rule()[0], rule()[1], rule()[2], rule()[3], rule()[4], asked.weight, asked.norms);
    variable_list gradients{found[0].toTensor()};
    append(gradients, found[1].toTensorVector(), asked);
    return gradients;
  }
};

}  // namespace fastode
