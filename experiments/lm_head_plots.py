"""Pictures of what `lm_head.py` finds, as PNG."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import fisher_optax as fo
from experiments.lm_head_report import Findings, interval, ratios

IMPORTANCE = "Fisher of the token's row (loss per parameter², summed)"
MOST_ROWS = 120  # of one picture
NAMED = 30  # tokens with their names beside their points


def draw(found: Findings, path: Path) -> None:
    """All six pictures."""
    m, plots = found.measured, fo.fisher.plots
    few = f"{found.config.spectrum_sequences} sequences"
    draw_importance(found, path / "importance.png")
    draw_shift(found, path / "shift.png")
    draw_labels(found, path / "labels.png")
    plots.spectrum_plot(m.spectrum, title=f"True Fisher of {few}: largest eigenvalues", path=path / "spectrum.png")
    plots.density_plot(
        m.density, level=found.config.level, title=f"True Fisher of {few}: density", path=path / "density.png"
    )
    title = f"Blocks of the Fisher of {m.drawn} labels drawn from the model"
    plots.block_plot(m.blocks, title=title, path=path / "blocks.png")


def draw_importance(found: Findings, path: Path) -> None:
    """Of every token, sorted."""
    fisher = found.measured.model
    lower, upper = interval(fisher, found.config.level)
    title = f"Tokens of {found.texts[0].name}, with {found.config.level:.0%} intervals"
    figure = fo.fisher.plots.importance_plot(
        np.asarray(fisher.mean), lower, upper, [plain(name) for name in found.names], top=MOST_ROWS,
        quantity=IMPORTANCE, log=True, title=title,
    )  # fmt: skip
    rows = min(len(found.names), MOST_ROWS)
    figure.set_size_inches(8, 1.5 + 0.135 * rows)
    figure.axes[0].tick_params("y", labelsize=8)
    figure.savefig(path, dpi=150)


def draw_shift(found: Findings, path: Path) -> None:
    """Shares of either text; those that differ beyond doubt in colour, the clearest with their names."""
    m, config = found.measured, found.config
    (x, left, right), (y, down, up) = (
        np.array([fisher.mean, *interval(fisher, config.level)]) / float(np.sum(fisher.mean))
        for fisher in (m.model, m.other)
    )
    figure = Figure(figsize=(8, 8), layout="constrained")
    axes = figure.subplots()
    low, high = 0.5 * min(x[x > 0].min(), y[y > 0].min()), 2 * max(x.max(), y.max())
    axes.plot([low, high], [low, high], color="gray", linewidth=0.8)
    more = found.shift.difference > 0
    for those, colour, name in (
        (~found.shift.significant, "0.65", "no difference shown"),
        (found.shift.significant & ~more, "C0", f"more in {found.texts[0].name}"),
        (found.shift.significant & more, "C3", f"more in {found.texts[1].name}"),
    ):
        axes.errorbar(
            x[those], y[those], xerr=np.array([x - left, right - x])[:, those],
            yerr=np.array([y - down, up - y])[:, those], fmt="o", color=colour, markersize=3.5, linewidth=0.6,
            label=f"{name} ({int(those.sum())})",
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), aspect="equal")
    axes.set(xlabel=f"share of the trace on {found.texts[0].name}", ylabel=f"share on {found.texts[1].name}")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize=9)
    figure.suptitle(f"Importance of tokens on two texts, with {config.level:.0%} intervals")
    clearest = [i for i in np.argsort(found.shift.p) if found.shift.significant[i]][:NAMED]
    colours = np.where(more, "C3", "C0")
    bars = [np.array(ends)[..., found.shift.significant] for ends in (((left, y), (right, y)), ((x, down), (x, up)))]
    name_points(axes, x, y, found.names, clearest, bars, colours)
    figure.savefig(path, dpi=150)


def draw_labels(found: Findings, path: Path) -> None:
    """Left the head alone, against its closed form; right what the text's own labels make of it, by frequency."""
    m = found.measured
    figure = Figure(figsize=(13, 6), layout="constrained")
    left, right = figure.subplots(1, 2)
    true = np.asarray(m.head_true)
    for fisher, colour, name in ((m.head_model, "C0", "model's labels"), (m.head_empirical, "C1", "text's labels")):
        mean, lower, upper = np.array([fisher.mean, *interval(fisher, found.config.level)])
        bars = np.array([mean - lower, upper - mean])
        left.errorbar(true, mean, bars, fmt="o", color=colour, markersize=3.5, linewidth=0.7, label=name)
    ends = np.array([true[true > 0].min() / 2, 2 * true.max()])
    left.plot(ends, ends, color="gray", linewidth=0.8, label="equal")
    left.set(xscale="log", yscale="log", xlabel="all labels, exact", ylabel="estimate")
    left.set_title(f"the head alone: {IMPORTANCE}", fontsize=10)
    shown = np.maximum(found.counts, 0.5)  # a place on the axis for what never occurs
    for (name, ratio), colour in zip(ratios(m).items(), ("C1", "C2"), strict=True):
        right.plot(shown, ratio, "o", color=colour, markersize=4, label=name)
    right.axhline(1, color="gray", linewidth=0.8)
    right.set(
        xscale="log",
        yscale="log",
        xlim=(0.25, 2 * shown.max()),
        xlabel="how often the token occurs",
        ylabel="text's labels / model's labels",
    )
    ticks = 10.0 ** np.arange(0, np.ceil(np.log10(max(found.counts.max(), 10))) + 1)
    right.set_xticks([0.5, *ticks], ["never", *(f"{tick:,.0f}" for tick in ticks)])
    right.set_title("what the text's own labels make of it", fontsize=10)
    both = ratios(m)
    row = (shown, both["whole row"])
    name_points(right, shown, both["head"], found.names, extremes(both["head"]), [np.array([row, row])])
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"Empirical against true Fisher, {found.texts[0].name}")
    figure.savefig(path, dpi=150)


def extremes(ratio: np.ndarray) -> list[int]:
    """Places of the points farthest from 1."""
    return [i for i in np.argsort(-np.abs(np.log(np.maximum(ratio, 1e-30)))) if np.isfinite(ratio[i])][:NAMED]


def name_points(
    axes: Axes,
    x: np.ndarray,
    y: np.ndarray,
    names: Sequence[str],
    chosen: Sequence[int],
    bars: Any = (),
    colours: Any = None,
) -> None:
    """Names beside points, first come, first served: where there is no room left, none.

    Args:
        bars: pairs of ends ``((x, y), (x, y))``, which names keep off as they do off the points.
        colours: of the names, one a point; black by default.
    """
    figure: Any = axes.get_figure()
    figure.draw_without_rendering()  # places on the page are known from here on
    unit = figure.dpi / 72
    on_page = lambda ends: axes.transData.transform(np.maximum(np.column_stack(ends), 1e-30))  # noqa: E731
    points = on_page((x, y))
    taken = [np.hstack([points - 3 * unit, points + 3 * unit])]
    taken += [np.hstack([on_page(low) - unit / 2, on_page(high) + unit / 2]) for low, high in bars]
    boxes, inside = np.vstack(taken), np.array(axes.get_window_extent().extents)
    for i in chosen:
        size = np.array([2 + 6 * len(names[i]), 9]) * unit
        if (place := free_place(points[i], size, boxes, inside, unit)) is None:
            continue
        boxes = np.vstack([boxes, np.concatenate([place - size / 2, place + size / 2])])
        colour, far = "black" if colours is None else colours[i], np.abs(place - points[i]).max() > 10 * unit
        axes.annotate(
            plain(names[i]), (x[i], y[i]), tuple((place - points[i]) / unit), textcoords="offset points",
            fontsize=9, color=colour, ha="center", va="center",
            arrowprops=dict(arrowstyle="-", linewidth=0.4, color=colour, shrinkA=4, shrinkB=0) if far else None,
        )  # fmt: skip


def free_place(
    point: np.ndarray, size: np.ndarray, boxes: np.ndarray, inside: np.ndarray, unit: float
) -> np.ndarray | None:
    """The centre of a box of that size near a point, over none of ``boxes``, each ``(x0, y0, x1, y1)``; in pixels."""
    for gap in (2, 6, 12, 20, 30):
        for angle in np.pi / 4 * np.arange(1, 9):
            way = np.array([np.cos(angle), np.sin(angle)])
            centre = point + way * (gap * unit + size / 2)
            low, high = centre - size / 2, centre + size / 2
            over = (low < boxes[:, 2:]).all(1) & (high > boxes[:, :2]).all(1)
            if not over.any() and (low >= inside[:2]).all() and (high <= inside[2:]).all():
                return centre
    return None


def plain(name: str) -> str:
    """What matplotlib does not read as mathematics."""
    return name.replace("$", r"\$")
