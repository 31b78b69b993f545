"""Orthogonal iteration by Cholesky factors: follows as QR does, orthonormal for every symmetric matrix."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from fisher_optax.linalg import followed_by_products, orthogonal_iteration

METHODS = ("qr", "cholesky")


def random_basis(d: int, seed: int = 0) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((d, d)))[0]


def with_eigenvalues(values: np.ndarray) -> np.ndarray:
    V = random_basis(len(values))
    return V * values @ V.T


def assert_orthonormal(Q: Any, tolerance: float) -> None:
    Q = np.asarray(Q, np.float64)
    np.testing.assert_allclose(Q.T @ Q - np.eye(len(Q)), 0, atol=tolerance)


def drifting_factors(condition: float, rank: int, steps: int = 120, d: int = 48) -> list[np.ndarray]:
    """Means at .95 of what ``rank`` columns a step add, their covariance's eigenbasis turning at random."""
    rng = np.random.default_rng(0)
    V, root, L = random_basis(d), np.geomspace(1, condition**-0.5, d), np.zeros((d, d))
    turn = rng.standard_normal((d, d))
    turn = scipy.linalg.expm(0.01 * (turn - turn.T) / np.linalg.norm(turn - turn.T, 2))
    factors = []
    for _ in range(steps):
        G = (V * root) @ rng.standard_normal((d, rank))
        L = 0.95 * L + 0.05 * G @ G.T / rank
        V = turn @ V
        factors.append(L.astype(np.float32))
    return factors


def off_diagonal_mass(A: Any, Q: Any) -> float:
    """Of ``D^-½ Qᵀ A Q D^-½``, D its diagonal, by the root of the side: small eigenvalues count as much as large."""
    Q = np.asarray(Q, np.float64)
    B = Q.T @ A @ Q
    B /= np.sqrt(np.outer(np.diag(B), np.diag(B)))
    return float(np.linalg.norm(B - np.eye(len(B))) / len(B) ** 0.5)


@pytest.mark.parametrize("rank", [96, 8, 2])
def test_cholesky_follows_ill_conditioned_factors_as_qr_does(rank: int) -> None:
    """From the identity, of full rank and of fewer columns a step than rows; orthonormal at every step."""
    steps: dict[str, Any] = {
        method: jax.jit(functools.partial(orthogonal_iteration, method=method)) for method in METHODS
    }
    for condition in (1e2, 1e4, 1e6):
        bases: dict[str, Any] = {method: jnp.eye(48) for method in METHODS}
        found: dict[str, list[float]] = {method: [] for method in METHODS}
        for t, L in enumerate(drifting_factors(condition, rank)):
            for method, step in steps.items():
                bases[method] = step(L, bases[method])
                assert_orthonormal(bases[method], 4e-6)
                if t >= 80:
                    found[method].append(off_diagonal_mass(L, bases[method]))
        np.testing.assert_allclose(np.mean(found["cholesky"]), np.mean(found["qr"]), rtol=0.05)


@pytest.mark.parametrize("d", [1, 2, 5, 64])
def test_cholesky_is_orthonormal_for_every_symmetric_matrix(d: int) -> None:
    """Of any rank, grading and sign; rounded to bfloat16; with an eigenvalue that cancels what is added to A."""
    rng = np.random.default_rng(0)
    g, decay, epsilon = rng.standard_normal((d, 2)), np.geomspace(1, 1e-6, d), float(np.finfo(np.float32).eps)
    matrices = [
        np.ones((d, d)),
        g[:, :1] @ g[:, :1].T,
        (g * [1, 1e-3]) @ (g * [1, 1e-3]).T,
        np.array(jnp.asarray(g @ g.T, jnp.bfloat16), np.float32),
        with_eigenvalues(decay),
        with_eigenvalues(decay**5),
        -with_eigenvalues(decay),
        with_eigenvalues(decay * rng.choice((-1, 1), d)),
        with_eigenvalues(np.where(np.arange(d), -8 * epsilon, 1)),
        np.diag(decay[::-1]),
        np.diag(np.arange(d) == d // 2).astype(float),
    ]
    bases = [np.eye(d), random_basis(d, 1), random_basis(d)]
    step = jax.jit(functools.partial(orthogonal_iteration, method="cholesky"))
    for A, Q, scale in itertools.product(matrices, bases, (1e-30, 1.0, 1e30)):
        assert_orthonormal(step(jnp.asarray(A * scale, jnp.float32), jnp.asarray(Q, jnp.float32)), 4 * d * epsilon)


@pytest.mark.parametrize("dead", [slice(0, 16), slice(16, 32), slice(32, 48), slice(0, 48, 3)])
def test_cholesky_keeps_directions_without_statistics_apart(dead: slice) -> None:
    """Rows and columns of exact zeros: the live basis has exact zeros there, and theirs stays as it was."""
    rng, d = np.random.default_rng(0), 48
    gone = np.zeros(d, bool)
    gone[dead] = True
    Q = np.zeros((d, d))
    Q[np.ix_(gone, np.arange(16))], Q[np.ix_(~gone, np.arange(16, d))] = random_basis(16), random_basis(32)
    start = Q[:, rng.permutation(d)].astype(np.float32)
    step, basis = jax.jit(functools.partial(orthogonal_iteration, method="cholesky")), jnp.asarray(start)
    for L in drifting_factors(1e6, 2, 20):
        basis = step(np.where(np.outer(~gone, ~gone), L, 0), basis)
    within = np.linalg.norm(np.asarray(basis)[gone], axis=0) > 0.5
    assert within.sum() == 16
    np.testing.assert_array_equal(np.asarray(basis)[np.ix_(~gone, within)], 0)
    np.testing.assert_array_equal(np.asarray(basis)[np.ix_(gone, ~within)], 0)
    np.testing.assert_allclose(np.asarray(basis)[:, within], start[:, np.abs(start[gone]).sum(0) > 0], atol=1e-6)


def test_dead_inputs_take_nothing_from_a_first_basis() -> None:
    """The smallest eigenvalue that is taken away is of live inputs: zeros beside them change nothing."""
    rng = np.random.default_rng(0)
    V = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    A = (V * np.linspace(1, 2, 6)) @ V.T
    places = [1, 2, 4, 5, 6, 8]
    padded = np.zeros((9, 9))
    padded[np.ix_(places, places)] = A
    alone, _ = followed_by_products(jnp.asarray(A), jnp.eye(6), True)
    Q, _ = followed_by_products(jnp.asarray(padded), jnp.eye(9), True)
    dead = np.setdiff1d(np.arange(9), places)
    columns = np.asarray(np.abs(Q[dead]).sum(0) == 0)
    assert columns.sum() == 6
    np.testing.assert_array_equal(np.abs(Q[dead][:, ~columns]).sum(0), 1)
    np.testing.assert_allclose(Q[np.array(places)][:, columns], alone, atol=2e-5)
