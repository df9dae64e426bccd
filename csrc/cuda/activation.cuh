// The activations and their derivatives, agreeing with PyTorch at every kink and threshold.
#pragma once

#include "../constants.h"
#include "device.cuh"

namespace fastode::device {

struct ActivationArguments {
  int kind;
  // leaky_relu: p = slope; softplus: p = beta, q = threshold; elu: p = alpha; gelu: p = 1 for the form with tanh
  float p, q;
};

FASTODE_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + device::exp(-x)); }

// 2 u of GELU's form with tanh, u = sqrt(2 / pi) (x + 0.044715 x^3), and its derivative; x (1 + tanh(u)) / 2 is
// x sigmoid(2 u).
FASTODE_DEVICE float gelu_exponent(float x) { return x * (1.59576912f + 0.0713548163f * x * x); }
FASTODE_DEVICE float gelu_slope(float x) { return 1.59576912f + 0.214064449f * x * x; }

// P(X <= x) of a normal X, and its density.
FASTODE_DEVICE float normal_distribution(float x) { return 0.5f + 0.5f * device::erf(0.707106781f * x); }
FASTODE_DEVICE float normal_density(float x) { return 0.398942280f * device::exp(-0.5f * x * x); }

// The smooth ones, by a call: inlined for each entry of a map they would be most of a kernel.
FASTODE_DEVICE_CALL float activate_smooth(int kind, float x, float p, float q) {
  if (kind == kTanh) return device::tanh(x);
  if (kind == kSilu) return x * sigmoid(x);
  if (kind == kElu) return x > 0 ? x : p * device::expm1(x);
  if (kind == kSigmoid) return sigmoid(x);
  if (kind == kGelu) return x * (p != 0 ? sigmoid(gelu_exponent(x)) : normal_distribution(x));
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
  if (kind == kSigmoid) {
    const float s = sigmoid(x);
    return s * (1 - s);
  }
  if (kind == kGelu) {
    if (p == 0) return normal_distribution(x) + x * normal_density(x);
    const float s = sigmoid(gelu_exponent(x));
    return s * (1 + x * (1 - s) * gelu_slope(x));
  }
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
  if (kind == kSigmoid) {
    const float s = sigmoid(x);
    return s * (1 - s) * (1 - 2 * s);
  }
  if (kind == kGelu) {
    if (p == 0) return normal_density(x) * (2 - x * x);
    const float s = sigmoid(gelu_exponent(x)), slope = gelu_slope(x);
    return s * (1 - s) * (slope * (2 + x * slope * (1 - 2 * s)) + 0.428128898f * x * x);
  }
  const float z = x * p, s = sigmoid(z);
  return z > q ? 0 : p * s * (1 - s);
}

struct Smooth {
  static constexpr bool kBends = true;
  ActivationArguments a;

  FASTODE_DEVICE Pair activate(Pair x) const {
    return {activate_smooth(a.kind, x.low, a.p, a.q), activate_smooth(a.kind, x.high, a.p, a.q)};
  }
  FASTODE_DEVICE Pair derive(Pair x) const {
    return {derive_smooth(a.kind, x.low, a.p, a.q), derive_smooth(a.kind, x.high, a.p, a.q)};
  }
  FASTODE_DEVICE Pair derive_twice(Pair x) const {
    return {derive_twice_smooth(a.kind, x.low, a.p, a.q), derive_twice_smooth(a.kind, x.high, a.p, a.q)};
  }
};

// relu, leaky_relu and none: linear on either side of zero. NaN passes, as it does in PyTorch.
class Linear {
 public:
  static constexpr bool kBends = false;

  FASTODE_DEVICE explicit Linear(const ActivationArguments& a)
      : relu_(a.kind == kRelu),
        below_(relu_                 ? 0
               : a.kind == kIdentity ? 1
                                     : a.p),
        of_nan_(relu_ ? 1 : below_) {}

  FASTODE_DEVICE Pair activate(Pair x) const { return {activate(x.low), activate(x.high)}; }
  FASTODE_DEVICE Pair derive(Pair x) const { return {derive(x.low), derive(x.high)}; }

 private:
  FASTODE_DEVICE float activate(float x) const { return x <= 0 ? (relu_ ? 0 : x * below_) : x; }
  FASTODE_DEVICE float derive(float x) const { return x > 0 ? 1 : x <= 0 ? below_ : of_nan_; }

  bool relu_;
  float below_, of_nan_;
};

// Calls f(activation), once for a map: to ask for the kind at each entry would be most of a kernel.
template <class F>
FASTODE_DEVICE void with_activation(const ActivationArguments& a, const F& f) {
  if (a.kind == kRelu || a.kind == kLeakyRelu || a.kind == kIdentity)
    f(Linear(a));
  else
    f(Smooth{a});
}

}  // namespace fastode::device
