"""The activations: value, first and second derivative, agreeing with csrc/cpu/activation.h at every kink and threshold.

Codes: 0 identity, 1 relu, 2 leaky_relu (p = slope), 3 tanh, 4 softplus (p = beta, q = threshold), 5 elu (p = alpha),
6 silu, 7 gelu (p = 1 for the form with tanh), 8 sigmoid. Arguments are in the accumulator's type.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def expm1_nonpositive(x):
    """exp(x) - 1 for x <= 0, without cancellation near 0: a Taylor series where |x| < 0.35."""
    DEGREE: tl.constexpr = 14 if x.dtype == tl.float64 else 8
    series = tl.full(x.shape, 1.0 / DEGREE, x.dtype)
    for k in tl.static_range(1, DEGREE - 1):
        series = (series * x + 1.0) * (1.0 / (DEGREE - k))
    return tl.where(x > -0.35, (series * x + 1.0) * x, tl.exp(x) - 1.0)


@triton.jit
def log1p_unit(u):
    """log(1 + u) for 0 <= u <= 1, by 2 artanh(u / (2 + u))."""
    TERMS: tl.constexpr = 18 if u.dtype == tl.float64 else 10
    s = u / (u + 2.0)
    squared = s * s
    series = tl.full(u.shape, 1.0 / (2 * TERMS - 1), u.dtype)
    for k in tl.static_range(1, TERMS):
        series = series * squared + 1.0 / (2 * (TERMS - k) - 1)
    return 2.0 * s * series


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), both tails without overflow."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (e + 1.0)


@triton.jit
def tanh(x):
    t = expm1_nonpositive(-2.0 * tl.abs(x))
    magnitude = -t / (t + 2.0)
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def gelu_exponent(x):
    """2 u of GELU's form with tanh, u = sqrt(2 / pi) (x + 0.044715 x^3): x (1 + tanh(u)) / 2 is x sigmoid(2 u)."""
    return x * (1.5957691216057308 + 0.07135481627260025 * x * x)


@triton.jit
def gelu_slope(x):
    return 1.5957691216057308 + 0.21406444881780076 * x * x


@triton.jit
def normal_distribution(x):
    return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)


@triton.jit
def normal_density(x):
    return 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def activate(x, p, q, ACT: tl.constexpr):
    if ACT == 1:
        return tl.where(x <= 0, 0.0, x)  # NaN passes, as it does in PyTorch
    elif ACT == 2:
        return tl.where(x > 0, x, x * p)
    elif ACT == 3:
        return tanh(x)
    elif ACT == 4:
        z = x * p
        soft = (tl.where(z > 0, z, 0.0) + log1p_unit(tl.exp(-tl.abs(z)))) / p
        return tl.where(z > q, x, tl.where(z == z, soft, z))
    elif ACT == 5:
        return tl.where(x > 0, x, p * expm1_nonpositive(tl.where(x > 0, 0.0, x)))
    elif ACT == 6:
        return x * sigmoid(x)
    elif ACT == 7:
        return x * (sigmoid(gelu_exponent(x)) if p != 0 else normal_distribution(x))
    elif ACT == 8:
        return sigmoid(x)
    else:
        return x


@triton.jit
def activate_first(x, p, q, ACT: tl.constexpr):
    one = tl.full(x.shape, 1.0, x.dtype)
    if ACT == 1:
        return tl.where(x <= 0, 0.0, one)
    elif ACT == 2:
        return tl.where(x > 0, one, p)
    elif ACT == 3:
        t = tanh(x)
        return 1.0 - t * t
    elif ACT == 4:
        z = x * p
        return tl.where(z > q, one, sigmoid(z))
    elif ACT == 5:
        return tl.where(x > 0, one, p * tl.exp(tl.where(x > 0, 0.0, x)))
    elif ACT == 6:
        s = sigmoid(x)
        return s * (1.0 + x * (1.0 - s))
    elif ACT == 7:
        if p != 0:
            s = sigmoid(gelu_exponent(x))
            slope = s * (1.0 + x * (1.0 - s) * gelu_slope(x))
        else:
            slope = normal_distribution(x) + x * normal_density(x)
        return slope
    elif ACT == 8:
        s = sigmoid(x)
        return s * (1.0 - s)
    else:
        return one


@triton.jit
def activate_second(x, p, q, ACT: tl.constexpr):
    """Zero for the piecewise linear ones."""
    if ACT == 3:
        t = tanh(x)
        return -2.0 * t * (1.0 - t * t)
    elif ACT == 4:
        z = x * p
        s = sigmoid(z)
        return tl.where(z > q, 0.0, p * s * (1.0 - s))
    elif ACT == 5:
        return tl.where(x > 0, 0.0, p * tl.exp(tl.where(x > 0, 0.0, x)))
    elif ACT == 6:
        s = sigmoid(x)
        return s * (1.0 - s) * (2.0 + x * (1.0 - 2.0 * s))
    elif ACT == 7:
        if p != 0:
            s = sigmoid(gelu_exponent(x))
            slope = gelu_slope(x)
            second = s * (1.0 - s) * (slope * (2.0 + x * slope * (1.0 - 2.0 * s)) + 0.4281288976356015 * x * x)
        else:
            second = normal_density(x) * (2.0 - x * x)
        return second
    elif ACT == 8:
        s = sigmoid(x)
        return s * (1.0 - s) * (1.0 - 2.0 * s)
    else:
        return tl.zeros(x.shape, x.dtype)
