"""Measures, compares and tells: `benchmarks/README.md` says how."""

import argparse
import difflib
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness, page, results
from benchmarks.catalogue import CATALOGUE, benchmark_of, load, options_of, summary

ROOT = Path(__file__).resolve().parents[1]
ONCE = 0.005  # of a number that was measured once, to either side
USAGE = """\
python -m benchmarks                       what there is
python -m benchmarks step_time             measure; --help lists its options
python -m benchmarks all                   measure what has no result yet
python -m benchmarks page                  write the page of results and the documents' tables anew; --draw: pictures
python -m benchmarks compare BEFORE AFTER  two results, or two folders of them, cell by cell"""


def measure(name: str, arguments: Sequence[str]) -> None:
    """Run a benchmark, write and draw what it finds as soon as it is there, and say it all at the end."""
    options, paths = options_of(name, arguments), {}
    harness.environment()  # as it is before anything runs
    for found in load(name).measure(options):
        path = results.write(found, options.out)
        draw(results.read(path), options.out)
        paths[path] = None  # a result may come again, with more of it
    for path in paths:
        for part in results.read(path)["tables"].values():
            print(f"\n{part['title']}\n{results.as_text(results.rows_of(part))}")
        print(f"written: {path}")


def draw(found: dict[str, Any], folder: Path) -> None:
    """Write the picture of a result, if its benchmark has one for it."""
    figure = load(benchmark_of(found)).draw(found)
    if figure is not None:
        figure.savefig(folder / f"{found['name']}.png", dpi=120, metadata={"Software": None})  # no version in the file


def all_results(folder: Path) -> list[dict[str, Any]]:
    """The results in ``folder``, by the catalogue and by name."""
    order, found = list(CATALOGUE), [results.read(path) for path in sorted(folder.glob("*.json"))]
    return sorted(found, key=lambda result: order.index(benchmark_of(result)))


def measure_all(arguments: Sequence[str]) -> int | str:
    """Every benchmark that has no result yet, with its defaults, each in a process of its own; then the documents."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks all", description=measure_all.__doc__)
    parser.add_argument("--out", type=Path, default=results.RESULTS, help="folder of the results")
    out: Path = parser.parse_args(arguments).out.resolve()
    there, failed = {benchmark_of(found) for found in all_results(out)}, []
    for name in (name for name in CATALOGUE if name not in there):
        print(f"{name}: about {CATALOGUE[name].minutes} minutes on two CPU cores", flush=True)
        if subprocess.run([sys.executable, "-m", "benchmarks", name, f"--out={out}"], cwd=ROOT).returncode:
            failed.append(name)
    status = write_page([]) if out == results.RESULTS else 0
    return f"failed: {', '.join(failed)}" if failed else status


def write_page(arguments: Sequence[str], folder: Path = results.RESULTS, root: Path = ROOT) -> int | str:
    """The page of results and the tables in the documents, anew; pictures only if asked for, since their bytes differ
    between versions of matplotlib.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks page", description=write_page.__doc__)
    parser.add_argument("--draw", action="store_true", help="pictures, too")
    path = folder
    try:
        found = all_results(folder)
        for result in found if parser.parse_args(arguments).draw else []:
            draw(result, folder)
        lines = "\n".join(listing("- `{name}` ({group}, {minutes}): {summary}"))
        (folder.parent / "README.md").write_text(page.text_of(found, USAGE, lines, folder), encoding="utf-8")
        for path in page.documents(root):
            path.write_text(page.rewritten(path.read_text(encoding="utf-8"), folder), encoding="utf-8")
    except (ValueError, KeyError) as error:
        return f"{path}: {error.args[0]}"
    return 0


def listing(form: str) -> Iterator[str]:
    """A line for each benchmark."""
    for name, entry in CATALOGUE.items():
        yield form.format(name=name, **entry._asdict(), summary=summary(name))


def compare(arguments: Sequence[str]) -> int | str:
    """Two results, or the results of the same names in two folders: cells that changed, and whether they agree.

    Two cells agree if their ranges from low to high overlap; a number that was measured once counts as half a per cent
    to either side. Ends with status 1 if a repeated measurement does not agree.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks compare", description=compare.__doc__)
    for side in ("before", "after"):
        parser.add_argument(side, type=Path, help="a result, or a folder of them")
    options, status = parser.parse_args(arguments), 0
    folders = [path if path.is_dir() else path.parent for path in (options.before, options.after)]
    names = [path.stem for path in sorted(folders[0].glob("*.json")) if (folders[1] / path.name).exists()]
    try:
        for a, b in (
            [(folders[0] / f"{name}.json", folders[1] / f"{name}.json") for name in names]
            if options.before.is_dir()
            else [(options.before, options.after)]
        ):
            before, after = results.read(a), results.read(b)
            lines, agree = differences(before, after)
            print(f"{before['name']}: {before['date']} -> {after['date']}\n{results.as_text(lines)}\n")
            status |= not agree
    except ValueError as error:
        return str(error)
    return status if names or not options.before.is_dir() else f"{folders[0]} and {folders[1]} share no result."


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[list[list[str]], bool]:
    """A line a cell that both have and that changed, and whether all repeated measurements agree."""
    lines, agree = [["table/row/column", "before", "after", "ratio", "agrees"]], True
    for key, part in before["tables"].items():
        for row, column in ((row, column) for row, cells in part["rows"].items() for column in cells):
            cells = [side["tables"].get(key, {"rows": {}})["rows"].get(row, {}).get(column) for side in (before, after)]
            if cells[0] == cells[1] or None in cells:
                continue
            shown = [results.shown(cell, {**part["columns"][column], "spread": True})[:40] for cell in cells]
            a, b = map(results.middle, cells)
            if not isinstance(a, int | float) or not isinstance(b, int | float):
                lines.append([f"{key}/{row}/{column}", *shown, "", ""])
                continue
            once = [0.0 if isinstance(cell, dict) else ONCE for cell in cells]
            (low, high), (least, most) = (
                (x - abs(x) * o, y + abs(y) * o) for (x, y), o in zip(map(results.ends, cells), once, strict=True)
            )
            same = low <= most and least <= high
            agree &= same or all(once)
            lines.append([f"{key}/{row}/{column}", *shown, f"{b / a:.3g}" if a else "", "yes" if same else "NO"])
    return lines, agree


def main(arguments: Sequence[str]) -> int | str:
    """What is typed after ``python -m benchmarks``; the exit status, or why it failed."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("\n".join([USAGE, "", *listing("{name:20} {group:9}{minutes:3} min  {summary}")]))
        return 0
    verbs = {"all": measure_all, "page": write_page, "compare": compare}
    name, *rest = arguments
    if name in verbs:
        return verbs[name](rest)
    if name not in CATALOGUE:
        known = [*CATALOGUE, *verbs]
        near = difflib.get_close_matches(name, known, 1)
        meant = f" Did you mean {near[0]!r}?" if near else ""
        return f"unknown benchmark {name!r}.{meant} There are {', '.join(known)}."
    measure(name, rest)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
