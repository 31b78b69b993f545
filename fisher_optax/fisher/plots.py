"""Pictures of a Fisher: its largest eigenvalues, its density, its blocks, the importance of parameters, its entries.

Each function returns a `matplotlib.figure.Figure`, drawn without pyplot (no display, no global state), and saves it
where ``path`` is given. All need matplotlib (``pip install 'fisher_optax[plots]'``); the ImportError says so.
"""

import math
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import IO, TYPE_CHECKING

import numpy as np
from jax.typing import ArrayLike
from scipy.special import stdtrit

from .spectra.capacity import BlockSpectrum
from .spectra.spectrum import Density, Spectrum

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Target = str | PathLike[str] | IO[bytes]  # what a picture is saved to
Numbers = ArrayLike | Sequence[ArrayLike]

# Side of the largest picture of a matrix.
PIXELS = 600
EIGENVALUE = "eigenvalue (loss per parameter²)"


def spectrum_plot(spectrum: Spectrum, *, title: str = "Largest eigenvalues", path: Target | None = None) -> "Figure":
    """Eigenvalues by rank on a logarithmic axis, with their residuals; hollow where they have not converged.

    Negative ones are shown by their size, in red.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> from fisher_optax.fisher.spectra.spectrum import spectrum
      >>> A = fo.fisher.Operator.from_dense(jnp.diag(jnp.array([4.0, 1.0, 2.0])), jnp.zeros(3))
      >>> print(spectrum_plot(spectrum(A, 2)).axes[0].get_xlabel())
      rank of the eigenvalue
    """
    λ, residuals, converged = (np.asarray(x) for x in (spectrum.eigenvalues, spectrum.residuals, spectrum.converged))
    figure = _figure(7, 4.5)
    axes = figure.subplots()
    rank = np.arange(1, len(λ) + 1)
    axes.plot(rank, residuals, "-", color="gray", linewidth=1, label="residual |A v - λ v|")
    for colour, of, name in (("C0", λ > 0, "eigenvalue"), ("C3", λ < 0, "negative, its size")):
        for face, those, state in ((colour, converged, ""), ("none", ~converged, ", not converged")):
            if (shown := of & those).any():
                axes.plot(rank[shown], abs(λ[shown]), "o", color=colour, markerfacecolor=face, label=name + state)
    known = np.concatenate([abs(λ), residuals])
    if λ.any():
        floor = max(known[known > 0].min(), np.finfo(λ.dtype).eps * known.max())
        axes.set(yscale="log", ylim=(floor / 2, 2 * known.max()))
    axes.set(xlabel="rank of the eigenvalue", ylabel=EIGENVALUE)
    axes.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]
    axes.grid(alpha=0.3)
    axes.legend()
    said = f"condition number of those found {float(spectrum.condition_number):.3g}"
    said += f", gap {float(spectrum.gap):.2f}" if len(λ) > 1 else ""
    return _finish(figure, f"{title}\n{said}", path)


def density_plot(
    density: Density,
    *,
    level: float = 0.95,
    log: bool = True,
    title: str = "Spectral density",
    path: Target | None = None,
) -> "Figure":
    """The density with a band of Student's intervals over the random vectors, and the trace's in the title.

    Args:
      level: of the intervals.
      log: whether the density's axis is logarithmic, down to a tenth of a single eigenvalue's peak or so.
    """
    if not 0 < level < 1:
        raise ValueError(f"density_plot: level is {level}; wanted a probability between 0 and 1.")
    x, φ, error = (np.asarray(a, np.float64) for a in (density.grid, density.values, density.standard_error))
    t = stdtrit(len(density.nodes) - 1, (1 + level) / 2)
    peak = φ.max() or 1.0
    floor = peak / (100 * density.size) if log else 0.0
    figure = _figure(7, 4.5)
    axes = figure.subplots()
    low, high = np.maximum(φ - t * error, floor), np.maximum(φ + t * error, floor)
    axes.fill_between(x, low, high, alpha=0.3, linewidth=0, label=f"{100 * level:g}% interval")
    axes.plot(x, np.maximum(φ, floor), linewidth=1.2, label=f"mean of {len(density.nodes)} vectors")
    axes.set(xlabel=EIGENVALUE, ylabel="density (1 / eigenvalue)", xlim=(x.min(), x.max()))
    if log:
        axes.set(yscale="log", ylim=(floor, 2 * max(high.max(), peak)))
    axes.grid(alpha=0.3)
    axes.legend()
    a, b = density.trace_interval(level)
    return _finish(figure, f"{title}\ntrace {float(density.trace):.4g}, {100 * level:g}% in [{a:.4g}, {b:.4g}]", path)


def block_plot(spectra: Mapping[str, BlockSpectrum], *, title: str = "Blocks", path: Target | None = None) -> "Figure":
    """Left the eigenvalues of each block, right how many directions it uses, in the same colours."""
    if not spectra:
        raise ValueError("block_plot: there is no block; wanted what block_spectra returns.")
    from matplotlib import colormaps

    figure = _figure(12, max(4.5, 1.5 + 0.3 * len(spectra)))
    left, right = figure.subplots(1, 2)
    colours = colormaps["viridis"](np.linspace(0, 0.9, len(spectra)))
    largest = max(float(np.max(block.eigenvalues)) for block in spectra.values())
    for block, colour in zip(spectra.values(), colours, strict=True):
        λ = np.asarray(block.eigenvalues)
        shown = λ > 10 * np.finfo(λ.dtype).eps * largest  # less is rounding
        left.plot(np.arange(1, len(λ) + 1)[shown], λ[shown], ".-", color=colour, markersize=3, linewidth=1)
    left.set(xlabel="rank of the eigenvalue", ylabel=EIGENVALUE, xscale="log")
    if largest > 0:
        left.set(yscale="log")
    places = np.arange(len(spectra))
    effective, participation, bound = (
        [float(getattr(block, name)) for block in spectra.values()]
        for name in ("effective_rank", "participation", "rank_bound")
    )
    right.barh(places, effective, color=colours, label="effective rank")
    right.plot(participation, places, "o", color="C1", label="participation ratio")
    right.plot(bound, places, "|", color="black", markersize=12, label="rank bound")
    right.set(xscale="log", xlabel="directions", yticks=places, yticklabels=list(spectra), xlim=(0.5, 2 * max(bound)))
    right.invert_yaxis()
    for axes in (left, right):
        axes.set_axisbelow(True)
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower right", ncols=3, handles=right.get_legend_handles_labels()[0])
    return _finish(figure, title, path)


def importance_plot(
    means: Numbers,
    lower: Numbers,
    upper: Numbers,
    labels: Sequence[str] | None = None,
    *,
    top: int = 40,
    quantity: str = "importance",
    log: bool = False,
    title: str = "Importance",
    path: Target | None = None,
) -> "Figure":
    """The largest ``top`` of these estimates, sorted, each with its interval.

    Args:
      means, lower, upper: ``(n,)`` each.
      labels: n names; by default the places in ``means``.
      quantity: what is estimated, with its unit.
      log: whether the axis is logarithmic; an interval that reaches 0 then ends at the left edge.

    Raises:
      ValueError: where lengths differ, a number is not finite, or a mean lies outside its interval.
    """
    m, low, high = (np.asarray(x, np.float64) for x in (means, lower, upper))
    names = [str(i) for i in range(m.size)] if labels is None else list(labels)
    if m.ndim != 1 or not m.size or not m.shape == low.shape == high.shape == (len(names),):
        got = f"means {m.shape}, lower {low.shape}, upper {high.shape}, {len(names)} labels"
        raise ValueError(f"importance_plot: got {got}; wanted one number and one label for each.")
    # Written so that NaN fails too.
    if not (np.isfinite(high - low) & (low <= m) & (m <= high)).all():
        i = int(np.argmin(np.isfinite(high - low) & (low <= m) & (m <= high)))
        raise ValueError(
            f"importance_plot: {names[i]!r} is {m[i]:.3g} in [{low[i]:.3g}, {high[i]:.3g}]; wanted finite numbers, "
            "lower <= mean <= upper."
        )
    order = np.argsort(-m, kind="stable")[:top]
    places = np.arange(len(order))
    figure = _figure(7, 1.6 + 0.2 * len(order))
    axes = figure.subplots()
    bars = np.stack([m - low, high - m])[:, order]
    axes.errorbar(m[order], places, xerr=bars, fmt="o", markersize=4, capsize=2, linewidth=1)
    if log and (m[order] > 0).any():
        ends = np.concatenate([low[order], m[order]])
        axes.set(xscale="log", xlim=(ends[ends > 0].min() / 2, 2 * high[order].max()))
    axes.set(xlabel=quantity, yticks=places, yticklabels=[names[i] for i in order], ylim=(len(order) - 0.4, -0.6))
    axes.grid(alpha=0.3)
    return _finish(figure, title if len(order) == m.size else f"{title}: the largest {len(order)} of {m.size}", path)


def matrices_plot(
    matrices: Mapping[str, ArrayLike],
    *,
    order: Numbers | None = None,
    boundaries: Mapping[str, int] | None = None,
    decades: float = 4,
    title: str = "log |F|",
    path: Target | None = None,
) -> "Figure":
    """``log10 |F|`` of dense matrices side by side, three in a row, in one order and on one scale of colours.

    Above 600 rows a pixel is the mean of |F| over a square.

    Args:
      matrices: name -> (D, D).
      order: a permutation of the D parameters, for all; by default as they are.
      boundaries: name -> number of parameters of each block, in that order, D in all; lines are drawn between.
      decades: powers of ten that the colours span, down from the largest pixel of all; what is less looks like 0.

    Raises:
      ValueError: for matrices that are not square, of one size and finite, an order that is no permutation, and
        boundaries that do not add up to D.
    """
    F = {name: np.abs(np.asarray(A)) for name, A in matrices.items()}
    D = len(next(iter(F.values()), ()))
    at = np.arange(D) if order is None else np.asarray(order)
    for name, A in F.items():
        if A.shape != (D, D) or not np.isfinite(A).all():
            what = f"shape {A.shape}" if A.shape != (D, D) else "entries that are not finite"
            raise ValueError(f"matrices_plot: {name!r} has {what}; wanted finite entries, {D} x {D}, for all.")
    if not D or not np.array_equal(np.sort(at), np.arange(D)):
        raise ValueError(f"matrices_plot: wanted matrices, and each of 0 to {D - 1} once in their order; got {order}.")
    if boundaries is not None and sum(boundaries.values()) != D:
        raise ValueError(f"matrices_plot: boundaries add up to {sum(boundaries.values())}; wanted {D}, one a row.")
    pictures = {name: _pooled(A[np.ix_(at, at)]) for name, A in F.items()}
    top = math.log10(max(P.max() for P in pictures.values()) or 1)
    rows = math.ceil(len(F) / 3)
    figure = _figure(4 * min(len(F), 3) + 1, 3.9 * rows + 0.6)
    panels = figure.subplots(rows, min(len(F), 3), squeeze=False)
    image = None
    for i, axes in enumerate(panels.flat):
        if i >= len(F):
            axes.set_axis_off()
            continue
        name, P = list(pictures.items())[i]
        shown = np.log10(np.maximum(P, 10.0 ** (top - decades)))
        image = axes.imshow(shown, vmin=top - decades, vmax=top, extent=(0, D, D, 0), interpolation="nearest")
        axes.set_title(name)
        if boundaries is None:
            axes.set(xlabel="parameter", ylabel="parameter")
        else:
            _draw_boundaries(axes, boundaries, first=i % 3 == 0)
    assert image is not None
    figure.colorbar(image, ax=panels, label="log10 |F| (loss per parameter²)", shrink=0.8)
    return _finish(figure, title, path)


def _pooled(A: np.ndarray) -> np.ndarray:
    """Means over squares, of the least side that leaves few enough."""
    starts = np.arange(0, len(A), math.ceil(len(A) / PIXELS))
    counts = np.diff(starts, append=len(A))
    return np.add.reduceat(np.add.reduceat(A, starts, 0), starts, 1) / np.outer(counts, counts)


def _draw_boundaries(axes: "Axes", boundaries: Mapping[str, int], first: bool) -> None:
    """Lines between blocks, and on the first panel of a row the names of those with room for one."""
    sizes = np.array(list(boundaries.values()))
    ends = np.cumsum(sizes)
    for end in ends[:-1]:
        axes.axhline(end, color="white", linewidth=0.4)
        axes.axvline(end, color="white", linewidth=0.4)
    centres, roomy = ends - sizes / 2, []
    for i, centre in enumerate(centres):
        if not roomy or centre - centres[roomy[-1]] >= 0.04 * ends[-1]:
            roomy.append(i)
    axes.set(xticks=[], yticks=centres[roomy] if first else [])
    if first:
        axes.set_yticklabels([list(boundaries)[i] for i in roomy], fontsize=8)


def _figure(width: float, height: float) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise ImportError(
            "pictures need matplotlib, which is not installed: pip install 'fisher_optax[plots]'"
        ) from missing
    return Figure(figsize=(width, height), layout="constrained")


def _finish(figure: "Figure", title: str, path: Target | None) -> "Figure":
    figure.suptitle(title)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure
