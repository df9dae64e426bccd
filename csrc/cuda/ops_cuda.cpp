// The resident engine's operators for CUDA tensors; their schemas are in ops.cpp.
#include <torch/csrc/stable/library.h>

#include "operators.h"
#include "stream.h"

namespace fastode::cuda {

void* stream_of(const Tensor& x) {
  int32_t index;
  void* stream = nullptr;
  checked(aoti_torch_get_device_index(x.get(), &index));
  launched(current_stream(index, &stream));
  return stream;
}

}  // namespace fastode::cuda

STABLE_TORCH_LIBRARY_IMPL(fastode, CUDA, m) { fastode::cuda::implement(m); }
