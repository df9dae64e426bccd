"""One evaluation of the skew pair on the staged engine, and its pull-back.

Derivation: README.md beside this file; equations are cited as (1) to (5) from there. Feature maps are channels_last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..._constants import ACTIVATION_CODE, NORM_CODE
from ...branch import Activation, Norm
from ..sweeps import Codes, MaybeTensors, channels_last, coefficients, combine

MaybeTensor = Tensor | None

PRE_Y, PRE_Z, POST_Y, POST_Z = range(4)
TENSORS_PER_NORM = 4  # weight, bias, running mean, running variance

_NO_NORM = (0, 1, 0.0)
_NO_ACTIVATION = (0, 0.0, 0.0)


@dataclass(frozen=True)
class Pair:
    """A skew pair as constants.

    Attributes:
        stride: of W.
        padding: of W.
        gamma: γ.
        activation: σ.
        norms: before W on y and on z, after σ on each.
        tracked: which of the norms update running statistics.
        lower: the dtype that autocast lowers W to, None where it is off.
        fused: whether W is fastode/ops/triton/skew.py's, which reads and writes for the passes.
    """

    stride: int
    padding: int
    gamma: float
    activation: Activation | None
    norms: tuple[Norm | None, Norm | None, Norm | None, Norm | None]
    tracked: tuple[bool, bool, bool, bool]
    lower: torch.dtype | None
    fused: bool = False


class Kept(NamedTuple):
    """What an evaluation leaves for its pull-back.

    Attributes:
        y: where it was made, as far as it was read.
        z: likewise.
        h_y: what σ was applied to for ẏ, or σ of it where that says enough.
        h_z: likewise for ż.
        stats: the statistics of each norm.
    """

    y: MaybeTensor
    z: MaybeTensor
    h_y: MaybeTensor
    h_z: MaybeTensor
    stats: tuple[MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor]


class Gradients:
    """The gradients of W and of the norms' weights and biases, summed over pull-backs; only those that are wanted."""

    def __init__(self, weight: Tensor, tensors: MaybeTensors, wanted: Sequence[bool]) -> None:
        self._tensors = [weight, *tensors]
        self._wanted = wanted
        self._sums: list[MaybeTensor] = [None] * len(wanted)

    @property
    def wants_weight(self) -> bool:
        return self._wanted[0]

    def wants_norm(self, which: int) -> bool:
        at = 1 + TENSORS_PER_NORM * which
        return self._wanted[at] or self._wanted[at + 1]

    def add_weight(self, gradient: Tensor) -> None:
        self._add(0, gradient)

    def add_norm(self, which: int, weight_bar: Tensor, bias_bar: Tensor, scale: float) -> None:
        at = 1 + TENSORS_PER_NORM * which
        self._add(at, weight_bar if scale == 1.0 else weight_bar * scale)
        self._add(at + 1, bias_bar if scale == 1.0 else bias_bar * scale)

    def _add(self, index: int, gradient: Tensor) -> None:
        if self._wanted[index]:
            present = self._sums[index]
            self._sums[index] = gradient if present is None else present + gradient

    def result(self) -> list[MaybeTensor]:
        """A gradient for each of weight and tensors, in its dtype."""
        pairs = zip(self._sums, self._tensors, strict=True)
        return [None if gradient is None or tensor is None else gradient.to(tensor.dtype) for gradient, tensor in pairs]


def evaluate(
    pair: Pair,
    weight: Tensor,
    tensors: MaybeTensors,
    y_terms: Sequence[Tensor],
    z_terms: Sequence[Tensor],
    y_coefs: Tensor,
    z_coefs: Tensor,
    want: tuple[bool, bool] = (True, True),
) -> tuple[MaybeTensor, MaybeTensor, Kept]:
    """(1) at the combinations of y_terms and of z_terms: the wanted slopes, and what the pull-back needs."""
    if pair.fused:
        from ..triton import skew

        return skew.evaluate(pair, weight, tensors, y_terms, z_terms, y_coefs, z_coefs, want)
    want_y, want_z = want
    y = z = y_hat = z_hat = None
    stats: list[MaybeTensor] = [None] * 4
    if want_z or (want_y and pair.gamma):
        y, y_hat, stats[PRE_Y] = _normalise(pair, PRE_Y, tensors, y_terms, y_coefs)
    if want_y or (want_z and pair.gamma):
        z, z_hat, stats[PRE_Z] = _normalise(pair, PRE_Z, tensors, z_terms, z_coefs)
    w = _lowered(pair, weight)
    dy = dz = h_y = h_z = None
    if want_y and z_hat is not None:
        h_y, slope = _activate(pair, _convolution(pair, _lowered(pair, z_hat), w), y_hat)
        _, dy, stats[POST_Y] = _normalise(pair, POST_Y, tensors, [slope], coefficients(1.0))
    if want_z and y_hat is not None:
        h_z, slope = _activate(pair, _transposed(pair, _lowered(pair, y_hat), -w), z_hat)
        _, dz, stats[POST_Z] = _normalise(pair, POST_Z, tensors, [slope], coefficients(1.0))
    return dy, dz, Kept(y, z, h_y, h_z, (stats[PRE_Y], stats[PRE_Z], stats[POST_Y], stats[POST_Z]))


def pull_back(
    pair: Pair,
    weight: Tensor,
    tensors: MaybeTensors,
    kept: Kept,
    bars: tuple[MaybeTensor, MaybeTensor],
    grads: Gradients,
    need: tuple[bool, bool] = (True, True),
    scale: float = 1.0,
) -> tuple[MaybeTensor, MaybeTensor]:
    """The cotangents of y and z for the slopes' cotangents `scale` × bars, of which an absent one is zero."""
    if pair.fused:
        from ..triton import skew

        return skew.pull_back(pair, weight, tensors, kept, bars, grads, need, scale)
    # (2): the cotangents p and q of W's two results, the second with its sign turned
    p = _pull_slope(pair, POST_Y, tensors, kept.h_y, kept.stats[POST_Y], bars[0], grads, scale, scale)
    q_turned = _pull_slope(pair, POST_Z, tensors, kept.h_z, kept.stats[POST_Z], bars[1], grads, -scale, scale)
    w = _lowered(pair, weight)
    p_low = None if p is None else p.to(w.dtype)
    q_low = None if q_turned is None else q_turned.to(w.dtype)
    if grads.wants_weight:
        _add_weight_gradient(pair, w, tensors, kept, p_low, q_low, grads)
    # (3): the same pair again, with the sign of W turned
    y_bar = z_bar = None
    if need[0] or grads.wants_norm(PRE_Y):
        image = None if q_low is None else _convolution(pair, q_low, w)
        y_bar = _pull_point(pair, PRE_Y, tensors, kept.y, kept.stats[PRE_Y], image, p, -pair.gamma, grads)
    if need[1] or grads.wants_norm(PRE_Z):
        image = None if p_low is None else _transposed(pair, p_low, w)
        z_bar = _pull_point(pair, PRE_Z, tensors, kept.z, kept.stats[PRE_Z], image, q_turned, pair.gamma, grads)
    return y_bar, z_bar


def _convolution(pair: Pair, z: Tensor, weight: Tensor) -> Tensor:
    """W z."""
    return _aten_convolution(pair, z, weight, False)


def _transposed(pair: Pair, y: Tensor, weight: Tensor) -> Tensor:
    """Wᵀ y."""
    return _aten_convolution(pair, y, weight, True)


def _aten_convolution(pair: Pair, x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    stride, padding = (pair.stride, pair.stride), (pair.padding, pair.padding)
    out = torch.ops.aten.convolution.default(x, weight, None, stride, padding, (1, 1), transposed, (0, 0), 1)
    return channels_last(out)


def _add_weight_gradient(
    pair: Pair,
    weight: Tensor,
    tensors: MaybeTensors,
    kept: Kept,
    p: MaybeTensor,
    q_turned: MaybeTensor,
    grads: Gradients,
) -> None:
    """(4), its halves one after the other: stacking them costs more than one call instead of two saves."""
    if p is not None and kept.z is not None:
        z_hat = _normalised_again(pair, PRE_Z, tensors, kept.z, kept.stats[PRE_Z])
        grads.add_weight(_weight_gradient(pair, weight, _lowered(pair, z_hat), p))
    if q_turned is not None and kept.y is not None:
        y_hat = _normalised_again(pair, PRE_Y, tensors, kept.y, kept.stats[PRE_Y])
        grads.add_weight(_weight_gradient(pair, weight, q_turned, _lowered(pair, y_hat)))


def _weight_gradient(pair: Pair, weight: Tensor, x: Tensor, output_bar: Tensor) -> Tensor:
    stride, padding = (pair.stride, pair.stride), (pair.padding, pair.padding)
    backward = torch.ops.aten.convolution_backward.default
    mask = (False, True, False)
    return backward(output_bar, x, weight, None, stride, padding, (1, 1), False, (0, 0), 1, mask)[1]


def _activate(pair: Pair, image: Tensor, state: MaybeTensor) -> tuple[Tensor, Tensor]:
    """What to keep of h = image − γ state, and σ(h)."""
    if pair.gamma and state is not None:
        dtype = torch.promote_types(image.dtype, state.dtype)
        terms, coefs = [image.to(dtype), state.to(dtype)], coefficients(1.0, -pair.gamma)
    else:
        terms, coefs = [image], coefficients(1.0)
    if pair.activation is None:
        h = image if len(terms) == 1 else combine(terms, coefs)
        return h, h
    codes = _activation_codes(pair.activation)
    if _tells_its_derivative(pair.activation):
        slope = torch.ops.fastode.combine(terms, coefs, *codes)
        return slope, slope
    coefs = coefs if len(terms) > 1 else coefs[:0]
    h, slope, _ = torch.ops.fastode.norm_act(terms, coefs, None, None, None, *_NO_NORM, *codes)
    return (image if len(terms) == 1 else h), slope


def _tells_its_derivative(activation: Activation) -> bool:
    """Whether σ'(h) is σ'(σ(h)): a slope that depends on the sign of h alone, which σ keeps."""
    return activation.kind == "relu" or (activation.kind == "leaky_relu" and activation.p > 0)


def _normalise(
    pair: Pair, which: int, tensors: MaybeTensors, terms: Sequence[Tensor], coefs: Tensor
) -> tuple[Tensor, Tensor, MaybeTensor]:
    """The combination of terms, its norm, and the norm's statistics."""
    norm = pair.norms[which]
    if norm is None:
        point = terms[0] if len(terms) == 1 else combine(terms, coefs)
        return point, point, None
    dtype = terms[0].dtype
    for term in terms[1:]:
        dtype = torch.promote_types(dtype, term.dtype)
    terms = [term.to(dtype) for term in terms]
    weight, bias, given = _norm_tensors(norm, which, tensors, dtype)
    coefs = coefs if len(terms) > 1 else coefs[:0]
    u, normed, made = torch.ops.fastode.norm_act(terms, coefs, weight, bias, given, *_norm_codes(norm))
    return (terms[0] if len(terms) == 1 else u), normed, made if given is None else given


def _normalised_again(pair: Pair, which: int, tensors: MaybeTensors, point: Tensor, stats: MaybeTensor) -> Tensor:
    """The norm of a point, from its statistics."""
    norm = pair.norms[which]
    if norm is None:
        return point
    weight, bias, _ = _norm_tensors(norm, which, tensors, point.dtype)
    return torch.ops.fastode.norm_act([point], coefficients(), weight, bias, stats, *_norm_codes(norm))[1]


def _pull_slope(
    pair: Pair,
    which: int,
    tensors: MaybeTensors,
    h: MaybeTensor,
    stats: MaybeTensor,
    bar: MaybeTensor,
    grads: Gradients,
    factor: float,
    scale: float,
) -> MaybeTensor:
    """`factor` times the cotangent of h for the cotangent `bar` of n(σ(h)); parameters are scaled by `scale`."""
    if bar is None or h is None:
        return None
    codes = None if pair.activation is None else (*_NO_NORM, *_activation_codes(pair.activation))
    inner = 1.0 if codes is not None else factor
    if pair.norms[which] is not None:
        slope = h
        if pair.activation is not None and not _tells_its_derivative(pair.activation):
            slope = torch.ops.fastode.combine([h], coefficients(1.0), *_activation_codes(pair.activation))
        bar = _pull_norm(pair, which, tensors, slope, stats, bar, grads, inner, scale)
    elif codes is None and factor != 1.0:
        bar = combine([bar], coefficients(factor))
    if codes is None:
        return bar
    empty = h.new_empty(0)
    return torch.ops.fastode.norm_act_vjp(h, bar, empty, None, None, [], coefficients(factor), False, *codes)[0]


def _pull_point(
    pair: Pair,
    which: int,
    tensors: MaybeTensors,
    point: MaybeTensor,
    stats: MaybeTensor,
    image: MaybeTensor,
    damped: MaybeTensor,
    damping: float,
    grads: Gradients,
) -> MaybeTensor:
    """The cotangent of a point, for the cotangent image + damping × damped of its norm."""
    terms = [(1.0, image)] + [(damping, damped)] * (pair.gamma != 0)
    present = [(factor, term) for factor, term in terms if term is not None]
    if not present or point is None:
        return None
    bar = present[0][1]
    if len(present) > 1 or present[0][0] != 1.0:
        bar = combine([term for _, term in present], coefficients(*(factor for factor, _ in present)))
    bar = bar.to(point.dtype)
    if pair.norms[which] is None:
        return bar
    return _pull_norm(pair, which, tensors, point, stats, bar, grads, 1.0, 1.0)


def _pull_norm(
    pair: Pair,
    which: int,
    tensors: MaybeTensors,
    x: Tensor,
    stats: MaybeTensor,
    bar: Tensor,
    grads: Gradients,
    factor: float,
    scale: float,
) -> Tensor:
    """`factor` times the cotangent of x for the cotangent `bar` of its norm; parameters are scaled by `scale`."""
    norm = pair.norms[which]
    assert norm is not None
    weight, bias, _ = _norm_tensors(norm, which, tensors, x.dtype)
    param_grads = grads.wants_norm(which)
    out, weight_bar, bias_bar = torch.ops.fastode.norm_act_vjp(
        x, bar, stats, weight, bias, [], coefficients(factor), param_grads, *_norm_codes(norm)
    )
    if param_grads:
        grads.add_norm(which, weight_bar, bias_bar, scale)
    return out


def _norm_tensors(
    norm: Norm, which: int, tensors: MaybeTensors, dtype: torch.dtype
) -> tuple[MaybeTensor, MaybeTensor, MaybeTensor]:
    """Weight, bias and fixed statistics in the accumulator's dtype."""
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    at = TENSORS_PER_NORM * which
    weight, bias, mean, variance = (
        None if t is None else t.to(accumulator).contiguous() for t in tensors[at : at + TENSORS_PER_NORM]
    )
    return weight, bias, None if mean is None or variance is None else torch.stack((mean, variance))


def _norm_codes(norm: Norm) -> Codes:
    return (NORM_CODE[norm.mode], norm.groups, norm.eps, *_NO_ACTIVATION)


def _activation_codes(activation: Activation) -> tuple[int, float, float]:
    return (ACTIVATION_CODE[activation.kind], activation.p, activation.q)


def _lowered(pair: Pair, tensor: Tensor) -> Tensor:
    """The tensor as a convolution under autocast sees it; autocast leaves float64 alone."""
    return tensor if pair.lower is None or tensor.dtype == torch.float64 else tensor.to(pair.lower)
