// The resident engine's operators for CUDA tensors; their schemas are in ops.cpp.
#include <torch/csrc/stable/library.h>

#include "operators.h"
#include "stream.h"

namespace fastode::cuda {

Queue queue_of(const Tensor& x) {
  int32_t index;
  Queue queue;
  checked(aoti_torch_get_device_index(x.get(), &index));
  queue.device = index;
  launched(current_stream(index, &queue.stream));
  return queue;
}

bool on_card(const Tensor& tensor) {
  int32_t device;
  checked(aoti_torch_get_device_type(tensor.get(), &device));
  return device != aoti_torch_device_type_cpu();
}

void unset(void*, int64_t) {}

}  // namespace fastode::cuda

STABLE_TORCH_LIBRARY_IMPL(fastode, CUDA, m) { fastode::cuda::implement(m); }
