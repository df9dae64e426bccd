// A chain of units and a residual block that may change the shape behind it, forwards and backwards, on resident
// samples. Derivation: README.md of fastode/ops/schemes/chain.
#pragma once

#include <optional>

#include "engine.h"

namespace fastode::resident {

// z = lead(x), and with a block y = act(shortcut(z) + step branch(z)), else y = z. `lengths`: the units of the lead,
// the branch and the shortcut; a branch of none stands for no block.
struct ChainArguments {
  const std::vector<Tensor>& parameters;
  const std::vector<int64_t>&units, &strides, &lengths;
  const std::vector<double>& numbers;
  double step;
  int64_t act;
  double p, q;
};

// The arguments of one of a chain's three parts.
struct ChainPart {
  std::vector<Tensor> parameters;
  std::vector<int64_t> units, strides;
  std::vector<double> numbers;

  BranchArguments arguments() const { return {parameters, units, numbers, &strides}; }
};

struct ChainCall {
  const Tensor& x;
  const Tensor* cotangent;  // null: forward
  const Tensor* y;          // backward's, of what forward returned
  Tensor result;            // y, or x's cotangent
  bool keep;                // something is left to backward, or was
  bool point, gradients;    // backward: whether x's cotangent, and whether the parameters' gradients are wanted
};

// Runs a chain whose maps are stored as T; float ones may be read of bfloat16 tensors and written to such. Forwards it
// fills `statistics`, backwards `bars`; `kept` goes from one to the other.
template <class T>
void run_chain(const ChainArguments& chain, const ChainCall& call, std::vector<Tensor>& kept, Tensor* statistics,
               std::vector<Tensor>* bars);

std::vector<ChainPart> parts_of(const ChainArguments& chain);

}  // namespace fastode::resident
