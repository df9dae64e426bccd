"""No engine's name outside its own folder and the table of engines, so that a new engine is a folder and a line.

What is read are the syntax trees of fastode/: comments, docstrings and the examples in them do not count. Refused are

* a string without spaces in which an engine's name is a word: "staged", "ops.resident";
* an identifier in which it is: `_RESIDENT`, `is_staged`, `ResidentX`, and so every import of an engine's module. Under
  fastode/ops an engine's folder counts like its name (`Plan.fused`); elsewhere `fused` says that a block is a twin;
* a comparison with an attribute `name`, and an attribute of one, as `engine.name.startswith`.

Allowed is all of it in the table, an engine's own name in its folder, an import there of what another engine is built
on, and an operator's name (csrc/ops.cpp). `reference` is refused as a string of its own only: as an identifier it is
the package fastode.reference, or a block of it, and so it is in __all__.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastode
from fastode.dispatch.engines import ENGINES, REFERENCE
from fastode.native import cuda

PACKAGE = Path(fastode.__file__).parent
TABLE = "dispatch/engines.py"
FOLDERS = {engine.name: type(engine).__module__.split(".")[-2] for engine in ENGINES if engine is not REFERENCE}
OPERATORS = {schema.partition("(")[0] for schema in cuda.schemas(PACKAGE.parent / "csrc" / "ops.cpp")}

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@functools.cache
def _words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]


@functools.cache
def _contains(text: str, name: str) -> bool:
    """Whether the words of a name stand in a text, one after the other."""
    words, wanted = _words(text), _words(name)
    return any(words[at : at + len(wanted)] == wanted for at in range(len(words)))


def _identifiers(node: ast.AST) -> Iterator[str]:
    """The names that a node of the tree introduces or uses."""
    for field in ("id", "attr", "arg", "name", "asname", "module", "rest"):
        value = getattr(node, field, None)
        if isinstance(value, str):
            yield value
    if isinstance(node, (ast.Global, ast.Nonlocal)):
        yield from node.names
    if isinstance(node, ast.MatchClass):
        yield from node.kwd_attrs


def _docstrings(tree: ast.Module) -> set[ast.AST]:
    first = [node.body[0] for node in ast.walk(tree) if isinstance(node, _DOCUMENTED) and node.body]
    return {statement.value for statement in first if isinstance(statement, ast.Expr)}


def _listed_as_public(tree: ast.Module) -> set[ast.AST]:
    """The entries of __all__: identifiers, although they are written as strings."""
    lists = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "__all__" for target in node.targets)
    ]
    return {entry for listed in lists for entry in ast.walk(listed)}


def _is_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "name"


def violations(source: str, place: str) -> list[str]:
    """What is refused in a file of the package, a line each.

    Args:
        source: its text.
        place: its path in the package.
    """
    if place == TABLE:
        return []
    tree = ast.parse(source)
    documented = _docstrings(tree)
    homes = {name for name, folder in FOLDERS.items() if place.startswith(f"ops/{folder}/")}
    foreign = [name for name in FOLDERS if name not in homes]
    words = foreign + [FOLDERS[name] for name in foreign if place.startswith("ops/")]
    public = _listed_as_public(tree)
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    imported = {part for node in imports for part in node.names}
    found = []
    for node in ast.walk(tree):
        line = f"{place}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in documented:
            text = node.value.strip()
            names_one = text not in OPERATORS and " " not in text and any(_contains(text, name) for name in foreign)
            if names_one or (text == REFERENCE.name and node not in public):
                found.append(f"{line}: the string {text!r}")
        if isinstance(node, ast.Compare) and any(map(_is_name, (node.left, *node.comparators))):
            found.append(f"{line}: a comparison with a name")
        if isinstance(node, ast.Attribute) and _is_name(node.value):
            found.append(f"{line}: an attribute of a name, {node.attr}")
        if homes and (node in imported or isinstance(node, ast.ImportFrom)):
            continue
        for identifier in _identifiers(node):
            if identifier not in OPERATORS and any(_contains(identifier, word) for word in words):
                found.append(f"{line}: the identifier {identifier}")
    return found


def test_no_engines_name_outside_its_folder_and_the_table():
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 80
    found = []
    for file in files:
        found += violations(file.read_text(), file.relative_to(PACKAGE).as_posix())
    assert not found, "\n".join(found)


def test_every_engine_but_the_reference_has_a_folder():
    assert set(FOLDERS) == {"resident", "fused_convolution", "staged"}
    assert all((PACKAGE / "ops" / folder).is_dir() for folder in FOLDERS.values())


PLANTED = [
    ('kind = "resident"', "nn/base.py"),
    ('kind = "staged"', "ops/resident/engine.py"),
    ('kind = f"staged {x}"', "dispatch/choice.py"),
    ('table = {"fused_convolution": 1}', "fusion/swap.py"),
    ('path = "ops/resident/rules"', "native/toolchain.py"),
    ('if kind == "reference": pass', "dispatch/trial.py"),
    ('__all__ = ["staged"]', "__init__.py"),
    ('match kind:\n    case "staged": pass', "dispatch/trial.py"),
    ("_RESIDENT = 1", "dispatch/skew.py"),
    ("class ResidentPair: pass", "ops/schemes/skew_pair/pair.py"),
    ("def is_staged(): pass", "dispatch/choice.py"),
    ("def run(staged): pass", "dispatch/choice.py"),
    ("run(use_fused_convolution=True)", "nn/skew.py"),
    ("engine = FusedConvolution()", "functional/skew.py"),
    ("from .ops.resident import rule", "__main__.py"),
    ("from .ops import staged", "__main__.py"),
    ("from .ops.plan import Plan as resident", "__main__.py"),
    ("import fastode.ops.staged.sweeps", "nn/skew.py"),
    ("plan.fused", "ops/schemes/implicit_euler/descent.py"),
    ("class Plan:\n    fused: bool", "ops/plan.py"),
    ("plan.fused", "ops/staged/sweeps.py"),
    ("if engine.name == wanted: pass", "dispatch/choice.py"),
    ("if engine.name in wanted: pass", "ops/staged/engine.py"),
    ('engine.name.startswith("res")', "dispatch/choice.py"),
    ('kind = "resident_unknown_operator"', "native/fake.py"),
    ("torch.ops.fastode.resident_unknown_operator()", "native/fake.py"),
]

INNOCENT = [
    ('"""The resident engine."""', "nn/base.py"),
    ('def run():\n    """\n    >>> run("staged")\n    """', "nn/base.py"),
    ("kind = 1  # resident", "nn/base.py"),
    ('name = "resident"', "ops/resident/engine.py"),
    ("class ResidentX: pass", "ops/resident/functions.py"),
    ("from ..staged.sweeps import dual", "ops/fused/sweeps.py"),
    ('name = "reference"', TABLE),
    ('fake = {"resident_ie_forward": 1}', "native/fake.py"),
    ("torch.ops.fastode.resident_ie_forward()", "nn/base.py"),
    ("from .. import reference", "nn/skew.py"),
    ('__all__ = ["reference"]', "__init__.py"),
    ("make_reference()", "dispatch/choice.py"),
    ('reason = "runs as the reference again"', "fusion/swap.py"),
    ("row.fused", "fusion/report.py"),
    ("used[block] = engine.name", "dispatch/choice.py"),
    ("unstaged = residents = 1", "nn/base.py"),
]


@pytest.mark.parametrize(("source", "place"), PLANTED)
def test_a_planted_name_is_found(source, place):
    assert violations(source, place)


@pytest.mark.parametrize(("source", "place"), INNOCENT)
def test_what_is_no_engines_name_passes(source, place):
    assert violations(source, place) == []
