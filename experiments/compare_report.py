"""What `compare_optimizers.py` tells: each method's losses and curves, a table and a picture."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.compare_options import LABELS
from experiments.comparison import Runs

LOSSES = {"train_loss": "training loss", "val_loss": "validation loss"}

Entry = dict[str, Any]  # of a method, JSON values


def entries(runs: Runs, methods: Iterable[str]) -> dict[str, Entry]:
    """Of each method at its best rate, the lowest final loss first; a list has an item a seed that did not diverge."""
    return {name: entry(runs, name) for name in runs.order() if name in set(methods)}


def entry(runs: Runs, method: str) -> Entry:
    best = runs.best(method)
    finished = [run for run in best if "rows" in run]
    found: Entry = {
        "label": LABELS.get(method, method),
        "rate": best[0]["rate"],
        "seeds": [run["seed"] for run in finished],
        "diverged": [run["seed"] for run in best if "rows" not in run],
        "steps": [row["step"] for row in finished[0]["rows"]] if finished else [],
        "curves": {},
    }
    for key in ("train_loss", "val_loss", "test_loss", "test_accuracy", "training_seconds"):
        if finished and all(key in run["rows"][-1] for run in finished):
            found["curves"][key] = [[row[key] for row in run["rows"]] for run in finished]
            found[key] = [run["rows"][-1][key] for run in finished]
    if runs.of("adamw"):
        found["to_adamw"] = runs.shares(method)
    return found


def middle(values: Sequence[float | None], form: str) -> str:
    """The median, with the least and the most where there are several; nothing unless every value is there."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return ""
    ends = f" ({min(known):{form}} to {max(known):{form}})" if max(known) > min(known) else ""
    return f"{statistics.median(known):{form}}{ends}"


def markdown(found: Mapping[str, Entry], config: Mapping[str, Any]) -> str:
    """A sentence on what was run, and a line a method."""
    seeds = len(config["seeds"].split(","))
    lines = [
        f"Optimizers on a character GPT ({config['layers']} layers, {config['width']} wide, context "
        f"{config['context']}, batch {config['batch']}, {config['steps']} steps, {config['dtype']}) and "
        f"{config['data']}, {seeds} seed{'s' * (seeds > 1)}. Losses in nats per character; medians over the seeds, "
        "with the least and the most. A rate is the best of those tried on the first seed, by the final training loss.",
        "",
        "| | rate | training loss | validation loss | share of AdamW's steps to AdamW's final training loss | s |",
        "|---|---|---|---|---|---|",
    ]
    for one in found.values():
        losses = [middle(one.get(key, []), ".4f") for key in LOSSES]
        if one["diverged"]:
            losses[0] = f"{losses[0]} diverged on seed {', '.join(map(str, one['diverged']))}".strip()
        cells = [*losses, middle(one.get("to_adamw", []), ".2f"), middle(one.get("training_seconds", []), ".1f")]
        lines.append("| " + " | ".join([one["label"], f"{one['rate']:g}", *cells]) + " |")
    note = "s: seconds of the training steps alone, without compiling and evaluations, whatever else the machine did."
    return "\n".join([*lines, "", note, ""])


def picture(found: Mapping[str, Entry], title: str) -> Figure:
    """Training loss over steps on the left, over seconds on the right where these are known."""
    timed = {name: one for name, one in found.items() if "seconds" in one}
    figure = Figure(figsize=(13, 4.8) if timed else (9, 4.8), layout="constrained")  # without pyplot: no global state
    left, *right = figure.subplots(1, 2 if timed else 1, squeeze=False)[0]
    draw_curves(left, found, "train_loss")
    left.set(xlabel="step")
    for axes in right:
        draw_curves(axes, timed, "train_loss", along="seconds")
        axes.set(xlabel="seconds of training steps", ylim=left.get_ylim())
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    figure.suptitle(title)
    return figure


def draw_curves(axes: Axes, found: Mapping[str, Entry], loss: str, along: str = "steps") -> None:
    """A line a method through the medians over the seeds, in the range of these, its final loss in the legend."""
    highest, unknown = [0.0], [name for name in found if name not in LABELS]
    for name, one in found.items():
        if loss in one:
            curves = np.array(one["curves"][loss])  # (seeds, evaluations)
            x, y = one[along], np.median(curves, 0)
            style, color = appearance(name, unknown)
            label = f"{one['label'].replace('`', '')}: {middle(one[loss], '.3f')}"
            (line,) = axes.plot(x, y, style, color=color, linewidth=1.6, label=label)
            axes.fill_between(x, curves.min(0), curves.max(0), color=line.get_color(), alpha=0.15, linewidth=0)
            highest.append(float(y[: max(2, len(y) // 10 + 1)].min()))
    lowest = min((min(one[loss]) for one in found.values() if loss in one), default=0.0)
    top = max(highest)
    # The first losses are far above all others.
    axes.set(ylabel=f"{LOSSES.get(loss, loss)} (nats per character)", ylim=(lowest - 0.05 * (top - lowest), top))
    axes.grid(alpha=0.3)


def appearance(name: str, unknown: Sequence[str]) -> tuple[str, str]:
    """Style and colour, those of a known method the same in all pictures: ten colours, in three styles."""
    if name in unknown:
        return ":", f"C{unknown.index(name) % 10}"
    i = list(LABELS).index(name)
    return "-" if i < 10 else "--", f"C{i % 10}"


def with_seconds(found: Mapping[str, Entry]) -> dict[str, Entry]:
    """Each with the seconds of its training steps at each evaluation, medians over the seeds, for the picture."""
    clock = "training_seconds"
    return {
        name: {**one, "seconds": np.median(one["curves"][clock], 0).tolist()} if clock in one else one
        for name, one in found.items()
    }
