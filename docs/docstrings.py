"""Docstrings as Markdown: examples become blocks of code, and sources paragraphs."""

import re
import textwrap
from collections.abc import Iterator
from typing import Any

import griffe

EXAMPLE = re.compile(r"Example(?P<what> \(.*\))?:$")
TOP = "top of this file"  # where some docstrings send their reader: on the site it stands below them
SOURCE = re.compile(r"(?P<word>Sources?): ")


def rendered(docstring: str) -> str:
    """The docstring with a fence around each example and its sections' names in bold."""
    lines = docstring.split("\n")
    return "\n".join(_sections(lines))


def _sections(lines: list[str]) -> Iterator[str]:
    while lines:
        line = lines.pop(0)
        if match := EXAMPLE.match(line):
            yield from (f"**Example**{match['what'] or ''}", "")
            yield from _fenced(textwrap.dedent("\n".join(_indented(lines))))
        elif match := SOURCE.match(line):
            yield f"**{match['word']}.** {line[match.end() :]}"
            yield from (more.strip() for more in _indented(lines))
        elif line.startswith(">>> "):
            yield from _fenced("\n".join([line, *_until_blank(lines)]))
        else:
            yield line


def _fenced(code: str) -> list[str]:
    return ["```pycon", code.strip("\n"), "```", ""]


def _indented(lines: list[str]) -> Iterator[str]:
    """The lines that are indented, taken from the front, with blank ones between them."""
    while lines and (lines[0].startswith(" ") or (not lines[0] and len(lines) > 1 and lines[1].startswith(" "))):
        yield lines.pop(0)


def _until_blank(lines: list[str]) -> Iterator[str]:
    while lines and lines[0]:
        yield lines.pop(0)


class Docstrings(griffe.Extension):
    """Applies `rendered` to every object of the package."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Once an object is known with all of its parts."""
        if obj.docstring is None:
            return
        text, module = obj.docstring.value, None if obj.is_module else obj.module.docstring
        if TOP in text and module is not None:
            text = f"{text.replace(TOP, 'end of this entry')}\n\n{module.value}"
        obj.docstring.value = rendered(text)
