"""The one form of every result: what was measured, on what, and tables whose cells know their spread.

A file ``results/NAME.json`` holds ``what`` (a sentence), ``command``, ``date``, ``machine``, ``versions``,
``settings``, ``seeds``, ``tables`` and, for pictures, ``details`` of any form. A table has a title, columns and rows; a
cell is a text, a number, None, or a `spread` of repeated measurements. A column ``label`` is shown in place of the
rows' names, which tables in documents choose rows by.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import harness

RESULTS = Path(__file__).parent / "results"
SCHEMA = 1
FIELDS = ("schema", "name", "what", "command", "date", "machine", "versions", "settings", "seeds", "tables", "details")
SPREAD = ("median", "low", "high", "n")
FEW = 10  # measurements: of fewer, `low` and `high` are the least and the most, else the 10th and 90th percentile

Cell = str | bool | int | float | None | dict[str, Any]
Cells = dict[str, Cell]


class Column(NamedTuple):
    """How the numbers of a column are shown."""

    title: str  # with the unit
    format: str = ".3g"  # as in `format`; "%" shows a share as per cent
    spread: bool = False  # show low and high beside the median


def columns(text: str) -> dict[str, Column]:
    """Columns from ``key: title``, perhaps with ``| format``, and with ``±`` to show low and high; by semicolons.

    Example:
        >>> columns("label: method; ms: step, ms | .1f ±")["ms"]
        Column(title='step, ms', format='.1f', spread=True)
    """
    found = {}
    for part in filter(None, map(str.strip, text.split(";"))):
        key, _, told = part.partition(": ")
        title, _, form = told.removesuffix("±").partition(" | ")
        found[key] = Column(title.strip(), form.strip() or ".3g", told.endswith("±"))
    return found


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, low, high and number of repeated measurements.

    Example:
        >>> spread([3.0, 1.0, 2.0])
        {'median': 2.0, 'low': 1.0, 'high': 3.0, 'n': 3}
    """
    few = len(values) < FEW
    low, high = (min(values), max(values)) if few else np.quantile(values, (0.1, 0.9)).tolist()
    return {"median": float(statistics.median(values)), "low": float(low), "high": float(high), "n": len(values)}


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, Any]:
    """Of the medians; low and high are of the ratios of each repeat."""
    of_repeats = spread([a / b for a, b in zip(numerators, denominators, strict=True)])
    return {**of_repeats, "median": statistics.median(numerators) / statistics.median(denominators)}


def table(title: str, columns: Mapping[str, Column], rows: Mapping[str, Mapping[str, Cell]]) -> dict[str, Any]:
    """A table of a result; a cell that a row lacks shows as nothing.

    Raises:
        ValueError: a row has a cell without a column.
    """
    for name, row in rows.items():
        if unknown := row.keys() - columns.keys():
            raise ValueError(f"table {title!r} has no column {', '.join(sorted(unknown))}, which row {name!r} fills.")
    return {
        "title": title,
        "columns": {key: column._asdict() for key, column in columns.items()},
        "rows": {name: dict(row) for name, row in rows.items()},
    }


def result(
    name: str,
    what: str,
    command: str,
    tables: Mapping[str, dict[str, Any]],
    *,
    settings: Mapping[str, Any] | None = None,
    seeds: Sequence[int] = (),
    details: Any = None,
) -> dict[str, Any]:
    """A whole result, of a file's name, a sentence, what to type to measure it again, and tables made by `table`.

    ``settings`` are whatever else the numbers depend on, ``seeds`` those that were varied, ``details`` what pictures
    need beside the tables. The machine is what `harness.environment` tells of.
    """
    machine = dict(harness.environment())
    date, versions = machine.pop("date"), machine.pop("versions")
    values = (SCHEMA, name, what, command, date, machine, versions, dict(settings or {}), list(seeds), dict(tables))
    return dict(zip(FIELDS, (*values, details), strict=True))


def write(found: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Write a result to ``folder``, numbers to five significant digits, and return the path. All of it or nothing."""
    check(found, found["name"])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{found['name']}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps(_rounded(found), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)
    return path


def read(path: Path) -> dict[str, Any]:
    """The result in a file.

    Raises:
        ValueError: the file is not there or not of this form; the message says where.
    """
    if not path.exists():
        there = ", ".join(sorted(other.stem for other in path.parent.glob("*.json")))
        raise ValueError(f"there is no result {path.stem!r} in {path.parent}; there are {there}.")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}. Measure it again.") from None
    check(found, str(path))
    return found


def check(found: Mapping[str, Any], where: str) -> None:
    """Raises `ValueError` unless ``found`` has the form of a result; ``where`` names it in the message."""
    if list(found) != list(FIELDS):
        raise ValueError(f"{where} has the fields {', '.join(found)}; a result has {', '.join(FIELDS)}.")
    if found["schema"] != SCHEMA:
        raise ValueError(f"{where} has schema {found['schema']}, this program reads {SCHEMA}: measure it again.")
    for key, part in found["tables"].items():
        for row, cells in part["rows"].items():
            for column, cell in cells.items():
                spread = isinstance(cell, dict) and list(cell) == [*SPREAD]
                if column not in part["columns"] or not (spread or isinstance(cell, str | int | float | None)):
                    raise ValueError(f"{where} holds {cell!r} in {key}/{row}/{column}: no cell of its table.")


def middle(cell: Any) -> Any:
    """The median of a spread; any other cell as it is."""
    return cell["median"] if isinstance(cell, Mapping) and "median" in cell else cell


def ends(cell: Any) -> tuple[float, float]:
    """Low and high; of a number that was measured once, itself."""
    return (cell["low"], cell["high"]) if isinstance(cell, Mapping) else (cell, cell)


def shown(cell: Cell, column: Mapping[str, Any]) -> str:
    """A cell as text.

    Example:
        >>> shown(spread([3.0, 1.0, 2.0]), Column("step, ms", ".1f", spread=True)._asdict())
        '2.0 (1.0 to 3.0)'
    """
    if cell is None or isinstance(cell, str):
        return cell or ""
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    form = column["format"]
    if isinstance(cell, Mapping) and column["spread"] and cell["n"] > 1:
        return f"{_number(cell['median'], form)} ({' to '.join(_number(end, form) for end in ends(cell))})"
    return _number(middle(cell), form)


def rows_of(
    part: Mapping[str, Any], columns: Sequence[str] = (), rows: Sequence[str] = (), first: str = "", spread: bool = True
) -> list[list[str]]:
    """A table as texts, headings first; only these columns and rows, in this order, where they are given.

    The first column, under the title ``first``, names the rows: by the table's column ``label`` where it has one.
    Without ``spread`` no cell shows more than its median.

    Raises:
        KeyError: a column or row is not there; the message lists those that are.
    """
    cells = part["rows"]
    titles = {key: {**column, "spread": column["spread"] and spread} for key, column in part["columns"].items()}
    for kind, asked, there in (("column", columns, titles), ("row", rows, cells)):
        for name in asked:
            if name not in there:
                raise KeyError(f"the table {part['title']!r} has no {kind} {name!r}; there are {', '.join(there)}")
    columns = columns or [key for key in titles if key != "label"]
    headings = [first or titles.get("label", {"title": ""})["title"], *(titles[key]["title"] for key in columns)]
    lines = [
        [cells[row].get("label") or row, *(shown(cells[row].get(key), titles[key]) for key in columns)]
        for row in rows or cells
    ]
    return [headings, *lines]


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells, headings first, as a Markdown table."""
    first, *rest = ["| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines]
    return "\n".join([first, "|" + "---|" * len(lines[0]), *rest])


def _number(value: float, form: str) -> str:
    if not math.isfinite(value):
        return str(value)
    text = format(value, form)
    # Not 1.2e+03, unless it is asked for: more digits before the point than the format gives are shown without one.
    return f"{value:.0f}" if "e+" in text and not form.endswith("e") else text


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value
