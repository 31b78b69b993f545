"""Every optimizer finds the minimum of small problems."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.optimizers_table import METHODS, Row, build, each


class Problem(NamedTuple):
    start: Any
    loss: Callable[[Any], jax.Array]
    minimum: Any


def parabola(start: Any, minimum: Any) -> Problem:
    """The squared distance to the minimum."""
    start, minimum = (jax.tree.map(jnp.asarray, x) for x in (start, minimum))
    return Problem(start, lambda params: optax.tree.norm(optax.tree.sub(params, minimum), squared=True), minimum)


def rosenbrock(w: jax.Array) -> jax.Array:
    return (1 - w[0]) ** 2 + 100 * (w[1] - w[0] ** 2) ** 2


def curved_matrix() -> Problem:
    """|A (W - M)|² with a condition number of 16 on the input side."""
    A, minimum = jnp.diag(jnp.asarray([4.0, 2.0, 1.0])), jnp.asarray([[1.0, -2.0], [0.5, 1.0], [-1.0, 0.25]])
    return Problem(jnp.zeros((3, 2)), lambda W: jnp.sum((A @ (W - minimum)) ** 2), minimum)


PROBLEMS = {
    "vector": parabola([-1.0, 3.0, 0.5], [1.0, -1.0, 1.0]),
    "rosenbrock": Problem(jnp.zeros(2), rosenbrock, jnp.ones(2)),
    "matrix": curved_matrix(),
    "mixed": parabola(
        {"bias": [0.0, 0.0], "kernel": [[0.0, 0.0], [0.0, 0.0]], "scale": 0.0},
        {"bias": [1.0, -1.0], "kernel": [[1.0, 0.5], [-1.0, 1.0]], "scale": 2.0},
    ),
}


@pytest.mark.parametrize("problem", PROBLEMS)
@each(row for row in METHODS if not row.keeps_norms)
def test_the_minimum_is_found(row: Row, problem: str) -> None:
    start, loss, minimum = PROBLEMS[problem]
    rate, steps = row.descent
    tx = build(row, learning_rate=optax.linear_schedule(rate, 0.0, steps), **row.undecayed)

    def step(carry: Any, _: None) -> Any:
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params, **row.update_kwargs)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps))((start, tx.init(start)))
    for w, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(minimum), strict=True):
        np.testing.assert_allclose(w, wanted, atol=3e-2)
