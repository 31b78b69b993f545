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

from benchmarks.catalogue import positive
from benchmarks.results import columns, result, spread, table
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
METHODS = columns(
    "label: method; both: both tasks | .1% ±; task_1: task 1 | .1% ±; task_2: task 2 | .1% ±;"
    "half: both, number at 0.5 | .1% ±; number: number chosen | .2f ±"
)
GAINS = columns(
    "label: method; gain: gain on both tasks, points | .1f ±; better: seeds better | d; worse: seeds worse | d"
)
Seeds = Sequence[Mapping[str, Any]]  # what the experiment measured, by seed


def both(seeds: Seeds, method: str, at: str = "test") -> np.ndarray:
    """Mean accuracy on both tasks, by seed, at the number that validation chose or ``"at one half"``."""
    return np.mean([seed["methods"][NAMES[method]][at] for seed in seeds], axis=1)


def of_method(seeds: Seeds, method: str) -> dict[str, Any]:
    rows = [seed["methods"][NAMES[method]] for seed in seeds]
    cells: dict[str, Any] = {"label": NAMES[method], "both": spread(both(seeds, method).tolist())}
    cells |= {f"task_{i + 1}": spread([row["test"][i] for row in rows]) for i in range(2)}
    if rows[0]["number"] is not None:
        cells["half"] = spread(both(seeds, method, "at one half").tolist())
        cells["number"] = spread([row["number"] for row in rows])
    return cells


def of_pair(seeds: Seeds, ours: str, other: str) -> dict[str, Any]:
    gain = 100 * (both(seeds, ours) - both(seeds, other))
    counts = {"better": int((gain > 0).sum()), "worse": int((gain < 0).sum())}
    return {"label": f"{NAMES[ours]} over {NAMES[other]}", "gain": spread(gain.tolist()), **counts}


def tables(measured: Mapping[str, Seeds]) -> dict[str, Any]:
    """Of the seeds of each pair of tasks."""
    titles, found = {kind: "; ".join(TASKS[kind]) for kind in measured}, {}
    rows = {name: {"label": label} for name, label in NAMES.items()}
    for kind, seeds in measured.items():
        of_kind = {method: of_method(seeds, method) for method in NAMES}
        pairs = {f"{ours}_over_{other}": of_pair(seeds, ours, other) for ours, other in DIFFERENCES}
        found[kind] = table(f"Accuracy, tasks: images {titles[kind]}", METHODS, of_kind)
        found[f"{kind}_gain"] = table(f"Differences seed by seed, tasks: images {titles[kind]}", GAINS, pairs)
        for method, cells in of_kind.items():
            rows[method][kind] = cells["both"]
    of_tasks = {kind: METHODS["both"]._replace(title=title) for kind, title in titles.items()}
    of_tasks = {"label": METHODS["label"], **of_tasks}
    return {"both": table("Accuracy on both tasks together", of_tasks, rows), **found}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=positive, default=5, help="how many")
    parser.add_argument("--work", type=Path, default=Path("runs/merging"), help="what the experiment writes")


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    measured, config, paths = dict[str, Seeds](), {}, {}
    for kind in TASKS:
        out = options.work / kind
        resume = ["--resume"] if (out / "config.json").exists() else []
        merge_tasks.main([f"--tasks={kind}", f"--seeds={options.seeds}", f"--out={out}", *resume])
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
        measured[kind], config = report["seeds"], report["config"]
        averages = {name: [seed["methods"][name] for seed in measured[kind]] for name in COLORS}
        paths[kind] = {
            name: {"numbers": rows[0]["numbers"], "accuracy": [row["path"] for row in rows]}
            for name, rows in averages.items()
        }
    yield result(
        "merging_digits",
        "Test accuracy of small CNNs merged from two that were tuned apart on two tasks of scikit-learn's digits.",
        options.command,
        tables(measured),
        settings={name: value for name, value in config.items() if name not in ("tasks", "seeds")},
        seeds=range(options.seeds),
        details=paths,
    )


def draw(found: dict[str, Any]) -> Figure:
    """For each pair of tasks: accuracy along the coefficient on the left, of all methods on the right."""
    figure = Figure(figsize=(13, 10.5), layout="constrained")
    axes = figure.subplots(len(TASKS), 2, width_ratios=(1.1, 1))
    for (left, right), (kind, tasks) in zip(axes, TASKS.items(), strict=True):
        paths = {
            name: [{"numbers": path["numbers"], "path": seed} for seed in path["accuracy"]]
            for name, path in found["details"][kind].items()
        }
        seeds = [{"methods": {name: rows[i] for name, rows in paths.items()}} for i in found["seeds"]]
        draw_paths(left, {"seeds": seeds, "tasks": tasks})
        methods = {}
        for row in found["tables"][kind]["rows"].values():
            cell, of_tasks = row["both"], [row[f"task_{i}"]["median"] for i in (1, 2)]
            ends = [cell["low"], cell["high"]]
            methods[row["label"]] = {"both": cell["median"], "both_by_seed": ends, "tasks": of_tasks}
        draw_methods(right, {"methods": methods})
    figure.suptitle(f"Merging a CNN tuned on two tasks; test accuracy, {len(found['seeds'])} seeds")
    return figure
