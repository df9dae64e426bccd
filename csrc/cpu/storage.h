// From a tensor's dtype to the storage type that the kernels are templates over.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "simd.h"

namespace fastode {

template <class T>
T* pointer(const torch::stable::Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// Calls f with a value of the storage type; dtypes that Python lets through are these three.
template <class F>
void with_storage(torch::headeronly::ScalarType type, const F& f) {
  using Type = torch::headeronly::ScalarType;
  if (type == Type::Double)
    f(double{});
  else if (type == Type::BFloat16)
    f(bfloat16{});
  else
    f(float{});
}

}  // namespace fastode
