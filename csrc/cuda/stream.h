// What launches need of torch: its stream on a card.
#pragma once

#include <cstdint>

// libtorch_cuda's. Weak, so that the library loads where torch is built for the CPU, and its operators are never
// called.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace fastode::cuda {

// torch's current stream on a card, as a cudaStream_t; null, or what went wrong.
inline const char* current_stream(int32_t device_index, void** stream) {
  if (aoti_torch_get_current_cuda_stream == nullptr) return "torch is built without CUDA";
  return aoti_torch_get_current_cuda_stream(device_index, stream) == 0 ? nullptr : "torch gives no CUDA stream";
}

}  // namespace fastode::cuda
