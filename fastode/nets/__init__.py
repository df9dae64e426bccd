"""The papers' networks, built from the reference blocks.

Every function takes `in_channels`, `num_classes`, `width` and `norm` and returns an `nn.Sequential` of named parts in
plain PyTorch; `fastode.fuse` swaps its blocks for fused ones.

- Li, He & Lin 2020: `ie_resnet18`, `ie_resnet34`, `ie_resnet50`, `wide_resnet34_10`, the networks they are compared
  with, `resnet18`, `resnet34`, `resnet50`, and the weight-sharing `sw_resnet58`
- Kim et al. 2020: `sspnet`, `sspnet_mnist`
- "Towards Natural Robustness Against Adversarial Examples": `resnet56`, `polynet`, `fractalnet`,
  `revnet`, `neural_ode_mnist`, `neural_ode_cifar`
- Huang et al.: `resnet10`, `sonet`, `soblock_resnet10`, `odenet`
"""

from .connections import fractalnet, revnet
from .ie_resnet import ie_resnet18, ie_resnet34, ie_resnet50, resnet18, resnet34, resnet50, sw_resnet58
from .neural_ode import neural_ode_cifar, neural_ode_mnist, odenet
from .ode import polynet, resnet10, resnet56, soblock_resnet10, sonet
from .sspnet import sspnet, sspnet_mnist
from .wide_resnet import wide_resnet34_10

__all__ = [
    "fractalnet",
    "ie_resnet18",
    "ie_resnet34",
    "ie_resnet50",
    "neural_ode_cifar",
    "neural_ode_mnist",
    "odenet",
    "polynet",
    "resnet10",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet56",
    "revnet",
    "soblock_resnet10",
    "sonet",
    "sspnet",
    "sspnet_mnist",
    "sw_resnet58",
    "wide_resnet34_10",
]
