// The activations: value, first and second derivative, agreeing with PyTorch at every kink and threshold.
#pragma once

#include <type_traits>

#include "constants.h"
#include "simd.h"

namespace fastode {

template <class A>
struct ActivationArguments {
  // leaky_relu: p = slope; softplus: p = beta, q = threshold; elu: p = alpha; gelu: p = 1 for the form with tanh
  A p, q;
};

// GELU, and its first and second derivative: x P(X <= x) of a normal X, or, with `tanh`, x (1 + tanh(u)) / 2 =
// x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3).
template <class A>
struct Gelu {
  static constexpr A height = A(0.39894228040143267793994605993439);  // 1 / sqrt(2 pi), of the normal density
  static constexpr A linear = 4 * height, cubic = linear * A(0.044715);

  template <class V>
  static V exponent(V x) {
    return x * (linear + cubic * x * x);
  }
  template <class V>
  static V slope(V x) {
    return linear + 3 * cubic * x * x;
  }
};

template <class V>
inline V gelu(V x, bool tanh) {
  V bell;
  return x * (tanh ? sigmoid<V>(Gelu<ScalarOf<V>>::exponent(x)) : normal_distribution<V>(x, bell));
}

template <class V>
inline V gelu_first(V x, bool tanh) {
  using A = ScalarOf<V>;
  if (tanh) {
    const V s = sigmoid<V>(Gelu<A>::exponent(x));
    return s * (A(1) + x * (A(1) - s) * Gelu<A>::slope(x));
  }
  V bell;
  const V below = normal_distribution<V>(x, bell);
  return below + x * bell * Gelu<A>::height;
}

template <class V>
inline V gelu_second(V x, bool tanh) {
  using A = ScalarOf<V>;
  if (tanh) {
    const V s = sigmoid<V>(Gelu<A>::exponent(x)), slope = Gelu<A>::slope(x);
    return s * (A(1) - s) * (slope * (A(2) + x * slope * (A(1) - A(2) * s)) + 6 * Gelu<A>::cubic * x * x);
  }
  V bell;
  normal_distribution<V>(x, bell);
  return bell * Gelu<A>::height * (A(2) - x * x);
}

template <int64_t kind, class V>
inline V activate(V x, const ActivationArguments<ScalarOf<V>>& k) {
  using A = ScalarOf<V>;
  if constexpr (kind == kRelu) {
    return x <= 0 ? V{} : x;  // NaN passes, as it does in PyTorch
  } else if constexpr (kind == kLeakyRelu) {
    return x > 0 ? x : x * k.p;
  } else if constexpr (kind == kTanh) {
    return tanh<V>(x);
  } else if constexpr (kind == kSoftplus) {
    const V z = x * k.p;
    const V soft = ((z > 0 ? z : V{}) + log1p_unit<V>(exp_nonpositive<V>(-absolute(z)))) / k.p;
    return z > k.q ? x : z == z ? soft : z;
  } else if constexpr (kind == kElu) {
    return x > 0 ? x : k.p * expm1_nonpositive<V>(x > 0 ? V{} : x);
  } else if constexpr (kind == kSilu) {
    return x * sigmoid<V>(x);
  } else if constexpr (kind == kGelu) {
    return gelu<V>(x, k.p != 0);
  } else if constexpr (kind == kSigmoid) {
    return sigmoid<V>(x);
  } else {
    static_cast<void>(A{});
    return x;
  }
}

template <int64_t kind, class V>
inline V activate_first(V x, const ActivationArguments<ScalarOf<V>>& k) {
  using A = ScalarOf<V>;
  const V one = splat<V>(1);
  if constexpr (kind == kRelu) {
    return x <= 0 ? V{} : one;
  } else if constexpr (kind == kLeakyRelu) {
    return x > 0 ? one : splat<V>(k.p);
  } else if constexpr (kind == kTanh) {
    const V t = tanh<V>(x);
    return one - t * t;
  } else if constexpr (kind == kSoftplus) {
    const V z = x * k.p;
    return z > k.q ? one : sigmoid<V>(z);
  } else if constexpr (kind == kElu) {
    return x > 0 ? one : k.p * exp_nonpositive<V>(x > 0 ? V{} : x);
  } else if constexpr (kind == kSilu) {
    const V s = sigmoid<V>(x);
    return s * (A(1) + x * (A(1) - s));
  } else if constexpr (kind == kGelu) {
    return gelu_first<V>(x, k.p != 0);
  } else if constexpr (kind == kSigmoid) {
    const V s = sigmoid<V>(x);
    return s * (A(1) - s);
  } else {
    return one;
  }
}

template <int64_t kind, class V>
inline V activate_second(V x, const ActivationArguments<ScalarOf<V>>& k) {
  using A = ScalarOf<V>;
  if constexpr (kind == kTanh) {
    const V t = tanh<V>(x);
    return A(-2) * t * (A(1) - t * t);
  } else if constexpr (kind == kSoftplus) {
    const V z = x * k.p, s = sigmoid<V>(z);
    return z > k.q ? V{} : k.p * s * (A(1) - s);
  } else if constexpr (kind == kElu) {
    return x > 0 ? V{} : k.p * exp_nonpositive<V>(x > 0 ? V{} : x);
  } else if constexpr (kind == kSilu) {
    const V s = sigmoid<V>(x);
    return s * (A(1) - s) * (A(2) + x * (A(1) - A(2) * s));
  } else if constexpr (kind == kGelu) {
    return gelu_second<V>(x, k.p != 0);
  } else if constexpr (kind == kSigmoid) {
    const V s = sigmoid<V>(x);
    return s * (A(1) - s) * (A(1) - A(2) * s);
  } else {
    return V{};
  }
}

// Which activation a pass applies. Those that cost next to nothing are constants, and each has a loop of its own; one
// loop serves all the others, which cost an exponential or more, so that asking which one it is costs little beside it.
template <int64_t kind>
using Fixed = std::integral_constant<int64_t, kind>;
struct Smooth {
  int64_t kind;
};

template <class Kind>
inline constexpr bool kIsIdentity = std::is_same_v<Kind, Fixed<kIdentity>>;
// Whether the second derivative is not zero everywhere.
template <class Kind>
inline constexpr bool kHasSecond = std::is_same_v<Kind, Smooth>;

// f with the activation as a compile-time constant, for one vector.
template <int64_t kind, class F>
inline auto with_constant(Fixed<kind> known, const F& f) {
  return f(known);
}

template <class F>
inline auto with_constant(Smooth asked, const F& f) {
  switch (asked.kind) {
    case kTanh:
      return f(Fixed<kTanh>{});
    case kSoftplus:
      return f(Fixed<kSoftplus>{});
    case kElu:
      return f(Fixed<kElu>{});
    case kSilu:
      return f(Fixed<kSilu>{});
    case kGelu:
      return f(Fixed<kGelu>{});
    default:
      return f(Fixed<kSigmoid>{});
  }
}

template <class V, class Kind>
inline V activate(Kind kind, V x, const ActivationArguments<ScalarOf<V>>& k) {
  return with_constant(kind, [&](auto known) { return activate<known(), V>(x, k); });
}

template <class V, class Kind>
inline V activate_first(Kind kind, V x, const ActivationArguments<ScalarOf<V>>& k) {
  return with_constant(kind, [&](auto known) { return activate_first<known(), V>(x, k); });
}

// The value, and the first derivative in `first`.
template <class V, class Kind>
inline V activate_with_first(Kind kind, V x, const ActivationArguments<ScalarOf<V>>& k, V& first) {
  return with_constant(kind, [&](auto known) {
    first = activate_first<known(), V>(x, k);
    return activate<known(), V>(x, k);
  });
}

// The first derivative, and the second in `second`.
template <class V, class Kind>
inline V activate_first_with_second(Kind kind, V x, const ActivationArguments<ScalarOf<V>>& k, V& second) {
  return with_constant(kind, [&](auto known) {
    second = activate_second<known(), V>(x, k);
    return activate_first<known(), V>(x, k);
  });
}

// Calls f with the activation, Fixed or Smooth.
template <class F>
inline void with_activation(int64_t kind, const F& f) {
  switch (kind) {
    case kIdentity:
      return f(Fixed<kIdentity>{});
    case kRelu:
      return f(Fixed<kRelu>{});
    case kLeakyRelu:
      return f(Fixed<kLeakyRelu>{});
    default:
      return f(Smooth{kind});
  }
}

}  // namespace fastode
