"""Geometry of trees, operators and arrays alike; under jit; of odd numbers; and what its errors say."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fisher_optax.fisher import Operator
from fisher_optax.fisher import geometry as g

information = jax.jit(g.information, static_argnums=0, static_argnames="form")
SIDES = np.array([1.0, 0.0])
exactly = pytest.mark.usefixtures("x64")


def log_coin(p: Any, x: Any) -> jax.Array:
    return jnp.where(x == 1, jnp.log(p), jnp.log1p(-p))


def matrix() -> np.ndarray:
    R = np.random.default_rng(0).standard_normal((6, 4))
    return R.T @ R


def tree(x: Any) -> dict[str, Any]:
    return {"w": x[:3].reshape(1, 3), "b": x[3]}


def close(a: Any, b: Any, rtol: float = 1e-9) -> None:
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=rtol, atol=0)


@exactly
def test_operators_and_arrays_trees_and_vectors_agree() -> None:
    """`natural_gradient` as NumPy solves it, too. The order of a tree is that of its keys: b, w."""
    A, (u, v) = matrix(), np.random.default_rng(1).standard_normal((2, 4))
    order = [3, 0, 1, 2]
    A_tree = A[np.ix_(order, order)]
    F = Operator.from_dense(jnp.asarray(A_tree), tree(u))
    close(g.inner_product(A, u, v), u @ A @ v)
    close(g.kl_quadratic(A, v), v @ A @ v / 2)
    for fisher in (F, A_tree):
        close(g.inner_product(fisher, tree(u), tree(v)), u @ A @ v)
        close(g.inner_product(fisher, u[order], v[order]), u @ A @ v)
        x = g.natural_gradient(fisher, tree(v), damping=0.1)
        close(np.append(x["w"][0], x["b"]), np.linalg.solve(A + 0.1 * np.eye(4), v))
        close(g.jeffreys_log_prior(fisher), np.linalg.slogdet(A)[1] / 2)
        close(g.cramer_rao_bound(fisher), np.linalg.inv(A_tree), 1e-8)
        J = np.stack([u[order], v[order]])
        close(g.cramer_rao_bound(fisher, J), J @ np.linalg.inv(A_tree) @ J.T)
        close(g.reparametrised(fisher, J.T), J @ A_tree @ J.T)


@exactly
def test_jit_changes_nothing() -> None:
    A, v = jnp.asarray(matrix()), jnp.arange(4.0)
    F = Operator.from_dense(A, v)
    for f in (g.jeffreys_log_prior, g.rank, g.cramer_rao_bound):
        close(jax.jit(f)(A), f(A))
        close(jax.jit(f)(F), f(F))
    for fisher in (A, F):
        close(jax.jit(g.natural_gradient)(fisher, v, 0.1), g.natural_gradient(fisher, v, 0.1))
        close(jax.jit(g.kl_quadratic)(fisher, v), g.kl_quadratic(fisher, v))
    hessian = jax.jit(lambda p, w: g.information(log_coin, p, SIDES, w, form="hessian"))
    close(hessian(0.2, jnp.array([0.2, 0.8])), [[1 / 0.16]])


def test_samples_count_alike_without_weights() -> None:
    """One head and three tails, as points of equal weight."""
    for form in ("score", "hessian"):
        close(information(log_coin, 0.25, np.array([1, 0, 0, 0]), form=form), [[1 / 0.1875]], 1e-6)
    close(g.statistic_information(log_coin, 0.25, np.array([1, 0, 0, 0]), lambda x: x), [[1 / 0.1875]], 1e-6)


def test_a_point_of_no_weight_is_not_there() -> None:
    """Though its log-density is -∞ and has no gradient; two groups of a statistic stay two."""
    log_density = lambda θ, x: jnp.log(jnp.array([θ, 1 - θ, 0 * θ])[x])  # noqa: E731
    xs, w = np.arange(3), np.array([0.25, 0.75, 0.0])
    for form in ("score", "hessian"):
        close(information(log_density, 0.25, xs, w, form=form), [[1 / 0.1875]], 1e-6)
    close(g.statistic_information(log_density, 0.25, xs, lambda x: x, w), [[1 / 0.1875]], 1e-6)


def test_half_precision_is_computed_in_single() -> None:
    θ = jnp.asarray(0.25, jnp.bfloat16)
    F = information(log_coin, θ, SIDES, np.array([0.25, 0.75]))
    assert F.dtype == g.score(log_coin, θ, 1.0).dtype == jnp.float32
    close(F, [[1 / 0.1875]], 1e-6)
    assert g.natural_gradient(F, jnp.ones(1, jnp.bfloat16)).dtype == jnp.float32


@exactly
def test_the_gradient_of_jeffreys_prior() -> None:
    """``-½ log p (1 - p)`` for a coin; and ½ F⁻¹ with respect to F, where eigenvalues are equal too."""
    prior = lambda p: g.jeffreys_log_prior(g.information(log_coin, p, SIDES, jnp.stack([p, 1 - p])))  # noqa: E731
    close(jax.jit(jax.grad(prior))(0.2), -(1 - 0.4) / (2 * 0.16))
    slope = jax.jit(jax.grad(g.jeffreys_log_prior))
    close(slope(2 * jnp.eye(4)).diagonal(), np.full(4, 0.25))
    close(slope(matrix()), np.linalg.inv(matrix()) / 2, 1e-8)


@exactly
def test_singular_natural_gradient() -> None:
    """The pseudo-inverse; damping, however small, leaves nothing out."""
    R = matrix()[:2]
    F, v = R.T @ R, np.arange(1.0, 5)
    close(g.natural_gradient(F, v), np.linalg.pinv(F, rcond=1e-12) @ v, 1e-8)
    close(g.natural_gradient(np.diag([1.0, 0.0]), np.ones(2), 1e-20), [1, 1e20])
    assert g.rank(F) == 2
    assert g.rank(np.diag([1.0, 1e-3, 1e-9]), tolerance=1e-6) == 2
    assert g.rank(np.diag([1.0, 1e-30]), tolerance=0.0) == 2
    assert g.jeffreys_log_prior(np.diag([1.0, 1e-30])) == -jnp.inf
    close(g.jeffreys_log_prior(np.diag([1.0, 1e-30]), tolerance=0.0), np.log(1e-15))


def test_natural_gradient_of_an_operator_at_any_scale() -> None:
    """A gradient whose square is no float32; none at all; one that is not finite, which shows."""
    A, v = matrix().astype(np.float32), np.arange(1, 5, dtype=np.float32)
    F = Operator.from_dense(jnp.asarray(A), v)
    solve = jax.jit(lambda g_: g.natural_gradient(F, g_, 0.1))
    for scale in (1e-30, 1.0, 1e30):
        close(solve(v * np.float32(scale)), scale * np.linalg.solve(A + 0.1 * np.eye(4), v), 2e-4)
    np.testing.assert_array_equal(solve(0 * v), 0 * v)
    assert np.isnan(solve(np.where(v > 3, np.nan, v))).all()
    assert np.isnan(jax.jit(g.jeffreys_log_prior)(jnp.full((2, 2), jnp.nan)))


def wide() -> Operator:
    """Of a size that is never made dense."""
    return Operator.from_matvec(lambda v: v, jax.ShapeDtypeStruct((g.LIMIT + 1,), jnp.float32))


POINTS = {
    r"theta is int32\. Let the log-density close over": lambda: g.score(log_coin, 1, 1.0),
    r"\['n'\] is int32": lambda: g.score(lambda θ, x: θ["p"], {"n": 3, "p": 0.5}, 1.0),
    "but is empty": lambda: g.score(log_coin, {}, 1.0),
    r"one number for one point; got shape \(2,\)": lambda: g.score(lambda θ, x: θ * x, 0.5, np.ones(2)),
    r"got shapes \(\(2,\), \(3,\)\)": lambda: g.information(log_coin, 0.5, (np.ones(2), np.ones(3))),
    r"leading axis; got shapes \(\)": lambda: g.information(log_coin, 0.5, 1.0),
    r"xs has 2 points, so weights must have shape \(2,\)": lambda: g.information(log_coin, 0.5, SIDES, np.ones(3)),
    "none may be negative": lambda: g.information(log_coin, 0.5, SIDES, np.array([1.5, -0.5])),
    "infinite or NaN": lambda: g.information(log_coin, 0.5, SIDES, np.array([1, np.nan])),
    'form must be "score" or "hessian"; got "?\'?fisher': lambda: g.information(log_coin, 0.5, SIDES, form="fisher"),
}
MATRICES = {
    r"square matrix or a fo.fisher.Operator; got shape \(2, 3\)": lambda: g.rank(np.ones((2, 3))),
    r"got shape \(0, 0\)": lambda: g.rank(np.ones((0, 0))),
    "must be symmetric; F - Fᵀ has entries of 1, F of 1": lambda: g.kl_quadratic(np.triu(np.ones((2, 2))), np.ones(2)),
    "F is not finite": lambda: g.jeffreys_log_prior(np.diag([1, np.inf])),
    "has the eigenvalue -1, and none of a Fisher": lambda: g.null_directions(np.diag([2.0, -1.0])),
    'use form="score"': lambda: g.natural_gradient(-np.eye(2), np.ones(2)),
    "a vector of 2; got": lambda: g.kl_quadratic(np.eye(2), np.ones(3)),
    r"a vector of 4; got .* of shapes \[\(1, 4\)\]": lambda: g.kl_quadratic(
        Operator.from_dense(jnp.eye(4), np.ones(4)), np.ones((1, 4))
    ),
    "damping must be at least 0": lambda: g.natural_gradient(np.eye(2), np.ones(2), -1.0),
    r"needs damping > 0, such as 1e-3; without, pass its entries: F\.dense": lambda: g.natural_gradient(
        Operator.from_dense(jnp.eye(2), np.ones(2)), np.ones(2)
    ),
    "iterations must be at least 1": lambda: g.natural_gradient(np.eye(2), np.ones(2), iterations=0),
    "m x 2, as F is": lambda: g.cramer_rao_bound(np.eye(2), np.ones((2, 3))),
    "is 2 x n, as F is": lambda: g.reparametrised(np.eye(2), np.ones(2)),
    r"20001 parameters, too many .*Take a layer, F\.block": lambda: g.rank(wide()),
}


@pytest.mark.parametrize("message", [*POINTS, *MATRICES])
def test_errors(message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        (POINTS | MATRICES)[message]()


def test_a_few_directions_of_a_large_operator() -> None:
    J = np.eye(g.LIMIT + 1, 2, dtype=np.float32)
    close(g.reparametrised(wide(), J), np.eye(2))
