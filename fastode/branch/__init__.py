"""Reading a branch: the nn.Sequential a user already has, as a list of units norm -> activation -> convolution."""

from .layers import TENSORS_PER_UNIT, Activation, Conv, Norm
from .read import Reading, Unit, channels, read

__all__ = ["TENSORS_PER_UNIT", "Activation", "Conv", "Norm", "Reading", "Unit", "channels", "read"]
