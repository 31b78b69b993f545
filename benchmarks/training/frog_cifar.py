"""FROG on CIFAR-10: time and epochs that FROG, K-FROG, K-FAC, Muon and SGD need to accuracies on test images.

ResNet-18. The preset `full` is a research note's setting, for a GPU: batches of 512, of which FROG samples 64 images,
and of 128 for SGD, which has a row with the others' batch besides. `cpu` has a fourth of all three, an eighth of the
width, and few epochs; it is meant for a part of CIFAR-10. Every method tries its rates on the first seed and runs at
the best of them, by the final accuracy, on the other seeds. The runs are kept in a file and never made twice. A step's
time is measured apart from them: all methods train in turns, whole periods between refreshes. Minutes are of such steps
alone, without compiling and evaluations.

Source: "FROG: My attempt to create efficient second-order optimizer", 2026
  (fullfix.github.io/notes/2026/01/25/frog-optimizer); its times are of an A100.
"""

import argparse
import dataclasses
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure

from benchmarks import harness
from benchmarks.catalogue import listed
from benchmarks.flops import count_matmul_flops
from benchmarks.results import Cells, Column, filled, result, spread, table
from benchmarks.steps import mean_flops
from benchmarks.training import tables
from experiments import periods, train_images
from experiments.compare_options import LABELS as KNOWN
from experiments.compare_report import Entry, appearance, entries
from experiments.comparison import Runs, Task, first_below
from experiments.images import Images, load_images
from experiments.images_config import Config
from experiments.options import option

FOLDER = "cifar-10-batches-bin"  # in $FISHER_OPTAX_DATA
PLAIN = "sgd_large"  # SGD with the others' batch: what a step costs without their curvature
LABELS = {"sgd": "SGD", PLAIN: "SGD, large batch", "kfac": "K-FAC"}  # K-FAC's inverse, where the GPT's has its root
RATES = {
    "sgd": (1e-2, 3e-2, 1e-1),
    PLAIN: (3e-2, 1e-1, 3e-1),
    "muon": (3e-3, 1e-2, 3e-2),
    "kfac": (3e-3, 1e-2, 3e-2),
    "kfrog": (3e-4, 1e-3, 3e-3),
    "frog": (3e-3, 1e-2, 3e-2),
}
# Minutes to per cent in the note, on an A100.
NOTE = {
    "frog": {88: 1.29, 90: 1.86, 92: 5.37, 94: 11.88},
    "sgd": {88: 3.82, 90: 5.01, 92: 9.63, 94: 11.44},
}
COLUMNS = {
    "label": Column("method"),
    "rate": Column("rate"),
    "batch": Column("batch", "d"),
    "test_accuracy": tables.LOSSES["test_accuracy"],
    "test_loss": tables.LOSSES["test_loss"],
    "step_ms": Column("step, ms", ".0f", spread=True),
    "over_plain": Column("step / SGD's of that batch", ".2f"),
    "epoch_s": Column("epoch, s", ".1f"),
    "over_sgd": Column("epoch / SGD's", ".2f"),
    "gflop": Column("products of a step, GF", ".1f"),
    "flops_over_plain": Column("GF / SGD's of that batch", ".2f"),
}


@dataclasses.dataclass(frozen=True)
class Setting(Config):
    """Of all runs."""

    sgd_batch: int = option(128, "batch of sgd")

    def of(self, method: str) -> "Setting":
        optimizer, batch = "sgd" if method == PLAIN else method, self.sgd_batch if method == "sgd" else self.batch
        return dataclasses.replace(self, optimizer=optimizer, batch=batch)


class Preset(NamedTuple):
    """Defaults of the options."""

    setting: Setting
    targets: Sequence[float]  # per cent of the test images
    seeds: int


CPU = Setting(model="resnet18", width=8, batch=128, sgd_batch=32, samples=16, epochs=4)
PRESETS = {
    "cpu": Preset(CPU, (35, 40, 45, 50), 2),
    # K-FAC's decompositions of 4608 x 4608 take seconds each.
    "full": Preset(Setting(model="resnet18", batch=512, epochs=30, refresh=100), (88, 90, 92, 94), 3),
}


class Steps(NamedTuple):
    """What was measured apart from the runs, by method, `PLAIN` among them; nothing yet by default."""

    ms: Mapping[str, Sequence[float]] = {}  # by round
    flops: Mapping[str, float] = {}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=list(PRESETS), default="cpu")
    parser.add_argument("--data", type=Path, help=f"folder of CIFAR-10 (default: {FOLDER} in $FISHER_OPTAX_DATA)")
    parser.add_argument("--methods", type=listed(RATES), default=list(RATES), help=f"of {', '.join(RATES)}")
    parser.add_argument("--targets", type=listed(of=float), help="accuracies in per cent")
    for field in dataclasses.fields(Setting):
        if field.name in ("width", "samples", "batch", "sgd_batch", "epochs"):
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, help=field.metadata["help"])
    parser.add_argument("--seeds", type=int, help="rates are tried on the first (default, as of these: the preset's)")
    parser.add_argument("--rounds", type=int, default=3, help="of timing, a period of each method in each")
    parser.add_argument("--runs", type=Path, help=f"file of runs to go on with (default: one in {tables.KEPT})")


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    preset, folder = PRESETS[options.preset], options.data
    if folder is None:
        if not (named := os.environ.get("FISHER_OPTAX_DATA")):
            raise SystemExit(f"no --data: name the folder of CIFAR-10, or, as $FISHER_OPTAX_DATA, that of {FOLDER}.")
        folder = Path(named) / FOLDER
    data, given = load_images(str(folder)), vars(options)
    changed = {f.name: given[f.name] for f in dataclasses.fields(Setting) if given.get(f.name) is not None}
    setting = dataclasses.replace(preset.setting, **{**changed, "data": data.name})
    name = "frog_cifar" if options.preset == "cpu" else f"frog_cifar_{options.preset}"
    task = Task(setting, data, train, "test_error", {method: RATES[method] for method in options.methods})
    runs, seeds = Runs(options.runs or tables.KEPT / f"{name}.json", task), range(options.seeds or preset.seeds)
    runs.make(seeds)
    targets, noted = options.targets or preset.targets, options.preset == "full"
    yield describe(name, runs, seeds, targets, options.command, noted, Steps())
    steps = measure_steps(setting, data, options.methods, options.rounds)
    yield describe(name, runs, seeds, targets, options.command, noted, steps)


def train(setting: Setting, data: Images) -> list[dict[str, Any]]:
    """Entries of `train_images.train`, and the share of test images that are not recognised."""
    config = dataclasses.replace(setting.of(setting.optimizer), seed=setting.seed, lr=setting.lr)
    return [{**row, "test_error": 1 - row["test_accuracy"]} for row in train_images.train(config, data)]


def measure_steps(setting: Setting, data: Images, names: Sequence[str], rounds: int) -> Steps:
    """Each method's, and those of `PLAIN` in any case."""
    trainers, flops = {}, {}
    for name in dict.fromkeys([*names, PLAIN]):
        trainers[name], step = periods.of_images(setting.of(name).resolve(), data)
        flops[name] = mean_flops(count_matmul_flops(*step))
        jax.block_until_ready(trainers[name](None))
    seconds = harness.interleaved(trainers, rounds, lambda _: (), "timing, round")
    return Steps({name: [1e3 * s / setting.refresh for s in times] for name, times in seconds.items()}, flops)


def describe(
    name: str, runs: Runs, seeds: range, targets: Sequence[float], command: str, noted: bool, steps: Steps
) -> dict[str, Any]:
    """The result, as far as ``steps`` are known; ``noted`` if the setting is the note's."""
    found, (train_part, test_part) = entries(runs, runs.task.rates), (runs.task.data.train, runs.task.data.test)
    epochs = {method: len(train_part.labels) // runs.task.base.of(method).batch for method in found}  # in steps
    minutes = {m: statistics.median(steps.ms[m]) / 60e3 * epochs[m] for m in found if m in steps.ms}
    curves = tables.curves(found)
    for method, one in found.items():
        one["label"] = curves[method]["label"] = LABELS.get(method, one["label"])
        rows_of_first = next((run["rows"] for run in runs.best(method) if "rows" in run), [])
        curves[method] |= {"epochs": [r["epoch"] for r in rows_of_first], "epoch_minutes": minutes.get(method)}
    rows = {method: row(runs, method, one, steps, minutes) for method, one in found.items()}
    return result(
        f"{name}_{harness.environment()['platform']}",
        "FROG beside K-FROG, K-FAC, Muon and SGD on CIFAR-10 with ResNet-18: epochs and time to test accuracies.",
        command,
        {
            "methods": table(tables.at_best(None, len(seeds)), filled(COLUMNS, rows), rows),
            **to_targets(runs, found, targets, minutes, NOTE if noted else {}),
            "grid": tables.grid_table(runs, list(found), "Final share of test images missed by rate, first seed"),
        },
        settings={
            **tables.setting_of(runs),
            "train_images": len(train_part.labels),
            "test_images": len(test_part.labels),
            "targets": list(targets),
        },
        seeds=seeds,
        details={"curves": curves, "targets": list(targets)},
    )


def row(runs: Runs, name: str, one: Entry, steps: Steps, minutes: Mapping[str, float]) -> Cells:
    batch = runs.task.base.of(name).batch
    cells = tables.method_cells(one, ("test_accuracy", "test_loss")) | {"batch": batch}
    if name in minutes:
        cells |= {"step_ms": spread(steps.ms[name]), "gflop": 1e-9 * steps.flops[name], "epoch_s": 60 * minutes[name]}
        if "sgd" in minutes:
            cells["over_sgd"] = minutes[name] / minutes["sgd"]
        if batch == runs.task.base.batch:
            cells["over_plain"] = statistics.median(steps.ms[name]) / statistics.median(steps.ms[PLAIN])
            cells["flops_over_plain"] = steps.flops[name] / steps.flops[PLAIN]
    return cells


def to_targets(
    runs: Runs,
    found: Mapping[str, Entry],
    targets: Sequence[float],
    minutes: Mapping[str, float],
    note: Mapping[str, Mapping[int, float]],
) -> dict[str, dict[str, Any]]:
    """Epochs and minutes to each target, and SGD's minutes over the method's; the note's beside them."""

    def epochs_to(run: Mapping[str, Any], target: float) -> float | None:
        return first_below(run["rows"], "test_error", 1 - target / 100, "epoch") if "rows" in run else None

    epochs = {m: {t: [epochs_to(run, t) for run in runs.best(m)] for t in targets} for m in found}
    taken = {m: {t: [e and e * minutes[m] for e in by] for t, by in epochs[m].items()} for m in found if m in minutes}
    sgd = taken.get("sgd", {})
    faster = {
        m: {t: [a / b if a and b else None for a, b in zip(sgd[t], of[t], strict=True)] for t in sgd}
        for m, of in taken.items()
        if sgd
    }
    noted_faster = {m: {t: NOTE["sgd"][t] / minute for t, minute in of.items()} for m, of in note.items()}
    made = {
        "epochs": ("Epochs to a test accuracy, if every seed reaches it", ".1f", epochs, {}),
        "minutes": ("Minutes of training steps to it", ".2f", taken, note),
        "speedup": ("SGD's minutes over the method's, seed by seed", ".2f", faster, noted_faster),
    }
    parts = {}
    for key, (title, form, values, noted) in made.items():
        columns = {"label": Column("method")} | {f"{t:g}": Column(f"{t:g} %", form, spread=True) for t in targets}
        rows: dict[str, Cells] = {
            m: {"label": found[m]["label"], **{f"{t:g}": tables.cell(by) for t, by in of.items()}}
            for m, of in values.items()
        }
        for m, of in noted.items():
            cells = {f"{t:g}": of[int(t)] for t in targets if t in of}
            rows[f"note_{m}"] = {"label": f"{LABELS.get(m, m.upper())} in the note", **cells}
        if values:
            parts[key] = table(title, columns, rows)
    return parts


def draw(found: dict[str, Any]) -> Figure:
    """Test accuracy over epochs on the left, over minutes on the right where these are known."""
    curves, targets, setting = found["details"]["curves"], found["details"]["targets"], found["settings"]
    panels = ["epochs", "minutes of training steps"][: 1 + any(one["epoch_minutes"] for one in curves.values())]
    figure = Figure(figsize=(4.5 + 4 * len(panels), 4.8), layout="constrained")
    for axes, along in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True):
        for name, one in curves.items():
            if "test_accuracy" in one["curves"] and (along == "epochs" or one["epoch_minutes"]):
                x = np.array(one["epochs"]) * (1 if along == "epochs" else one["epoch_minutes"])
                y = 100 * np.array(one["curves"]["test_accuracy"])  # (seeds, evaluations)
                style, color = appearance(name, [other for other in LABELS if other not in KNOWN])
                label = f"{one['label']}, rate {one['rate']:g}"
                axes.plot(x, np.median(y, 0), style, color=color, linewidth=1.6, label=label)
                axes.fill_between(x, y.min(0), y.max(0), color=color, alpha=0.15, linewidth=0)
        axes.hlines(targets, *axes.get_xlim(), color="grey", linewidth=0.6, linestyle=":")
        axes.set(xlabel=along, ylabel="test accuracy, %" if along == "epochs" else "", ylim=(targets[0] - 15, None))
        axes.grid(alpha=0.3)
    seeds = len(found["seeds"])
    told = "one seed" if seeds == 1 else f"medians and ranges of {seeds} seeds"
    figure.suptitle(
        f"CIFAR-10, {setting['train_images']:,} images to train, ResNet-18 of width {setting['width']}: {told}"
    )
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    return figure
