"""The fused blocks as functions."""

from .one_step import ie_skip, shu_osher
from .skew import skew_pair

__all__ = ["ie_skip", "shu_osher", "skew_pair"]
