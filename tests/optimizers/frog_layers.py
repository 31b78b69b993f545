"""Layers of every geometry with random samples, what the reference makes of them, and runs of FROG on them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisher_optax as fo
from fisher_optax.statistics import Samples, Window
from tests.reference.frog import frog_row, kfrog_row, patches

METHODS = {"frog": (fo.frog, frog_row), "kfrog": (fo.kfrog, kfrog_row)}
each_method = pytest.mark.parametrize("method", METHODS)


def window(
    shape: tuple[int, ...], strides: Any = None, padding: Any = None, lhs: Any = None, rhs: Any = None
) -> Window:
    ones, none = (1,) * len(shape), ((0, 0),) * len(shape)
    return Window(shape, strides or ones, padding or none, lhs or ones, rhs or ones)


class Case(NamedTuple):
    """A layer and the shapes of its samples."""

    kernel: tuple[int, ...]
    inputs: tuple[int, ...]
    gradients: tuple[int, ...]
    window: Window | None = None
    bias: bool = False


GEOMETRY = window((3, 2), (2, 1), ((1, 0), (0, 2)), rhs=(1, 2))
LAYERS = {
    "dense": Case((5, 3), (9, 5), (9, 3)),
    "dense-bias": Case((5, 3), (9, 5), (9, 3), bias=True),
    "fewer-samples": Case((6, 3), (4, 6), (4, 3), bias=True),
    "conv": Case((3, 3, 2, 3), (4, 5, 4, 2), (4, 5, 4, 3), window((3, 3), padding=((1, 1), (1, 1)))),
    "conv-1d-bias": Case((3, 2, 4), (4, 6, 2), (4, 4, 4), window((3,)), bias=True),
    "conv-geometry-bias": Case((3, 2, 2, 3), (4, 6, 5, 2), (4, 3, 5, 3), GEOMETRY, bias=True),
    "conv-of-spread-inputs": Case((2, 2, 2, 3), (4, 3, 3, 2), (4, 4, 4, 3), window((2, 2), lhs=(2, 2)), bias=True),
}
each_layer = pytest.mark.parametrize("layer", LAYERS)


def sampled(case: Case, seed: int = 0, dtype: Any = None) -> tuple[Any, Samples]:
    """A gradient and samples of a layer called "layer"."""
    rng = np.random.default_rng(seed)
    draw = lambda shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    leaves = {"kernel": draw(case.kernel)} | ({"bias": draw(case.kernel[-1:])} if case.bias else {})
    samples = Samples(draw(case.inputs), draw(case.gradients), jnp.ones([]), window=case.window)
    return {"layer": leaves}, samples


def given(samples: Samples) -> Any:
    return {"layer": {"kernel": samples, "bias": None}}


def joined(tree: Any) -> np.ndarray:
    """The layer's matrix."""
    leaves = {name: np.asarray(x, np.float64) for name, x in tree["layer"].items()}
    rows = [leaves["kernel"].reshape(-1, leaves["kernel"].shape[-1])]
    return np.concatenate([*rows, *([leaves["bias"][None]] if "bias" in leaves else [])])


def rows_of(samples: Samples, bias: bool) -> tuple[np.ndarray, np.ndarray]:
    """X and Y, written out."""
    x, y, w = (np.asarray(samples.inputs), np.asarray(samples.gradients), samples.window)
    if w is not None:
        places = [(n - 1) * gap + 1 for n, gap in zip(x.shape[1:-1], w.lhs_dilation, strict=True)]
        spread = np.zeros((len(x), *places, x.shape[-1]))
        spread[(slice(None), *(slice(None, None, gap) for gap in w.lhs_dilation))] = x
        x = patches(spread, w.shape, w.strides, w.padding, w.rhs_dilation)
    return np.concatenate([x, np.ones((len(x), 1))], axis=1) if bias else x, y.reshape(len(x), -1)


def run(tx: optax.GradientTransformationExtraArgs, params: Any, steps: list[tuple[Any, Samples]]) -> list[np.ndarray]:
    """The layer's matrix after each step, under jit."""
    state, update, path = tx.init(params), jax.jit(tx.update), []
    for grads, samples in steps:
        updates, state = update(grads, state, params, statistics=given(samples))
        params = optax.apply_updates(params, updates)
        path.append(joined(params))
    return path


def direction(tx: optax.GradientTransformationExtraArgs, grads: Any, samples: Samples) -> Any:
    return jax.jit(tx.update)(grads, tx.init(grads), grads, statistics=given(samples))[0]


def assert_same(actual: Any, wanted: np.ndarray, start: Any, tolerance: float) -> None:
    """Within ``tolerance`` of the distance moved."""
    assert np.linalg.norm(actual - wanted) <= tolerance * np.linalg.norm(wanted - start)
    assert np.linalg.norm(wanted - start) > 0
