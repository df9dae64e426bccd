"""``python -m fastode.robustness CHECKPOINT``: the accuracy that attacks leave of a network, as a table.

Everything that was asked for is looked at before the first attack.
"""

from __future__ import annotations

import argparse
import json
import pkgutil
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastode

from ..stability.plots import axes_or_new
from ..training.checkpoint import load_weights
from .data import read_images
from .evaluation import Row, evaluate
from .planned import NAMES, plan
from .plots import plot_accuracy

SHARES = (0.25, 0.5, 1.0, 1.5)  # of the radius, where the figure has points


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the result is the exit status."""
    parser = _parser()
    asked = parser.parse_args(arguments)
    try:
        names = asked.attacks.split(",")
        plan(names, asked.norm)
        eps, radii = _radii(asked)
        outputs = [_output(path) for path in (asked.json, asked.figure) if path is not None]
        if asked.figure is not None:
            _check_figure(asked.figure)
        _check_device(asked.device)
        model = _model(asked)
        images, labels = _images(asked)
    except (TypeError, ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    if asked.fused:
        fastode.fuse(model)

    def tell(row: Row) -> None:
        print(f"{row.name}: {row.accuracy:.2%}, {row.seconds:.1f} s", file=sys.stderr, flush=True)

    try:
        found = evaluate(
            model, images, labels, attacks=names, eps=eps, norm=asked.norm, radii=radii, batch_size=asked.batch_size,
            seed=asked.seed, solver_gradient=asked.solver_gradient, tell=tell,
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    print(found)
    if asked.json is not None:
        about = {
            "checkpoint": Path(asked.checkpoint).name,
            "model": asked.model,
            "data": Path(asked.data).name,
            "fused": asked.fused,
            "solver_gradient": asked.solver_gradient,
            "seed": asked.seed,
            "device": str(images.device),
            "torch": torch.__version__,
            "fastode": fastode.__version__,
        }
        Path(asked.json).write_text(json.dumps({**about, **found.as_json()}, indent=1) + "\n")
    if asked.figure is not None:
        plot_accuracy(found).figure.savefig(asked.figure)
    for path in outputs:
        print(f"written: {path}", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastode.robustness", description="the accuracy that attacks leave of a network, as a table"
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a file of fastode.training.Trainer, or a state_dict")
    parser.add_argument(
        "--model", required=True, metavar="MODULE:FUNCTION", help="makes the network, for images in [0, 1]"
    )
    parser.add_argument("--options", default="{}", metavar="JSON", help="the function's arguments by name")
    parser.add_argument("--data", required=True, metavar="NPZ", help="a file with x_test and y_test, in Keras' layout")
    parser.add_argument(
        "--attacks", default="pgd20", help=f"by commas, each with its steps behind it: {', '.join(NAMES)}"
    )
    parser.add_argument("--eps", default="8/255", help="the radius, a number or a fraction; 8/255 if not given")
    parser.add_argument("--norm", default="linf", choices=("linf", "l2"), help="of the radius, for all attacks")
    parser.add_argument("--images", type=_positive, help="how many, from the beginning; all if not given")
    parser.add_argument("--batch-size", type=_positive, default=100, help="images attacked together; 100 if not given")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0, help="of each attack's random numbers")
    parser.add_argument("--fused", action="store_true", help="fuse the network's blocks first")
    parser.add_argument("--solver-gradient", choices=("solver", "constant", "exact"), help="of adaptive solvers")
    parser.add_argument("--json", metavar="FILE", help="write all numbers")
    parser.add_argument(
        "--figure", metavar="FILE", help="draw accuracy against the radius; attacks run for each of them"
    )
    parser.add_argument(
        "--radii", help="by commas, of the figure; a quarter, half, once and one and a half times --eps"
    )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _number(name: str, text: str) -> float:
    try:
        value = float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{name} must be a number or a fraction, as 8/255, got {text!r}") from None
    if not value > 0:
        raise ValueError(f"{name} must be above 0, got {text}")
    return value


def _radii(asked: argparse.Namespace) -> tuple[float, tuple[float, ...]]:
    eps = _number("eps", asked.eps)
    if asked.radii is not None and asked.figure is None:
        raise ValueError("radii must come with a figure, got them without")
    if asked.figure is None:
        return eps, ()
    if asked.radii is None:
        return eps, tuple(share * eps for share in SHARES)
    return eps, tuple(_number("radii", text) for text in asked.radii.split(","))


def _output(path: str) -> str:
    if Path(path).is_dir() or not Path(path).parent.is_dir():
        raise ValueError(f"output must be a file in a folder that exists, got {path}")
    return path


def _check_figure(path: str) -> None:
    kinds = axes_or_new(None).figure.canvas.get_supported_filetypes()
    if Path(path).suffix[1:] not in kinds:
        raise ValueError(f"figure must be a file that ends in one of {', '.join(sorted(kinds))}, got {path}")


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without it
        reason = str(error).splitlines()[0]
        raise ValueError(f"device must be one that torch can use here, got {device!r}: {reason}") from error


def _model(asked: argparse.Namespace) -> nn.Module:
    """The network, with the checkpoint's weights, on the device."""
    module, colon, function = asked.model.partition(":")
    if not (module and colon and function):
        raise ValueError(f"model must be MODULE:FUNCTION, got {asked.model!r}")
    try:
        make = pkgutil.resolve_name(asked.model)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"model must be MODULE:FUNCTION, got {asked.model!r}: {error}") from error
    made = make(**_options(asked.options)) if callable(make) and not isinstance(make, nn.Module) else make
    if not isinstance(made, nn.Module):
        raise TypeError(f"model must make an nn.Module, got an object of type {type(made).__name__}")
    load_weights(made, asked.checkpoint)
    return made.to(asked.device).eval()


def _options(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"options must be JSON, got {text!r}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"options must be a JSON object, got {text!r}")
    return found


def _images(asked: argparse.Namespace) -> tuple[Tensor, Tensor]:
    images, labels = read_images(asked.data)
    return images[: asked.images].to(asked.device), labels[: asked.images].to(asked.device)


if __name__ == "__main__":
    sys.exit(main())
