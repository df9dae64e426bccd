// The activations and their derivatives, agreeing with PyTorch at every kink and threshold.
#pragma once

#include "../constants.h"
#include "device.cuh"

namespace fastode::device {

struct ActivationArguments {
  int kind;
  float p, q;  // leaky_relu: p = slope; softplus: p = beta, q = threshold; elu: p = alpha
};

FASTODE_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + device::exp(-x)); }

// The smooth ones, by a call: inlined for each entry of a map they would be most of a kernel.
FASTODE_DEVICE_CALL float activate_smooth(int kind, float x, float p, float q) {
  if (kind == kTanh) return device::tanh(x);
  if (kind == kSilu) return x * sigmoid(x);
  if (kind == kElu) return x > 0 ? x : p * device::expm1(x);
  const float z = x * p;  // softplus
  return z > q ? x : device::log1p(device::exp(z)) / p;
}

FASTODE_DEVICE_CALL float derive_smooth(int kind, float x, float p, float q) {
  if (kind == kTanh) {
    const float t = device::tanh(x);
    return 1 - t * t;
  }
  if (kind == kSilu) {
    const float s = sigmoid(x);
    return s * (1 + x * (1 - s));
  }
  if (kind == kElu) return x > 0 ? 1 : p * device::exp(x);
  const float z = x * p;
  return z > q ? 1 : sigmoid(z);
}

FASTODE_DEVICE_CALL float derive_twice_smooth(int kind, float x, float p, float q) {
  if (kind == kTanh) {
    const float t = device::tanh(x);
    return -2 * t * (1 - t * t);
  }
  if (kind == kSilu) {
    const float s = sigmoid(x);
    return s * (1 - s) * (2 + x * (1 - 2 * s));
  }
  if (kind == kElu) return x > 0 ? 0 : p * device::exp(x);
  const float z = x * p, s = sigmoid(z);
  return z > q ? 0 : p * s * (1 - s);
}

FASTODE_DEVICE float activate(const ActivationArguments& a, float x) {
  if (a.kind == kRelu) return x <= 0 ? 0 : x;  // NaN passes, as it does in PyTorch
  if (a.kind == kLeakyRelu) return x > 0 ? x : x * a.p;
  return a.kind == kIdentity ? x : activate_smooth(a.kind, x, a.p, a.q);
}

FASTODE_DEVICE float derive(const ActivationArguments& a, float x) {
  if (a.kind == kRelu) return x <= 0 ? 0 : 1;
  if (a.kind == kLeakyRelu) return x > 0 ? 1 : a.p;
  return a.kind == kIdentity ? 1 : derive_smooth(a.kind, x, a.p, a.q);
}

// Whether there is a second derivative: 0 times what is infinite would be NaN.
FASTODE_DEVICE bool bends(const ActivationArguments& a) {
  return a.kind != kRelu && a.kind != kLeakyRelu && a.kind != kIdentity;
}

}  // namespace fastode::device
