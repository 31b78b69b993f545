"""Pictures of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def plot_losses(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Training and validation loss over steps, as PNG. ``rows`` are the lines of ``metrics.jsonl``."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")  # without pyplot: no display, no global state
    axes = figure.subplots()
    steps = [row["step"] for row in rows]
    axes.plot(steps, [row["train_loss"] for row in rows], "--.", label="train")
    axes.plot(steps, [row["val_loss"] for row in rows], ".-", label="validation")
    best = min(rows, key=lambda row: row["val_loss"])
    label = f"best validation: {best['val_loss']:.3f} at step {best['step']}"
    axes.axhline(best["val_loss"], color="gray", linewidth=0.8, linestyle=":", label=label)
    axes.set(xlabel="step", ylabel="loss (nats per character)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
