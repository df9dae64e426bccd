"""What every engine does with feature maps: layouts, dtypes, and the combinations that stand between convolutions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ..branch.layers import TENSORS_PER_UNIT
from ..native.constants import MOST_TERMS
from ..native.cuda import operators
from ..tracing import is_exporting
from .plan import CONV_BIAS, CONV_WEIGHT, MaybeTensor, MaybeTensors, Plan


def channels_last(x: Tensor) -> Tensor:
    """x in dense channels_last memory: what every operator takes."""
    return x.contiguous(memory_format=torch.channels_last)


def is_channels_last(x: Tensor) -> bool:
    """Whether PyTorch takes x as channels_last, as it does a slice of such a tensor."""
    dense = torch.empty_like(x)
    return dense.is_contiguous(memory_format=torch.channels_last) and not dense.is_contiguous()


def last_of(x: Tensor, tensors: MaybeTensors) -> bool:
    """Whether the result is in channels_last: where x, or a weight, is so that convolutions would give it."""
    if is_channels_last(x):
        return True
    weights = [tensor for tensor in tensors if tensor is not None and tensor.dim() == 4]
    return any(is_channels_last(weight) for weight in weights)


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
    if torch.compiler.is_compiling():
        if values and is_exporting():  # a literal tensor would be a constant of the exporter's own fake mode
            return torch.cat([torch.full((1,), value, dtype=torch.float64, device="cpu") for value in values])
        return torch.tensor(values, dtype=torch.float64, device="cpu")
    found = None if torch._C._len_torch_dispatch_stack() else _coefficients.get(values)
    return _make_coefficients(values) if found is None else found


Row = Callable[[Sequence[tuple[int, int, int] | None]], Tensor]


def rows_of(table: Tensor) -> Row:
    """Gives the coefficients at some places of a table [2, s, s], with a one for None, as the operators take them."""
    if torch.compiler.is_compiling() or table.device.type != "cpu" or type(table) is not Tensor:
        return lambda places: torch.cat(
            [table.new_ones(1) if at is None else table[at[0], at[1], at[2] : at[2] + 1] for at in places]
        )
    values = table.tolist()
    return lambda places: coefficients(*[1.0 if at is None else values[at[0]][at[1]][at[2]] for at in places])


_MOST_COEFFICIENTS = 1024  # those of learned tableaus are others at every call
_coefficients: dict[tuple[float, ...], Tensor] = {}


def _make_coefficients(values: tuple[float, ...]) -> Tensor:
    with torch.inference_mode(False):  # or no operator could take them where gradients are on
        made = torch.tensor(values, dtype=torch.float64, device="cpu")  # whatever the default device is
    if type(made) is Tensor:  # not a fake mode's
        if len(_coefficients) >= _MOST_COEFFICIENTS:
            _coefficients.clear()
        _coefficients[values] = made
    return made


def combine(terms: Sequence[Tensor], coefs: Tensor) -> Tensor:
    """The sum of coefs[i] terms[i], in the dtype that PyTorch promotes the terms to."""
    terms, coefs = few(promoted(terms), coefs)
    return operators(terms[0]).combine(terms, coefs, 0, 0.0, 0.0)


def summed(terms: Sequence[Tensor]) -> Tensor:
    """The sum of some maps, at least one, in the dtype that PyTorch promotes them to; of one, itself."""
    return terms[0] if len(terms) == 1 else combine(terms, coefficients(*[1.0] * len(terms)))


def weighing(terms: Sequence[Tensor], weights: Sequence[float]) -> tuple[list[Tensor], list[float]]:
    """The terms of a sum whose weights are not zero, and these."""
    pairs = [(term, weight) for term, weight in zip(terms, weights, strict=True) if weight]
    return [term for term, _ in pairs], [weight for _, weight in pairs]


def combine_pair(first: Sequence[Tensor], second: Sequence[Tensor], coefs: Tensor) -> Tensor:
    """Two combinations stacked along the batch; coefs are the first's, then the second's."""
    terms = promoted([*first, *second])
    return operators(terms[0]).combine_pair(terms[: len(first)], terms[len(first) :], coefs)


def dots(v: Tensor, terms: Sequence[Tensor]) -> Tensor:
    """The inner products of v with each term, in the accumulator's dtype."""
    terms = in_dtype(terms, v.dtype)
    starts = range(0, len(terms), MOST_TERMS)
    return torch.cat([operators(v).dots(v, terms[start : start + MOST_TERMS]) for start in starts])


def few(terms: list[Tensor], coefs: Tensor) -> tuple[list[Tensor], Tensor]:
    """The same sum in no more terms than one operator takes."""
    while len(terms) > MOST_TERMS:
        head = operators(terms[0]).combine(terms[:MOST_TERMS], coefs[:MOST_TERMS], 0, 0.0, 0.0)
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
    return [cast(term, dtype) for term in terms]


def lowered(lower: torch.dtype | None, tensor: Tensor) -> Tensor:
    """The tensor as a convolution under autocast to `lower` sees it; autocast leaves float64 alone."""
    return tensor if lower is None or tensor.dtype == torch.float64 else cast(tensor, lower)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """tensor.to(dtype), without the call where it would do nothing."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over maps of a dtype are taken."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Converted(list[MaybeTensor]):
    """A block's tensors as the sweeps read them, so that a call converts each of them once.

    Attributes:
        accumulator: the dtype of the norms' weights and biases.
        statistics: the fixed statistics of norms that were asked for, by their place and dtype.
    """

    def __init__(
        self,
        tensors: MaybeTensors,
        norms: Iterable[int],
        convolutions: Iterable[int],
        lower: torch.dtype | None,
        dtype: torch.dtype,
    ) -> None:
        """Convert.

        Args:
            tensors: of the block.
            norms: where those of a norm begin.
            convolutions: where weights of convolutions, and after them their biases, stand.
            lower: the dtype to which autocast lowers convolutions.
            dtype: of the block's input.
        """
        super().__init__(tensors)
        self.statistics: dict[tuple[int, torch.dtype], MaybeTensor] = {}
        self.accumulator = accumulator(dtype)
        for at in norms:
            self[at], self[at + 1] = norm_tensors(tensors, at, dtype)
        for at in convolutions:
            tensor = self[at]
            if tensor is not None:
                tensor = lowered(lower, tensor)
                # What every convolution on a card would make of it for itself: its input is channels_last.
                on_card = tensor.device.type != "cpu" and tensor.dim() == 4
                self[at] = channels_last(tensor) if on_card else tensor


def converted(plan: Plan, tensors: MaybeTensors, dtype: torch.dtype) -> MaybeTensors:
    """A branch's tensors as its sweeps over an input of `dtype` read them."""
    if torch.compiler.is_compiling():
        return tensors
    units = range(0, len(tensors), TENSORS_PER_UNIT)
    return Converted(tensors, units, [at + i for at in units for i in (CONV_WEIGHT, CONV_BIAS)], plan.lower, dtype)


def norm_tensors(tensors: MaybeTensors, at: int, dtype: torch.dtype) -> tuple[MaybeTensor, MaybeTensor]:
    """Weight and bias of the norm whose tensors begin at `at`, in the accumulator's dtype for maps of `dtype`."""
    wanted = accumulator(dtype)
    if isinstance(tensors, Converted) and tensors.accumulator == wanted:
        return tensors[at], tensors[at + 1]
    return _dense(tensors[at], wanted), _dense(tensors[at + 1], wanted)


def _dense(tensor: MaybeTensor, dtype: torch.dtype) -> MaybeTensor:
    return None if tensor is None else cast(tensor, dtype).contiguous()


def fixed_statistics(tensors: MaybeTensors, at: int, dtype: torch.dtype) -> MaybeTensor:
    """Mean and variance [2, C] that such a norm normalises by, where it has them."""
    mean, variance = tensors[at + 2], tensors[at + 3]
    if mean is None or variance is None:
        return None
    wanted = accumulator(dtype)
    kept = tensors.statistics if isinstance(tensors, Converted) else {}
    if (at, wanted) not in kept:
        kept[at, wanted] = torch.stack((mean, variance)).to(wanted)
    return kept[at, wanted]
