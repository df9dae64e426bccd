"""What a forward or an adapter depends on beside modules and tensors: attributes, globals, functions, classes.

A snapshot of modules compares their variables, and so it sees neither what a list or an object among them holds, nor
what lies at their classes and in globals. `Survey` follows the code of the functions that may be called: the names in
it say which attributes and globals count. What it finds is kept as it was (`State`) and compared at each call.
"""

from __future__ import annotations

import contextlib
import dis
import enum
import functools
import operator
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..branch.snapshot import KEY
from .graph import Unreadable

_MOST = 300  # things that are followed, more than any block needs: what holds a whole network is refused
_INTERNAL = {*nn.Module().__dict__, KEY}

_PLAIN = (int, float, complex, str, bytes, type(None), type(...), type(NotImplemented), range, slice, enum.Enum)
_PLAIN_OF_TORCH = (Tensor, torch.dtype, torch.device, torch.layout, torch.memory_format)
_DESCRIPTORS = (
    types.MemberDescriptorType,
    types.GetSetDescriptorType,
    types.WrapperDescriptorType,
    types.MethodDescriptorType,
    types.ClassMethodDescriptorType,
    types.MethodWrapperType,
)
_LEAVES = (*_PLAIN, *_PLAIN_OF_TORCH, *_DESCRIPTORS)
_CONTAINERS = (list, dict, set, deque)

# Modules of Python's own that give the same whenever they are asked, and those whose objects never change.
_STEADY = {
    "__future__", "_abc", "_collections", "_functools", "_operator", "abc", "argparse", "builtins", "cmath",
    "collections", "contextlib", "copy", "dataclasses", "decimal", "enum", "fractions", "functools", "itertools",
    "logging", "math", "numbers", "operator", "pathlib", "re", "types", "typing", "warnings",
}  # fmt: skip
_VALUES = {"decimal", "fractions", "pathlib", "re", "typing"}
_BARE = {"object", "SimpleNamespace", "Namespace", "ABC", "Generic", "Protocol"}  # classes without methods to follow
_OURS = ("torch", "fastode", "numpy")  # whose functions are not followed
# What torch tells that is not computed from a tensor, and may be another thing at the next call.
_TOLD = {
    name
    for name in (*dir(torch), *dir(torch._C))
    if name.lstrip("_").startswith(("is_", "get_", "are_")) and name.endswith(("_enabled", "_mode"))
}
_TOLD |= {"get_autocast_cpu_dtype", "get_autocast_dtype", "get_autocast_gpu_dtype", "get_default_dtype", "backends"}
_TOLD |= {"get_default_device", "get_float32_matmul_precision", "get_num_threads", "get_rng_state", "initial_seed"}
# A forward may also turn the caller's autocast off.
_TOLD |= {"is_tracing", "_get_tracing_state", "requires_grad", "autocast"}
_ANYTHING = {"eval", "exec", "globals", "open", "input", "__import__", "compile"}
# With these, the names of attributes need not be written out: all that an object holds may count.
_DYNAMIC = {"getattr", "hasattr", "vars", "dir", "__dict__", "__getattribute__", "attrgetter", "methodcaller"}
# Methods that Python calls by no name that is in the code: of modules, of what is made anew, and of neither.
_CALLED = {"__call__", "__getattr__", "__getattribute__"}
_MADE = {"__init__", "__new__", "__post_init__"}
_NEVER = _MADE | {"__repr__", "__str__", "__hash__", "__eq__", "__reduce__", "__reduce_ex__", "__getstate__"}
_NEVER |= {"__setstate__", "__del__", "__init_subclass__", "__class_getitem__", "__set_name__", "__replace__"}


class State:
    """Values as they were, wherever they lie."""

    __slots__ = ("_absent", "_cells", "_functions", "_held", "_parts", "_variables")

    def __init__(self) -> None:
        self._held: list[tuple[Any, Any]] = []  # lists, dictionaries, a class's own, and what they held
        self._parts: list[tuple[Callable[[Any], Any], Any, Any]] = []  # what gets some values of something
        self._absent: list[tuple[dict[str, Any], frozenset[str]]] = []
        self._variables: list[tuple[Any, dict[str, Any]]] = []  # an object, and the dictionary that it had
        self._cells: list[tuple[types.CellType, Any]] = []
        self._functions: list[tuple[types.FunctionType, types.CodeType, Any, Any]] = []

    def holds(self) -> bool:
        """Whether everything is as it was; what is another object may be equal to the one before."""
        try:
            for now, then in self._held:
                if now != then:
                    return False
            for function, code, defaults, more in self._functions:
                if (
                    function.__code__ is not code
                    or function.__defaults__ is not defaults
                    or function.__kwdefaults__ is not more
                ):
                    return False
            for get, of, then in self._parts:
                if get(of) != then:
                    return False
            for variables, names in self._absent:
                if not names.isdisjoint(variables):
                    return False
            for cell, content in self._cells:
                if cell.cell_contents is not content and cell.cell_contents != content:
                    return False
            for each, variables in self._variables:
                if each.__dict__ is not variables:
                    return False
        except Exception:  # an array or a tensor in one was replaced and has no truth value, or a name was deleted
            return False
        return True

    def without_changes(self) -> State:
        """The same without the containers that have changed since: an adapter that counts its calls changes one."""
        self._held = [(now, then) for now, then in self._held if _equal(now, then)]
        return self


def _equal(now: Any, then: Any) -> bool:
    try:
        return bool(now == then)
    except Exception:
        return False


def state_of(block: nn.Module, adapter: Callable[..., Any] | None = None) -> State:
    """What the forward of a block, or its adapter, depends on.

    Raises:
        Unreadable: on something of which changes would not be seen, with the reason.
    """
    survey = _Survey(block, adapter)
    names = -1
    while names != len(survey.names):  # a function that is found names attributes, which may hold functions
        names = len(survey.names)
        survey.follow()
    return survey.state


class _Survey:
    def __init__(self, block: nn.Module, adapter: Callable[..., Any] | None) -> None:
        self._modules = list(block.modules())
        self._known = {id(module) for module in self._modules}
        self._adapter = adapter
        self._who = "its forward" if adapter is None else "its adapter"
        self.names: set[str] = set() if adapter is not None else {"forward"}

    def follow(self) -> None:
        self.state = State()
        self._seen: dict[int, Any] = {}
        self._classes: dict[type, set[str]] = {}
        self._globals: dict[int, tuple[dict[str, Any], set[str]]] = {}
        if self._adapter is not None:
            self._value(self._adapter, self._who)
        for module in self._modules:
            for kind in _theirs(type(module)):
                self._class(kind, _CALLED if self._adapter is None else set())
            for name, value in module.__dict__.items():
                if self._counts(name) and name not in _INTERNAL:
                    self._value(value, name)
        for variables, names in self._globals.values():
            self._keep(variables, names)
        told = sorted(self.names & _TOLD)
        if told:
            raise Unreadable(f"{self._who} asks for {told[0]}, and that may change from call to call.")

    def _counts(self, name: str) -> bool:
        return name in self.names or not self.names.isdisjoint(_DYNAMIC)

    def _keep(self, variables: dict[str, Any], names: Iterable[str]) -> None:
        kept = sorted({*names} & variables.keys())
        if kept:
            get = operator.itemgetter(*kept, kept[0])  # of two at least, which gives a tuple: identity is enough there
            self.state._parts.append((get, variables, get(variables)))

    def _value(self, value: Any, place: str) -> None:
        if isinstance(value, _LEAVES) or id(value) in self._known or id(value) in self._seen:
            return
        if len(self._seen) >= _MOST:
            raise Unreadable(f"{self._who} depends on {place}, which holds more than each call could look at.")
        self._seen[id(value)] = value
        if isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, types.BuiltinFunctionType):
            self._steady(value.__module__ or type(value.__self__).__module__, value.__name__)
            if not isinstance(value.__self__, (types.ModuleType, type)):
                self._value(value.__self__, place)
        elif isinstance(value, types.ModuleType):
            self._module(value, place)
        elif isinstance(value, type):
            made = set() if issubclass(value, nn.Module) or self._steady(value.__module__, value.__name__) else _MADE
            for kind in _theirs(value):
                self._class(kind, made)
        elif isinstance(value, nn.Module):  # that is none of the block's own
            for each in value.modules():
                self._seen[id(each)] = each
                held = (each.__dict__, each._parameters, each._buffers, each._modules)
                self.state._held += [(now, now.copy()) for now in held if now]
        elif isinstance(value, _CONTAINERS):
            self.state._held.append((value, value.copy()))
            self._each((*value, *value.values()) if isinstance(value, dict) else value, place)
            self._object(value, place)
        else:
            inside = _inside(value)
            if inside is not None:
                self._each(inside, place)
            elif not self._object(value, place):
                name = type(value).__name__
                raise Unreadable(f"{self._who} depends on {place}, of whose type ({name}) changes are not seen.")

    def _each(self, values: Iterable[Any], place: str) -> None:
        for value in values:
            self._value(value, place)

    def _module(self, module: types.ModuleType, place: str) -> None:
        if not self._steady(module.__name__, ""):
            held = vars(module)
            names = self.names & held.keys()
            self._keep(held, names)
            self._each((held[name] for name in names), place)

    def _object(self, value: Any, place: str) -> bool:
        """Follow what an object holds; False if it cannot be asked for that."""
        kind = type(value)
        steady = self._steady(kind.__module__, kind.__name__)
        if kind is object or kind.__module__ in _VALUES or (_top(kind.__module__) == "torch" and callable(value)):
            return True
        for each in _theirs(kind):
            # Python calls these by no name that is in the code.
            special = {name for name, its in vars(each).items() if name[:2] == "__" and callable(its)}
            self._class(each, special - _NEVER)
        slots = [name for each in kind.__mro__ for name in _slots(each) if self._counts(name)]
        if slots:
            get = functools.partial(_of_slots, (*slots,))
            self.state._parts.append((get, value, get(value)))
            self._each(get(value), place)
        variables = getattr(value, "__dict__", None)
        if type(variables) is not dict:
            # Without variables: of a class of theirs, or one of numpy's numbers; others have them where none can look.
            return not steady or any(each.__name__ == "generic" for each in kind.__mro__)
        self.state._variables.append((value, variables))
        # Also what is not there yet and would hide what the class has.
        at_class = {name for each in _theirs(kind) for name in self.names & vars(each).keys()}
        # Methods of classes that are not followed name what they use where none looks.
        whole = any(each.__name__ not in _BARE for each in kind.__mro__ if each not in _theirs(kind))
        counted = {name for name in variables if whole or self._counts(name)}
        if counted == variables.keys():
            self.state._held.append((variables, variables.copy()))
        else:
            self._keep(variables, counted)
            if at_class - counted:
                self.state._absent.append((variables, frozenset(at_class - counted)))
        self._each((variables[name] for name in counted), place)
        return True

    def _class(self, kind: type, more: set[str]) -> None:
        """Follow what a class has by the names that count, and by more."""
        held = vars(kind)
        if kind not in self._classes:
            self._classes[kind] = set()
            with contextlib.suppress(Exception):
                kind.__annotations__  # noqa: B018 - Python makes some when first asked, and that shall be no change
            self.state._held.append((held, dict(held)))
        named = {name for name in held if self._counts(name) and (name[:2] != "__" or name in self.names)}
        names = (named - _NEVER) | (more & held.keys())
        names -= self._classes[kind]
        self._classes[kind] |= names
        self._each((held[name] for name in sorted(names)), kind.__name__)

    def _function(self, function: types.FunctionType) -> None:
        if self._steady(function.__module__ or "", function.__name__):
            return
        code, defaults, more = function.__code__, function.__defaults__, function.__kwdefaults__
        self.state._functions.append((function, code, defaults, more))
        self._each((*(defaults or ()), *(more or {}).values()), function.__name__)
        self._code(code, function.__globals__)
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            try:
                content = cell.cell_contents
            except ValueError:  # nothing has been assigned
                continue
            self.state._cells.append((cell, content))
            self._value(content, name)

    def _code(self, code: types.CodeType, variables: dict[str, Any]) -> None:
        used = self._globals.setdefault(id(variables), (variables, set()))[1]
        for step in dis.get_instructions(code):
            if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                used.add(step.argval)
                if step.argval in _DYNAMIC:
                    self.names.add(step.argval)
                if step.argval in variables:
                    self._value(variables[step.argval], step.argval)
                elif step.argval in _ANYTHING:
                    raise Unreadable(f"{self._who} calls {step.argval}, which may do anything.")
            elif step.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
                raise Unreadable(f"{self._who} changes the global {step.argval}.")
            elif step.opname == "IMPORT_NAME":
                if step.argval not in sys.modules:
                    raise Unreadable(f"{self._who} imports {step.argval or 'something'}.")
                self._value(sys.modules[step.argval], step.argval)
            elif step.opcode in dis.hasname:
                self.names.add(step.argval)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._code(constant, variables)

    def _steady(self, module: str, name: str) -> bool:
        """Whether a function, a class or a module is one that is not followed, as it gives the same each time."""
        top = _top(module)
        if top in _OURS:
            if name in _TOLD:
                raise Unreadable(f"{self._who} asks for {name}, and that may change from call to call.")
            if module.startswith("numpy.random") or (top == "numpy" and "random" in self.names):
                raise Unreadable(f"{self._who} uses numpy.random, and that may change from call to call.")
            return True
        if top in sys.stdlib_module_names:
            if top not in _STEADY:
                raise Unreadable(f"{self._who} uses the module {top}, and that may change from call to call.")
            return True
        return False


def _top(module: str) -> str:
    return module.partition(".")[0]


def _theirs(kind: type) -> list[type]:
    """A class and its bases without Python's, torch's and ours."""
    return [each for each in kind.__mro__ if _top(each.__module__) not in (*_OURS, *sys.stdlib_module_names)]


def _slots(kind: type) -> tuple[str, ...]:
    found = vars(kind).get("__slots__", ())
    return (found,) if isinstance(found, str) else tuple(found)


def _of_slots(names: Iterable[str], value: Any) -> tuple[Any, ...]:
    return tuple(getattr(value, name, None) for name in names)


def _inside(value: Any) -> tuple[Any, ...] | None:
    """What something that never changes itself is made of; None of all else."""
    if isinstance(value, (tuple, frozenset)):
        return tuple(value)
    if isinstance(value, types.MethodType):
        return value.__func__, value.__self__
    if isinstance(value, (staticmethod, classmethod)):
        return (value.__func__,)
    if isinstance(value, property):
        return (value.fget,)
    if isinstance(value, functools.cached_property):
        return (value.func,)
    if isinstance(value, (functools.partial, functools.partialmethod)):
        return (value.func, *value.args, *value.keywords.values())
    if isinstance(value, functools._lru_cache_wrapper):
        return (value.__wrapped__,)
    return None
