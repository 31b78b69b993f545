"""What the comparisons of training runs share: their options, and tables of rates tried and of losses."""

import argparse
import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import Cell, Column, spread, table
from experiments.compare_options import PER_METHOD, split
from experiments.compare_report import Entry
from experiments.comparison import Run, Runs
from experiments.optimizers import find_method

KEPT = Path("runs/benchmarks")  # where runs are, unless --runs says another file
LOSSES = {
    "train_loss": Column("training loss", ".3f", spread=True),
    "val_loss": Column("validation loss", ".3f", spread=True),
    "test_loss": Column("test loss", ".3f", spread=True),
    "test_accuracy": Column("test accuracy", ".1%", spread=True),
}


def add_run_options(parser: argparse.ArgumentParser, seeds: int) -> None:
    """Where runs are kept, and how many there are of a method at its best rate."""
    parser.add_argument("--runs", type=Path, help=f"file of runs to go on with (default: one in {KEPT})")
    parser.add_argument("--seeds", type=int, default=seeds, help="rates are tried on the first (default: %(default)s)")


def method_names(text: str) -> list[str]:
    """As an option's type: rows of `optimizers.METHODS`."""
    try:
        return [name for name in split(text) if find_method(name)]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def numbers(text: str) -> list[float]:
    """As an option's type."""
    return [float(number) for number in split(text)]


def command(name: str, options: argparse.Namespace, add_options: Callable[[argparse.ArgumentParser], None]) -> str:
    """What to type for these options, without those that have their defaults, and without files."""
    parser = argparse.ArgumentParser()
    add_options(parser)
    words = [f"python -m benchmarks {name}"]
    for key, default in vars(parser.parse_args([])).items():
        value = getattr(options, key)
        if key != "runs" and value != default:
            text = ",".join(f"{item}" for item in value) if isinstance(value, list) else f"{value}"
            words.append(f"--{key.replace('_', '-')} {text}")
    return " ".join(words)


def cell(values: Sequence[float | None]) -> Cell:
    """The spread of numbers of which none is missing; else nothing."""
    known = [value for value in values if value is not None]
    return spread(known) if known and len(known) == len(values) else None


def loss_cells(one: Entry, keys: Sequence[str]) -> dict[str, Cell]:
    """Of a method that diverged on a seed, that instead of its training loss."""
    cells: dict[str, Cell] = {key: cell(one[key]) for key in keys if key in one}
    return {**cells, "train_loss": "diverged"} if one["diverged"] else cells


def grid_table(runs: Runs, methods: Sequence[str], title: str) -> dict[str, Any]:
    """Each method's final loss at each rate on the first seed, the best rate, and at which end of the grid it is."""
    rows: dict[str, dict[str, Cell]] = {}
    for name in methods:
        first = runs.of(name)[0]["seed"]
        at = {run["rate"]: final_cell(runs, run) for run in runs.of(name, seed=first)}
        best, ends = runs.best(name)[0]["rate"], {max(at): "highest", min(at): "lowest"}
        rows[name] = {f"{rate:g}": at[rate] for rate in sorted(at)}
        rows[name] |= {"best": best, "end": ends.get(best) if len(at) > 1 else None}
    rates = sorted({rate for row in rows.values() for rate in row} - {"best", "end"}, key=float)
    columns = {rate: Column(rate, ".3f") for rate in rates}
    return table(title, {**columns, "best": Column("best rate"), "end": Column("at an end of the grid")}, rows)


def final_cell(runs: Runs, run: Run) -> Cell:
    """The final loss; "diverged" where it is not finite or higher than before training."""
    final = runs.final(run)
    return final if math.isfinite(final) and final <= run["rows"][0][runs.task.loss] else "diverged"


def setting_of(runs: Runs) -> dict[str, Any]:
    """What all runs have in common, without what is left to the methods."""
    setting = dataclasses.asdict(runs.task.base)
    return {name: value for name, value in setting.items() if name not in PER_METHOD and value not in (None, "")}


def beyond_spread(differences: Sequence[float]) -> bool | None:
    """Whether the median is larger than the distance between the least and the most; None: there is only one.

    Of three draws from one normal distribution around 0 it is so in 9 % of cases.
    """
    if len(differences) < 2:
        return None
    return abs(statistics.median(differences)) > max(differences) - min(differences)


def filled(columns: Mapping[str, Column], rows: Mapping[str, Mapping[str, Cell]]) -> dict[str, Column]:
    """The columns in which some row has something."""
    return {
        key: column for key, column in columns.items() if any(cells.get(key) is not None for cells in rows.values())
    }


def curves(found: Mapping[str, Entry]) -> dict[str, Entry]:
    """What a picture needs of each method."""
    return {name: {key: value for key, value in one.items() if key != "to_adamw"} for name, one in found.items()}
