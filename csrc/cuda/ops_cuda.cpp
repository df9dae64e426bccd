// The resident engine's operators for CUDA tensors; their schemas are in ops.cpp.
#include <torch/csrc/stable/library.h>

#include "operators.h"
#include "stream.h"

namespace fastode::cuda {
namespace {

void* stream_of(const Tensor& x) {
  int32_t index;
  void* stream = nullptr;
  checked(aoti_torch_get_device_index(x.get(), &index));
  launched(current_stream(index, &stream));
  return stream;
}

const Programs kPrograms{&scheme_forward, &scheme_backward, &descent_forward, &stream_of};

void refuse_gradients(bool asked) {
  if (asked) throw std::runtime_error("there are no programs for the parameters' gradients");
}

Forward rk_forward(const Tensor& x, const Tensors& parameters, const Integers& units, const Numbers& numbers,
                   const Tensor& table, bool keep, bool) {
  return scheme_forward(kPrograms, x, parameters, units, numbers, table, keep);
}

Backward rk_backward(const Tensor& x, const Tensor& cotangent, const Tensors& kept, const Tensors& parameters,
                     const Integers& units, const Numbers& numbers, const Tensor& table, bool gradients,
                     bool table_gradient, bool) {
  refuse_gradients(gradients || table_gradient);
  return {scheme_backward(kPrograms, x, cotangent, kept, parameters, units, numbers, table), {},
          new_vector(x, 0, ScalarType::Double)};
}

}  // namespace
}  // namespace fastode::cuda

STABLE_TORCH_LIBRARY_IMPL(fastode, CUDA, m) {
  m.impl("resident_rk_forward", TORCH_BOX(&fastode::cuda::rk_forward));
  m.impl("resident_rk_backward", TORCH_BOX(&fastode::cuda::rk_backward));
}
