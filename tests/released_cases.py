"""Networks of `fastode.released`, the independent ones, and random state_dicts of these."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from released_codes import IEResNet, PreactResNet, SSPNet, SSPNetMnist
from released_odes import FourLayers, ODENet
from torch import Tensor, nn

from fastode import released
from fastode.released.network import Network

TOLERANCE = 1e-10  # of float64, relative to the largest value
CLASSES = 5

Make = Callable[[], nn.Module]


def case(name: str, theirs: Make, size: int = 8, **arguments: Any) -> tuple[str, Make, int, dict[str, Any]]:
    """A network of `fastode.released`, the independent one, the image's side, and our arguments."""
    return name, theirs, size, {"num_classes": CLASSES, **arguments}


def ie(depth: int, steps: int, theta: float = 1.0, follow: str = "code") -> Any:
    theirs = partial(IEResNet, depth, 4, CLASSES, steps, 0.03, theta, follow)
    arguments = {"width": 4, "steps": steps, "step_size": 0.03, "theta": theta, "follow": follow}
    return case(f"ie_resnet{depth}", theirs, **arguments)


def ssp(block: str, norm: str, *kinds: str) -> Any:
    theirs = partial(SSPNet, kinds or (block,) * 3, 2, 4, norm, CLASSES)
    return case("sspnet", theirs, block=block, n=2, width=4, norm=norm)


def mnist(block: str, kind: str, norm: str) -> Any:
    return case(
        "sspnet_mnist", partial(SSPNetMnist, kind, 2, 4, norm, CLASSES), 16, block=block, n=2, width=4, norm=norm
    )


def layers(name: str, counts: tuple[int, ...], solver: str = "") -> Any:
    theirs = partial(FourLayers, name, counts, 4, CLASSES, solver or "dopri5")
    return case(name, theirs, width=4, blocks=counts, **({"solver": solver} if solver else {}))


CASES = {
    "ie_resnet18": ie(18, 1),
    "ie_resnet18 two steps": ie(18, 2, theta=0.7),
    "ie_resnet18 paper": ie(18, 2, theta=0.7, follow="paper"),
    "ie_resnet34": ie(34, 1),
    "ie_resnet50": ie(50, 2, theta=0.7),
    "ie_resnet50 paper": ie(50, 1, follow="paper"),
    "resnet18": case("resnet18", partial(PreactResNet, 18, 4, CLASSES), width=4),
    "resnet34": case("resnet34", partial(PreactResNet, 34, 4, CLASSES), width=4),
    "resnet50": case("resnet50", partial(PreactResNet, 50, 4, CLASSES), width=4),
    "sspnet res": ssp("res", "layer"),
    "sspnet midpoint": ssp("midpoint", "batch"),
    "sspnet ssp2": ssp("ssp2", "batch"),
    "sspnet ssp3": ssp("ssp3", "group"),
    "sspnet adap": ssp("adap", "batch", "ark", "res", "ssp2"),
    "sspnet adap instance": ssp("adap", "instance", "ark", "res", "ssp2"),
    "sspnet_mnist res": mnist("res", "res", "batch"),
    "sspnet_mnist ssp3": mnist("ssp3", "ssp3", "batch"),
    "sspnet_mnist ssp2": mnist("ssp2", "ssp2", "instance"),
    "sspnet_mnist adap": mnist("adap", "ark", "batch"),
    "sonet": layers("sonet", (1, 1, 1, 1), "dopri5"),
    "sonet two blocks": layers("sonet", (2, 1, 1, 2), "rk4"),
    "soblock_resnet10": layers("soblock_resnet10", (1, 1, 1, 1), "bosh3"),
    "resnet10": layers("resnet10", (2, 1, 1, 1)),
    "odenet": case("odenet", partial(ODENet, 2, 4, CLASSES, "dopri5"), width=4, blocks=2, solver="dopri5"),
}
# What moves running statistics, where training and evaluation differ.
WITH_STATISTICS = ("sspnet midpoint", "sspnet adap", "sspnet_mnist adap", "resnet10", "soblock_resnet10")
FEW = (
    "ie_resnet18",
    "ie_resnet50",
    "sspnet midpoint",
    "sspnet adap",
    "sspnet_mnist adap",
    "sonet",
    "resnet10",
    "odenet",
)


def draw(model: nn.Module, seed: int = 0) -> None:
    """Random parameters and buffers, of a size that lets every layer count."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, tensor in tensors.items():
            if not tensor.is_floating_point():
                continue
            drawn = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
            if tensor.dim() > 1:
                tensor.copy_(drawn / tensor[0].numel() ** 0.5)
            elif name.endswith("bias") or name.endswith("running_mean"):
                tensor.copy_(0.2 * drawn)
            else:
                tensor.copy_(0.5 + drawn.abs() / 2)


def their_network(name: str) -> nn.Module:
    theirs = CASES[name][1]().double()
    draw(theirs)
    return theirs


def our_network(name: str) -> Network:
    function, _, _, arguments = CASES[name]
    return getattr(released, function)(**arguments).double()


def images(name: str) -> Tensor:
    function, _, size, _ = CASES[name]
    channels = 1 if "mnist" in function else 3
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, channels, size, size, generator=generator, dtype=torch.float64)


def run(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the gradient at the image; the parameters' are accumulated."""
    x = x.clone().requires_grad_()
    y = model(x)
    generator = torch.Generator().manual_seed(2)
    y.backward(torch.randn(y.shape, generator=generator, dtype=y.dtype))
    assert x.grad is not None
    return y.detach(), x.grad


def assert_equal(found: Tensor, wanted: Tensor, what: str, scale: float = 0.0) -> None:
    scale = scale or max(wanted.abs().max().item(), 1e-3)
    worst = (found - wanted).abs().max().item()
    assert worst <= TOLERANCE * scale, f"{what} differs by {worst:.1e} of {scale:.1e}"
