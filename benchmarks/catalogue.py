"""What can be measured, and the interface that every benchmark has."""

import argparse
import ast
import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

if TYPE_CHECKING:
    from matplotlib.figure import Figure


USAGE = """\
python -m benchmarks                       what there is
python -m benchmarks step_time             measure; --help lists its options
python -m benchmarks all                   measure everything but the results that are there already
python -m benchmarks page                  write the page of results and the documents' tables and numbers anew
python -m benchmarks compare BEFORE AFTER  two results, or two folders of them, side by side"""


class Benchmark(Protocol):
    """A module of this folder. The first line of its docstring says what it measures."""

    __doc__: str | None

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Options of its own; the defaults are those of the committed results."""
        ...

    def measure(self, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
        """Results, each made by `results.result` and given as soon as it is there, with more of it later if need be.

        ``options.out`` is the folder that earlier results are in. Progress goes to the terminal.
        """
        ...

    def draw(self, found: dict[str, Any]) -> "Figure | None":
        """The picture of one of its results, from the result alone."""
        ...


class Entry(NamedTuple):
    """Where a benchmark is, and how long it takes on two CPU cores with its defaults."""

    module: str
    minutes: int


CATALOGUE = {
    "layouts": Entry("layouts", 1),
    "scaling": Entry("scaling", 20),
    "step_time": Entry("step_time", 40),
    "train_step": Entry("train_step", 5),
    "capture_cost": Entry("capture_cost", 28),
    "figure3": Entry("figure3", 60),
    "steps_to_target": Entry("steps_to_target", 60),
    "curvature": Entry("curvature", 25),
    "frog_cifar": Entry("frog_cifar", 40),
    "dykaf_regimes": Entry("dykaf_regimes", 20),
    "kronecker_error": Entry("kronecker_error", 1),
    "orthogonal_iteration": Entry("orthogonal_iteration", 2),
    "fisher_tools": Entry("fisher_tools", 2),
    "pruning": Entry("pruning", 14),
    "merging": Entry("merging", 2),
    "precision": Entry("precision", 20),
    "compiled": Entry("compiled", 3),
    "compression_speed": Entry("compression_speed", 1),
}


def load(name: str) -> Benchmark:
    """The benchmark called ``name`` in the catalogue."""
    return cast(Benchmark, importlib.import_module(f"benchmarks.{CATALOGUE[name].module}"))


def summary(name: str) -> str:
    """The first line of the benchmark's docstring, read without importing it."""
    path = Path(__file__).with_name(f"{CATALOGUE[name].module}.py")
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return doc.partition("\n")[0]


def benchmark_of(found: Mapping[str, Any]) -> str:
    """The name of the benchmark that a result is of: its command says so.

    Raises:
        ValueError: the command is of no benchmark in the catalogue.
    """
    words = found["command"].split()
    if words[:3] != ["python", "-m", "benchmarks"] or len(words) < 4 or words[3] not in CATALOGUE:
        known = ", ".join(CATALOGUE)
        raise ValueError(
            f"result {found['name']!r} has the command {found['command']!r}; it must begin with "
            f"'python -m benchmarks NAME', NAME one of {known}."
        )
    return words[3]
