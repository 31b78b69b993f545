"""Pictures of results: bars of a column with low and high, and lines in a band."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from benchmarks.results import ends, middle


class Bars(NamedTuple):
    """A panel: a column of a table's rows, and what is marked on it."""

    rows: Mapping[str, Mapping[str, Any]]
    column: str
    title: str
    marks: Mapping[str, str] = {}  # columns that are marked on the bars, and what the legend calls them
    log: bool = False


def bars(title: str, *panels: Bars) -> Figure:
    """Panels beside each other; the rows of the first name all."""
    longest = max(len(panel.rows) for panel in panels)
    figure = Figure(figsize=(4 + 3.4 * len(panels), 1.7 + 0.3 * longest), layout="constrained")  # without pyplot
    for i, (axes, panel) in enumerate(zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True)):
        draw_bars(axes, panel)
        axes.set(title=panel.title, xscale="log" if panel.log else "linear")
        axes.tick_params(labelleft=not i)
    figure.suptitle(title)
    if labels := figure.axes[0].get_legend_handles_labels()[1]:
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(labels))
    return figure


def draw_bars(axes: Axes, panel: Bars) -> None:
    labels = [str(row.get("label") or name).replace("`", "") for name, row in panel.rows.items()]
    cells = {i: row[panel.column] for i, row in enumerate(panel.rows.values()) if row.get(panel.column) is not None}
    values = [middle(cell) for cell in cells.values()]
    around = np.abs(np.array([ends(cell) for cell in cells.values()]).T - values)
    axes.barh([*cells], values, xerr=around, color="C0", ecolor="0.3")
    for (column, label), marker in zip(panel.marks.items(), "|od", strict=False):
        marked = [(middle(row[column]), i) for i, row in enumerate(panel.rows.values()) if row.get(column) is not None]
        x, y = zip(*marked, strict=True) if marked else ((), ())
        axes.scatter(x, y, marker=marker, color="black", s=60 if marker == "|" else 25, zorder=3, label=label)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(alpha=0.3, axis="x")


def line(axes: Axes, x: Sequence[float], cells: Iterable[Any], style: str, **options: Any) -> None:
    """Through the medians of cells, in the band of their ends."""
    cells = list(cells)
    low, high = zip(*map(ends, cells), strict=True)
    (drawn,) = axes.plot(x, [middle(cell) for cell in cells], style, **{"linewidth": 1.6, **options})
    axes.fill_between(x, low, high, color=drawn.get_color(), alpha=0.15, linewidth=0)


def plain_ticks(axes: Axes, x: Sequence[float] = ()) -> None:
    """Numbers instead of powers of ten on a logarithmic vertical axis, and at ``x`` where it is given; and a grid."""
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    if x:
        axes.set_xticks(x, [f"{size:g}" for size in x])
        axes.xaxis.set_minor_locator(NullLocator())
