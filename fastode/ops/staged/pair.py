"""One evaluation of the skew pair, and its pull-back: W by ATen, an operator for everything between.

Derivation: README.md of ops/schemes/skew_pair; equations are cited as (1) to (4) from there. Feature maps are
channels_last. `tensors` are W's weight and then four of each norm.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...branch.layers import Activation
from ...native.cuda import operators
from ..maps import cast, channels_last, coefficients, combine, fixed_statistics, lowered, norm_tensors, promoted
from ..plan import (
    NO_ACTIVATION,
    NO_NORM,
    TENSORS_PER_NORM,
    Gradients,
    MaybeTensor,
    MaybeTensors,
    activation_codes,
    norm_codes,
)
from ..schemes.skew_pair.pair import POST_Y, POST_Z, PRE_Y, PRE_Z, Kept, Pair

WEIGHT = 0  # the place of W's weight


def norm_at(which: int) -> int:
    """The place of the first of a norm's tensors."""
    return 1 + TENSORS_PER_NORM * which


def evaluate(
    pair: Pair,
    tensors: MaybeTensors,
    y_terms: Sequence[Tensor],
    z_terms: Sequence[Tensor],
    y_coefs: MaybeTensor = None,
    z_coefs: MaybeTensor = None,
    want: tuple[bool, bool] = (True, True),
) -> tuple[MaybeTensor, MaybeTensor, Kept]:
    """(1) at the combinations of y_terms and of z_terms: the wanted slopes, and what the pull-back needs."""
    want_y, want_z = want
    y = z = y_hat = z_hat = None
    stats: list[MaybeTensor] = [None] * 4
    if want_z or (want_y and pair.gamma):
        y, y_hat, stats[PRE_Y] = _normalise(pair, PRE_Y, tensors, y_terms, y_coefs)
    if want_y or (want_z and pair.gamma):
        z, z_hat, stats[PRE_Z] = _normalise(pair, PRE_Z, tensors, z_terms, z_coefs)
    w = weight_of(pair, tensors)
    dy = dz = h_y = h_z = None
    if want_y and z_hat is not None:
        h_y, slope = _activate(pair, _convolution(pair, lowered(pair.lower, z_hat), w), y_hat)
        _, dy, stats[POST_Y] = _normalise(pair, POST_Y, tensors, [slope], None)
    if want_z and y_hat is not None:
        h_z, slope = _activate(pair, _transposed(pair, lowered(pair.lower, y_hat), -w), z_hat)
        _, dz, stats[POST_Z] = _normalise(pair, POST_Z, tensors, [slope], None)
    return dy, dz, Kept(y, z, h_y, h_z, (stats[PRE_Y], stats[PRE_Z], stats[POST_Y], stats[POST_Z]))


def pull_back(
    pair: Pair,
    tensors: MaybeTensors,
    kept: Kept,
    bars: tuple[MaybeTensor, MaybeTensor],
    grads: Gradients,
    need: tuple[bool, bool] = (True, True),
    scale: float = 1.0,
) -> tuple[MaybeTensor, MaybeTensor]:
    """The cotangents of y and z for the slopes' cotangents `scale` × bars, of which an absent one is zero."""
    # (2); h̄_z with its sign turned, so that neither W nor a gradient has to change its own
    hy_bar = pull_slope(pair, POST_Y, tensors, kept.h_y, kept.stats[POST_Y], bars[0], grads, scale, scale)
    hz_bar_turned = pull_slope(pair, POST_Z, tensors, kept.h_z, kept.stats[POST_Z], bars[1], grads, -scale, scale)
    w = weight_of(pair, tensors)
    hy_low = None if hy_bar is None else cast(hy_bar, w.dtype)
    hz_low = None if hz_bar_turned is None else cast(hz_bar_turned, w.dtype)
    if grads.wants(WEIGHT):
        _add_weight_gradient(pair, w, tensors, kept, hy_low, hz_low, grads)
    # (3): the forward's two convolutions again, with the sign of W turned
    y_bar = z_bar = None
    if need[0] or grads.wants_norm(norm_at(PRE_Y)):
        image = None if hz_low is None else _convolution(pair, hz_low, w)
        y_bar = pull_point(pair, PRE_Y, tensors, kept.y, kept.stats[PRE_Y], image, hy_bar, -pair.gamma, grads)
    if need[1] or grads.wants_norm(norm_at(PRE_Z)):
        image = None if hy_low is None else _transposed(pair, hy_low, w)
        z_bar = pull_point(pair, PRE_Z, tensors, kept.z, kept.stats[PRE_Z], image, hz_bar_turned, pair.gamma, grads)
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
    hy_bar: MaybeTensor,
    hz_bar_turned: MaybeTensor,
    grads: Gradients,
) -> None:
    """(4) in two calls: stacking the halves for one call takes longer than it saves."""
    if hy_bar is not None and kept.z is not None:
        z_hat = normalised_again(pair, PRE_Z, tensors, kept.z, kept.stats[PRE_Z])
        grads.add(WEIGHT, _weight_gradient(pair, weight, lowered(pair.lower, z_hat), hy_bar))
    if hz_bar_turned is not None and kept.y is not None:
        y_hat = normalised_again(pair, PRE_Y, tensors, kept.y, kept.stats[PRE_Y])
        grads.add(WEIGHT, _weight_gradient(pair, weight, hz_bar_turned, lowered(pair.lower, y_hat)))


def _weight_gradient(pair: Pair, weight: Tensor, x: Tensor, output_bar: Tensor) -> Tensor:
    stride, padding = (pair.stride, pair.stride), (pair.padding, pair.padding)
    backward = torch.ops.aten.convolution_backward.default
    mask = (False, True, False)
    return backward(output_bar, x, weight, None, stride, padding, (1, 1), False, (0, 0), 1, mask)[1]


def _activate(pair: Pair, image: Tensor, state: MaybeTensor) -> tuple[Tensor, Tensor]:
    """What to keep of h = image − γ state, and σ(h)."""
    if pair.gamma and state is not None:
        dtype = torch.promote_types(image.dtype, state.dtype)
        terms, coefs = [cast(image, dtype), cast(state, dtype)], coefficients(1.0, -pair.gamma)
    else:
        terms, coefs = [image], coefficients(1.0)
    if pair.activation is None:
        h = image if len(terms) == 1 else combine(terms, coefs)
        return h, h
    codes = activation_codes(pair.activation)
    if tells_its_derivative(pair.activation):
        slope = operators(image).combine(terms, coefs, *codes)
        return slope, slope
    alone = len(terms) == 1  # with a coefficient of one
    h, slope, _ = operators(image).norm_act(
        terms, coefficients() if alone else coefs, None, None, None, *NO_NORM, *codes
    )
    return (image if alone else h), slope


def tells_its_derivative(activation: Activation) -> bool:
    """Whether σ′ may be taken at σ(h) instead of h: it depends on the sign alone, which σ keeps."""
    return activation.kind == "relu" or (activation.kind == "leaky_relu" and activation.p > 0)


def _normalise(
    pair: Pair, which: int, tensors: MaybeTensors, terms: Sequence[Tensor], coefs: MaybeTensor
) -> tuple[Tensor, Tensor, MaybeTensor]:
    """The combination of terms, its norm, and the norm's statistics."""
    norm = pair.norms[which]
    if coefs is not None and norm is None:
        terms, coefs = [combine(terms, coefs)], None
    if norm is None:
        return terms[0], terms[0], None
    terms = promoted(terms)
    weight, bias = norm_tensors(tensors, norm_at(which), terms[0].dtype)
    given = fixed_statistics(tensors, norm_at(which), terms[0].dtype)
    given_coefs = coefficients() if coefs is None else coefs
    u, normed, made = operators(terms[0]).norm_act(
        terms, given_coefs, weight, bias, given, *norm_codes(norm), *NO_ACTIVATION
    )
    return (terms[0] if coefs is None else u), normed, made if given is None else given


def normalised_again(pair: Pair, which: int, tensors: MaybeTensors, point: Tensor, stats: MaybeTensor) -> Tensor:
    """The norm of a point, from its statistics."""
    norm = pair.norms[which]
    if norm is None:
        return point
    weight, bias = norm_tensors(tensors, norm_at(which), point.dtype)
    return operators(point).norm_act([point], coefficients(), weight, bias, stats, *norm_codes(norm), *NO_ACTIVATION)[1]


def pull_slope(
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
    codes = None if pair.activation is None else (*NO_NORM, *activation_codes(pair.activation))
    inner = 1.0 if codes is not None else factor
    if pair.norms[which] is not None:
        slope = h
        if pair.activation is not None and not tells_its_derivative(pair.activation):
            slope = operators(h).combine([h], coefficients(1.0), *activation_codes(pair.activation))
        bar = _pull_norm(pair, which, tensors, slope, stats, bar, grads, inner, scale)
    elif codes is None and factor != 1.0:
        bar = combine([bar], coefficients(factor))
    if codes is None:
        return bar
    empty = h.new_empty(0)
    return operators(h).norm_act_vjp(h, bar, empty, None, None, [], coefficients(factor), False, *codes)[0]


def pull_point(
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
    bar = cast(bar, point.dtype)
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
    weight, bias = norm_tensors(tensors, norm_at(which), x.dtype)
    param_grads = grads.wants_norm(norm_at(which))
    out, weight_bar, bias_bar = operators(x).norm_act_vjp(
        x, bar, stats, weight, bias, [], coefficients(factor), param_grads, *norm_codes(norm), *NO_ACTIVATION
    )
    if param_grads:
        grads.add_norm(norm_at(which), weight_bar, bias_bar, scale)
    return out


def weight_of(pair: Pair, tensors: MaybeTensors) -> Tensor:
    """W's weight as a convolution sees it."""
    weight = tensors[WEIGHT]
    assert weight is not None
    return lowered(pair.lower, weight)
