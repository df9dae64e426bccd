"""Launches of kernels that were compiled before, without what Triton's own launch does anew each time.

`kernel[grid](...)` binds the arguments, writes constants and options into one long string, looks the compiled kernel up
under it, compares the globals of the kernel's source with what they were, and calls its launch hooks. A block is some
forty launches, so that this was most of its time. Here a call is looked up under a tuple, and the compiled kernel that
`kernel[grid](...)` returned is launched with the same arguments.

The tuple has all that Triton specialises a kernel on: of tensors the dtype and whether they begin at 16 bytes, of
integers the number itself, of other arguments their kind, of constants and options each. Settings of Triton that are
changed after a kernel's first launch (debug, say) reach those of its calls that were not made before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

# Calls with ever new sizes must not fill the memory.
MOST = 4096
# Kinds of arguments on whose value Triton does not specialise a kernel.
_PLAIN = {float, bool, type(None)}
# By a call's key: the compiled kernel, its launcher, and the constants behind the arguments, in the kernel's order.
_found: dict[tuple[Any, ...], tuple[CompiledKernel, Any, tuple[Any, ...]]] = {}


def run(kernel: Any, programs: int, arguments: tuple[Any, ...], constants: dict[str, Any], warps: int) -> None:
    """Launch a kernel on its first tensor's device, and that device's current stream.

    Args:
        kernel: as `triton.jit` made it.
        programs: how many.
        arguments: tensors, numbers, None, and tuples of these, by position; the first is a tensor or has some.
        constants: its constants by name, and options of Triton.
        warps: of a program.
    """
    if kernel.__class__ is not JITFunction:  # Triton's interpreter has nothing compiled
        kernel[(programs,)](*arguments, **constants, num_warps=warps)
        return
    active = driver.active
    device, home = active.get_current_device(), _home(arguments[0])
    if home != device and home >= 0:  # Triton launches on the current device
        with torch.cuda.device(home):
            run(kernel, programs, arguments, constants, warps)
        return
    if kernel.pre_run_hooks or _hooked():  # a profiler's, which may change how kernels are compiled
        kernel[(programs,)](*arguments, **constants, num_warps=warps)
        return
    key: list[Any] = [id(kernel), device, warps, tuple(constants), *constants.values()]
    given: list[Any] = []
    known = _describe(arguments, key, given)
    name = tuple(key)
    found = _found.get(name) if known else None
    if found is not None:
        compiled, launcher, rest = found
        stream = active.get_current_stream(device)
        launcher(programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *given, *rest)
        return
    compiled = kernel[(programs,)](*arguments, **constants, num_warps=warps)
    behind = kernel.arg_names[len(arguments) :]
    if known and isinstance(compiled, CompiledKernel) and constants.keys() >= set(behind):
        if len(_found) >= MOST:
            _found.clear()
        _found[name] = compiled, compiled.run, tuple([constants[each] for each in behind])


def _home(first: Tensor | tuple[Tensor, ...]) -> int:
    """The index of a tensor's device, or of several tensors' one device; -1 on the host."""
    index: int = (first[0] if isinstance(first, tuple) else first).get_device()
    return index


def _hooked() -> bool:
    """Whether someone wants to be told of launches."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _describe(arguments: tuple[Any, ...], key: list[Any], given: list[Any]) -> bool:
    """Add to `key` what Triton specialises a kernel on, and to `given` the arguments as a launcher takes them.

    Returns:
        Whether all arguments are of kinds that are known here.
    """
    known = True
    for each in arguments:
        kind = each.__class__
        if kind is Tensor or kind is Parameter:
            pointer = each.data_ptr()
            key.append(each.dtype)
            key.append(pointer % 16 == 0)
            given.append(pointer)  # of a tensor the launcher would ask the driver whether it is on a card
        elif kind is int:
            key.append(each)
            given.append(each)
        elif kind is tuple:
            inside: list[Any] = []
            key.append(tuple)
            key.append(len(each))
            known = _describe(each, key, inside) and known
            given.append(tuple(inside))
        else:
            key.append(kind)
            given.append(each)
            known = known and kind in _PLAIN
    return known
