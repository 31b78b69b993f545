"""What merging keeps of two CNNs tuned apart: averages, Fishers, task arithmetic, TIES and DARE.

The comparison is that of `experiments.merge_tasks` on scikit-learn's digits, on tasks that distort all images and on
tasks with classes of their own. Differences are taken seed by seed. An interrupted run goes on where it was.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks import results
from benchmarks.catalogue import positive
from benchmarks.results import Column
from experiments import merge_tasks
from experiments.merge_tasks_parts import TASKS
from experiments.merge_tasks_report import COLORS, FISHER, PLAIN, SCALED, draw_methods, draw_paths

NAMES = {
    "base": "base",
    "first": "tuned on task 1",
    "second": "tuned on task 2",
    "average": PLAIN,
    "fisher": FISHER,
    "fisher_scaled": SCALED,
    "arithmetic": "task arithmetic",
    "arithmetic_fisher": "task arithmetic, Fisher",
    "ties": "TIES",
    "dare_ties": "DARE + TIES",
}
DIFFERENCES = (("fisher", "average"), ("fisher", "fisher_scaled"), ("arithmetic_fisher", "arithmetic"))

Seeds = Sequence[Mapping[str, Any]]  # what the example measured, by seed


def both(seeds: Seeds, method: str, at: str) -> np.ndarray:
    """Mean accuracy on both tasks, by seed, at the number that validation ``"test"`` chose or ``"at one half"``."""
    return np.mean([seed["methods"][NAMES[method]][at] for seed in seeds], axis=1)


def of_method(seeds: Seeds, method: str) -> dict[str, Any]:
    found = [seed["methods"][NAMES[method]] for seed in seeds]
    cells: dict[str, Any] = {"label": NAMES[method], "both": results.spread(both(seeds, method, "test").tolist())}
    for i in range(2):
        cells[f"task_{i + 1}"] = results.spread([row["test"][i] for row in found])
    if found[0]["number"] is not None:
        cells["half"] = results.spread(both(seeds, method, "at one half").tolist())
        cells["number"] = results.spread([row["number"] for row in found])
    return cells


def of_pair(seeds: Seeds, ours: str, other: str) -> dict[str, Any]:
    gain = 100 * (both(seeds, ours, "test") - both(seeds, other, "test"))
    return {
        "label": f"{NAMES[ours]} over {NAMES[other]}",
        "gain": results.spread(gain.tolist()),
        "better": int((gain > 0).sum()),
        "worse": int((gain < 0).sum()),
    }


def tables(measured: Mapping[str, Seeds]) -> dict[str, Any]:
    """Of the seeds of each pair of tasks."""
    methods = {kind: {method: of_method(seeds, method) for method in NAMES} for kind, seeds in measured.items()}
    together = {
        method: {"label": label, **{kind: rows[method]["both"] for kind, rows in methods.items()}}
        for method, label in NAMES.items()
    }
    titles = {kind: "; ".join(TASKS[kind]) for kind in measured}
    columns = {"label": Column("method"), **{kind: accuracy(title) for kind, title in titles.items()}}
    found = {"both": results.table("Accuracy on both tasks together", columns, together)}
    for kind, title in titles.items():
        found[kind] = results.table(f"Accuracy, tasks: images {title}", METHODS, methods[kind])
        pairs = {f"{ours}_over_{other}": of_pair(measured[kind], ours, other) for ours, other in DIFFERENCES}
        found[f"{kind}_gain"] = results.table(f"Differences seed by seed, tasks: images {title}", GAINS, pairs)
    return found


def accuracy(title: str) -> Column:
    return Column(title, ".1%", spread=True)


METHODS = {
    "label": Column("method"),
    "both": accuracy("both tasks"),
    "task_1": accuracy("task 1"),
    "task_2": accuracy("task 2"),
    "half": accuracy("both, number at 0.5"),
    "number": Column("number chosen", ".2f", spread=True),
}
GAINS = {
    "label": Column("method"),
    "gain": Column("gain on both tasks, points", ".1f", spread=True),
    "better": Column("seeds better", "d"),
    "worse": Column("seeds worse", "d"),
}


def paths(seeds: Seeds) -> dict[str, Any]:
    """Of both averages, along the coefficient of task 2: (seeds, points, tasks)."""
    found = {name: [seed["methods"][name] for seed in seeds] for name in COLORS}
    return {
        name: {"numbers": rows[0]["numbers"], "accuracy": [row["path"] for row in rows]} for name, rows in found.items()
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=positive, default=5, help="how many")
    parser.add_argument("--work", type=Path, default=Path("runs/merging"), help="what the experiment writes")


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    measured, config = dict[str, Seeds](), {}
    for kind in TASKS:
        out = options.work / kind
        resume = ["--resume"] if (out / "config.json").exists() else []
        merge_tasks.main([f"--tasks={kind}", f"--seeds={options.seeds}", f"--out={out}", *resume])
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
        measured[kind], config = report["seeds"], report["config"]
    yield results.result(
        "merging_digits",
        "Test accuracy of small CNNs merged from two that were tuned apart on two tasks of scikit-learn's digits.",
        options.command,
        tables(measured),
        settings={name: value for name, value in config.items() if name not in ("tasks", "seeds")},
        seeds=range(options.seeds),
        details={kind: paths(seeds) for kind, seeds in measured.items()},
    )


def draw(found: dict[str, Any]) -> Figure:
    """For each pair of tasks: accuracy along the coefficient on the left, of all methods on the right."""
    figure = Figure(figsize=(13, 10.5), layout="constrained")
    axes = figure.subplots(len(TASKS), 2, width_ratios=(1.1, 1))
    for (left, right), (kind, tasks) in zip(axes, TASKS.items(), strict=True):
        paths, rows = found["details"][kind], found["tables"][kind]["rows"]
        seeds = [
            {
                "methods": {
                    name: {"numbers": path["numbers"], "path": path["accuracy"][i]} for name, path in paths.items()
                }
            }
            for i in found["seeds"]
        ]
        draw_paths(left, {"seeds": seeds, "tasks": tasks})
        both = {row["label"]: row["both"] for row in rows.values()}
        of_tasks = {row["label"]: [row[f"task_{i}"]["median"] for i in (1, 2)] for row in rows.values()}
        methods = {
            name: {"both": cell["median"], "both_by_seed": [cell["low"], cell["high"]], "tasks": of_tasks[name]}
            for name, cell in both.items()
        }
        draw_methods(right, {"methods": methods})
    count = len(found["seeds"])
    figure.suptitle(f"Merging a CNN tuned on two tasks; test accuracy, means along the lines, {count} seeds")
    return figure
