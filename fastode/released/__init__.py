"""The networks of the papers' released codes, whose state_dicts load as they are.

`load_state_dict` of each takes the released code's names as well as our own; `load` makes the network that a checkpoint
is of, and `state_dict` gives a network's tensors under the released code's names. Where code and paper differ,
`follow="code"`, the default, computes what the code does. `fastode.fuse` fuses them.

- Li, He & Lin 2020: `ie_resnet18`, `ie_resnet34`, `ie_resnet50`, `resnet18`, `resnet34`, `resnet50`
- Kim et al. 2020: `sspnet`, `sspnet_mnist`
- Huang et al.: `sonet`, `soblock_resnet10`, `resnet10`, `odenet`
"""

from .blocks import JoinedClassifier, ReleasedIESkip
from .ie_resnets import ie_resnet18, ie_resnet34, ie_resnet50, resnet18, resnet34, resnet50
from .loading import load
from .network import Network, state_dict
from .sonets import odenet, resnet10, soblock_resnet10, sonet
from .sspnets import sspnet, sspnet_mnist

__all__ = [
    "JoinedClassifier",
    "Network",
    "ReleasedIESkip",
    "ie_resnet18",
    "ie_resnet34",
    "ie_resnet50",
    "load",
    "odenet",
    "resnet10",
    "resnet18",
    "resnet34",
    "resnet50",
    "soblock_resnet10",
    "sonet",
    "sspnet",
    "sspnet_mnist",
    "state_dict",
]
