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

namespace {

Programs given[2];  // by type

}  // namespace

#define FASTODE_LAUNCHED(Result, name, Call)                                                  \
  Result name(Type type, Shape shape, const Call& call, const Queue& queue) {                 \
    const auto program = given[static_cast<int>(type)].name;                                  \
    if (!program) throw std::runtime_error("the CUDA program " #name " has not been loaded"); \
    return program(type, shape, call, queue);                                                 \
  }
FASTODE_CUDA_PROGRAMS(FASTODE_LAUNCHED)
#undef FASTODE_LAUNCHED

}  // namespace fastode::cuda

STABLE_TORCH_LIBRARY_IMPL(fastode, CUDA, m) { fastode::cuda::implement(m); }

// Where a library of programs puts its launchers (given.cpp).
extern "C" __attribute__((visibility("default"))) fastode::cuda::Programs* fastode_programs(int type) {
  return &fastode::cuda::given[type];
}
