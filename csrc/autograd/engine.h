// What autograd's engine is about to do, for operators in the backward of a compiled graph.
#pragma once

#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_cpp_function.h>

#include <algorithm>
#include <unordered_set>

#include "block_node.h"

namespace fastode {

// Whether a node adds up the gradient of a parameter, or cannot be asked. Python is: the class's header brings in all
// of ATen's.
inline bool ends_in_parameter(const NodePointer& node) {
  const PyGILState_STATE state = PyGILState_Ensure();
  bool found = true;
  if (THPObjectPtr object{torch::autograd::functionToPyObject(node)}) {
    THPObjectPtr variable{PyObject_GetAttrString(object.get(), "variable")};
    found = variable && PyObject_IsInstance(variable.get(), ParameterClass) != 0;
  }
  PyErr_Clear();
  PyGILState_Release(state);
  return found;
}

// Whether no gradient of a parameter is asked for in the backward of the graph that this thread is in: an attack's,
// which asks for an image's. The graph's node has an edge to each of its inputs. What an operator is given may be
// another input than the one that its gradient goes to, as a compiler takes one for a copy of it: so all of the node's
// edges count, and `leaves`, which an operator was traced for, are only to be among them.
inline bool go_unused(const std::vector<const Tensor*>& leaves) {
  const auto* running = torch::autograd::get_current_graph_task_exec_info();
  const auto node = torch::autograd::get_current_node();
  if (!running || running->empty() || !node || leaves.empty()) return false;
  std::unordered_set<const torch::autograd::Node*> idle;
  for (const torch::autograd::Edge& edge : node->next_edges()) {
    if (!edge.function) continue;
    const auto found = running->find(edge.function.get());
    const bool runs = found != running->end() && found->second.should_execute();
    if (!runs)
      idle.insert(edge.function.get());
    else if (ends_in_parameter(edge.function))
      return false;
  }
  return std::all_of(leaves.begin(), leaves.end(), [&](const Tensor* tensor) {
    if (!tensor->is_leaf() || !tensor->requires_grad()) return false;
    const auto accumulator = torch::autograd::impl::try_get_grad_accumulator(*tensor);
    return accumulator && idle.count(accumulator.get()) > 0;
  });
}

// The same by the handles that operators have: pointers to tensors.
inline bool handles_go_unused(void* const* handles, int64_t count) {
  std::vector<const Tensor*> leaves(count);
  std::transform(handles, handles + count, leaves.begin(), [](void* at) { return static_cast<const Tensor*>(at); });
  return go_unused(leaves);
}

}  // namespace fastode
