"""Measures, and writes the tables of what was measured: `benchmarks/README.md` says how."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness, page, results
from benchmarks.catalogue import CATALOGUE, benchmark_of, load, options_of, summary

ROOT = Path(__file__).resolve().parents[1]
USAGE = """\
python -m benchmarks            what there is
python -m benchmarks step_time  measure; --help lists its options
python -m benchmarks page       write the page of results and the documents' tables anew; --draw: pictures"""


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
            print(f"\n{part['title']}\n\n{results.markdown(results.rows_of(part))}")
        print(f"written: {path}")


def draw(found: dict[str, Any], folder: Path) -> None:
    """Write the picture of a result, if its benchmark has one for it."""
    benchmark = load(benchmark_of(found))
    if hasattr(benchmark, "draw"):
        benchmark.draw(found).savefig(
            folder / f"{found['name']}.png", dpi=120, metadata={"Software": None}
        )  # no version in the file


def all_results(folder: Path) -> list[dict[str, Any]]:
    """The results in ``folder``, by the catalogue and by name."""
    order, found = list(CATALOGUE), [results.read(path) for path in sorted(folder.glob("*.json"))]
    return sorted(found, key=lambda result: order.index(benchmark_of(result)))


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


def main(arguments: Sequence[str]) -> int | str:
    """What is typed after ``python -m benchmarks``; the exit status, or why it failed."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("\n".join([USAGE, "", *listing("{name:20} {group:9}{minutes:3} min  {summary}")]))
        return 0
    name, *rest = arguments
    if name == "page":
        return write_page(rest)
    if name not in CATALOGUE:
        return f"unknown benchmark {name!r}. There are {', '.join(CATALOGUE)}, and page."
    measure(name, rest)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
