"""What every engine does with feature maps: layouts, dtypes, and the combinations that stand between convolutions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..native.constants import MOST_TERMS
from ..tracing import is_exporting
from .plan import MaybeTensor, MaybeTensors


def channels_last(x: Tensor) -> Tensor:
    """x in dense channels_last memory: what every operator takes."""
    return x.contiguous(memory_format=torch.channels_last)


def is_channels_last(x: Tensor) -> bool:
    """Whether PyTorch takes x as channels_last, as it does a slice of such a tensor."""
    dense = torch.empty_like(x)
    return dense.is_contiguous(memory_format=torch.channels_last) and not dense.is_contiguous()


def like_reference(y: Tensor, x: Tensor) -> Tensor:
    """y in the memory format that element-wise PyTorch gives a result of x."""
    if y.stride() == x.stride():  # y is dense, so x is, and PyTorch keeps the strides of a dense x
        return y
    wanted = torch.empty_like(x, dtype=y.dtype)
    if y.stride() == wanted.stride():
        return y
    if torch.compiler.is_compiling():  # torch 2.11 traces a zero gradient for a result that is written in place
        return torch.ops.aten.copy.default(wanted, y)
    return wanted.copy_(y)


def coefficients(*values: float) -> Tensor:
    """Coefficients as the operators take them."""
    if values and is_exporting():  # a literal tensor would be a constant of the exporter's own fake mode
        return torch.cat([torch.full((1,), value, dtype=torch.float64, device="cpu") for value in values])
    return torch.tensor(values, dtype=torch.float64, device="cpu")  # whatever the default device is


def combine(terms: Sequence[Tensor], coefs: Tensor) -> Tensor:
    """The sum of coefs[i] terms[i], in the dtype that PyTorch promotes the terms to."""
    terms, coefs = few(promoted(terms), coefs)
    return torch.ops.fastode.combine(terms, coefs, 0, 0.0, 0.0)


def combine_pair(first: Sequence[Tensor], second: Sequence[Tensor], coefs: Tensor) -> Tensor:
    """Two combinations stacked along the batch; coefs are the first's, then the second's."""
    terms = promoted([*first, *second])
    return torch.ops.fastode.combine_pair(terms[: len(first)], terms[len(first) :], coefs)


def dots(v: Tensor, terms: Sequence[Tensor]) -> Tensor:
    """The inner products of v with each term, in the accumulator's dtype."""
    terms = in_dtype(terms, v.dtype)
    starts = range(0, len(terms), MOST_TERMS)
    return torch.cat([torch.ops.fastode.dots(v, terms[start : start + MOST_TERMS]) for start in starts])


def few(terms: list[Tensor], coefs: Tensor) -> tuple[list[Tensor], Tensor]:
    """The same sum in no more terms than one operator takes."""
    while len(terms) > MOST_TERMS:
        head = torch.ops.fastode.combine(terms[:MOST_TERMS], coefs[:MOST_TERMS], 0, 0.0, 0.0)
        terms, coefs = [head, *terms[MOST_TERMS:]], torch.cat([torch.ones_like(coefs[:1]), coefs[MOST_TERMS:]])
    return terms, coefs


def few_addends(addends: Sequence[Tensor], coefs: Tensor) -> tuple[Sequence[Tensor], Tensor]:
    """The addends of a pull-back and its coefficients, whose first is the pull-back's own, in no more terms."""
    if len(addends) <= MOST_TERMS:
        return addends, coefs
    return [combine(addends, coefs[1:])], torch.cat([coefs[:1], torch.ones_like(coefs[:1])])


def promoted(terms: Sequence[Tensor]) -> list[Tensor]:
    """The terms in the dtype that PyTorch promotes them to."""
    dtype = terms[0].dtype
    for term in terms[1:]:
        dtype = torch.promote_types(dtype, term.dtype)
    return in_dtype(terms, dtype)


def in_dtype(terms: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [term if term.dtype == dtype else term.to(dtype) for term in terms]


def lowered(lower: torch.dtype | None, tensor: Tensor) -> Tensor:
    """The tensor as a convolution under autocast to `lower` sees it; autocast leaves float64 alone."""
    return tensor if lower is None or tensor.dtype == torch.float64 else tensor.to(lower)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over maps of a dtype are taken."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def norm_tensors(tensors: MaybeTensors, at: int, dtype: torch.dtype) -> tuple[MaybeTensor, MaybeTensor]:
    """Weight and bias of the norm whose tensors begin at `at`, in the accumulator's dtype for maps of `dtype`."""
    wanted = accumulator(dtype)
    weight, bias = (None if t is None else t.to(wanted).contiguous() for t in tensors[at : at + 2])
    return weight, bias


def fixed_statistics(tensors: MaybeTensors, at: int, dtype: torch.dtype) -> MaybeTensor:
    """Mean and variance [2, C] that such a norm normalises by, where it has them."""
    mean, variance = tensors[at + 2 : at + 4]
    return None if mean is None or variance is None else torch.stack((mean, variance)).to(accumulator(dtype))
