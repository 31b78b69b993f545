"""What documents take from results: tables between two comments, and linked numbers. And the numbers from nowhere.

A table stands between ``<!-- table NAME/TABLE -->`` and ``<!-- end -->``, with the options ``columns=a,b rows=x,y
first="title" spread=no``; rows of several tables are joined by ``NAME/T,U columns=T:a,U:a``. A number in a sentence is
a link to its file, with the path of the cell as title: ``[74 ms](results/speed.json "obs/ours/ms")``. It keeps the
number of digits that it is written with; per cent are 100 times the cell. Any other number that looks measured is a
problem: a decimal, a number with a unit of time, memory or comparison, or one that has a cell of a table to itself.
Settings stand in code spans.
"""

import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import results

OPTIONS = ("columns", "rows", "first", "spread")
TABLE = re.compile(r"<!-- table (?P<what>.*?) -->\n(?P<body>.*?)<!-- end -->", re.DOTALL)
LINK = re.compile(r'!?\[(?P<text>[^\]]*)\]\(\s*(?P<target>[^\s)]+)(?:\s+"(?P<path>[^"]*)")?\s*\)')
NUMBER = re.compile(r"(?<![\w.])[-−+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:e[-+]?\d+)?")

FENCED = re.compile(r"^(```|~~~).*?^\1[^\n]*$", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"(?<=\n\n)(?: {4}[^\n]*\n|\n(?= {4}))+")
SPAN = re.compile(r"(?<!`)(`+)(?!`)((?!\n\n).)+?(?<!`)\1(?!`)", re.DOTALL)
CODE = (FENCED, INDENTED, SPAN)
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
HEADING = re.compile(r"^#.*$", re.MULTILINE)
CITED = re.compile(r"https?://\S+|arXiv[: ]\d{4}\.\d{4,5}|(?:[Ss]ection|[Ff]igure|[Tt]able|Eq\.|§) ?\d+(?:\.\d+)+")
UNITS = (
    r"%|per cent\b|[mµn]?s\b|seconds?\b|minutes?\b|hours?\b|[kKMGT]i?B\b|bytes?\b|[kKMGT]?(?:flops?|FLOPs?)\b"
    r"|[MGT]F\b|nats?\b|bits?\b|times\b|fold\b|x(?!\s*\d)\b|points?\b"
)
DECIMAL = r"(?:\d[\d,]*\.\d+(?!\.?\d)|\.\d+)(?:e[-+]?\d+)?"
WITH_UNIT = rf"\d[\d,]*(?=[\s-]?(?:{UNITS}))"
IN_A_CELL = r"(?<=\| )\d[\d,]*(?= \|)"
MEASURED = re.compile(rf"(?<![\w.,])[-−+±]?(?:{DECIMAL}|{WITH_UNIT}|{IN_A_CELL})(?:[\s-]?(?:{UNITS}))?")


class Change(NamedTuple):
    """What a part of a document becomes."""

    start: int
    end: int
    new: str
    problem: str  # why it is another, or cannot be made; none: it stays


def paths(root: Path) -> list[Path]:
    """The documents whose numbers come from results. The page of results is written whole."""
    return [
        *(root / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        *sorted(root.glob("docs/*.md")),
    ]


def rewrite(text: str, path: Path, folder: Path) -> str:
    """The document at ``path`` with its tables and linked numbers as the results in ``folder`` say.

    What cannot be written anew stays as it is; `problems` tells.
    """
    for pattern in RENEWALS:
        for change in reversed(list(_changes(pattern, text, path, folder))):
            text = text[: change.start] + change.new + text[change.end :]
    return text


def problems(text: str, path: Path, folder: Path) -> list[str]:
    """What a document says that the results do not, each as ``LINE: what, and what to do``."""
    found = [
        (_line(text, change.start), change.problem)
        for pattern in RENEWALS
        for change in _changes(pattern, text, path, folder)
        if change.problem
    ]
    masked = _masked(text, CODE)
    ended = {match.start() for match in TABLE.finditer(masked)}
    begun = [match.start() for match in re.finditer("<!-- table ", masked)]
    found += [(_line(text, start), "a table without <!-- end -->: add it") for start in begun if start not in ended]
    found += [
        (line, f"{token!r} looks measured: link it to its cell or, if it is a setting, make it a code span")
        for line, token in stray(text)
    ]
    return [f"{line}: {what}" for line, what in sorted(found)]


def stray(text: str) -> Iterator[tuple[int, str]]:
    """Line and text of each number that looks measured, outside code, tables from results, links and headings."""
    for match in MEASURED.finditer(_masked(text, (*CODE, TABLE, COMMENT, LINK, HEADING, CITED))):
        yield _line(text, match.start()), match[0]


def restated(text: str, value: float) -> str:
    """``text`` with its one number replaced by ``value``, to the same digits.

    Raises:
        ValueError: there is not one number.

    Example:
        >>> restated(".73 s", 0.9182), restated("-5 %", -0.0631), restated("1,024 steps", 2000)
        ('.92 s', '-6 %', '2,000 steps')
    """
    numbers = list(NUMBER.finditer(text))
    if len(numbers) != 1:
        raise ValueError(f"the link {text!r} holds {len(numbers)} numbers: link one measured number, and it alone")
    (match,) = numbers
    old, end = match[0], text[match.end() :]
    value = 100 * value if re.match(r"\s*(?:%|per cent)", end) else value
    mantissa, _, exponent = old.partition("e")
    kind = "e" if exponent else "f"
    plus, comma = "+" if old[0] == "+" else "", "," if "," in old else ""
    new = f"{value:{plus}{comma}.{len(mantissa.partition('.')[2])}{kind}}"
    if not re.search("[1-9]", new):
        new = new.removeprefix("-")
    if re.match(r"\D?\.", old):
        new = re.sub(r"^(\D?)0\.", r"\1.", new)
    return text[: match.start()] + (new.replace("-", "−", 1) if "−" in old else new) + end


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells, headings first, as a Markdown table."""
    rows = ["| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines]
    return "\n".join([rows[0], "|" + "---|" * len(lines[0]), *rows[1:]])


def _changes(pattern: re.Pattern[str], text: str, path: Path, folder: Path) -> Iterator[Change]:
    """What becomes of each table or link that a document has outside code."""
    for match in pattern.finditer(_masked(text, CODE)):
        old = {name: text[slice(*match.span(name))] for name in pattern.groupindex if match[name] is not None}
        before = text[slice(*match.span())]
        try:
            new = RENEWALS[pattern](before, old, path, folder)
        except (LookupError, ValueError) as error:
            yield Change(*match.span(), before, str(error.args[0]))
        else:
            told = f"{before} must be {new}" if pattern is LINK else f"the table {old['what']} is out of date"
            yield Change(*match.span(), new, "" if new == before else f"{told}: run `python -m benchmarks page`")


def _table(before: str, old: Mapping[str, str], path: Path, folder: Path) -> str:
    where, *options = shlex.split(old["what"])
    given = {name: text for name, _, text in (option.partition("=") for option in options)}
    if unknown := given.keys() - set(OPTIONS):
        raise ValueError(f"table {where} has the options {', '.join(sorted(unknown))}; known are {', '.join(OPTIONS)}")
    name, _, key = where.partition("/")
    part = _joined(_result(folder / f"{name}.json"), key.split(","))
    columns, rows = (given[axis].split(",") if axis in given else [] for axis in ("columns", "rows"))
    if given.get("spread", "no") != "no":
        raise ValueError(f"table {where} has spread={given['spread']}: spread=no leaves it out, and no option shows it")
    lines = results.rows_of(part, columns, rows, given.get("first", ""), "spread" not in given)
    return f"<!-- table {old['what']} -->\n\n{markdown(lines)}\n\n<!-- end -->"


def _joined(found: Mapping[str, Any], keys: Sequence[str]) -> Mapping[str, Any]:
    """The table of that name; of several, one with the columns of all as ``table:column``."""
    tables = found["tables"]
    for key in keys:
        if key not in tables:
            raise KeyError(f"{found['name']} has no table {key!r}; there is {', '.join(tables)}")
    if len(keys) == 1:
        return tables[keys[0]]
    joined: dict[str, Any] = {"title": ", ".join(tables[key]["title"] for key in keys), "columns": {}, "rows": {}}
    for key in keys:
        named = {name: name if name == "label" else f"{key}:{name}" for name in tables[key]["columns"]}
        for name, column in tables[key]["columns"].items():
            title = column["title"] if name == "label" else f"{key}: {column['title']}"
            joined["columns"][named[name]] = {**column, "title": title}
        for row, cells in tables[key]["rows"].items():
            joined["rows"].setdefault(row, {}).update({named[name]: cell for name, cell in cells.items()})
    return joined


def _link(before: str, old: Mapping[str, str], path: Path, folder: Path) -> str:
    target = (path.parent / old["target"]).resolve()
    if "path" not in old or target.suffix != ".json":
        return before
    if target.parent != folder.resolve():
        raise ValueError(f"{old['target']} is not in {folder}: link the file of the result")
    value = results.lookup(_result(target), old["path"])
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{target.stem} has {value!r} at {old['path']!r}, and no number: link another cell")
    return before.replace(f"[{old['text']}]", f"[{restated(old['text'], value)}]", 1)


def _result(path: Path) -> dict[str, Any]:
    if not path.exists():
        there = ", ".join(sorted(other.stem for other in path.parent.glob("*.json")))
        raise KeyError(f"there is no result {path.stem!r}; there are {there}")
    return results.read(path)


def _masked(text: str, patterns: Sequence[re.Pattern[str]]) -> str:
    """``text`` with spaces, which move nothing, in place of all that one of ``patterns`` matches."""
    for pattern in patterns:
        text = pattern.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
    return text


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


RENEWALS: dict[re.Pattern[str], Callable[[str, Mapping[str, str], Path, Path], str]] = {TABLE: _table, LINK: _link}
