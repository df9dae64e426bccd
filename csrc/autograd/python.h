// Python objects as the nodes hold and read them.
#pragma once
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>

#include <utility>
#include <vector>

namespace fastode {

// Holds a Python object; it may be dropped by any thread, with or without the interpreter's lock.
class PythonObject {
 public:
  explicit PythonObject(PyObject* object) : object_(object) { Py_XINCREF(object_); }
  PythonObject(const PythonObject&) = delete;
  PythonObject& operator=(const PythonObject&) = delete;
  ~PythonObject() {
    if (!object_ || !Py_IsInitialized() || Py_IsFinalizing()) return;
    const pybind11::gil_scoped_acquire lock;
    Py_DECREF(object_);
  }
  PyObject* get() const { return object_; }

 private:
  PyObject* object_;
};

[[noreturn]] inline void throw_python_error() {
  python_error error;
  error.persist();
  throw error;
}

inline PyObject* checked(PyObject* made) {
  if (!made) throw_python_error();
  return made;
}

template <class F>
PyObject* new_tuple(size_t size, const F& item) {
  PyObject* made = checked(PyTuple_New(static_cast<Py_ssize_t>(size)));
  for (size_t i = 0; i < size; ++i) PyTuple_SET_ITEM(made, static_cast<Py_ssize_t>(i), item(i));
  return made;
}

inline int64_t integer(PyObject* object) {
  const auto value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) throw_python_error();
  return value;
}

inline double number(PyObject* object) {
  const double value = PyFloat_AsDouble(object);
  if (value == -1.0 && PyErr_Occurred()) throw_python_error();
  return value;
}

inline bool truth(PyObject* object) { return object == Py_True; }

}  // namespace fastode
