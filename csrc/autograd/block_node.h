// The autograd node of a block: what the nodes of all families share.
//
// A node stands for the autograd Function of the same name in Python, for plain calls. Its backward runs without
// Python; one that is differentiated itself, or is under a transform, is handed to the Function.
#pragma once
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "../constants.h"
#include "python.h"

namespace fastode {

using at::Tensor;
using c10::IValue;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using Wanted = std::vector<bool>;
using NodePointer = decltype(torch::autograd::Edge::function);

// An operator of this project, called with a stack of arguments, which it replaces by its results.
class Operator {
 public:
  explicit Operator(const char* name) : handle_(c10::Dispatcher::singleton().findSchemaOrThrow(name, "")) {}
  template <class... Arguments>
  std::vector<IValue> operator()(Arguments&&... arguments) const {
    std::vector<IValue> stack;
    stack.reserve(sizeof...(arguments));
    (stack.emplace_back(std::forward<Arguments>(arguments)), ...);
    handle_.callBoxed(stack);
    return stack;
  }

 private:
  c10::OperatorHandle handle_;
};

// What an operator leaves to backward, as its schema takes it: pieces where there will be one.
inline int64_t pieces_if(bool graph) { return graph ? kKeepPieces : kKeepNothing; }

// What describes a branch or a pair to an operator, made once; of a pair's solution by equal steps also the last three.
struct Program {
  IValue integers, numbers, table, steps, used;
};

// What a block is called with: its tensors that are present, inputs first, and which of all its places they stand at.
struct Given {
  variable_list tensors;
  std::vector<bool> present;

  void add(const Tensor& tensor) {
    tensors.push_back(tensor);
    present.push_back(true);
  }
  bool any_requires_grad(size_t first) const {
    for (size_t i = first; i < tensors.size(); ++i)
      if (tensors[i].requires_grad()) return true;
    return false;
  }
  IValue from(size_t first) const { return c10::List<Tensor>(c10::ArrayRef<Tensor>(tensors).slice(first).vec()); }
};

// Whether a tensor belongs to a transform or to a subclass, which the Function in Python knows how to treat.
inline bool is_plain(const Tensor& tensor) {
  using c10::DispatchKey;
  constexpr c10::DispatchKeySet others({DispatchKey::Python, DispatchKey::FuncTorchGradWrapper, DispatchKey::Batched,
                                        DispatchKey::FuncTorchBatched, DispatchKey::Functionalize});
  return !tensor.key_set().has_any(others);
}

inline bool is_plain_cotangent(const Tensor& bar) {
  return !bar.defined() || (is_plain(bar) && !bar._fw_grad(/*level=*/0).defined());
}

// Whether PyTorch takes x as channels_last, as it does a slice of such a tensor.
inline bool is_channels_last(const Tensor& x) {
  const Tensor dense = x.is_non_overlapping_and_dense() ? x : at::empty_like(x);
  return dense.is_contiguous(at::MemoryFormat::ChannelsLast) && !dense.is_contiguous();
}

class BlockNode : public Node {
 public:
  variable_list apply(variable_list&& bars) override {
    const Wanted wanted = find_wanted();
    bool any = false, plain = !at::GradMode::is_enabled();
    for (const Tensor& bar : bars) any |= bar.defined(), plain &= is_plain_cotangent(bar);
    if (!any) return variable_list(num_outputs());
    if (!plain) return in_python(bars, wanted);
    const at::AutoDispatchBelowADInplaceOrView below;
    variable_list found = pull(bars, saved(), wanted);
    for (size_t i = 0; i < found.size(); ++i)
      if (!wanted[i]) found[i].reset();
    return found;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable& each : saved_) each.reset_data();
    result_.reset_data();
    kept_.clear();
  }

  std::string name() const override { return name_; }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& arguments) const override {
    arguments.collect(name_);
    arguments.collect(saved_, /*is_output=*/false);
    if (saves_result_) arguments.collect(result_, /*is_output=*/true);
    arguments.collect(kept_all_);
    // Numbers as nested ones are part of the key; others would be inputs of the trace, which is made for these values.
    for (const IValue& each : rule_) arguments.collect(each, /*nested=*/true);
  }

  // A tracer's inputs and saved tensors stand for the real ones, and nothing that is kept belongs to them.
  variable_list apply_with_saved(const variable_list& bars,
                                 torch::dynamo::autograd::SwapSavedVariables& saved) override {
    std::vector<Tensor> kept;
    std::swap(kept, kept_);
    saved.before(saved_);
    if (saves_result_) saved.before(result_);
    variable_list found = apply(variable_list(bars));
    saved.after(saved_);
    if (saves_result_) saved.after(result_);
    std::swap(kept, kept_);
    return found;
  }

  // What forward kept beside the saved tensors and backward has not used yet.
  const std::vector<Tensor>& kept() const { return kept_; }

 protected:
  // rule: all that the block's operators are called with and that is no tensor, by which a compiled backward is known.
  BlockNode(const char* name, const Given& given, std::vector<Tensor> kept, bool kept_all, PyObject* constants,
            std::vector<IValue> rule)
      : name_(name),
        present_(given.present),
        kept_(std::move(kept)),
        kept_all_(kept_all),
        constants_(constants),
        rule_(std::move(rule)) {
    torch::autograd::edge_list edges;
    edges.reserve(given.tensors.size());
    saved_.reserve(given.tensors.size());
    for (const Tensor& tensor : given.tensors) {
      edges.push_back(torch::autograd::impl::gradient_edge(tensor));
      saved_.emplace_back(tensor, /*is_output=*/false);
    }
    set_next_edges(std::move(edges));
  }

  // The gradients of the saved tensors, at least of those that are wanted.
  virtual variable_list pull(const variable_list& bars, const variable_list& given, const Wanted& wanted) = 0;

  // What forward returned, for backward to read.
  void save_result(const Tensor& result) { result_ = SavedVariable(result, /*is_output=*/true), saves_result_ = true; }
  Tensor result() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return result_.unpack(getptr());
  }

  // Hands over what forward kept, once: backward overwrites it, and a second backward computes everything again.
  std::vector<Tensor> take_kept() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return std::exchange(kept_, {});
  }

  // What forward kept, where backward only reads it.
  std::vector<Tensor> copy_kept() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return kept_;
  }

  static bool any_from(const Wanted& wanted, size_t first) {
    for (size_t i = first; i < wanted.size(); ++i)
      if (wanted[i]) return true;
    return false;
  }

  bool kept_all() const { return kept_all_; }
  const std::vector<bool>& present() const { return present_; }
  const std::vector<IValue>& rule() const { return rule_; }

 private:
  // Which gradients autograd will use: not those of trainable parameters where only an image's was asked for.
  Wanted find_wanted() const {
    Wanted wanted(num_outputs());
    for (size_t i = 0; i < wanted.size(); ++i) wanted[i] = task_should_compute_output(i);
    return wanted;
  }

  variable_list saved() {
    const std::lock_guard<std::mutex> lock(mutex_);
    variable_list found;
    found.reserve(saved_.size());
    for (const SavedVariable& each : saved_) found.push_back(each.unpack());
    return found;
  }

  variable_list in_python(const variable_list& bars, const Wanted& wanted) {
    const variable_list tensors = saved();
    const pybind11::gil_scoped_acquire lock;
    size_t next = 0;
    THPObjectPtr given(new_tuple(present_.size(), [&](size_t i) {
      return present_[i] ? THPVariable_Wrap(tensors[next++]) : Py_NewRef(Py_None);
    }));
    next = 0;
    THPObjectPtr owed(new_tuple(
        present_.size(), [&](size_t i) { return Py_NewRef(present_[i] && wanted[next++] ? Py_True : Py_False); }));
    THPObjectPtr cotangents(new_tuple(
        bars.size(), [&](size_t i) { return bars[i].defined() ? THPVariable_Wrap(bars[i]) : Py_NewRef(Py_None); }));
    PyObject* function = PyTuple_GET_ITEM(constants_.get(), 0);
    THPObjectPtr name(checked(PyUnicode_InternFromString("backward_of_node")));
    THPObjectPtr found(
        checked(PyObject_CallMethodObjArgs(function, name.get(), constants_.get(), given.get(), owed.get(),
                                           kept_all_ ? Py_True : Py_False, cotangents.get(), nullptr)));
    variable_list gradients;
    gradients.reserve(tensors.size());
    for (size_t i = 0; i < present_.size(); ++i) {
      PyObject* each = PyTuple_GET_ITEM(found.get(), static_cast<Py_ssize_t>(i));
      if (present_[i]) gradients.push_back(each == Py_None ? Tensor() : THPVariable_Unpack(each));
    }
    return gradients;
  }

  const char* name_;
  std::vector<bool> present_;
  std::vector<SavedVariable> saved_;
  SavedVariable result_;
  bool saves_result_ = false;
  std::vector<Tensor> kept_;
  bool kept_all_;
  PythonObject constants_;  // the Function, and what it is called with before the tensors
  std::vector<IValue> rule_;
};

template <class T, class... Arguments>
NodePointer make_node(Arguments&&... arguments) {
  if constexpr (std::is_constructible_v<NodePointer, std::shared_ptr<Node>>)  // before torch 2.12
    return NodePointer(
        std::shared_ptr<T>(new T(std::forward<Arguments>(arguments)...), [](T* node) { deleteNode(node); }));
  else
    return c10::make_intrusive<T>(std::forward<Arguments>(arguments)...);
}

// Makes a result of a block the output of its node.
inline void set_history(const Tensor& result, const NodePointer& node) {
  const uint32_t place = node->add_input_metadata(result);
  torch::autograd::impl::set_gradient_edge(result, {node, place});
}

}  // namespace fastode
