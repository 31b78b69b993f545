"""Symmetric matrices in blocks are the same matrices, and a K-FAC step does not hold its statistics whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_optax as fo
from benchmarks import harness
from fisher_optax import linalg
from fisher_optax.preconditioner.contracts import Kronecker
from fisher_optax.preconditioner.factors import kronecker

SIZES = (3, 401)  # whole, and in blocks of unequal heights


def rows(d: int, k: int = 7) -> jax.Array:
    return jnp.asarray(np.random.default_rng(d).normal(size=(k, d)), jnp.float32)


@pytest.mark.parametrize("d", SIZES)
def test_the_last_column_is_as_if_it_had_been_there(d: int) -> None:
    """``second_moment(X, last)`` is that of ``[X last]``, whole and in blocks."""
    X, last = rows(d - 1), jnp.asarray(np.random.default_rng(1).normal(size=(7, 1)), jnp.float32)
    joined = np.concatenate([X, last], 1).astype(np.float64)
    np.testing.assert_allclose(jax.jit(linalg.second_moment)(X, last), joined.T @ joined, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("d", SIZES)
def test_entries_are_read_and_written_by_blocks(d: int) -> None:
    """The three functions agree with NumPy's, under `jit` and outside it, and overwrite nothing of the caller's."""
    S = linalg.second_moment(rows(d))
    A = jnp.asarray(np.random.default_rng(2).normal(size=(d, d)), jnp.float32)
    before = np.array(A)
    for f, *arguments, wanted in (
        (lambda S: linalg.blockwise(lambda x: 2 * x, S), S, 2 * np.array(S)),
        (lambda A, S: linalg.overwritten(lambda a, s: a - s, A, S), A, S, before - np.array(S)),
        (linalg.diagonal, S, np.diag(S)),
        (linalg.diagonal, jnp.stack([S, A]), np.stack([np.diag(S), np.diag(before)])),
    ):
        np.testing.assert_array_equal(f(*arguments), wanted)
        np.testing.assert_array_equal(jax.jit(f)(*arguments), wanted)
    np.testing.assert_array_equal(A, before)


def test_statistics_are_never_put_together() -> None:
    """Statistics that factors follow, once all are known to be finite, take less than they would as matrices."""
    d, rule = 400, kronecker()
    W, start = {"kernel": jnp.zeros((d, d)), "bias": jnp.zeros(d)}, rule.init(d + 1, d, True, True, jnp.float32)

    def follow(factors: Kronecker, W: dict[str, jax.Array], x: jax.Array) -> Kronecker:
        loss = lambda W: fo.losses.gaussian(x @ W["kernel"] + W["bias"], x)  # noqa: E731
        _, _, statistics = fo.value_and_grad(loss)(W)
        seen = statistics["kernel"]
        finite = jnp.isfinite(linalg.diagonal(seen.left).sum() + linalg.diagonal(seen.right).sum())
        return rule.overwrite(seen, factors, finite)

    compiled = jax.jit(follow, donate_argnums=0).lower(start, W, jnp.zeros((8, d))).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.75 * harness.nbytes(start)
