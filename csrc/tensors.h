// Tensors by torch's stable ABI, for every device.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <stdexcept>

namespace fastode {

// Of a call of the stable ABI; torch 2.11 and 2.13 name their own check differently.
inline void checked(AOTITorchError code) {
  if (code) throw std::runtime_error("a call of torch's stable ABI failed");
}

// Uninitialised. Straight from the allocator: torch::stable::empty and new_empty look an operator up by its name each
// time, which takes as long as a convolution of a small map.
inline torch::stable::Tensor empty_strided(torch::headeronly::ScalarType type, const int64_t* sizes,
                                           const int64_t* strides, int64_t dimensions, int32_t device, int32_t index) {
  AtenTensorHandle made;
  checked(aoti_torch_empty_strided(dimensions, sizes, strides, static_cast<int32_t>(torch::stable::detail::from(type)),
                                   device, index, &made));
  return torch::stable::Tensor(made);
}

}  // namespace fastode
