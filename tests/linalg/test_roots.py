"""Negative powers in float32 against eigenvalues in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fisher_optax import linalg
from fisher_optax.linalg import cholesky_inverse

matrix_power = jax.jit(linalg.matrix_power, static_argnums=1, static_argnames=("method", "ridge"))
ITERATIONS = {"newton": (-1.0, -0.5, -0.25, -1 / 3), "polynomial": (-0.5, -0.25, -0.125)}
CASES = [("eigh", -0.25), ("eigh", -0.4), *((method, p) for method, ps in ITERATIONS.items() for p in ps)]


def factor(condition: float, d: int = 32, rank: int | None = None) -> np.ndarray:
    """Eigenvalues spread evenly over the logarithm down to 1 / condition, rounded to float32."""
    Q = np.linalg.qr(np.random.default_rng(0).normal(size=(d, d)))[0]
    values = np.logspace(0, -np.log10(condition), d) * (np.arange(d) < (d if rank is None else rank))
    return np.asarray((Q * values) @ Q.T, np.float32)


def exact(A: np.ndarray, exponent: float) -> np.ndarray:
    values, Q = np.linalg.eigh(A.astype(np.float64))
    return (Q * values**exponent) @ Q.T


def error(got: jax.Array | np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(got, np.float64) - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("condition", [1e2, 1e3, 1e4, 1e5, 1e6, 1e7])
@pytest.mark.parametrize(("method", "exponent"), CASES)
def test_error_grows_with_the_condition(method: str, exponent: float, condition: float) -> None:
    """Iterations: at most 1e-8 of the condition number (and float32's own 1e-6), twice that for an inverse, whose
    relative error is twice that of a square root. eigh: ten times that, what LAPACK's float32 eigenvalues allow."""
    A = factor(condition)
    allowed = max(1e-6, (1e-7 if method == "eigh" else 1e-8) * condition) * max(1, -2 * exponent)
    assert error(matrix_power(jnp.asarray(A), exponent, method=method, ridge=0.0), exact(A, exponent)) <= allowed


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e10, 1e30])
@pytest.mark.parametrize(("method", "exponent"), CASES)
def test_any_scale(method: str, exponent: float, scale: float) -> None:
    """``(c A)^p = c^p A^p`` over the range of float32."""
    A = jnp.asarray(factor(1e2))
    c = float(np.float32(scale))
    wanted = c**exponent * np.asarray(matrix_power(A, exponent, method=method), np.float64)
    assert error(matrix_power(c * A, exponent, method=method), wanted) <= 1e-4


@pytest.mark.parametrize(("method", "exponent"), CASES)
def test_what_has_no_inverse(method: str, exponent: float) -> None:
    """Zero gives the identity; deficient rank and condition 1e7 something finite, symmetric and positive."""
    np.testing.assert_array_equal(matrix_power(jnp.zeros((5, 5)), exponent, method=method), np.eye(5))
    for A in (factor(1e7), factor(10, rank=1), factor(10, rank=16)):
        root = np.asarray(matrix_power(jnp.asarray(A), exponent, method=method))
        assert np.isfinite(root).all()
        np.testing.assert_array_equal(root, root.T)
        assert np.linalg.eigvalsh(root.astype(np.float64))[0] > 0


@pytest.mark.parametrize(("method", "exponent"), CASES)
def test_the_ridge_bounds_the_root(method: str, exponent: float) -> None:
    """On a rank-one matrix, nothing is amplified beyond ``ridge^p`` of the largest eigenvalue's power."""
    root = matrix_power(jnp.asarray(factor(10, rank=1)), exponent, method=method, ridge=1e-4)
    assert 0.1 * 1e-4**exponent <= float(jnp.linalg.norm(root, 2)) <= 1.1 * 1e-4**exponent


@pytest.mark.parametrize("method", ["eigh", "newton", "polynomial"])
def test_a_matrix_that_is_not_finite_has_no_root(method: str) -> None:
    """So that whoever asked keeps the last good one; and the iteration ends."""
    for bad in (jnp.nan, jnp.inf):
        root = matrix_power(jnp.eye(4).at[1, 2].set(bad), -0.5, method=method)
        assert not bool(jnp.isfinite(root).all())


def test_exponent_zero_is_the_identity() -> None:
    np.testing.assert_array_equal(matrix_power(jnp.full((3, 3), 2.0), 0.0), np.eye(3))


def test_matrices_in_a_batch() -> None:
    """Under `jax.vmap` as one by one."""
    A = jnp.stack([jnp.asarray(factor(c)) for c in (10.0, 1e3)])
    for method in ("eigh", "newton", "polynomial"):
        batched = jax.vmap(lambda M, method=method: matrix_power(M, -0.25, method=method))(A)
        np.testing.assert_allclose(batched, [matrix_power(M, -0.25, method=method) for M in A], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("d", [1, 2, 127, 300])  # one block, and blocks within blocks
@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_cholesky_inverse_errs_by_the_condition_number(d: int, scale: float) -> None:
    """The float32 error is within a unit of rounding times the condition number, at any scale, of batches too."""
    conditions = (1e1, 1e3, 1e6)
    A = np.stack([factor(condition, d) for condition in conditions])
    X = np.asarray(jax.jit(cholesky_inverse)(jnp.asarray(A * np.float32(scale))), np.float64) * scale
    for condition, mine, given in zip(conditions, X, A, strict=True):
        assert error(mine, exact(given, -1)) <= np.finfo(np.float32).eps * condition


@pytest.mark.parametrize("d", [2, 300])
def test_cholesky_inverse_of_what_is_not_positive_is_nan(d: int) -> None:
    """Also where only the last block shows it."""
    A = jnp.eye(d).at[-1, -1].set(-1)
    assert np.isnan(cholesky_inverse(A)).any()
    assert np.isnan(cholesky_inverse(A.at[0, 0].set(jnp.nan))).any()
