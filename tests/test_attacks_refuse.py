"""What `fastode.attacks` refuses, before anything runs or at the model's first answer, and what it says."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastode import attacks

IMAGES, LABELS = torch.full((2, 3, 4, 4), 0.5), torch.tensor([0, 1])


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 3))


class Answers(nn.Module):
    """Answers what it is told to, and counts how often it was asked."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer, self.asked = answer, 0

    def forward(self, x: Tensor) -> Any:
        self.asked += 1
        return self.answer(x)


def refused(kind: type[Exception], message: str) -> Any:
    return pytest.raises(kind, match=f"^{re.escape(message)}$")


ARGUMENTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"images": IMAGES * 3}, ValueError, "images must be within bounds, 0.0 to 1.0, got values from 1.5 to 1.5"),
    (
        {"images": IMAGES / 0 * 0},
        ValueError,
        "images must be within bounds, 0.0 to 1.0, got some that are not finite",
    ),
    (
        {"images": (255 * IMAGES).byte()},
        TypeError,
        "images must be of dtype float32, float64, bfloat16 or float16, got uint8",
    ),
    ({"images": IMAGES[0]}, ValueError, "images must be a tensor [N, C, H, W], got shape [3, 4, 4]"),
    ({"images": IMAGES[:0], "labels": LABELS[:0]}, ValueError, "images must be at least one, got none"),
    ({"images": IMAGES.to("meta")}, ValueError, "images must be on the model's device cpu, got meta"),
    ({"labels": LABELS.float()}, TypeError, "labels must be a tensor [2] of dtype int64, got dtype float32"),
    ({"labels": LABELS.int()}, TypeError, "labels must be a tensor [2] of dtype int64, got dtype int32"),
    ({"labels": LABELS[:1]}, ValueError, "labels must be a tensor [2] of dtype int64, got shape [1]"),
    ({"labels": [0, 1]}, TypeError, "labels must be a tensor [2] of dtype int64, got an object of type list"),
    ({"labels": LABELS - 1}, ValueError, "labels must be at least 0, got -1"),
    ({"labels": LABELS + 2}, ValueError, "labels must be below the model's 3 classes, got 3"),
    ({"labels": LABELS.to("meta")}, ValueError, "labels must be on the images' device cpu, got meta"),
    ({"targets": LABELS + 2}, ValueError, "targets must be below the model's 3 classes, got 3"),
    ({"model": lambda x: x}, TypeError, "model must be an nn.Module, got an object of type function"),
    ({"eps": 0.0}, ValueError, "eps must be a finite number > 0, got 0.0"),
    ({"eps": -1}, ValueError, "eps must be a finite number > 0, got -1"),
    ({"eps": "8/255"}, TypeError, "eps must be a finite number > 0, got '8/255'"),
    ({"eps": [0.1, 0.2]}, ValueError, "eps must be one number or one for each of 3 channels, got 2"),
    ({"eps": [0.1, 0.2, 0.0]}, ValueError, "eps must be a finite number > 0, got 0.0"),
    ({"eps": [0.1, 0.2, 0.3], "norm": "l2"}, ValueError, "eps must be one number with norm 'l2', got 3"),
    ({"step_size": 0}, ValueError, "step_size must be a finite number > 0, got 0"),
    ({"steps": 0}, ValueError, "steps must be an int >= 1, got 0"),
    ({"norm": "l1"}, ValueError, "norm must be one of 'linf', 'l2', got 'l1'"),
    ({"random_start": 0.0}, ValueError, "random_start must be a finite number > 0, got 0.0"),
    ({"restarts": 1.5}, TypeError, "restarts must be an int >= 1, got 1.5"),
    ({"loss": "dlr"}, ValueError, "loss must be one of 'ce', 'margin', 'kl', got 'dlr'"),
    ({"loss": "kl", "targets": LABELS}, ValueError, "targets must be None with loss 'kl', which knows no classes"),
    (
        {"loss": "kl", "random_start": False},
        ValueError,
        "loss must be 'ce' or 'margin' without a random start, where 'kl' has no gradient",
    ),
    ({"confidence": 0.0}, ValueError, "confidence must be a finite number > 0, got 0.0"),
    ({"bounds": 1.0}, TypeError, "bounds must be the least and the largest value of a pixel, got 1.0"),
    ({"bounds": (1.0, 0.0)}, ValueError, "bounds must be a lower and a higher value, got 1.0 and 0.0"),
    ({"mode": "test"}, ValueError, "mode must be one of 'eval', 'train', 'keep', got 'test'"),
    ({"generator": 3}, TypeError, "generator must be a torch.Generator or None, got 3"),
    ({"early_stop": 1}, TypeError, "early_stop must be True or False, got 1"),
    (
        {"early_stop": True, "mode": "train"},
        ValueError,
        "early_stop must be False with mode 'train', in which samples depend on one another",
    ),
    (
        {"early_stop": True, "graphed": True},
        ValueError,
        "early_stop must be False with graphed, which repeats one shape",
    ),
    (
        {"solver_gradient": "true"},
        ValueError,
        "solver_gradient must be one of 'solver', 'constant', 'exact', got 'true'",
    ),
]


@pytest.mark.parametrize(("given", "kind", "message"), ARGUMENTS, ids=[case[2][:40] for case in ARGUMENTS])
def test_bad_arguments(given: dict[str, Any], kind: type[Exception], message: str) -> None:
    options: dict[str, Any] = {"model": network(), "images": IMAGES, "labels": LABELS, "eps": 0.1} | given
    with refused(kind, message):
        attacks.pgd(options.pop("model"), options.pop("images"), options.pop("labels"), **options)


NO_LOGITS: list[tuple[Any, type[Exception], str]] = [
    (lambda x: None, TypeError, "model must return logits [N, classes], got None"),
    (lambda x: (x, x), TypeError, "model must return logits [N, classes], got an object of type tuple"),
    (
        lambda x: x,
        ValueError,
        "model must return logits [N, classes] with N = 2, got a tensor [2, 3, 4, 4] of dtype float32",
    ),
    (
        lambda x: x.flatten(1).argmax(1),
        ValueError,
        "model must return logits [N, classes] with N = 2, got a tensor [2] of dtype int64",
    ),
    (
        lambda x: x.flatten(1)[:, :1],
        ValueError,
        "model must return logits [N, classes] with N = 2, got a tensor [2, 1] of dtype float32",
    ),
    (
        lambda x: x.flatten(1)[:, :3].softmax(1),
        ValueError,
        "model must return logits [N, classes], got probabilities: they are at least 0 and each row's sum is 1",
    ),
    (
        lambda x: x.detach().flatten(1)[:, :3],
        ValueError,
        "model must return logits that depend on the images, got some without a graph",
    ),
]


@pytest.mark.parametrize(("answer", "kind", "message"), NO_LOGITS, ids=[case[2][:60] for case in NO_LOGITS])
def test_a_model_that_returns_no_logits(answer: Any, kind: type[Exception], message: str) -> None:
    model = Answers(answer)
    with refused(kind, message):
        attacks.pgd(model, IMAGES, LABELS, eps=0.1)
    assert model.asked == 1


def test_logits_whose_sums_are_near_one_are_no_probabilities() -> None:
    """As those of a network that training has made constant, on their way past one."""
    model = Answers(lambda x: x.flatten(1)[:, :3] * 0.66 + torch.tensor([[0.0, 0.0, 0.0095], [0.0, 0.0, 0.0097]]))
    assert attacks.fgsm(model, IMAGES, LABELS, eps=0.1).shape == IMAGES.shape and model.asked == 1


HALF = "images must be of the model's dtype float32, or autocast be on, got float16: "


@pytest.mark.parametrize("name", ["fgsm", "pgd", "bim", "di2_fgsm", "spsa"])
def test_images_of_another_dtype_than_the_models(name: str) -> None:
    with pytest.raises(TypeError, match=f"^{re.escape(HALF)}."):
        attacks.ATTACKS[name](network(), IMAGES.half(), LABELS, eps=0.1)
    with pytest.raises(TypeError, match=f"^{re.escape(HALF)}."):
        attacks.run(name, network(), IMAGES.half(), LABELS, eps=0.1)


def test_another_dtype_is_no_error_where_the_model_takes_it() -> None:
    class Casts(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.float())

    moved = attacks.fgsm(Casts(*network()), IMAGES.half(), LABELS, eps=0.1)
    assert moved.dtype == torch.float16
    with torch.autocast("cpu", torch.bfloat16):
        assert attacks.fgsm(network(), IMAGES.bfloat16(), LABELS, eps=0.1).dtype == torch.bfloat16


def test_an_error_of_the_models_own_stays() -> None:
    def fails(x: Tensor) -> Tensor:
        raise RuntimeError("its own")

    with refused(RuntimeError, "its own"):
        attacks.pgd(Answers(fails), IMAGES, LABELS, eps=0.1)


def test_di2_names_resize_where_the_model_does_not_take_larger_images() -> None:
    message = r"^resize must give images that the model takes, got 8x8 for 4x4: ."
    with pytest.raises(ValueError, match=message):
        attacks.di2_fgsm(network(), IMAGES, LABELS, eps=0.1, resize=2.0, probability=1.0)


def test_a_gradient_that_is_not_finite() -> None:
    model = Answers(lambda x: (x - x.detach()).flatten(1)[:, :3].abs().sqrt() * x.new_tensor([1.0, 2.0, 3.0]))
    with refused(FloatingPointError, "model must have a finite gradient, got NaN or infinity at some of the images"):
        attacks.pgd(model, IMAGES, LABELS, eps=0.1, random_start=False, steps=2)


OTHERS: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("bim", {"momentum": -0.1}, ValueError, "momentum must be at least 0, got -0.1"),
    ("di2_fgsm", {"probability": 1.1}, ValueError, "probability must be a number in [0, 1], got 1.1"),
    ("di2_fgsm", {"resize": 0}, ValueError, "resize must be a finite number > 0, got 0"),
    ("spsa", {"samples": 0}, ValueError, "samples must be an int >= 1, got 0"),
    ("spsa", {"delta": 0.0}, ValueError, "delta must be a finite number > 0, got 0.0"),
    ("spsa", {"loss": "kl"}, ValueError, "loss must be one of 'margin', 'ce', got 'kl'"),
    ("transfer", {"source": None}, TypeError, "source must be an nn.Module, got None"),
    (
        "transfer",
        {"source": network(), "attack": "pgd"},
        TypeError,
        "attack must be a function, got 'pgd'",
    ),
    ("cw_l2", {"confidence": -1}, ValueError, "confidence must be at least 0, got -1"),
    ("cw_linf", {"eps": 0}, ValueError, "eps must be a finite number > 0, got 0"),
    ("boundary", {"source_step": 0}, ValueError, "source_step must be a finite number > 0, got 0"),
    ("apgd", {"loss": "margin"}, ValueError, "loss must be one of 'ce', 'dlr', got 'margin'"),
    (
        "apgd",
        {"loss": "dlr", "targets": LABELS},
        ValueError,
        "targets must be None with loss 'dlr', which has no form for them here",
    ),
    (
        "apgd",
        {"bounds": ([0, 0, 0], 1)},
        ValueError,
        "bounds must be two numbers here; put the normalisation into the model, got some per channel",
    ),
]


@pytest.mark.parametrize(("name", "given", "kind", "message"), OTHERS, ids=[f"{c[0]} {[*c[1]]}" for c in OTHERS])
def test_bad_arguments_of_the_others(name: str, given: dict[str, Any], kind: type[Exception], message: str) -> None:
    with refused(kind, message):
        attacks.ATTACKS[name](network(), IMAGES, LABELS, **{"eps": 0.1} | given)


def test_images_of_di2_are_square() -> None:
    with refused(ValueError, "images must be as high as wide, got 4x3"):
        attacks.di2_fgsm(network(), IMAGES[..., :3], LABELS, eps=0.1)


def test_the_report_refuses_what_is_no_attack() -> None:
    with refused(TypeError, "attack must be a name or a function, got 3"):
        attacks.run(3, network(), IMAGES, LABELS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^attack must be one of 'fgsm', 'pgd', .*, got 'deepfool'$"):
        attacks.run("deepfool", network(), IMAGES, LABELS)


@pytest.mark.parametrize("name", ["cw_l2", "cw_linf", "boundary", "apgd"])
def test_without_the_extra_one_sentence_names_the_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for missing in ("art", "art.attacks", "foolbox"):
        monkeypatch.setitem(sys.modules, missing, None)
    model = Answers(lambda x: x)
    with pytest.raises(ImportError, match=r'^this attack needs [a-z-]+: pip install "fastode\[attacks\]" \(.*\)$'):
        attacks.ATTACKS[name](model, IMAGES, LABELS, eps=0.1)
    assert model.asked == 0
