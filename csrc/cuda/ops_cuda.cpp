// Registers the operators that csrc/cuda implements; their schemas are in ops.cpp.
#include <torch/csrc/stable/library.h>

#include "probe.h"
#include "stream.h"

// For tests: adds one to `count` numbers on a card; null, or what went wrong.
extern "C" __attribute__((visibility("default"))) const char* fastode_cuda_probe(int32_t device_index, float* numbers,
                                                                                 int32_t count) {
  void* stream = nullptr;
  const char* error = fastode::cuda::current_stream(device_index, &stream);
  return error != nullptr ? error : fastode::cuda::add_one(numbers, count, stream);
}

STABLE_TORCH_LIBRARY_IMPL(fastode, CUDA, m) {
  (void)m;  // one m.impl for each operator
}
