"""The picture of `dykaf_regimes`: validation losses of both regimes, and what separates them from SOAP's."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLORS = {"adamw": "C0", "muon": "C1", "soap": "C4", "dykaf": "C3", "dykaf_rank1": "C2"}
BOLD = ("dykaf", "dykaf_rank1")


def picture(regimes: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Above the losses, below their differences to SOAP's of the same seed: medians over the seeds; of DyKAF's two,
    which set the limits below, the least and the most are shaded.

    Args:
        regimes: curves of each method, as `run_tables.curves` gives them, by regime.
    """
    figure = Figure(figsize=(11, 7.5), layout="constrained")  # without pyplot: no global state
    rows = figure.subplots(2, len(regimes), sharex="col", height_ratios=(3, 2), squeeze=False)
    for (above, below), (regime, found) in zip(rows.T, regimes.items(), strict=True):
        runs = {name: by_seed(one) for name, one in found.items() if one["curves"]}
        soap = runs.get("soap", {})
        apart = {name: [losses[seed] - soap[seed] for seed in losses if seed in soap] for name, losses in runs.items()}
        for name, losses in runs.items():
            draw_line(above, name, found[name], np.array(list(losses.values())))
            if apart[name] and name != "soap":
                draw_line(below, name, found[name], np.array(apart[name]))
        below.axhline(0, color=COLORS["soap"], linewidth=1.2)
        fit(above, [curve for losses in runs.values() for curve in losses.values()])
        fit(below, [curve for name in BOLD for curve in apart.get(name, [])])
        above.set_title(regime)
        below.set_xlabel("step")
    rows[0, 0].set_ylabel("validation loss (nats per character)")
    rows[1, 0].set_ylabel("less SOAP's (nats per character)")
    figure.legend(*rows[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle("Character GPT on tiny Shakespeare, from random parameters and from those of another text")
    return figure


def by_seed(one: Mapping[str, Any]) -> dict[int, np.ndarray]:
    """Validation losses at each evaluation."""
    return dict(zip(one["seeds"], map(np.array, one["curves"]["val_loss"]), strict=True))


def draw_line(axes: Axes, name: str, one: Mapping[str, Any], values: np.ndarray) -> None:
    """A line through the medians of ``values``, (seeds, evaluations)."""
    steps, color, bold = np.array(one["steps"]), COLORS[name], name in BOLD
    middle = np.median(values, 0)
    axes.plot(steps, middle, color=color, label=one["label"], linewidth=2.6 if bold else 1.2, zorder=3 if bold else 2)
    if bold:
        axes.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)


def fit(axes: Axes, curves: list[np.ndarray]) -> None:
    """Limits that show the last three quarters of these, for the first fall is far, and the same for all."""
    axes.grid(alpha=0.3)
    if curves:
        ends = np.concatenate([y[len(y) // 4 :] for y in curves])
        room = 0.1 * (ends.max() - ends.min()) or 1e-3
        axes.set_ylim(ends.min() - room, ends.max() + room)
