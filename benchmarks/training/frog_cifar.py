"""FROG on CIFAR-10: time and epochs that FROG, K-FROG, K-FAC, Muon and SGD need to accuracies on test images.

ResNet-18. The preset `full` is a research note's setting, for a GPU: batches of 512, of which FROG samples 64 images,
and of 128 for SGD, which has a row with the others' batch besides. `cpu` has a fourth of all three, an eighth of the
width, and few epochs, for a part of CIFAR-10. The final accuracy decides on a rate. Minutes are of steps alone.

Source: "FROG: My attempt to create efficient second-order optimizer", 2026
  (fullfix.github.io/notes/2026/01/25/frog-optimizer).
"""

import argparse
import dataclasses
import os
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks import harness
from benchmarks.catalogue import listed
from benchmarks.results import Cells, Column, table
from benchmarks.training import comparison
from experiments import frog_cifar, periods
from experiments.compare_options import LABELS as KNOWN
from experiments.compare_report import Entry, appearance
from experiments.comparison import Runs, Task, first_below
from experiments.frog_cifar import PLAIN, PRESETS, RATES, Setting
from experiments.images import load_images

FOLDER = "cifar-10-batches-bin"  # in $FISHER_OPTAX_DATA
LABELS = {"sgd": "SGD", PLAIN: "SGD, large batch", "kfac": "K-FAC"}  # K-FAC's inverse, where the GPT's has its root
COLUMNS = {"batch": Column("batch", "d"), "over_plain": Column("step / SGD's of that batch", ".2f")}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=list(PRESETS), default="cpu")
    parser.add_argument("--data", type=Path, help=f"folder of CIFAR-10 (default: {FOLDER} in $FISHER_OPTAX_DATA)")
    parser.add_argument("--methods", type=listed(RATES), default=list(RATES), help=f"of {', '.join(RATES)}")
    parser.add_argument("--targets", type=listed(of=float), help="accuracies in per cent")
    for field in dataclasses.fields(Setting):
        if field.name in ("width", "samples", "batch", "sgd_batch", "epochs"):
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, help=field.metadata["help"])
    parser.add_argument("--rounds", type=int, default=3, help="of timing, a period of each method in each")
    comparison.add_run_options(parser, seeds=None)


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    preset, given, named = PRESETS[options.preset], vars(options), os.environ.get("FISHER_OPTAX_DATA")
    if not (options.data or named):
        raise SystemExit(f"no --data: name the folder of CIFAR-10, or, as $FISHER_OPTAX_DATA, that of {FOLDER}.")
    data = load_images(str(options.data or Path(named or "") / FOLDER))
    changed = {f.name: given[f.name] for f in dataclasses.fields(Setting) if given.get(f.name) is not None}
    setting = dataclasses.replace(preset.setting, **{**changed, "data": data.name})
    name = "frog_cifar" if options.preset == "cpu" else f"frog_cifar_{options.preset}"
    targets = options.targets or list(preset.targets)
    rates = {method: RATES[method] for method in options.methods}
    compared = comparison.Comparison(
        f"{name}_{harness.environment()['platform']}",
        "FROG beside K-FROG, K-FAC, Muon and SGD on CIFAR-10 with ResNet-18: epochs and time to test accuracies.",
        f"CIFAR-10, {len(data.train.labels):,} images to train, ResNet-18 of width {setting.width}",
        Task(setting, data, frog_cifar.train, "test_error", rates),
        ("test_accuracy", "test_loss"),
        COLUMNS,
        cells,
        lambda runs, found, times: to_targets(runs, [*found], times, targets),
        LABELS,
        lambda config: periods.of_images(config.of(config.optimizer).resolve(), data),
        (PLAIN,),
    )
    seeds = range(options.seeds or preset.seeds)
    path = options.runs or comparison.KEPT / f"{name}.json"
    yield from comparison.measure(compared, path, seeds, options.command, options.rounds)


def cells(runs: Runs, name: str, entry: Entry, times: comparison.Times) -> Cells:
    """The batch, and a step's time over that of SGD with the same batch."""
    batch, over = runs.task.base.of(name).batch, None
    if name in times and batch == runs.task.base.batch:
        over = statistics.median(times[name]) / statistics.median(times[PLAIN])
    return {"batch": batch, "over_plain": over}


def to_targets(
    runs: Runs, methods: Sequence[str], times: comparison.Times, targets: Sequence[float]
) -> dict[str, dict[str, Any]]:
    """Tables of epochs and of minutes to each target; nothing where a seed never reaches it."""
    titles = {"epochs": "Epochs to a test accuracy, if every seed reaches it", "minutes": "Minutes of training to it"}
    rows: dict[str, dict[str, Cells]] = {key: {} for key in titles}
    for name in methods:
        reached = {
            target: [
                first_below(run["rows"], "test_error", 1 - target / 100, "epoch") if "rows" in run else None
                for run in runs.best(name)
            ]
            for target in targets
        }
        steps = len(runs.task.data.train.labels) // runs.task.base.of(name).batch  # an epoch's
        units = {"epochs": 1.0} | ({"minutes": statistics.median(times[name]) * steps / 60e3} if name in times else {})
        for key, unit in units.items():
            found = {f"{t:g}": comparison.cell([e if e is None else e * unit for e in of]) for t, of in reached.items()}
            rows[key][name] = {"label": LABELS.get(name, KNOWN.get(name, name)), **found}
    columns = {f"{t:g}": Column(f"{t:g} %", ".2f", spread=True) for t in targets}
    return {
        key: table(title, {"label": Column("method"), **columns}, rows[key])
        for key, title in titles.items()
        if rows[key]
    }


def draw(found: dict[str, Any]) -> Figure:
    """Test accuracy over steps on the left, over minutes on the right where steps were timed."""
    curves, seeds = found["details"]["curves"], len(found["seeds"])
    panels = ["steps", "seconds"][: 1 + any("seconds" in one for one in curves.values())]
    figure = Figure(figsize=(4.5 + 4 * len(panels), 4.8), layout="constrained")
    for axes, along in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True):
        for name, one in ((name, one) for name, one in curves.items() if along in one and one["curves"]):
            x, y = np.array(one[along]), 100 * np.array(one["curves"]["test_accuracy"])  # (seeds, evaluations)
            style, color = appearance(name, [other for other in LABELS if other not in KNOWN])
            axes.plot(x, np.median(y, 0), style, color=color, label=f"{one['label']}, rate {one['rate']:g}")
            axes.fill_between(x, y.min(0), y.max(0), color=color, alpha=0.15, linewidth=0)
        axes.set(xlabel=along)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("test accuracy, %")
    told = "one seed" if seeds == 1 else f"medians and ranges of {seeds} seeds"
    figure.suptitle(f"{found['details']['title']}: {told}")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    return figure
