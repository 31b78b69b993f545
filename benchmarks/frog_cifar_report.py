"""The tables and the picture of `frog_cifar`."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from benchmarks import run_tables
from benchmarks.results import Cell, Column, result, spread, table
from experiments.compare_options import LABELS as KNOWN
from experiments.compare_report import Entry, appearance, entries, middle
from experiments.comparison import Runs, first_below

NOTE = {
    "frog": {88: 1.29, 90: 1.86, 92: 5.37, 94: 11.88},
    "sgd": {88: 3.82, 90: 5.01, 92: 9.63, 94: 11.44},
}  # minutes to per cent, on an A100
PLAIN = "sgd_large"  # SGD with the others' batch: what a step costs without their curvature
LABELS = {"sgd": "SGD", PLAIN: "SGD, large batch", "kfac": "K-FAC"}  # K-FAC's inverse, where the GPT's has its root
COLUMNS = {
    "label": Column("method"),
    "rate": Column("rate"),
    "batch": Column("batch", "d"),
    "test_accuracy": run_tables.LOSSES["test_accuracy"],
    "test_loss": run_tables.LOSSES["test_loss"],
    "step_ms": Column("step, ms", ".0f", spread=True),
    "over_plain": Column("step / SGD's of that batch", ".2f"),
    "epoch_s": Column("epoch, s", ".1f"),
    "over_sgd": Column("epoch / SGD's", ".2f"),
    "gflop": Column("products of a step, GF", ".1f"),
    "flops_over_plain": Column("GF / SGD's of that batch", ".2f"),
}

BySeed = list[float | None]
ByTarget = Mapping[float, BySeed]


class Shown(NamedTuple):
    """What a result says beside what the runs hold."""

    name: str
    command: str
    targets: Sequence[float]  # per cent
    seeds: Sequence[int]
    environment: Mapping[str, Any]
    noted: bool  # the setting is the note's


class Steps(NamedTuple):
    """What was measured apart from the runs, by method, `PLAIN` among them; nothing yet by default."""

    ms: Mapping[str, Sequence[float]] = {}  # by round
    flops: Mapping[str, float] = {}

    def minutes(self, runs: Runs) -> dict[str, float]:
        """An epoch takes."""
        images, base = len(runs.task.data.train.labels), runs.task.base
        known = [name for name in runs.task.rates if name in self.ms]
        return {name: statistics.median(self.ms[name]) / 60e3 * (images // base.of(name).batch) for name in known}


def describe(runs: Runs, shown: Shown, steps: Steps) -> dict[str, Any]:
    """The result, as far as ``steps`` are known."""
    found, data, minutes = entries(runs, runs.task.rates), runs.task.data, steps.minutes(runs)
    for name, one in found.items():
        one["label"] = LABELS.get(name, one["label"])
    rows = {name: row(runs, name, one, steps, minutes) for name, one in found.items()}
    title = f"Each method at its best rate, {len(shown.seeds)} seed{'s' * (len(shown.seeds) > 1)}"
    tables = {
        "methods": table(title, run_tables.filled(COLUMNS, rows), rows),
        **to_targets(runs, found, shown, minutes),
        "grid": run_tables.grid_table(runs, list(found), "Final share of test images missed by rate, first seed"),
    }
    sizes = {"train_images": len(data.train.labels), "test_images": len(data.test.labels)}
    curves = run_tables.curves(found)
    for name in found:
        curves[name] |= {"epochs": epochs_of(runs, name), "epoch_minutes": minutes.get(name)}
    return result(
        shown.name,
        "FROG beside K-FROG, K-FAC, Muon and SGD on CIFAR-10 with ResNet-18: epochs and time to test accuracies.",
        shown.command,
        tables,
        environment=shown.environment,
        settings={**run_tables.setting_of(runs), **sizes, "targets": list(shown.targets)},
        seeds=shown.seeds,
        details={"curves": curves, "targets": list(shown.targets)},
    )


def row(runs: Runs, name: str, one: Entry, steps: Steps, minutes: Mapping[str, float]) -> dict[str, Cell]:
    batch = runs.task.base.of(name).batch
    cells: dict[str, Cell] = {"label": one["label"], "rate": one["rate"], "batch": batch}
    cells |= {key: run_tables.cell(one[key]) for key in ("test_accuracy", "test_loss") if key in one}
    if one["diverged"]:
        cells["test_accuracy"] = "diverged"
    if name in minutes:
        cells |= {"step_ms": spread(steps.ms[name]), "gflop": 1e-9 * steps.flops[name], "epoch_s": 60 * minutes[name]}
        if "sgd" in minutes:
            cells["over_sgd"] = minutes[name] / minutes["sgd"]
        if batch == runs.task.base.batch:
            cells["over_plain"] = statistics.median(steps.ms[name]) / statistics.median(steps.ms[PLAIN])
            cells["flops_over_plain"] = steps.flops[name] / steps.flops[PLAIN]
    return cells


def epochs_of(runs: Runs, method: str) -> list[int]:
    """Those of the evaluations."""
    return next(([row["epoch"] for row in run["rows"]] for run in runs.best(method) if "rows" in run), [])


def to_targets(
    runs: Runs, found: Mapping[str, Entry], shown: Shown, minutes: Mapping[str, float]
) -> dict[str, dict[str, Any]]:
    """Epochs and minutes to each target, and SGD's minutes over the method's; the note's beside them."""
    epochs = {name: {target: epochs_to(runs, name, target) for target in shown.targets} for name in found}
    taken = {
        name: {target: [e and e * minutes[name] for e in at] for target, at in epochs[name].items()}
        for name in found
        if name in minutes
    }
    faster = {
        name: {target: ratios(taken["sgd"][target], at) for target, at in by_target.items()}
        for name, by_target in taken.items()
        if "sgd" in taken
    }
    note_faster = {name: {t: NOTE["sgd"][t] / m for t, m in of.items()} for name, of in NOTE.items()}
    made = {
        "epochs": ("Epochs to a test accuracy, if every seed reaches it", ".1f", epochs, {}),
        "minutes": ("Minutes of training steps to it", ".2f", taken, NOTE),
        "speedup": ("SGD's minutes over the method's, seed by seed", ".2f", faster, note_faster),
    }
    return {
        key: target_table(title, form, found, shown, values, note if shown.noted else {})
        for key, (title, form, values, note) in made.items()
        if values
    }


def epochs_to(runs: Runs, method: str, target: float) -> BySeed:
    """By seed; None: it is never reached."""
    return [
        first_below(run["rows"], "test_error", 1 - target / 100, along="epoch") if "rows" in run else None
        for run in runs.best(method)
    ]


def ratios(theirs: BySeed, mine: BySeed) -> BySeed:
    return [a / b if a and b else None for a, b in zip(theirs, mine, strict=True)]


def target_table(
    title: str,
    form: str,
    found: Mapping[str, Entry],
    shown: Shown,
    values: Mapping[str, ByTarget],
    note: Mapping[str, Mapping[int, float]],
) -> dict[str, Any]:
    """A row a method, and one for each in the note; a column a target."""
    columns = {"label": Column("method")} | {f"{t:g}": Column(f"{t:g} %", form, spread=True) for t in shown.targets}
    rows: dict[str, dict[str, Cell]] = {
        name: {"label": found[name]["label"], **{f"{t:g}": run_tables.cell(at) for t, at in by_target.items()}}
        for name, by_target in values.items()
    }
    for name, of in note.items():
        cells: dict[str, Cell] = {f"{t:g}": of[int(t)] for t in shown.targets if t in of}
        rows[f"note_{name}"] = {"label": f"{LABELS.get(name, name.upper())} in the note", **cells}
    return table(title, columns, rows)


def picture(found: dict[str, Any]) -> Figure:
    """Test accuracy over epochs on the left, over minutes on the right where these are known."""
    curves, targets = found["details"]["curves"], found["details"]["targets"]
    timed = {name: one for name, one in curves.items() if one["epoch_minutes"]}
    figure = Figure(figsize=(12.5, 4.8) if timed else (8.5, 4.8), layout="constrained")
    left, *right = figure.subplots(1, 2 if timed else 1, sharey=True, squeeze=False)[0]
    draw_accuracies(left, curves, targets, "epochs")
    for axes in right:
        draw_accuracies(axes, timed, targets, "minutes of training steps")
    left.set(ylabel="test accuracy, as evaluated after each epoch", ylim=(targets[0] / 100 - 0.15, None))
    left.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    setting, seeds = found["settings"], len(found["seeds"])
    figure.suptitle(
        f"CIFAR-10, {setting['train_images']:,} images to train, ResNet-18 of width {setting['width']}: "
        f"{'one seed' if seeds == 1 else f'medians and ranges of {seeds} seeds'}"
    )
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    return figure


def draw_accuracies(axes: Axes, curves: Mapping[str, Entry], targets: Sequence[float], along: str) -> None:
    for target in targets:
        axes.axhline(target / 100, color="grey", linewidth=0.6, linestyle=":")
    for name, one in curves.items():
        if accuracies := one["curves"].get("test_accuracy"):
            unit = 1 if along == "epochs" else one["epoch_minutes"]
            x, y = unit * np.array(one["epochs"]), np.array(accuracies)  # (seeds, evaluations)
            style, color = appearance(name, [other for other in LABELS if other not in KNOWN])
            label = f"{one['label']}, rate {one['rate']:g}: {middle(one['test_accuracy'], '.1%')}"
            axes.plot(x, np.median(y, 0), style, color=color, linewidth=1.6, label=label)
            axes.fill_between(x, y.min(0), y.max(0), color=color, alpha=0.15, linewidth=0)
    axes.set(xlabel=along)
    axes.grid(alpha=0.3)
