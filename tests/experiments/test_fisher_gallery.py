"""The gallery from command line to files: every method is measured, the picture has one scale, and errors are lines."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from flax import linen as nn
from jax.flatten_util import ravel_pytree
from matplotlib.figure import Figure

from experiments import fisher_gallery
from experiments.images import load_images
from fisher_optax.fisher.operators.approximations import METHODS
from tests.experiments.experiment_runs import flags, refusal
from tests.experiments.test_image_parts import TINY, random_part, write_mnist

fail = functools.partial(refusal, fisher_gallery.main)


class TinyCNN(nn.Module):
    """The same layers, each as small as can be."""

    classes: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(1, (2, 2), strides=4, name="conv1")(images))
        x = nn.relu(nn.Conv(2, (1, 1), name="conv2")(x))
        return nn.Dense(self.classes, name="head")(x.mean((1, 2)))


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    folder = tmp_path / "mnist"
    folder.mkdir()
    write_mnist(folder, TINY)
    return folder


def test_the_model_has_as_many_parameters_as_it_says() -> None:
    for side in (8, 28):
        shapes = jax.eval_shape(fisher_gallery.SmallCNN(10).init, jax.random.key(0), jnp.zeros((1, side, side, 1)))
        assert sum(x.size for x in jax.tree.leaves(shapes)) == 3818


def test_all_methods_are_shown() -> None:
    assert {method for method, _ in fisher_gallery.SHOWN.values()} == set(METHODS)
    assert set(fisher_gallery.PANELS) - set(fisher_gallery.SHOWN) == {"true", "empirical"}


def test_a_small_run(
    tmp_path: Path, mnist: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All files, the methods in both tables, six panels on one scale of colours and a progress bar."""
    monkeypatch.setattr(fisher_gallery, "SmallCNN", TinyCNN)
    shown = {
        name: fisher_gallery.SHOWN[name] for name in ("exact blocks", *fisher_gallery.PANELS[1:3], "EKFAC", "SOAP")
    }
    monkeypatch.setattr(fisher_gallery, "SHOWN", shown)
    drawn: list[Figure] = []
    plot = fisher_gallery.matrices_plot
    monkeypatch.setattr(fisher_gallery, "matrices_plot", lambda *a, **k: drawn.append(plot(*a, **k)))
    out = tmp_path / "deep" / "gallery"
    fisher_gallery.main(flags(data=mnist, epochs=1, examples=5, out=out))
    printed = capsys.readouterr()
    assert "12/12" in printed.err

    (figure,) = drawn
    images = [axes.images[0] for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in figure.axes[:6]] == list(fisher_gallery.PANELS)
    assert len({image.get_clim() for image in images[:6]}) == 1
    assert len({np.asarray(image.get_array()).shape for image in images[:6]}) == 1
    assert matplotlib.image.imread(out / "gallery.png").shape[0] > 500

    saved: dict[str, Any] = json.loads((out / "gallery.json").read_text())
    assert saved["config"] == {"data": load_images(str(mnist)).name, "epochs": 1, "examples": 5, "seed": 0}
    assert saved["versions"]["jax"] == jax.__version__
    assert set(saved["errors"]["empirical"]) == set(shown)
    assert set(saved["errors"]["true"]) == {*shown, "empirical Fisher"}
    for fisher in ("true", "empirical"):
        errors = {name: row["relative_error"] for name, row in saved["errors"][fisher].items()}
        assert errors["exact blocks"] == min(errors[name] for name in shown)
        assert errors["EKFAC"] <= errors["K-FAC"] * (1 + 1e-5)
    table = (out / "gallery.md").read_text()
    assert table in printed.out
    assert all(f"\n| {name} |" in table for name in shown)


def test_parameters_are_ordered_by_layers_as_matrices_with_the_bias_below() -> None:
    params = TinyCNN(3).init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
    flat = np.asarray(ravel_pytree(params)[0])
    order, sizes = fisher_gallery.ordering(params)
    assert sizes == {"conv1": 5, "conv2": 4, "head": 9}
    expected = [np.ravel(params[layer][leaf]) for layer in sizes for leaf in ("kernel", "bias")]
    np.testing.assert_array_equal(flat[order], np.concatenate(expected))


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        ({"epochs": 0}, "--epochs must be at least 1, not 0"),
        ({"examples": 0}, "--examples must be at least 1, not 0"),
        ({"examples": 1438}, "--examples must be at most 1437, the number of training images, not 1438"),
        ({"seed": -1}, "--seed must be at least 0 and less than 2^31, not -1"),
        ({"seed": "x"}, "argument --seed: invalid int value: 'x'"),
        ({"data": "/nowhere"}, "no folder '/nowhere'. --data takes 'digits', or a folder"),
    ),
    ids=lambda value: value if isinstance(value, str) else " ".join(flags(**value)),
)
def test_a_bad_option_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: dict[str, Any], message: str
) -> None:
    assert message in fail(capsys, *flags(**arguments, out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_small_images_and_a_folder_that_is_a_file_are_named(
    tmp_path: Path, mnist: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert "exists" in fail(capsys, *flags(data=mnist, examples=2, out=tmp_path / "file"))
    write_mnist(mnist, TINY._replace(train=random_part(20, 7, 8, 1), test=random_part(5, 7, 8, 1)))
    assert "8 x 8 pixels or more" in fail(capsys, *flags(data=mnist, examples=2, out=tmp_path / "run"))
