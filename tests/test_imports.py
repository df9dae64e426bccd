"""No circle of imports between the modules of a package, imports inside functions and for type checking included."""

from __future__ import annotations

import ast
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("benchmarks", "fastode")

Graph = dict[str, set[str]]


def modules_of(package: Path) -> dict[str, Path]:
    """Every module below a package's folder, by its full name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(name: str, path: Path, known: Iterable[str]) -> set[str]:
    """The modules of `known` that a module imports anywhere in its source.

    `from a.b import c` is an import of a.b.c where that is a module, else of a.b. Importing a.b.c also runs
    a/__init__.py and a/b/__init__.py; that is not counted, or no __init__.py could import from its own package.
    """
    known = set(known)
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *(node.module.split(".") if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in known else base)
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
            argument = node.args[0] if node.args else None
            # A name that is made while running would hide a circle from this test.
            assert isinstance(argument, ast.Constant), f"{path}:{node.lineno} imports a module by a computed name"
            found.add(str(argument.value))
    return (found & known) - {name}


def _called(call: ast.Call) -> str:
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def graph_of(package: Path) -> Graph:
    """Of each module, those it imports."""
    modules = modules_of(package)
    return {name: imports_of(name, path, modules) for name, path in modules.items()}


def way(graph: Mapping[str, set[str]], start: str, end: str) -> list[str]:
    """The shortest way of at least one import from one module to another; empty if there is none."""
    before: dict[str, str] = {}
    queue = deque([start])
    while queue:
        here = queue.popleft()
        for there in sorted(graph[here]):
            if there == end:
                found = [end, here]
                while found[-1] != start:
                    found.append(before[found[-1]])
                return found[::-1]
            if there not in before and there != start:
                before[there] = here
                queue.append(there)
    return []


def circles(graph: Mapping[str, set[str]]) -> list[str]:
    """A shortest circle through each module that lies on one, each named once: "a → b → a"."""
    found: dict[frozenset[str], str] = {}
    for name in sorted(graph):
        circle = way(graph, name, name)
        if circle:
            found.setdefault(frozenset(circle), " → ".join(circle))
    return list(found.values())


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_imports_itself_in_the_end(package: str) -> None:
    graph = graph_of(ROOT / package)
    assert len(graph) > 10 and any(graph.values()), "the sources were not found"
    assert not circles(graph), "imports go in a circle: " + "; ".join(circles(graph))


def made(folder: Path, **sources: str) -> Graph:
    """The graph of a package "p" with these sources; "inner__x" stands for p/inner/x.py."""
    for name, text in sources.items():
        path = folder / "p" / f"{name.replace('__', '/') if name != '__init__' else name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return graph_of(folder / "p")


@pytest.mark.parametrize(
    "way_back",
    [
        "import p.a",
        "from p import a",
        "from . import a",
        "from .a import f",
        "def g():\n    from .a import f",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .a import f",
        "import importlib\ndef g():\n    return importlib.import_module('p.a')",
    ],
)
def test_every_kind_of_import_is_seen(tmp_path: Path, way_back: str) -> None:
    graph = made(
        tmp_path, __init__="from . import a", a="from .b import g\ndef f(): ...", b=way_back, c="from . import b"
    )
    assert circles(graph) == ["p.a → p.b → p.a"]


def test_relative_imports_are_resolved_from_the_module_they_stand_in(tmp_path: Path) -> None:
    (tmp_path / "p" / "inner").mkdir(parents=True)
    (tmp_path / "p" / "inner" / "__init__.py").write_text("from .x import X")
    inner = {"inner__x": "from ..a import A\nfrom .y import Y", "inner__y": ""}
    graph = made(tmp_path, __init__="", a="from .inner import X", **inner)
    assert graph["p.inner"] == {"p.inner.x"} and graph["p.inner.x"] == {"p.a", "p.inner.y"}
    assert circles(graph) == ["p.a → p.inner → p.inner.x → p.a"]


def test_what_has_no_circle_has_none(tmp_path: Path) -> None:
    graph = made(tmp_path, __init__="from .c import h", a="import os", b="from . import a", c="from . import a, b")
    assert graph["p.c"] == {"p.a", "p.b"} and not circles(graph)


def test_a_computed_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="computed name"):
        made(tmp_path, __init__="", a="from importlib import import_module\nimport_module('p.' + 'b')")
