"""Two results, or two folders of them, side by side.

Two cells agree if their ranges from low to high overlap; a number that was measured once counts as half a per cent to
either side, so two of them agree up to 1 %. Ends with status 1 if repeated measurements do not agree.
"""

import argparse
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import harness, results

ONCE = 0.005  # of a number that was measured once, to either side
LONGEST = 40  # characters of a text that is shown
HEAD = ("table/row/column", "before", "after", "ratio", "agrees")


class Pair(NamedTuple):
    """One cell of two results; None where one lacks it."""

    path: str
    before: Any
    after: Any
    column: Mapping[str, Any]

    @property
    def agrees(self) -> bool:
        """Whether the ranges overlap; of texts, whether they are equal."""
        a, b = range_of(self.before), range_of(self.after)
        return self.before == self.after if a is None or b is None else a[0] <= b[1] and b[0] <= a[1]

    @property
    def repeated(self) -> bool:
        return any(isinstance(cell, Mapping) and cell["n"] > 1 for cell in (self.before, self.after))

    @property
    def ratio(self) -> str:
        a, b = (value_of(cell) for cell in (self.before, self.after))
        return f"{b / a:.3g}" if a and b is not None else ""

    def line(self) -> tuple[str, ...]:
        cells = (
            textwrap.shorten(results.shown(cell, {**self.column, "spread": True}), LONGEST, placeholder=" ...")
            for cell in (self.before, self.after)
        )
        there = None not in (self.before, self.after)
        return self.path, *cells, self.ratio, ("yes" if self.agrees else "NO") if there else ""


def value_of(cell: Any) -> float | None:
    """The median of a spread, or the number itself."""
    value = cell["median"] if isinstance(cell, Mapping) else cell
    return None if isinstance(value, bool) or not isinstance(value, int | float) else float(value)


def range_of(cell: Any) -> tuple[float, float] | None:
    """From low to high."""
    value = value_of(cell)
    if value is None:
        return None
    if isinstance(cell, Mapping) and cell["n"] > 1:
        return cell["low"], cell["high"]
    return value - ONCE * abs(value), value + ONCE * abs(value)


def pairs(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Pair]:
    """Every cell that either has, in the order of ``before`` and then of ``after``."""
    for key in {**before["tables"], **after["tables"]}:
        parts = [result["tables"].get(key, {"columns": {}, "rows": {}}) for result in (before, after)]
        columns = {**parts[1]["columns"], **parts[0]["columns"]}
        for row in {**parts[0]["rows"], **parts[1]["rows"]}:
            a, b = (part["rows"].get(row, {}) for part in parts)
            for column in (name for name in {**a, **b} if (a.get(name), b.get(name)) != (None, None)):
                yield Pair(f"{key}/{row}/{column}", a.get(column), b.get(column), columns[column])


def circumstances(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """What else differs: date, machine, versions, settings."""
    told = []
    for field in ("date", "machine", "versions", "settings", "seeds"):
        a, b = (
            found[field] if isinstance(found[field], Mapping) else {field: found[field]} for found in (before, after)
        )
        told += [f"{key} {a.get(key)} -> {b.get(key)}" for key in {**a, **b} if a.get(key) != b.get(key)]
    return "; ".join(told) or "same date, machine, versions and settings"


def compare(before: Mapping[str, Any], after: Mapping[str, Any], every: bool = False) -> tuple[str, bool]:
    """The comparison as text, only of cells that changed unless ``every``, and whether repeated measurements agree."""
    found = list(pairs(before, after))
    lines = [pair.line() for pair in found if every or pair.before != pair.after]
    table = harness.aligned([HEAD, *lines]) if lines else f"{len(found)} cells, all the same"
    told = f"{before['name']}: {circumstances(before, after)}\n{table}\n"
    return told, all(pair.agrees for pair in found if pair.repeated and None not in (pair.before, pair.after))


def main(arguments: Sequence[str]) -> int | str:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path, help="a result, or a folder of them")
    parser.add_argument("after", type=Path)
    parser.add_argument("--all", action="store_true", help="cells that did not change, too")
    options = parser.parse_args(arguments)
    try:
        before, after = (files(path) for path in (options.before, options.after))
        if not options.before.is_dir() and not options.after.is_dir():
            after = dict.fromkeys(before, *after.values())  # a file may have been renamed
        agree = True
        for name in sorted(before.keys() & after.keys()):
            text, same = compare(results.read(before[name]), results.read(after[name]), options.all)
            print(text)
            agree &= same
    except (OSError, ValueError) as error:
        return str(error)
    for name in sorted(before.keys() ^ after.keys()):
        print(f"{name}: only in {options.before if name in before else options.after}")
    return int(not agree)


def files(path: Path) -> dict[str, Path]:
    """The results at ``path``, by name.

    Raises:
        ValueError: there are none.
    """
    found = {file.stem: file for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])}
    if not found or not path.exists():
        raise ValueError(f"{path} holds no results: name a file or a folder that `python -m benchmarks` wrote.")
    return found
