// Whether modules are as they were: the look of fastode/branch/snapshot.py at what it keeps, in C++.
//
// Everything is compared by identity here. Where an object is another one, Python decides whether it is equal.
#pragma once
#include "python.h"

namespace fastode {

// What a snapshot keeps, by borrowed references: the snapshot in Python owns all of it, and this too.
class Watched {
 public:
  // The arguments are the snapshot's own lists; false from `usable` where one holds what only Python can compare.
  Watched(PyObject* hooks, PyObject* rows, PyObject* tensors) {
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(hooks); ++i) add_empty(PyList_GET_ITEM(hooks, i));
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(rows); ++i) add_row(PyList_GET_ITEM(rows, i));
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(tensors); ++i) add_tensor(PyList_GET_ITEM(tensors, i));
  }

  bool usable() const { return usable_; }

  // Py_True, Py_False, or Py_NotImplemented where Python has to compare.
  PyObject* unchanged(PyObject* root) const {
    for (PyObject* each : empty_)
      if (PyDict_GET_SIZE(each) != 0) return Py_False;
    for (const Row& row : rows_) {
      PyObject* held = row.module == Py_None ? root : row.module;
      static PyObject* const name = checked(PyUnicode_InternFromString("__dict__"));
      THPObjectPtr variables(PyObject_GetAttr(held, name));
      if (!variables) {
        PyErr_Clear();
        return Py_NotImplemented;
      }
      if (variables.get() != row.variables.dictionary || Py_TYPE(held) != row.kind) return Py_False;
      if (!row.variables.same()) return Py_NotImplemented;
      for (const Entries& each : row.contents)
        if (!each.same()) return Py_False;
    }
    for (const Met& met : tensors_) {
      const Tensor& tensor = THPVariable_Unpack(met.object);
      if (Py_TYPE(met.object) != met.kind || tensor.scalar_type() != met.dtype || tensor.device() != met.device ||
          tensor.sizes() != met.shape)
        return Py_False;
    }
    return Py_True;
  }

 private:
  // The items of a dictionary, in order.
  struct Entries {
    PyObject* dictionary;
    std::vector<std::pair<PyObject*, PyObject*>> items;

    explicit Entries(PyObject* held, PyObject* before) : dictionary(held) {
      PyObject *key, *value;
      for (Py_ssize_t at = 0; PyDict_Next(before, &at, &key, &value);) items.emplace_back(key, value);
    }

    bool same() const {
      if (static_cast<size_t>(PyDict_GET_SIZE(dictionary)) != items.size()) return false;
      PyObject *key, *value;
      size_t next = 0;
      for (Py_ssize_t at = 0; PyDict_Next(dictionary, &at, &key, &value); ++next)
        if (value != items[next].second || key != items[next].first) return false;
      return true;
    }
  };

  struct Row {
    PyObject* module;  // Py_None for the root
    PyTypeObject* kind;
    Entries variables;
    std::vector<Entries> contents;
  };

  struct Met {
    PyObject* object;
    PyTypeObject* kind;
    at::ScalarType dtype;
    at::Device device;
    std::vector<int64_t> shape;
  };

  bool is_plain_dictionary(PyObject* object) {
    const bool plain = object && PyDict_CheckExact(object);
    usable_ &= plain;
    return plain;
  }

  void add_empty(PyObject* dictionary) {
    if (PyDict_Check(dictionary))
      empty_.push_back(dictionary);
    else
      usable_ = false;
  }

  // (module, type, its variables, a copy of them, [(name, identities, keys)], [...]), as snapshot.py has it
  void add_row(PyObject* row) {
    PyObject *variables = PyTuple_GET_ITEM(row, 2), *before = PyTuple_GET_ITEM(row, 3);
    if (!is_plain_dictionary(variables)) return;
    rows_.push_back({PyTuple_GET_ITEM(row, 0),
                     reinterpret_cast<PyTypeObject*>(PyTuple_GET_ITEM(row, 1)),
                     Entries(variables, before),
                     {}});
    PyObject* identities = PyTuple_GET_ITEM(row, 4);
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(identities); ++i) {
      PyObject* held = PyDict_GetItem(before, PyTuple_GET_ITEM(PyList_GET_ITEM(identities, i), 0));
      if (is_plain_dictionary(held)) rows_.back().contents.emplace_back(held, held);
    }
  }

  void add_tensor(PyObject* row) {
    PyObject* object = PyTuple_GET_ITEM(row, 0);
    // A Tensor or a Parameter itself: subclasses may answer in Python what shape they have.
    if (!THPVariable_CheckExact(object) ||
        THPVariable_Unpack(object).unsafeGetTensorImpl()->has_symbolic_sizes_strides()) {
      usable_ = false;
      return;
    }
    const Tensor& tensor = THPVariable_Unpack(object);
    tensors_.push_back({object, Py_TYPE(object), tensor.scalar_type(), tensor.device(), tensor.sizes().vec()});
  }

  bool usable_ = true;
  std::vector<PyObject*> empty_;
  std::vector<Row> rows_;
  std::vector<Met> tensors_;
};

}  // namespace fastode
