"""What `merge_tasks.py` tells: a table, numbers and a picture."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.merge_tasks_parts import TASKS
from experiments.run_folder import versions

PLAIN, FISHER, SCALED = "average", "Fisher-weighted average", "Fisher-weighted average, scales kept"
ALONE = ("base", "tuned on task 1", "tuned on task 2")
COLORS = {PLAIN: "tab:gray", FISHER: "tab:red"}
LABELS = {"mc": "labels drawn from the model", "true": "all labels", "empirical": "the data's labels"}


def payload(config: Any, data: str, found: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """All that is written, as JSON values."""
    return {
        "config": {**dataclasses.asdict(config), "data": data},
        "versions": versions("flax", "optax", "numpy"),
        "seconds": round(seconds, 1),
        "tasks": TASKS[config.tasks],
        "methods": {name: summary(name, found) for name in found[0]["methods"]},
        "seeds": found,
    }


def summary(name: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Of one method over the seeds: test accuracies by task and of both, with the numbers that validation chose."""
    rows = [seed["methods"][name] for seed in found]
    test, half = (np.array([row[key] for row in rows]) for key in ("test", "at one half"))
    numbers = [row["number"] for row in rows if row["number"] is not None]
    return {
        "tasks": test.mean(0).tolist(),
        "both": float(test.mean()),
        "both_by_seed": test.mean(1).tolist(),
        "both_at_one_half": float(half.mean()),
        "number": float(np.median(numbers)) if numbers else None,
    }


def markdown(report: dict[str, Any]) -> str:
    config, tasks, rows = report["config"], report["tasks"], report["methods"]
    lines = [
        f"Two tasks on {config['data']}: images {tasks[0]} (1) and {tasks[1]} (2). A CNN is trained for "
        f"{config['base_epochs']} epochs on all images as they are, tuned for {config['epochs']} on each task, and the "
        f"two are merged. Diagonal Fishers of {config['examples']} images at most, {LABELS[config['fisher']]}, each "
        f"divided by its trace unless said. Test accuracies, means of {config['seeds']} seeds; the number of each "
        "method (share of task 2, or scale) is chosen on validation images, its median is shown.",
        "",
        "| | task 1 | task 2 | both | both, by seed | number | both at 0.5 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        first, second = row["tasks"]
        low, high = min(row["both_by_seed"]), max(row["both_by_seed"])
        tail = ["", ""] if row["number"] is None else [f"{row['number']:.2f}", f"{row['both_at_one_half']:.1%}"]
        cells = [name, f"{first:.1%}", f"{second:.1%}", f"{row['both']:.1%}", f"{low:.1%} to {high:.1%}", *tail]
        lines.append("| " + " | ".join(cells).rstrip() + " |")
    return "\n".join([*lines, "", verdict(rows), ""])


def verdict(rows: dict[str, Any]) -> str:
    """What the Fisher was worth, whichever way it went."""
    merged = {name: row["both"] for name, row in rows.items() if name not in ALONE}
    best = max(merged, key=lambda name: merged[name])
    pairs = ((FISHER, PLAIN), (FISHER, SCALED), ("task arithmetic, Fisher", "task arithmetic"))
    return " ".join([f"Best of both: {best}."] + [compared(rows, *pair) for pair in pairs])


def compared(rows: dict[str, Any], ours: str, other: str) -> str:
    δ = 100 * (np.array(rows[ours]["both_by_seed"]) - np.array(rows[other]["both_by_seed"]))
    how = "above" if δ.mean() >= 0 else "below"
    wins = f"better for {int((δ > 0).sum())} of {len(δ)} seeds, worse for {int((δ < 0).sum())}"
    return f"{ours[0].upper()}{ours[1:]} is {abs(δ.mean()):.1f} points {how} {other} ({wins})."


def draw(report: dict[str, Any], path: Path) -> None:
    """Accuracy along the coefficients on the left, of all methods on the right, as PNG."""
    figure = Figure(figsize=(13, 5.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.1, 1))
    draw_paths(left, report)
    draw_methods(right, report)
    config = report["config"]
    figure.suptitle(f"Merging a CNN tuned on two tasks of {config['data']}; test accuracy, {config['seeds']} seeds")
    figure.savefig(path, dpi=150)


def draw_paths(axes: Axes, report: dict[str, Any]) -> None:
    """Of both averages: each task thin, their mean thick with the range of the seeds."""
    for name, color in COLORS.items():
        rows = [seed["methods"][name] for seed in report["seeds"]]
        x, path = np.array(rows[0]["numbers"]), np.array([row["path"] for row in rows])  # (seeds, points, tasks)
        both = path.mean(-1)
        axes.fill_between(x, both.min(0), both.max(0), color=color, alpha=0.15, linewidth=0)
        axes.plot(x, both.mean(0), color=color, linewidth=2.5, label=f"{name}: both tasks")
        for task, style in enumerate(("--", ":")):
            axes.plot(x, path[..., task].mean(0), style, color=color, linewidth=1.2, label=f"... task {task + 1}")
    first, second = report["tasks"]
    axes.set(xlabel="coefficient of task 2", ylabel="test accuracy", ylim=(0, 1), xlim=(0, 1))
    axes.set_title(f"task 1: {first}; task 2: {second}", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12))


def draw_methods(axes: Axes, report: dict[str, Any]) -> None:
    """The best at the top: a bar for both tasks, a point for each, a line for the range of the seeds."""
    rows = sorted(report["methods"].items(), key=lambda item: item[1]["both"])
    y, both = np.arange(len(rows)), np.array([row["both"] for _, row in rows])
    seeds = np.array([row["both_by_seed"] for _, row in rows])
    colors = ["tab:red" if "Fisher" in name else "tab:gray" for name, _ in rows]
    axes.barh(y, both, color=colors, alpha=0.45, height=0.6)
    axes.hlines(y, seeds.min(1), seeds.max(1), color="black", linewidth=1.5, label="both: range of the seeds")
    for task, marker in enumerate("o^"):
        points = [row["tasks"][task] for _, row in rows]
        axes.plot(points, y, marker, color="tab:blue", markersize=6, markerfacecolor="white", label=f"task {task + 1}")
    axes.set_yticks(y, [f"{name}  {row['both']:.1%}" for name, row in rows])
    axes.set(xlim=(-0.02, 1), xlabel="test accuracy, at the number chosen on validation images")
    axes.grid(alpha=0.3, axis="x")
    axes.legend(fontsize="small", ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.12))
