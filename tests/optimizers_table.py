"""What the laws run every optimizer on: standard parameters and gradients, and each row's run over them."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.optimizer_rows import FACTORIES as FACTORIES
from tests.optimizer_rows import METHODS as METHODS
from tests.optimizer_rows import ROWS as ROWS
from tests.optimizer_rows import SHAPES as SHAPES
from tests.optimizer_rows import SOME as SOME
from tests.optimizer_rows import STATES as STATES
from tests.optimizer_rows import Row as Row
from tests.optimizer_rows import build as build
from tests.optimizer_rows import each as each

STEPS = 6


def standard_params(dtype: Any = jnp.float32) -> dict[str, Any]:
    """A small model's parameters by Flax's names.

    Matrices are square: the factor of a longer side is singular at first, and the basis of its null space depends on
    rounding, so that two correct computations need not agree.
    """
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), dtype)

    return {
        "conv": {"kernel": normal(2, 2, 2, 8)},
        "dense": {"bias": normal(4), "kernel": normal(4, 4)},
        "embed": {"embedding": normal(4, 4)},
        "head": {"kernel": normal(4, 4)},
        "norm": {"scale": normal(4)},
        "temperature": normal(),
    }


def standard_gradients(seed: int = 1, steps: int = STEPS, dtype: Any = jnp.float32) -> list[Any]:
    """Gradients for `standard_params` whose factors have full rank and well-separated eigenvalues."""
    rng = np.random.default_rng(seed)

    def leaf(x: jax.Array) -> list[jax.Array]:
        n = x.shape[-1] if x.ndim >= 2 else x.size
        if x.ndim < 2:
            return [jnp.asarray(g, dtype) for g in rng.normal(size=(steps, *x.shape))]
        U, V = (np.linalg.qr(rng.normal(size=(n, n)))[0] for _ in range(2))
        core = np.diag(np.linspace(1, 3, n)) @ (np.eye(n) + 0.1 * rng.normal(size=(steps, n, n)))
        return [jnp.asarray(g.reshape(x.shape), dtype) for g in U @ core @ V.T]

    leaves, treedef = jax.tree.flatten(standard_params())
    return [treedef.unflatten(step) for step in zip(*map(leaf, leaves), strict=True)]


def matrices_of(tree: Any) -> Any:
    """The leaves of the standard tree that every row treats as matrices."""
    return {"conv": {"kernel": tree["conv"]["kernel"]}, "dense": {"kernel": tree["dense"]["kernel"]}}


class Point(NamedTuple):
    """A run after one step."""

    updates: Any
    state: Any
    params: Any


class Compiled(NamedTuple):
    """A row's optimizer, compiled once for the standard parameters and shared by the tests."""

    tx: optax.GradientTransformationExtraArgs
    init: Callable[[Any], Any]
    update: Callable[..., Any]  # (grads, state, params), with an argument no optimizer knows
    traces: list[None]  # one entry each time `update` was traced


def updater(tx: optax.GradientTransformationExtraArgs, **extra: Any) -> Callable[..., Any]:
    """``tx.update`` as a function of gradients, state and parameters alone."""
    return lambda grads, state, params: tx.update(grads, state, params, **extra)


@functools.cache
def _compiled(name: str) -> Compiled:
    row = next(row for row in ROWS if row.name == name)
    tx, traces = build(row), []

    @jax.jit
    def update(grads: Any, state: Any, params: Any) -> Any:
        traces.append(None)
        return tx.update(grads, state, params, **row.update_kwargs, stranger=jnp.ones(3))

    return Compiled(tx, jax.jit(tx.init), update, traces)


@functools.cache
def _trajectory(name: str) -> tuple[Point, ...]:
    c = _compiled(name)
    params = standard_params()
    return tuple(run(c.update, c.tx.init(params), params, standard_gradients()))


def compiled(row: Row) -> Compiled:
    return _compiled(row.name)


def trajectory(row: Row) -> tuple[Point, ...]:
    """The row's run over `standard_gradients`, under jit."""
    return _trajectory(row.name)


def run(update: Callable[..., Any], state: Any, params: Any, gradients: list[Any]) -> list[Point]:
    points = []
    for grads in gradients:
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        points.append(Point(updates, state, params))
    return points
