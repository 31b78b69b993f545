"""A comparison of training runs: each method at the best rate of its grid, its losses, its steps and its time.

Rates are tried on the first seed; the best, by the task's final loss, runs on the others. Runs are kept in a file and
never made twice. A step's time is measured apart: all methods train in turns, whole periods between refreshes.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from matplotlib.figure import Figure

from benchmarks import harness
from benchmarks.results import Cell, Cells, Column, columns, result, spread, table
from experiments.compare_options import PER_METHOD
from experiments.compare_report import Entry, draw_curves, entries
from experiments.comparison import Runs, Task

KEPT = Path("runs/benchmarks")  # where runs are, unless --runs says another file
LOSSES = columns(
    "train_loss: training loss | .3f ±; val_loss: validation loss | .3f ±; test_loss: test loss | .3f ±;"
    "test_accuracy: test accuracy | .1% ±"
)
TIMES = columns(
    "to_adamw: of AdamW's steps to its final loss | .2f ±; step_ms: step, ms | .1f ±;"
    "time_to_adamw: of AdamW's time to its final loss | .2f"
)
Found = Mapping[str, Entry]  # by method, the lowest final loss first
Times = Mapping[str, Sequence[float]]  # milliseconds of a step, by method and round


class Comparison(NamedTuple):
    """A task, and what is told of it beside every method's losses."""

    name: str  # of the result
    what: str
    title: str  # of the picture
    task: Task
    losses: Sequence[str]  # that are columns
    columns: Mapping[str, Column] = MappingProxyType({})  # more of them,
    cells: Callable[[Runs, str, Entry, Times], Cells] = lambda runs, name, entry, times: {}  # and what they hold
    tables: Callable[[Runs, Found, Times], dict[str, Any]] = lambda runs, found, times: {}  # more of them
    labels: Mapping[str, str] = MappingProxyType({})  # that differ from the experiments'
    trainer: Callable[[Any], Callable[[Any], Any]] | None = None  # of a configuration: trains on for a period
    always_timed: tuple[str, ...] = ()
    inside: bool = False  # grids are extended until the best rate is inside


def add_run_options(parser: argparse.ArgumentParser, seeds: int | None = 3) -> None:
    """Where runs are kept, and how many there are of a method at its best rate."""
    parser.add_argument("--runs", type=Path, help=f"file of runs to go on with (default: one in {KEPT})")
    parser.add_argument("--seeds", type=int, default=seeds, help="rates are tried on the first (default: %(default)s)")


def measure(
    comparison: Comparison, path: Path, seeds: range, command: str, rounds: int = 0
) -> Iterator[dict[str, Any]]:
    """Make what runs are missing, then time steps over ``rounds``; a result after each."""
    runs = Runs(path, comparison.task)
    (runs.make_inside if comparison.inside else runs.make)(seeds)
    found = entries(runs, runs.task.rates)
    yield describe(comparison, runs, found, {}, seeds, command)
    if comparison.trainer and rounds:
        rates = {name: found[name]["rate"] if name in found else None for name in [*found, *comparison.always_timed]}
        base = comparison.task.base
        configs = {name: dataclasses.replace(base, optimizer=name, lr=rate) for name, rate in rates.items()}
        trainers = {name: comparison.trainer(config) for name, config in configs.items()}
        for train in trainers.values():
            jax.block_until_ready(train(None))
        seconds = harness.interleaved(trainers, rounds, lambda _: (), "timing, round")
        times = {name: [1e3 * s / base.refresh for s in of_method] for name, of_method in seconds.items()}
        yield describe(comparison, runs, found, times, seeds, command)


def describe(
    comparison: Comparison, runs: Runs, found: Found, times: Times, seeds: Sequence[int], command: str
) -> dict[str, Any]:
    """The result, with steps' times as far as they are known."""
    rows = {}
    for name, entry in found.items():
        entry["label"] = comparison.labels.get(name, entry["label"])
        rows[name] = method_cells(entry, comparison.losses) | time_cells(name, entry, times)
        rows[name] |= comparison.cells(runs, name, entry, times)
    shown = {**columns("label: method; rate: rate"), **{key: LOSSES[key] for key in comparison.losses}}
    shown |= {**TIMES, **comparison.columns}
    there = {key for row in rows.values() for key, cell in row.items() if cell is not None}
    rows = {name: {key: cell for key, cell in row.items() if key in there} for name, row in rows.items()}
    drawn = {name: {key: x for key, x in entry.items() if key != "to_adamw"} for name, entry in found.items()}
    for name in times.keys() & drawn.keys():
        drawn[name]["seconds"] = [1e-3 * statistics.median(times[name]) * step for step in drawn[name]["steps"]]
    title = f"Each method at its best rate, {len(seeds)} seed{'s' * (len(seeds) > 1)}"
    return result(
        comparison.name,
        comparison.what,
        command,
        {
            "methods": table(title, {key: column for key, column in shown.items() if key in there}, rows),
            **comparison.tables(runs, found, times),
            "grid": grid_table(runs, list(found)),
        },
        settings=setting_of(runs),
        seeds=seeds,
        details={"curves": drawn, "title": comparison.title, "loss": runs.task.loss},
    )


def method_cells(entry: Entry, keys: Sequence[str]) -> Cells:
    """Label, rate and final losses; of a method that diverged on a seed, that instead of the first."""
    cells: Cells = {key: cell(entry[key]) for key in keys if key in entry}
    return {"label": entry["label"], "rate": entry["rate"], **cells} | (
        {keys[0]: "diverged"} if entry["diverged"] else {}
    )


def time_cells(name: str, entry: Entry, times: Times) -> Cells:
    """The share of AdamW's steps, and of its time, and a step's time."""
    shares = entry.get("to_adamw", [])
    cells: Cells = {"to_adamw": cell(shares)}
    if name in times:
        cells["step_ms"] = spread(times[name])
    if name in times and "adamw" in times:
        over = statistics.median(times[name]) / statistics.median(times["adamw"])
        cells["time_to_adamw"] = cell([None if share is None else share * over for share in shares])
    return cells


def cell(values: Sequence[float | None]) -> Cell:
    """The spread of numbers of which none is missing; else nothing."""
    known = [value for value in values if value is not None]
    return spread(known) if known and len(known) == len(values) else None


def grid_table(runs: Runs, methods: Sequence[str], title: str = "") -> dict[str, Any]:
    """Each method's final loss at each rate on the first seed, the best rate, and at which end of the grid it is.

    It is "diverged" where it is not finite or higher than before training.
    """
    rows, loss = dict[str, Cells](), runs.task.loss
    for name in methods:
        first = runs.of(name, seed=runs.of(name)[0]["seed"])
        final = {run["rate"]: runs.final(run) for run in first}
        fell = {run["rate"] for run in first if "rows" in run and runs.final(run) <= run["rows"][0][loss]}
        best, ends = runs.best(name)[0]["rate"], {max(final): "highest", min(final): "lowest"}
        rows[name] = {f"{rate:g}": final[rate] if rate in fell else "diverged" for rate in sorted(final)}
        rows[name] |= {"best": best, "end": ends.get(best) if len(final) > 1 else None}
    rates = sorted({rate for row in rows.values() for rate in row} - {"best", "end"}, key=float)
    shown = {rate: Column(rate, ".3f") for rate in rates} | columns("best: best rate; end: at an end of the grid")
    return table(title or f"Final {loss.replace('_', ' ')} by rate, first seed", shown, rows)


def setting_of(runs: Runs) -> dict[str, Any]:
    """What all runs have in common, without what is left to the methods."""
    setting = dataclasses.asdict(runs.task.base)
    return {name: value for name, value in setting.items() if name not in PER_METHOD and value not in (None, "")}


def by_seed(one: Entry, other: Entry, loss: str) -> list[float]:
    """Final losses of ``one`` less those of ``other``, of the seeds on which neither diverged."""
    ends = [dict(zip(x["seeds"], x.get(loss, []), strict=True)) for x in (one, other)]
    return [ends[0][seed] - ends[1][seed] for seed in sorted(ends[0].keys() & ends[1].keys())]


def difference(found: Found, one: str, other: str, loss: str) -> dict[str, Any]:
    """A table of how much higher the first ends, seed by seed."""
    values = by_seed(found[one], found[other], loss)
    shown = columns("loss: difference, nats | .3f ±; lower: seeds where it is lower")
    row: Cells = {"loss": spread(values), "lower": f"{sum(δ < 0 for δ in values)} of {len(values)}"}
    return table(f"Final {LOSSES[loss].title}, the first less the second", shown, {f"{one} - {other}": row})


def draw(found: dict[str, Any]) -> Figure:
    """The loss over steps, a line a method."""
    figure, details, seeds = Figure(figsize=(10, 4.8), layout="constrained"), found["details"], len(found["seeds"])
    axes = figure.subplots()
    draw_curves(axes, details["curves"], details["loss"])
    loss = details["loss"]
    axes.set(xlabel="step", ylabel=f"{LOSSES[loss].title}, nats", yscale="log" if loss == "test_loss" else "linear")
    figure.suptitle(details["title"] + (f": medians and ranges of {seeds} seeds" if seeds > 1 else ""))
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    return figure
