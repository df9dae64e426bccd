"""Triton's interpreter made fit to judge kernels by; for processes started with TRITON_INTERPRET=1.

Two of its faults (Triton 3.6): NumPy 2.4 refuses int() of the arrays of one entry that it keeps a loop's bounds in, and
it cuts float32 to bfloat16 off, which every device rounds to nearest even. Four habits that took three quarters of its
time: it patches the language again for every call of a device function, tabulates NumPy's dtypes for every operation,
makes the shape of every value and of every type anew, and repeats operations on integers in 64 bits, for an overflow
that maps as small as the tests' cannot have.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import triton.language as tl
import triton.language.core as core
import triton.runtime.interpreter as interpreter

from fastode.native import cuda, operators

SOURCE = Path(__file__).parent.parent / "csrc" / "ops.cpp"
_patch_tensor = interpreter._patch_lang_tensor
_cast = interpreter.InterpreterBuilder.cast_impl
_call = interpreter.InterpretedFunction.__call__
_np_dtype = interpreter._get_np_dtype
_type_of_values = core._type_for_tuple_values
_init_block_type = core.block_type.__init__
_np_dtypes: dict[str, np.dtype[Any]] = {}
_shapes: dict[tuple[int, ...], tuple[Any, Any]] = {}
_block_types: dict[tuple[Any, ...], dict[str, Any]] = {}
_patched: set[str] = set()


def _patch_lang_tensor(tensor: Any, scope: Any) -> None:
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def _cast_impl(self: Any, source: Any, to: Any) -> Any:
    if source.dtype.scalar != tl.float32 or to.scalar != tl.bfloat16:
        return _cast(self, source, to)
    bits = np.ascontiguousarray(source.data).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet = (bits >> 16) | 0x40
    data = np.where(np.isnan(source.data), quiet, rounded).astype(np.uint16)
    return interpreter.TensorHandle(data, to.scalar)


def _call_device_function(self: Any, *arguments: Any, **keywords: Any) -> Any:
    """What a kernel's launch patches it restores; what a module's device functions need besides stays patched."""
    module = self.fn.__module__
    if module not in _patched:
        _patched.add(module)
        return _call(self, *arguments, **keywords)
    return self.rewrite()(*arguments, **keywords)


def _get_np_dtype(kind: Any) -> Any:
    scalar = kind.scalar
    if scalar.name not in _np_dtypes:
        _np_dtypes[scalar.name] = _np_dtype(scalar)
    return _np_dtypes[scalar.name]


class _TupleType(core.tuple_type):  # type: ignore[misc]
    """The type of some values, found out when it is asked for."""

    def __init__(self, values: Any, fields: Any = None) -> None:
        self.of = list(values), fields

    def __getattr__(self, name: str) -> Any:
        if name == "of":
            raise AttributeError(name)
        vars(self).update(vars(_type_of_values(*self.of)))
        return vars(self)[name]


def _init_tensor(self: Any, handle: Any, kind: Any) -> None:
    """The attributes of a value; values of one shape share it, and their number of entries."""
    self.handle, self.type, self.dtype = handle, kind, kind.scalar
    sizes = tuple(kind.shape.values) if kind.is_block() else ()
    if sizes not in _shapes:
        _shapes[sizes] = core.tuple([core.constexpr(size) for size in sizes]), core.constexpr(math.prod(sizes))
    self.shape, self.numel = _shapes[sizes]


def _init_block_type_once(self: Any, element: Any, shape: Any) -> None:
    """The attributes of a type, which equal ones share; pointers' are made anew."""
    if type(element) is not core.dtype:
        return _init_block_type(self, element, shape)
    sizes = shape.values if isinstance(shape, core.tuple) else shape
    key = (element.name, *[getattr(size, "value", size) for size in sizes])
    if key not in _block_types:
        _init_block_type(self, element, shape)
        _block_types[key] = dict(vars(self))
    vars(self).update(_block_types[key])
    return None


def use_operators() -> None:
    """Make Triton's operators those of CPU tensors, defined as on a machine that cannot build the C++ library."""
    if operators._state.path != SOURCE:
        cuda.define(SOURCE)
        cuda.implement("CPU")
        operators._state.path = SOURCE  # what says that the operators are there


interpreter._patch_lang_tensor = _patch_lang_tensor
interpreter.InterpreterBuilder.cast_impl = _cast_impl
interpreter.InterpretedFunction.__call__ = _call_device_function
interpreter._get_np_dtype = _get_np_dtype
core._type_for_tuple_values = _TupleType
core.tensor.__init__ = _init_tensor
core.block_type.__init__ = _init_block_type_once
_builder = interpreter.interpreter_builder
_builder.options = replace(_builder.options, sanitize_overflow=False)
