// Tensors that the resident operators make.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "../../tensors.h"
#include "arena.h"

namespace fastode::resident {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class A>
constexpr ScalarType scalar_type() {
  return std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
}

inline Tensor fresh(const Tensor& made) {
  fill_fresh(made.data_ptr(), made.numel() * static_cast<int64_t>(made.element_size()));
  return made;
}

// On the CPU, uninitialised.
inline Tensor new_tensor(ScalarType type, const int64_t* sizes, const int64_t* strides, int64_t dimensions) {
  return fresh(empty_strided(type, sizes, strides, dimensions, aoti_torch_device_type_cpu(), 0));
}

inline Tensor new_vector(int64_t length, ScalarType type, bool zero = false) {
  const int64_t stride = 1;
  Tensor made = new_tensor(type, &length, &stride, 1);
  if (zero && length > 0) std::memset(made.data_ptr(), 0, length * made.element_size());
  return made;
}

// Of these sizes, and contiguous.
inline Tensor new_contiguous(ScalarType type, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * std::max<int64_t>(1, sizes[d]);
  return new_tensor(type, sizes.data(), strides.data(), static_cast<int64_t>(sizes.size()));
}

// [N, C, H, W], channels_last if `last`, else contiguous.
inline Tensor new_map(ScalarType type, int64_t samples, int64_t channels, int64_t height, int64_t width, bool last) {
  const int64_t sizes[] = {samples, channels, height, width}, sample = channels * height * width;
  const int64_t strides[2][4] = {{sample, height * width, width, 1}, {sample, 1, width * channels, channels}};
  return new_tensor(type, sizes, strides[last], 4);
}

// For the gradient of a convolution's weight: in the weight's memory format, or accumulating it would copy it.
inline Tensor new_weight(const Tensor& like) {
  const auto sizes = like.sizes(), strides = like.strides();
  const int64_t in = sizes[1], row = in * sizes[3];
  const bool last = in > 1 && strides[1] == 1 && strides[3] == in && strides[2] == row && strides[0] == row * sizes[2];
  return new_map(like.scalar_type(), sizes[0], in, sizes[2], sizes[3], last);
}

}  // namespace fastode::resident
