"""What the comparisons of training runs share: their options, and tables of rates tried, of losses, of differences."""

import argparse
import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.results import Cell, Cells, Column, spread, table
from experiments.compare_options import PER_METHOD
from experiments.compare_report import Entry, draw_curves
from experiments.comparison import Run, Runs

KEPT = Path("runs/benchmarks")  # where runs are, unless --runs says another file
LOSSES = {
    "train_loss": Column("training loss", ".3f", spread=True),
    "val_loss": Column("validation loss", ".3f", spread=True),
    "test_loss": Column("test loss", ".3f", spread=True),
    "test_accuracy": Column("test accuracy", ".1%", spread=True),
}


def add_run_options(parser: argparse.ArgumentParser, seeds: int = 3) -> None:
    """Where runs are kept, and how many there are of a method at its best rate."""
    parser.add_argument("--runs", type=Path, help=f"file of runs to go on with (default: one in {KEPT})")
    parser.add_argument("--seeds", type=int, default=seeds, help="rates are tried on the first (default: %(default)s)")


def cell(values: Sequence[float | None]) -> Cell:
    """The spread of numbers of which none is missing; else nothing."""
    known = [value for value in values if value is not None]
    return spread(known) if known and len(known) == len(values) else None


def method_cells(entry: Entry, keys: Sequence[str]) -> Cells:
    """Label, rate and final losses; of a method that diverged on a seed, that instead of the first."""
    cells: Cells = {key: cell(entry[key]) for key in keys if key in entry}
    return {"label": entry["label"], "rate": entry["rate"], **cells} | (
        {keys[0]: "diverged"} if entry["diverged"] else {}
    )


def at_best(steps: int | None, seeds: int) -> str:
    """A title."""
    told = f", {steps} steps" if steps else ""
    return f"Each method at its best rate{told}, {seeds} seed{'s' * (seeds > 1)}"


def grid_table(runs: Runs, methods: Sequence[str], title: str) -> dict[str, Any]:
    """Each method's final loss at each rate on the first seed, the best rate, and at which end of the grid it is."""
    rows: dict[str, Cells] = {}
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


def by_seed(one: Entry, other: Entry, loss: str) -> dict[int, float]:
    """Final losses of ``one`` less those of ``other``, where neither diverged."""
    ends = [dict(zip(x["seeds"], x.get(loss, []), strict=True)) for x in (one, other)]
    return {seed: ends[0][seed] - ends[1][seed] for seed in sorted(ends[0].keys() & ends[1].keys())}


def beyond_spread(differences: Sequence[float]) -> bool | None:
    """Whether the median is larger than the distance between the least and the most; None: there is only one.

    Of three draws from one normal distribution around 0 it is so in 9 % of cases.
    """
    if len(differences) < 2:
        return None
    return abs(statistics.median(differences)) > max(differences) - min(differences)


def curves(found: Mapping[str, Entry]) -> dict[str, Entry]:
    """What a picture needs of each method."""
    return {name: {key: value for key, value in one.items() if key != "to_adamw"} for name, one in found.items()}


def curves_figure(
    found: Mapping[str, Entry], loss: str, title: str, seeds: int, change: Callable[[Any], object] = lambda axes: None
) -> Figure:
    """One loss over steps, a line a method; ``change`` gets the axes."""
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    axes = figure.subplots()
    change(axes)
    draw_curves(axes, found, loss)
    axes.set(xlabel="step")
    figure.suptitle(title + (f": medians and ranges of {seeds} seeds" if seeds > 1 else ""))
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    return figure
