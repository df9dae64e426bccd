// What autograd's engine is about to do, for operators in graphs of a compiler.
#pragma once

#include <torch/csrc/autograd/graph_task.h>

#include "python.h"

namespace fastode {

// Whether the engine will use a gradient of this tensor in the backward that runs on this thread: false where it is a
// leaf that the caller has not asked for. True for all else, as what a graph has computed.
inline bool will_use(const Tensor& tensor) {
  const auto* tasks = torch::autograd::get_current_graph_task_exec_info();
  if (!tasks || tasks->empty()) return true;  // no backward at work, or one that goes to all leaves
  if (!tensor.is_leaf() || !tensor.requires_grad()) return true;
  const auto leaf = torch::autograd::impl::try_get_grad_accumulator(tensor);
  if (!leaf) return true;
  const auto found = tasks->find(leaf.get());
  return found != tasks->end() && found->second.should_execute();
}

// The same by the handle that operators have: a pointer to the tensor.
inline bool will_use_handle(void* handle) { return will_use(*static_cast<const Tensor*>(handle)); }

}  // namespace fastode
