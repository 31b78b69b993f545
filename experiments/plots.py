"""Pictures of a run. The ``rows`` are the lines of its ``metrics.jsonl``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

LowRank = Sequence[dict[str, Any]]


def plot_losses(rows: LowRank, title: str, path: Path) -> None:
    """Training and validation loss over steps, as PNG."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")  # without pyplot: no display, no global state
    axes = figure.subplots()
    best = min(rows, key=lambda row: row["val_loss"])
    draw_pair(axes, rows, "step", "loss", ("val", "validation"), best)
    axes.set(ylabel="loss (nats per character)", title=title)
    figure.savefig(path, dpi=150)


def plot_losses_and_accuracies(rows: LowRank, title: str, path: Path) -> None:
    """Loss on the left and accuracy on the right, of training and test images over epochs, as PNG."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_pair(left, rows, "epoch", "loss", ("test", "test"), min(rows, key=lambda row: row["test_loss"]))
    draw_pair(right, rows, "epoch", "accuracy", ("test", "test"), max(rows, key=lambda row: row["test_accuracy"]))
    left.set(ylabel="loss (nats per image)", yscale="log")
    right.set(ylabel="accuracy")
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def draw_pair(
    axes: Axes, rows: LowRank, over: str, quantity: str, held_out: tuple[str, str], best: dict[str, Any]
) -> None:
    """A quantity of training and of held-out data, which has a name in the rows and one in the legend."""
    key, name = held_out
    x = [row[over] for row in rows]
    axes.plot(x, [row[f"train_{quantity}"] for row in rows], "--.", label="train")
    axes.plot(x, [row[f"{key}_{quantity}"] for row in rows], ".-", label=name)
    value = best[f"{key}_{quantity}"]
    label = f"best {name}: {value:.3f} at {over} {best[over]}"
    axes.axhline(value, color="gray", linewidth=0.8, linestyle=":", label=label)
    axes.set(xlabel=over)
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
