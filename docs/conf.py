"""How Sphinx builds these pages: Markdown by MyST, the API from the docstrings, everything offline.

The pages can be read on any site that shows Markdown, where links lead to files of the repository. Here a page may
show such a file whole (a README beside its kernels, by MyST's include directive), and links are changed to fit: to the
page that shows the file, else to a copy of it.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))

project = "fastode"
author = "fastode authors"
project_copyright = author

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "fastode"
html_copy_source = False

myst_heading_anchors = 3

# A single backtick in a docstring means code, as in Markdown.
default_role = "code"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False

_INCLUDE = re.compile(r"^```\{include\} (\S+)\n```$", re.MULTILINE)
_LINK = re.compile(r"(?<!!)\[([^\[\]]*)\]\((?!https?:|#)([^()\s#]+)(#[^()\s]*)?\)")
_IMAGE = re.compile(r"!\[([^\[\]]*)\]\(([^()\s]+)\)")


def shown() -> dict[Path, Path]:
    """The files of the repository that a page shows whole, and the page of each."""
    found = {}
    for page in sorted(DOCS.rglob("*.md")):
        for name in _INCLUDE.findall(page.read_text()):
            found[(page.parent / name).resolve()] = page
    return found


def rewritten(text: str, origin: Path, page: Path) -> str:
    """A text with its includes in place and its links changed.

    Args:
        text: Markdown.
        origin: the file it was written in, from which its links count.
        page: the page it is shown on.
    """
    pages = shown()

    def relative(target: Path) -> str:
        return Path(os.path.relpath(target, page.parent)).as_posix()

    def link(match: re.Match[str]) -> str:
        words, address, anchor = match[1], match[2], match[3] or ""
        target = (origin.parent / address).resolve()
        if target.is_dir():
            return words
        target = pages.get(target, target)
        if target.is_relative_to(DOCS):
            return f"[{words}]({relative(target)}{anchor})"
        return f"[{words}](path:{relative(target)})"

    def image(match: re.Match[str]) -> str:
        return f"![{match[1]}]({relative((origin.parent / match[2]).resolve())})"

    def include(match: re.Match[str]) -> str:
        source = (origin.parent / match[1]).resolve()
        return rewritten(source.read_text(), source, page).strip()

    return _INCLUDE.sub(include, _IMAGE.sub(image, _LINK.sub(link, text)))


def _on_page(app: Any, name: str, source: list[str]) -> None:
    page = DOCS / f"{name}.md"
    for path in (path for path, where in shown().items() if where == page):
        app.env.note_dependency(str(path))
    source[0] = rewritten(source[0], page, page)


def plain(lines: list[str]) -> list[str]:
    """A docstring in a form that napoleon reads as it is meant.

    The paragraph "Source: ..." comes on one line, as its continuation lines are indented; and what is returned comes as
    a field, in which a colon does not end the name of a type.
    """
    found: list[str] = []
    paragraph = False  # whether the line belongs to one that is being joined
    for line in lines:
        if line.startswith("Source: "):
            paragraph = True
            found.append(line)
        elif line == "Returns:":
            paragraph = True
            found.append(":returns:")
        elif paragraph and line.startswith(" "):
            found[-1] += f" {line.strip()}"
        else:
            paragraph = False
            found.append(line)
    return found


def _on_docstring(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    lines[:] = plain(lines)


def _leave_fields_to_the_class(app: Any, what: str, name: str, member: Any, skip: bool, options: Any) -> bool | None:
    """A named tuple's fields say nothing but their numbers, and its docstring says the rest."""
    return True if type(member).__name__ == "_tuplegetter" else None


def setup(app: Any) -> None:
    """Connect what is left out and what is changed: a page's source, and a docstring before napoleon reads it."""
    app.connect("autodoc-skip-member", _leave_fields_to_the_class)
    app.connect("source-read", _on_page)
    app.connect("autodoc-process-docstring", _on_docstring, priority=100)
