// The module fastode_nodes: calls of blocks whose autograd node is in C++.
//
// Built against the C++ interface of the torch that is installed, which is not stable, and so apart from the operators:
// where it cannot be built the Functions in Python take its place. Every call returns NotImplemented for tensors that
// the Functions have to treat.
#include "chain_node.h"
#include "engine.h"
#include "head_node.h"
#include "linear_nodes.h"
#include "running.h"
#include "snapshot.h"

namespace fastode {
namespace {

constexpr const char *kProgram = "fastode program", *kSolver = "fastode solver", *kWatched = "fastode watched";
constexpr const char *kChain = "fastode chain", *kStatistics = "fastode running";

template <class Item, class F>
IValue list_of(PyObject* sequence, const F& item) {
  THPObjectPtr items(checked(PySequence_Fast(sequence, "expected a sequence")));
  c10::List<Item> list;
  const Py_ssize_t size = PySequence_Fast_GET_SIZE(items.get());
  list.reserve(size);
  for (Py_ssize_t i = 0; i < size; ++i) list.push_back(item(PySequence_Fast_GET_ITEM(items.get(), i)));
  return list;
}

// A capsule that owns what it holds, under a name that `held_in` asks for.
template <class Held>
PyObject* hold(std::unique_ptr<Held> made, const char* name) {
  return PyCapsule_New(made.release(), name, [](PyObject* capsule) {
    delete static_cast<Held*>(PyCapsule_GetPointer(capsule, PyCapsule_GetName(capsule)));
  });
}

template <class Held>
const Held& held_in(PyObject* capsule, const char* name) {
  const auto* found = static_cast<Held*>(PyCapsule_GetPointer(capsule, name));
  if (!found) throw_python_error();
  return *found;
}

const Tensor& tensor_in(PyObject* object) {
  TORCH_CHECK_TYPE(THPVariable_Check(object), "expected a tensor, got ", Py_TYPE(object)->tp_name);
  return THPVariable_Unpack(object);
}

void expect(Py_ssize_t found, Py_ssize_t wanted) {
  TORCH_CHECK_TYPE(found == wanted, "expected ", wanted, " arguments, got ", found);
}

// program(integers, numbers), or program(integers, numbers, table, steps, used)
PyObject* program(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  expect(count, count == 2 ? 2 : 5);
  auto made = std::make_unique<Program>();
  made->integers = list_of<int64_t>(arguments[0], integer);
  made->numbers = list_of<double>(arguments[1], number);
  if (count == 5) {
    made->table = list_of<double>(arguments[2], number);
    made->steps = integer(arguments[3]);
    made->used = list_of<int64_t>(arguments[4], integer);
  }
  return hold(std::move(made), kProgram);
  END_HANDLE_TH_ERRORS
}

// Adds a tensor, or a place without one; false if it is not for the nodes.
bool add(Given& given, PyObject* object) {
  if (object == Py_None) {
    given.present.push_back(false);
    return true;
  }
  given.add(tensor_in(object));
  return is_plain(given.tensors.back());
}

bool add_all(Given& given, PyObject* sequence) {
  THPObjectPtr items(checked(PySequence_Fast(sequence, "expected a sequence of tensors")));
  const Py_ssize_t size = PySequence_Fast_GET_SIZE(items.get());
  given.tensors.reserve(size + 2);
  given.present.reserve(size + 2);
  for (Py_ssize_t i = 0; i < size; ++i)
    if (!add(given, PySequence_Fast_GET_ITEM(items.get(), i))) return false;
  return true;
}

// The constants and the tensors of every call around a branch, of a chain or of a head. The last constant is None where
// there can be no graph. False from `read` where they are not for the nodes.
struct BlockArguments {
  PyObject* constants;
  Given given;

  explicit BlockArguments(PyObject* tuple) : constants(tuple) {
    TORCH_CHECK_TYPE(PyTuple_Check(constants) && PyTuple_GET_SIZE(constants) > 0, "expected a tuple of constants");
  }
  bool read(PyObject* tensors) {
    if (!add_all(given, tensors)) return false;
    const bool graph = PyTuple_GET_ITEM(constants, PyTuple_GET_SIZE(constants) - 1) != Py_None;
    return graph || !at::GradMode::is_enabled() || !given.any_requires_grad(0);
  }
};

PyObject* wrapped(BranchResult result) {
  if (result.statistics.numel() == 0) return THPVariable_Wrap(std::move(result.y));
  THPObjectPtr y(THPVariable_Wrap(std::move(result.y))), statistics(THPVariable_Wrap(std::move(result.statistics)));
  return PyTuple_Pack(2, y.get(), statistics.get());
}

template <class Family>
PyObject* run(PyObject* const* arguments, const typename Family::Rule& rule) {
  BlockArguments found(arguments[1]);
  if (!found.read(arguments[2])) return Py_NewRef(Py_NotImplemented);
  const BranchCall call{held_in<Program>(arguments[0], kProgram), found.constants, std::move(found.given)};
  return wrapped(run_branch<Family>(call, rule));
}

// descent(program, constants, tensors, steps, step_size, theta, detach)
PyObject* descent(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  expect(count, 7);
  return run<DescentNode>(arguments,
                          {integer(arguments[3]), number(arguments[4]), number(arguments[5]), truth(arguments[6])});
  END_HANDLE_TH_ERRORS
}

// scheme(program, constants, tensors)
PyObject* scheme(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  expect(count, 3);
  return run<SchemeNode>(arguments, {});
  END_HANDLE_TH_ERRORS
}

// chain_program(integers, numbers, strides, lengths, step, act, p, q, whether backward reads the result)
PyObject* chain_program(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  expect(count, 9);
  auto made = std::make_unique<ChainProgram>();
  made->integers = list_of<int64_t>(arguments[0], integer);
  made->numbers = list_of<double>(arguments[1], number);
  made->strides = list_of<int64_t>(arguments[2], integer);
  made->lengths = list_of<int64_t>(arguments[3], integer);
  made->step = number(arguments[4]), made->act = integer(arguments[5]);
  made->p = number(arguments[6]), made->q = number(arguments[7]);
  made->reads_result = truth(arguments[8]);
  return hold(std::move(made), kChain);
  END_HANDLE_TH_ERRORS
}

// chain(program, constants, tensors, the result's shape without samples)
PyObject* chain(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  expect(count, 4);
  BlockArguments found(arguments[1]);
  if (!found.read(arguments[2])) return Py_NewRef(Py_NotImplemented);
  const ChainCall call{held_in<ChainProgram>(arguments[0], kChain), found.constants,
                       list_of<int64_t>(arguments[3], integer), std::move(found.given)};
  return wrapped(ChainNode::run(call));
  END_HANDLE_TH_ERRORS
}

// head(constants, tensors, lowers)
PyObject* head(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  expect(count, 3);
  BlockArguments found(arguments[0]);
  if (!found.read(arguments[1])) return Py_NewRef(Py_NotImplemented);
  return THPVariable_Wrap(HeadNode::run(found.given, found.constants, truth(arguments[2])));
  END_HANDLE_TH_ERRORS
}

// running([(mean, variance, count of batches, place, channels, factor, unbiased)])
PyObject* running(PyObject*, PyObject* rows) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(PyList_Check(rows), "expected a list");
  auto made = std::make_unique<Running>();
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(rows); ++i) {
    PyObject *tensors[3], *row = PyList_GET_ITEM(rows, i);
    long long place, channels;
    double factor, unbiased;
    if (!PyArg_ParseTuple(row, "OOOLLdd", &tensors[0], &tensors[1], &tensors[2], &place, &channels, &factor, &unbiased))
      throw_python_error();
    made->add({tensor_in(tensors[0]), tensor_in(tensors[1]), tensor_in(tensors[2]), place, channels, factor, unbiased});
  }
  return hold(std::move(made), kStatistics);
  END_HANDLE_TH_ERRORS
}

// move(running, what an operator has met): whether that was done
PyObject* move(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  expect(count, 2);
  return PyBool_FromLong(held_in<Running>(arguments[0], kStatistics).move(tensor_in(arguments[1])));
  END_HANDLE_TH_ERRORS
}

// Calls run(call, whether there is to be a graph) for the arguments program, constants, tensors.
template <class F>
PyObject* run_field(PyObject* const* arguments, const F& run) {
  TORCH_CHECK_TYPE(PyTuple_Check(arguments[1]), "expected a tuple of constants");
  PairCall call{held_in<Program>(arguments[0], kProgram), arguments[1], {}};
  if (!add_all(call.given, arguments[2])) return Py_NewRef(Py_NotImplemented);
  return run(call, at::GradMode::is_enabled() && call.given.any_requires_grad(0));
}

PyObject* wrap_both(Tensor first, Tensor second) {
  THPObjectPtr one(THPVariable_Wrap(std::move(first))), other(THPVariable_Wrap(std::move(second)));
  return PyTuple_Pack(2, one.get(), other.get());
}

// pair(program, constants, tensors) -> (dy, dz), and likewise linear
template <class Family>
PyObject* pair(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  expect(count, 3);
  return run_field(arguments, [](const PairCall& call, bool graph) {
    auto [dy, dz] = Family::run(call, graph);
    return wrap_both(std::move(dy), std::move(dz));
  });
  END_HANDLE_TH_ERRORS
}

// march(program, constants, tensors)
PyObject* march(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  expect(count, 3);
  return run_field(arguments,
                   [](const PairCall& call, bool graph) { return THPVariable_Wrap(MarchNode::run(call, graph)); });
  END_HANDLE_TH_ERRORS
}

// solver(table, numbers, limits, per_sample, through, reads_slope_of_z)
PyObject* solver(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  expect(count, 6);
  auto made = std::make_unique<SolverProgram>();
  made->table = list_of<double>(arguments[0], number);
  made->solver = list_of<double>(arguments[1], number);
  made->limits = list_of<int64_t>(arguments[2], integer);
  made->per_sample = truth(arguments[3]), made->through = integer(arguments[4]);
  made->reads_slope_of_z = truth(arguments[5]);
  return hold(std::move(made), kSolver);
  END_HANDLE_TH_ERRORS
}

// linear_solve(program, constants, tensors, solver) -> (end, log)
PyObject* linear_solve(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  expect(count, 4);
  const auto& how = held_in<SolverProgram>(arguments[3], kSolver);
  return run_field(arguments, [&](const PairCall& call, bool graph) {
    auto [end, log] = LinearSolveNode::run(call, how, graph);
    return wrap_both(std::move(end), std::move(log));
  });
  END_HANDLE_TH_ERRORS
}

// kept(result): the tensors that forward kept beside the saved ones and backward has not used yet
PyObject* kept(PyObject*, PyObject* result) {
  HANDLE_TH_ERRORS
  const NodePointer node = tensor_in(result).grad_fn();
  const auto* block = dynamic_cast<const BlockNode*>(node.get());
  if (!block) return Py_NewRef(Py_None);
  return new_tuple(block->kept().size(), [&](size_t i) { return THPVariable_Wrap(block->kept()[i]); });
  END_HANDLE_TH_ERRORS
}

// watched(hooks, rows, tensors): what a snapshot keeps, or None where only Python can compare it
PyObject* watched(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  expect(count, 3);
  for (Py_ssize_t i = 0; i < 3; ++i) TORCH_CHECK_TYPE(PyList_Check(arguments[i]), "expected a list");
  auto made = std::make_unique<Watched>(arguments[0], arguments[1], arguments[2]);
  if (!made->usable()) return Py_NewRef(Py_None);
  return hold(std::move(made), kWatched);
  END_HANDLE_TH_ERRORS
}

// unchanged(watched, root): whether all of it is as it was, or NotImplemented
PyObject* unchanged(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  expect(count, 2);
  return Py_NewRef(held_in<Watched>(arguments[0], kWatched).unchanged(arguments[1]));
  END_HANDLE_TH_ERRORS
}

// go_unused(list of tensors): whether the engine will use none of the gradients that a graph was traced for
PyObject* unused(PyObject*, PyObject* tensors) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(PyList_Check(tensors), "expected a list");
  std::vector<const Tensor*> leaves;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(tensors); ++i) leaves.push_back(&tensor_in(PyList_GET_ITEM(tensors, i)));
  return PyBool_FromLong(go_unused(leaves));
  END_HANDLE_TH_ERRORS
}

// question(): where the operators find the same
PyObject* question(PyObject*, PyObject*) { return PyLong_FromVoidPtr(reinterpret_cast<void*>(&handles_go_unused)); }

template <class F>
PyCFunction method(F* function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {{"program", method(program), METH_FASTCALL, nullptr},
                         {"descent", method(descent), METH_FASTCALL, nullptr},
                         {"scheme", method(scheme), METH_FASTCALL, nullptr},
                         {"chain_program", method(chain_program), METH_FASTCALL, nullptr},
                         {"chain", method(chain), METH_FASTCALL, nullptr},
                         {"head", method(head), METH_FASTCALL, nullptr},
                         {"running", running, METH_O, nullptr},
                         {"move", method(move), METH_FASTCALL, nullptr},
                         {"pair", method(pair<PairNode>), METH_FASTCALL, nullptr},
                         {"march", method(march), METH_FASTCALL, nullptr},
                         {"linear", method(pair<LinearNode>), METH_FASTCALL, nullptr},
                         {"solver", method(solver), METH_FASTCALL, nullptr},
                         {"linear_solve", method(linear_solve), METH_FASTCALL, nullptr},
                         {"kept", kept, METH_O, nullptr},
                         {"watched", method(watched), METH_FASTCALL, nullptr},
                         {"unchanged", method(unchanged), METH_FASTCALL, nullptr},
                         {"go_unused", unused, METH_O, nullptr},
                         {"question", question, METH_NOARGS, nullptr},
                         {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "fastode_nodes", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace fastode

PyMODINIT_FUNC PyInit_fastode_nodes() { return PyModule_Create(&fastode::definition); }
