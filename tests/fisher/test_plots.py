"""Pictures of a Fisher: written, not blank, showing the numbers they were given."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

from fisher_optax.fisher.plots import block_plot, density_plot, importance_plot, matrices_plot, spectrum_plot
from fisher_optax.fisher.spectra.capacity import BlockSpectrum
from fisher_optax.fisher.spectra.spectrum import Density, Spectrum

λ = jnp.array([3.0, 1.0, 0.1, 0.0, -0.2])
SPECTRUM = Spectrum(λ, jnp.eye(5), jnp.array([1e-7, 1e-7, 0.5, 1e-7, 0.5]))
NODES = jnp.array([[0.0, 1.0], [0.1, 1.2]])
X = jnp.linspace(-1, 2, 50)
DENSITY = Density(X, jnp.exp(-(X**2) / 0.1), jnp.full(50, 0.1), NODES, jnp.full((2, 2), 0.5), 20)
BLOCKS = {
    "tower": BlockSpectrum(jnp.array([2.0, 1.0, 0.0]), 9, 3, True),
    "head": BlockSpectrum(jnp.ones(2), 2, 2, True),
}
MATRICES = {
    name: np.diag(np.arange(7.0)) * scale for name, scale in (("true", 1), ("mc", 10), ("K-FAC", 0), ("EKFAC", -1))
}
MEANS = np.array([0.5, 2.0, 1.0])


def important(means: Any = MEANS, lower: Any = MEANS / 2, upper: Any = 2 * MEANS, **options: Any) -> Any:
    return importance_plot(means, lower, upper, **options)


@pytest.mark.parametrize(
    ("draw", "panels"),
    [
        (lambda path: spectrum_plot(SPECTRUM, path=path), 1),
        (lambda path: spectrum_plot(Spectrum(jnp.zeros(1), jnp.ones((1, 1)), jnp.zeros(1)), path=path), 1),
        (lambda path: density_plot(DENSITY, path=path), 1),
        (lambda path: density_plot(DENSITY, log=False, level=0.5, path=path), 1),
        (lambda path: block_plot(BLOCKS, path=path), 2),
        (lambda path: block_plot({"dead": BlockSpectrum(jnp.zeros(2), 2, 2, True)}, path=path), 2),
        (lambda path: important(labels=["a", "b", "c"], path=path), 1),
        (lambda path: important(lower=[0, 0, 0], log=True, path=path), 1),
        (lambda path: matrices_plot(MATRICES, boundaries={"tower": 5, "head": 2}, path=path), 7),
        (lambda path: matrices_plot({"zero": np.zeros((2, 2))}, path=path), 2),
    ],
    ids=[
        "spectrum",
        "no spectrum",
        "density",
        "linear",
        "blocks",
        "dead block",
        "importance",
        "log",
        "matrices",
        "zero",
    ],
)
def test_a_picture_is_written_and_not_blank(draw: Callable[[Path], Any], panels: int, tmp_path: Path) -> None:
    figure = draw(tmp_path / "plot.png")
    picture = matplotlib.image.imread(tmp_path / "plot.png")
    assert picture.shape == (*(figure.get_size_inches() * 150).astype(int)[::-1], 4)
    assert 0.01 < (picture[..., :3].min(-1) < 0.95).mean() < 0.9
    assert len(figure.axes) == panels
    assert figure.get_suptitle()
    assert all(axes.get_xlabel() or axes.get_title() or axes.get_ylabel() or not axes.axison for axes in figure.axes)


def test_spectrum_shows_signs_and_what_has_not_converged() -> None:
    lines = {line.get_label(): line for line in spectrum_plot(SPECTRUM).axes[0].lines}
    shown = {name: line.get_xydata().tolist() for name, line in lines.items() if "residual" not in name}
    assert shown == {
        "eigenvalue": [[1, 3], [2, 1]],
        "eigenvalue, not converged": [[3, pytest.approx(0.1)]],
        "negative, its size, not converged": [[5, pytest.approx(0.2)]],
    }
    assert lines["eigenvalue, not converged"].get_markerfacecolor() == "none"


def test_density_names_the_trace() -> None:
    assert "trace 11.5, 95% in" in density_plot(DENSITY).get_suptitle()


def test_importance_is_sorted_and_cut() -> None:
    figure = important(labels=["a", "b", "c"], top=2, title="Units")
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b", "c"]
    np.testing.assert_allclose(axes.lines[0].get_xdata(), [2, 1])
    assert figure.get_suptitle() == "Units: the largest 2 of 3"


def test_matrices_share_one_scale_and_one_order() -> None:
    """Entries are those of the permuted matrices, down to the scale's lower end."""
    figure = matrices_plot(MATRICES, order=np.arange(7)[::-1], decades=2)
    images = [axes.images[0] for axes in figure.axes if axes.images]
    assert [image.get_clim() for image in images] == [pytest.approx((np.log10(60) - 2, np.log10(60)))] * 4
    for image, A in zip(images, MATRICES.values(), strict=True):
        np.testing.assert_allclose(image.get_array(), np.log10(np.maximum(np.abs(A[::-1, ::-1]), 0.6)))


def test_large_matrices_are_pooled_by_means() -> None:
    A = np.random.default_rng(0).normal(size=(1201, 1201))
    picture = matrices_plot({"A": A}).axes[0].images[0].get_array()
    assert picture.shape == (401, 401)
    np.testing.assert_allclose(picture[0, 1], np.log10(np.abs(A[:3, 3:6]).mean()))
    np.testing.assert_allclose(picture[-1, -1], np.log10(np.abs(A[-1, -1])))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: density_plot(DENSITY, level=95), r"level is 95"),
        (lambda: block_plot({}), r"there is no block"),
        (lambda: important(lower=[1.0]), r"lower \(1,\)"),
        (lambda: important(labels=["a"]), r"1 labels"),
        (lambda: important(upper=MEANS / 4), r"'0' is 0.5 in \[0.25, 0.125\]; wanted finite"),
        (lambda: important(means=[1, np.nan, 1], labels=["a", "b", "c"]), r"'b' is nan"),
        (lambda: matrices_plot({}), r"wanted matrices"),
        (
            lambda: matrices_plot({"A": np.eye(2), "B": np.eye(3)}),
            r"'B' has shape \(3, 3\); wanted finite entries, 2 x 2",
        ),
        (lambda: matrices_plot({"A": np.full((2, 2), np.nan)}), r"'A' has entries that are not finite"),
        (lambda: matrices_plot({"A": np.eye(2)}, order=[0, 0]), r"each of 0 to 1 once in their order; got \[0, 0\]"),
        (lambda: matrices_plot({"A": np.eye(2)}, boundaries={"head": 3}), r"add up to 3; wanted 2"),
    ],
)
def test_errors_say_what_to_do(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'fisher_optax\[plots\]'"):
        spectrum_plot(SPECTRUM)
