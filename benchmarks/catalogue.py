"""What can be measured, and the options that many benchmarks share."""

import argparse
import ast
import importlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import results


class Entry(NamedTuple):
    """In which group a benchmark is, and how many minutes it takes on two CPU cores with its defaults."""

    group: str
    minutes: int


GROUPS = {
    "speed": {
        "step_time": 40,
        "train_step": 5,
        "capture_cost": 28,
        "scaling": 20,
        "compiled": 3,
        "compression_speed": 1,
        "orthogonal_iteration": 2,
    },
    "training": {
        "figure3": 60,
        "steps_to_target": 60,
        "curvature": 25,
        "frog_cifar": 40,
        "dykaf_regimes": 20,
        "precision": 20,
    },
    "tools": {"kronecker_error": 1, "fisher_tools": 2, "pruning": 14, "merging": 2, "layouts": 1},
}
CATALOGUE = {name: Entry(group, m) for group, names in GROUPS.items() for name, m in names.items()}


def load(name: str) -> Any:
    """The module of the benchmark called ``name`` in the catalogue."""
    return importlib.import_module(f"benchmarks.{CATALOGUE[name].group}.{name}")


def summary(name: str) -> str:
    """The first line of the benchmark's docstring, read without importing it."""
    path = Path(__file__).parent / CATALOGUE[name].group / f"{name}.py"
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def benchmark_of(found: Mapping[str, Any]) -> str:
    """The name of the benchmark that a result is of: its command says so.

    Raises:
        ValueError: the command is of no benchmark in the catalogue.
    """
    words, known = found["command"].split(), ", ".join(CATALOGUE)
    if words[:3] != ["python", "-m", "benchmarks"] or len(words) < 4 or words[3] not in CATALOGUE:
        told = f"it must begin with 'python -m benchmarks NAME', NAME one of {known}"
        raise ValueError(f"result {found['name']!r} has the command {found['command']!r}; {told}.")
    return words[3]


def parser_of(name: str) -> argparse.ArgumentParser:
    """Of one benchmark: ``--out`` and what it adds."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        f"python -m benchmarks {name}", description=load(name).__doc__, formatter_class=raw
    )
    parser.add_argument("--out", type=Path, default=results.RESULTS, help="folder of the results")
    getattr(load(name), "add_options", lambda parser: None)(parser)
    return parser


def options_of(name: str, arguments: Collection[str] = ()) -> argparse.Namespace:
    """A benchmark's options, and as ``command`` what to type for them: no defaults, and no files of this machine."""
    parser = parser_of(name)
    options = parser.parse_args([*arguments])
    words = [f"python -m benchmarks {name}"]
    for key, value in vars(options).items():
        if value != parser.get_default(key) and not isinstance(value, Path):
            text = ",".join(map(str, value)) if isinstance(value, list) else f"{value}"
            words.append(f"--{key.replace('_', '-')}" + f" {text}" * (value is not True))
    options.command = " ".join(words)
    return options


def listed(known: Collection[str] = (), of: Callable[[str], Any] = str) -> Callable[[str], list[Any]]:
    """An option's type: a list by commas, perhaps of ``known`` names alone."""

    def parse(text: str) -> list[Any]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        if known and (unknown := [name for name in names if name not in known]):
            raise argparse.ArgumentTypeError(f"got {', '.join(unknown)}; known are {', '.join(known)}")
        return [of(name) for name in names]

    return parse


def positive(text: str) -> int:
    """An option's type: a count of at least one."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text}; it must be at least 1")
    return int(text)
