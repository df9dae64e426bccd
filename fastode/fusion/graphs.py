"""A whole network as CUDA graphs: its forward and its backward, each replayed by one launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import checks
from ..branch.read import has_hooks
from ..dispatch import choice
from ..dispatch.engines import is_reference

DEVICES = ("cuda",)  # on which there are graphs
_WARM = 3  # calls before the capture: the first makes trials and compiles, the others let caches settle

Replay = Callable[[], object]


def graphed(model: nn.Module, example: Tensor | tuple[Tensor, ...]) -> Graphed:
    """Capture a model's forward, and its backward where gradients are wanted, in CUDA graphs that replay it.

    The graphs hold the shapes, dtypes and engines of the example's call, and read the model's parameters and buffers
    where they lie: an optimizer's steps in place and running statistics go on as ever. Warming up leaves no trace in
    buffers and random numbers. What is returned is called in the model's place; outputs and gradients are copies, so
    that the next replay does not change them. A second call discards what the first kept for its backward.

    Not `torch.cuda.make_graphed_callables`: that hands out its own buffers, so that gradients of two batches cannot be
    accumulated, broadcasts an input of another shape, and computes wrong gradients after two calls.

    Args:
        model: fused or not, on one CUDA device, in the mode (`train` or `eval`) that it will be called in.
        example: its input or inputs; one that requires a gradient has it captured. Under torch.no_grad() or with
            nothing that requires a gradient, only the forward is captured.

    Returns:
        A function of as many tensors as the example has, of the same shapes, dtypes and device.

    Raises:
        TypeError: the model is not a module, or the example or the model's output not a tensor or a tuple of tensors.
        ValueError: the model or the example cannot be captured, with the reason.
        RuntimeError: CUDA refused the capture, with the reason.

    Example:
        >>> model = nn.Conv2d(3, 3, 1)
        >>> graphed(model, torch.zeros(1, 3, 4, 4))
        Traceback (most recent call last):
        ValueError: example must be on a CUDA device, got cpu
    """
    checks.module("model", model)
    inputs = example if isinstance(example, tuple) else (example,)
    if not inputs or not all(isinstance(x, Tensor) for x in inputs):
        raise TypeError(f"example must be a tensor or a tuple of tensors, got {checks.what(example)}")
    _check_model(model)
    _check_devices(model, inputs)
    return Graphed(model, inputs)


def _check_model(model: nn.Module) -> None:
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise ValueError('model must not be compiled: torch.compile(mode="reduce-overhead") captures graphs itself')
    for name, module in model.named_modules():
        if has_hooks(module):
            raise ValueError(f"model must not have hooks, which a replay does not call, got some on {name or 'itself'}")


def _check_devices(model: nn.Module, inputs: Sequence[Tensor]) -> None:
    device = inputs[0].device
    if device.type not in DEVICES:
        raise ValueError(f"example must be on a CUDA device, got {device}")
    held: list[tuple[str, str, Tensor]] = [("parameter", *item) for item in model.named_parameters()]
    held += [("buffer", *item) for item in model.named_buffers()]
    for kind, name, tensor in [*held, *(("input", str(i), x) for i, x in enumerate(inputs))]:
        if tensor.device != device:
            raise ValueError(f"model and example must be on one device, got {kind} {name} on {tensor.device}")


class Graphed:
    """A captured model, as `graphed` returns it.

    Attributes:
        model: the model; its parameters are those that the graphs read.
    """

    def __init__(self, model: nn.Module, inputs: Sequence[Tensor]) -> None:
        self.model = model
        self.inputs = tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in inputs)
        self.turn = 0
        parameters = [p for p in model.parameters() if p.requires_grad] if torch.is_grad_enabled() else []
        inputs_asked = [x for x in self.inputs if x.requires_grad and torch.is_grad_enabled()]
        self.sources: list[Tensor] = [*inputs_asked, *parameters]
        self._parameters = parameters
        self._held = [*model.parameters(), *model.buffers()]
        self._at = [t.data_ptr() for t in self._held]
        self._parts = list(model.modules())
        self._modes = [part.training for part in self._parts]
        self._cotangents: list[Tensor] = []
        self._single = False
        device = self.inputs[0].device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self._warm()
            self._capture()

    def __call__(self, *inputs: Tensor) -> Any:
        self._check(inputs)
        if self._replay_backward is None:
            with torch.no_grad():
                results = self._forward(inputs)
        else:
            results = _Replayed.apply(self, *inputs, *self._parameters)
        return results[0] if self._single else tuple(results)

    def _call(self) -> tuple[Tensor, ...]:
        """The model on the static inputs; what a replay repeats."""
        device = self.inputs[0].device.type
        lower = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        # Without autocast's cache: a weight cast before the capture would not be cast again by a replay.
        with torch.autocast(device, lower, enabled=lower is not None, cache_enabled=False):
            outputs = self.model(*self.inputs)
        self._single = isinstance(outputs, Tensor)
        self._outputs: tuple[Tensor, ...] = (outputs,) if self._single else outputs
        if not (isinstance(self._outputs, tuple) and all(isinstance(y, Tensor) for y in self._outputs)):
            raise TypeError(f"model must return a tensor or a tuple of tensors, got {checks.what(outputs)}")
        return self._outputs

    def _differentiate(self) -> list[Tensor | None]:
        """The gradients of the last call for the static cotangents."""
        outputs = [y for y in self._outputs if y.requires_grad]
        return list(torch.autograd.grad(outputs, self.sources, self._cotangents, allow_unused=True))

    def _warm(self) -> None:
        """Call the model as it will be captured; buffers and random numbers are then as they were."""
        buffers = [(buffer, buffer.detach().clone()) for buffer in self.model.buffers()]
        device = self.inputs[0].device
        try:
            with torch.random.fork_rng([device.index] if device.type == "cuda" else []):
                for turn in range(_WARM):
                    with _beside(device), choice.recording() as used:
                        outputs = self._call()
                        if turn == 0:
                            self._check_norms(used)
                            wanted = [y for y in outputs if y.requires_grad and self.sources]
                            self._cotangents = [torch.zeros_like(y) for y in wanted]
                        if self._cotangents:
                            self._differentiate()
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)

    def _check_norms(self, used: dict[nn.Module, str]) -> None:
        """Refuse norms with momentum=None: a replay would repeat their factor, which must change at each call."""
        fused = {part for block, engine in used.items() if not is_reference(engine) for part in block.modules()}
        for name, module in self.model.named_modules():
            moves = isinstance(module, _BatchNorm) and module.training and module.running_mean is not None
            if moves and module.momentum is None and module not in fused:
                raise ValueError(
                    f"model must not have norms with momentum=None in training, whose next factor a replay does not "
                    f"know, got {name or 'itself'}"
                )

    def _capture(self) -> None:
        pool = pool_handle()
        self._results, self._replay_forward = _captured(self._call, pool)
        self._differentiable = [y.requires_grad for y in self._outputs]
        self._replay_backward: Replay | None = None
        if self._cotangents:
            self._bars, self._replay_backward = _captured(self._differentiate, pool)

    def _forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        for static, given in zip(self.inputs, inputs, strict=True):
            static.copy_(given)
        self.turn += 1
        self._replay_forward()
        return [y.detach().clone() for y in self._results]

    def _backward(self, turn: int, cotangents: Sequence[Tensor]) -> list[Tensor | None]:
        """The gradients of inputs and parameters, None for those that have none."""
        if turn != self.turn:
            raise RuntimeError("backward must come before the graphed model is called again, got it after")
        assert self._replay_backward is not None
        wanted = [bar for bar, able in zip(cotangents, self._differentiable, strict=True) if able]
        for static, given in zip(self._cotangents, wanted, strict=True):
            static.copy_(given)
        self._replay_backward()
        found = {id(t): bar for t, bar in zip(self.sources, self._bars, strict=True)}
        bars = [found.get(id(t)) for t in (*self.inputs, *self._parameters)]
        return [None if bar is None else bar.clone() for bar in bars]

    def _check(self, inputs: tuple[Any, ...]) -> None:
        """Refuse a call that the graphs do not hold."""
        if len(inputs) != len(self.inputs):
            raise TypeError(f"inputs must be {len(self.inputs)} tensors, got {len(inputs)}")
        for i, (x, static) in enumerate(zip(inputs, self.inputs, strict=True)):
            if not isinstance(x, Tensor):
                raise TypeError(f"input {i} must be a tensor, got {checks.what(x)}")
            given, held = ((t.dtype, tuple(t.shape), t.device) for t in (x, static))
            if given != held:
                words = [f"{dtype} of shape {shape} on {device}" for dtype, shape, device in (held, given)]
                raise ValueError(f"input {i} must be {words[0]}, as it was captured, got {words[1]}")
            if x.requires_grad and torch.is_grad_enabled() and not static.requires_grad:
                raise ValueError(f"input {i} must not require a gradient, because the example did not")
        if [part.training for part in self._parts] != self._modes:
            raise ValueError("model must be in the mode (train or eval) in which it was captured")
        if torch.is_grad_enabled():
            fresh = sum(t.requires_grad for t in self._held) - len(self._parameters)
            if fresh > 0:
                raise ValueError(f"model must not require gradients that were not captured, got {fresh} that it does")
        if [t.data_ptr() for t in self._held] != self._at:
            raise ValueError("model must have its parameters and buffers where they were when it was captured")


class _Replayed(torch.autograd.Function):
    """A replay as one node of the graph of autograd."""

    @staticmethod
    def forward(ctx: Any, graphs: Graphed, *tensors: Tensor) -> tuple[Tensor, ...]:
        results = graphs._forward(tensors[: len(graphs.inputs)])
        ctx.graphs, ctx.turn = graphs, graphs.turn
        constants = [y for y, able in zip(results, graphs._differentiable, strict=True) if not able]
        ctx.mark_non_differentiable(*constants)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("create_graph must be False: a graphed model has no gradients of gradients")
        return (None, *ctx.graphs._backward(ctx.turn, cotangents))


def capture(run: Callable[[], Sequence[Any]], pool: Any) -> tuple[list[Any], Replay]:
    """run() in a graph: what it returned, and what replays it into the same memory."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        results = run()
    return list(results), graph.replay


def _captured(run: Callable[[], Sequence[Any]], pool: Any) -> tuple[list[Any], Replay]:
    try:
        return capture(run, pool)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise RuntimeError(f"the model cannot be captured: {reason}") from error


def repeated(run: Callable[[], Sequence[Any]], model: nn.Module, example: Tensor) -> Replay:
    """What repeats run() as one CUDA graph, after calls that warm it up.

    Args:
        run: a method that reads and writes tensors where they lie, and asks the model; a replay goes on from it.
        model: as `graphed` takes it.
        example: its input.

    Raises:
        ValueError: the model or the example cannot be captured, with the reason.
        RuntimeError: CUDA refused the capture, with the reason.
    """
    if example.device.type not in DEVICES:
        raise ValueError(f"graphed must be False where images are on {example.device}: graphs are of CUDA devices")
    _check_model(model)
    _check_devices(model, (example,))
    with torch.cuda.device(example.device) if example.device.type == "cuda" else nullcontext():
        for _ in range(_WARM):
            with _beside(example.device):
                run()
        return _captured(run, pool_handle())[1]


def pool_handle() -> Any:
    """Memory that the graphs of one model share."""
    return torch.cuda.graph_pool_handle()


@contextmanager
def _beside(device: torch.device) -> Iterator[None]:
    """Run on a side stream, as a capture does, so that what a stream sets up at first is done before it."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)
