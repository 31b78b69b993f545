"""Measures, compares and tells: `benchmarks/README.md` says how."""

import argparse
import difflib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import compare, page, results
from benchmarks.catalogue import CATALOGUE, USAGE, benchmark_of, load, summary

ROOT = Path(__file__).resolve().parents[1]


def parser_of(name: str) -> argparse.ArgumentParser:
    """Of one benchmark."""
    benchmark = load(name)
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}",
        description=benchmark.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=results.RESULTS, help="folder of the results")
    benchmark.add_options(parser)
    return parser


def measure(name: str, arguments: Sequence[str]) -> None:
    """Run a benchmark, write and draw what it finds as soon as it is there, and say it all at the end."""
    options, paths = parser_of(name).parse_args(arguments), {}
    for found in load(name).measure(options):
        path = results.write(found, options.out)
        page.draw(results.read(path), options.out)
        paths[path] = None  # a result may come again, with more of it
    for path in paths:
        print_tables(results.read(path))
        print(f"written: {path}")


def print_tables(found: dict[str, Any]) -> None:
    for part in found["tables"].values():
        print(f"\n{part['title']}\n{results.as_text(part)}")


def measure_all(arguments: Sequence[str]) -> int | str:
    """Every benchmark with its defaults that has no result yet, each in a process of its own; then the documents.

    A result whose name ends with the platform counts only on that platform. Delete results to measure them again.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks all", description=measure_all.__doc__)
    parser.add_argument("--out", type=Path, default=results.RESULTS, help="folder of the results")
    out: Path = parser.parse_args(arguments).out.resolve()
    here, failed = platform(), []
    there = {benchmark_of(found) for found in page.all_results(out) if counts(found, here)}
    for name, entry in CATALOGUE.items():
        if name in there:
            print(f"{name}: there already", flush=True)
            continue
        print(f"{name}: about {entry.minutes} minutes on two CPU cores", flush=True)
        if subprocess.run([sys.executable, "-m", "benchmarks", name, f"--out={out}"], cwd=ROOT).returncode:
            failed.append(name)
    status = page.main([]) if out == results.RESULTS else 0
    return f"failed: {', '.join(failed)}" if failed else status


def platform() -> str:
    """JAX's, asked in another process: this one would hold the accelerator's memory while others measure."""
    program = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    return subprocess.run(program, capture_output=True, text=True, check=True).stdout.strip()


def counts(found: dict[str, Any], here: str) -> bool:
    """Whether a result need not be measured on the platform ``here``."""
    measured = found["machine"]["platform"]
    return measured == here or not found["name"].endswith(f"_{measured}")


def usage() -> str:
    """What can be typed, and what there is to measure."""
    names = (f"{name:20}{entry.minutes:4} min  {summary(name)}" for name, entry in CATALOGUE.items())
    return "\n".join([USAGE, "", *names])


def main(arguments: Sequence[str]) -> int | str:
    """What is typed after ``python -m benchmarks``; the exit status, or why it failed."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    verbs = {"all": measure_all, "page": page.main, "compare": compare.main}
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
