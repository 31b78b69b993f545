"""Eigenbases: orthonormal, ordered, convergent, safe for every scale and rank; off-diagonality by its definition."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fisher_optax import linalg
from fisher_optax.linalg import descending, keep_last_good, off_diagonality, project

eigenbasis = jax.jit(linalg.eigenbasis)
orthogonal_iteration = jax.jit(linalg.orthogonal_iteration, static_argnames="method")
METHODS = ("qr", "cholesky")


def random_basis(d: int, seed: int = 0) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((d, d)))[0]


def with_eigenvalues(values: Any, seed: int = 0) -> np.ndarray:
    V = random_basis(len(values), seed)
    return V * np.asarray(values, float) @ V.T


def assert_orthonormal(Q: Any, tolerance: float) -> None:
    Q = np.asarray(Q, np.float64)
    np.testing.assert_allclose(np.swapaxes(Q, -1, -2) @ Q - np.eye(Q.shape[-1]), 0, atol=tolerance)


def aligned(Q: Any, wanted: np.ndarray) -> np.ndarray:
    """Q with the signs of ``wanted``'s columns."""
    return np.asarray(Q) * np.sign(np.sum(np.asarray(Q) * wanted, axis=-2, keepdims=True))


# --- eigenbasis ---


@pytest.mark.parametrize("size", [1e-4, 1e-5])
@pytest.mark.parametrize("of", ["first", "next"])
def test_a_small_coordinate_that_follows_a_large_one_is_turned_out_of_it(size: float, of: str) -> None:
    """What they share is below rounding of the large one's square, and is nearly all of the small one."""
    A = jnp.array([[1.0, size, 0.0], [size, 1.25 * size**2, 0.0], [0.0, 0.0, 0.5]], jnp.float32)
    Q = eigenbasis(A) if of == "first" else jnp.eye(3)
    Q = np.asarray(Q if of == "first" else orthogonal_iteration(A, Q), np.float64)
    large, small = np.argmax(np.abs(Q[0])), np.argmax(np.abs(Q[1]))
    np.testing.assert_allclose(np.abs(Q[1, large]), size, rtol=1e-2)
    np.testing.assert_allclose(np.abs(Q[0, small]), size, rtol=1e-2)


@pytest.mark.usefixtures("x64")
def test_the_rest_of_an_indefinite_matrix_is_its_eigenvectors_too() -> None:
    """Beside a coordinate that goes with no other, eigenvalues of both signs; and two that are the smallest."""
    A = np.zeros((7, 7))
    A[1:, 1:] = with_eigenvalues([5.0, 3.0, 1.0, 0.5, -2.0, -2.0])
    Q = np.asarray(eigenbasis(jnp.asarray(A)))
    assert_orthonormal(Q, 1e-12)
    B = Q.T @ A @ Q
    np.testing.assert_allclose(B, np.diag(np.diag(B)), atol=1e-11)
    assert np.sum(np.abs(Q[0]) == 1) == 1


@pytest.mark.usefixtures("x64")
def test_eigenbasis_is_numpys_largest_first() -> None:
    A = with_eigenvalues([5.0, 1.0, 3.0, -2.0, 0.5])
    values, V = np.linalg.eigh(A)
    Q = eigenbasis(jnp.asarray(A))
    np.testing.assert_allclose(aligned(Q, V[:, ::-1]), V[:, ::-1], atol=1e-12)
    np.testing.assert_allclose(np.diag(Q.T @ A @ Q), values[::-1], atol=1e-12)


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1.0, 1e30, 1e38])
def test_eigenbasis_of_any_scale(scale: float) -> None:
    """A diagonal matrix with a gap: the basis is exact, whatever the units."""
    Q = eigenbasis(jnp.asarray(np.diag([1.0, 3.0, 0.01]) * scale, jnp.float32))
    np.testing.assert_allclose(np.abs(Q), np.eye(3)[:, [1, 0, 2]], atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_bases_of_zero_are_orthonormal_and_never_in_half_precision(dtype: Any) -> None:
    zero, Q = jnp.zeros((4, 4), dtype), jnp.asarray(random_basis(4), dtype)
    for basis in (eigenbasis(zero), *(orthogonal_iteration(zero, Q, method=method) for method in METHODS)):
        assert basis.dtype == jnp.float32
        assert_orthonormal(basis, 1e-6)


# --- orthogonal iteration ---


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("x64")
def test_iteration_converges_to_the_eigenbasis(method: str) -> None:
    """By the ratio of neighbouring eigenvalues a step, and ordered from any start."""
    A = with_eigenvalues([1.0, 8.0, 4.0, 2.0, 16.0])
    Q = jnp.asarray(random_basis(5, 1))
    for _ in range(60):
        Q = orthogonal_iteration(jnp.asarray(A), Q, method=method)
    wanted = np.linalg.eigh(A)[1][:, ::-1]
    np.testing.assert_allclose(aligned(Q, wanted), wanted, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("x64")
def test_one_step_is_numpys_qr_of_the_ordered_product(method: str) -> None:
    """Up to signs."""
    A, Q = with_eigenvalues(np.geomspace(1, 1e-3, 12)), random_basis(12, 1)
    order = np.argsort(-np.einsum("ij,ij->j", Q, A @ Q))
    wanted = np.linalg.qr((A @ Q)[:, order])[0]
    stepped = orthogonal_iteration(jnp.asarray(A), jnp.asarray(Q), method=method)
    np.testing.assert_allclose(aligned(stepped, wanted), wanted, atol=1e-10)
    np.testing.assert_array_equal(descending(jnp.asarray(Q), jnp.asarray(A @ Q)), order)


@pytest.mark.parametrize("method", METHODS)
def test_an_eigenbasis_is_a_fixed_point(method: str) -> None:
    A = with_eigenvalues([4.0, 3.0, 2.0, 1.0]).astype(np.float32)
    Q = eigenbasis(jnp.asarray(A))
    np.testing.assert_allclose(
        aligned(orthogonal_iteration(jnp.asarray(A), Q, method=method), np.asarray(Q)), Q, atol=1e-5
    )


@pytest.mark.parametrize("method", METHODS)
def test_fifty_rank_deficient_factors(method: str) -> None:
    """Sums of fewer outer products than rows, steeply graded, at 1e-15 to 1e15: always orthonormal to rounding."""
    rng = np.random.default_rng(0)
    step = jax.jit(lambda A, Q: orthogonal_iteration(A, Q, method=method))
    for trial in range(50):
        rank = 1 + trial % 16
        G = rng.standard_normal((48, rank)) * np.geomspace(1, 10.0 ** -(trial % 5), rank)
        A = jnp.asarray(G @ G.T * 10.0 ** rng.uniform(-15, 15), jnp.float32)
        Q = jnp.asarray(random_basis(48, trial), jnp.float32)
        for _ in range(3):
            Q = step(A, Q)
            assert_orthonormal(Q, 1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_shared_product_changes_nothing(method: str) -> None:
    A, Q = jnp.asarray(with_eigenvalues([3.0, 2.0, 1.0]), jnp.float32), jnp.asarray(random_basis(3, 1), jnp.float32)
    P = project(A, Q)
    np.testing.assert_array_equal(
        orthogonal_iteration(A, Q, P=P, method=method), orthogonal_iteration(A, Q, method=method)
    )
    np.testing.assert_array_equal(off_diagonality(A, Q, P=P), off_diagonality(A, Q))
    products = [
        str(jax.make_jaxpr(f)(A, Q, P)).count("dot_general")
        for f in (
            lambda A, Q, P: orthogonal_iteration(A, Q, P=P, method=method),
            lambda A, Q, P: orthogonal_iteration(A, Q, method=method),
            lambda A, Q, P: off_diagonality(A, Q, P=P),
            lambda A, Q, P: off_diagonality(A, Q),
        )
    ]
    assert np.diff(products).tolist() == [1, products[2] - products[1], 1]
    assert products[2:] == [0, 1]


def test_products_are_at_highest_precision_unless_told_otherwise() -> None:
    A = jnp.eye(3)
    assert "HIGHEST" in str(jax.make_jaxpr(project)(A, A))
    for method in METHODS:
        for f in (lambda A, Q, m=method: orthogonal_iteration(A, Q, method=m), off_diagonality):
            program = str(jax.make_jaxpr(f)(A, A))
            assert program.count("dot_general[") == program.count("precision=(Precision.HIGHEST") > 0
    assert "HIGHEST" not in str(jax.make_jaxpr(lambda A: project(A, A, precision="default"))(A))


# --- off-diagonality ---


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_off_diagonality_is_its_definition(scale: float) -> None:
    A, Q = with_eigenvalues([5.0, 3.0, 1.0, 0.1]), random_basis(4, 1)
    B = Q.T @ A @ Q
    wanted = np.linalg.norm(B - np.diag(np.diag(B))) / np.linalg.norm(B)
    measured = off_diagonality(jnp.asarray(A * scale, jnp.float32), jnp.asarray(Q, jnp.float32))
    np.testing.assert_allclose(measured, wanted, rtol=1e-5)
    assert off_diagonality(jnp.asarray(A, jnp.float32), eigenbasis(jnp.asarray(A, jnp.float32))) < 1e-3


@pytest.mark.usefixtures("x64")
def test_off_diagonality_in_double_precision() -> None:
    A, Q = with_eigenvalues([5.0, 3.0, 1.0, 0.1]), random_basis(4, 1)
    B = Q.T @ A @ Q
    wanted = np.linalg.norm(B - np.diag(np.diag(B))) / np.linalg.norm(B)
    np.testing.assert_allclose(off_diagonality(jnp.asarray(A), jnp.asarray(Q)), wanted, rtol=1e-12)


def test_off_diagonality_of_zero_and_of_nan() -> None:
    Q = jnp.asarray(random_basis(3), jnp.float32)
    assert off_diagonality(jnp.zeros((3, 3)), Q) == 0
    assert np.isnan(off_diagonality(jnp.full((3, 3), jnp.nan), Q))


# --- failures, batches ---


def test_keep_last_good_takes_whole_matrices() -> None:
    new = np.arange(24.0).reshape(2, 3, 2, 2)
    new[0, 1, 0, 1], new[1, 2, 1, 1] = np.nan, np.inf
    old = -np.ones_like(new)
    chosen, failed = keep_last_good(jnp.asarray(new), jnp.asarray(old))
    np.testing.assert_array_equal(failed, [[False, True, False], [False, False, True]])
    np.testing.assert_array_equal(chosen, np.where(np.asarray(failed)[..., None, None], old, new))


@pytest.mark.parametrize("method", METHODS)
def test_a_factor_that_is_not_finite_is_caught(method: str) -> None:
    """It spoils its own basis, entirely or in part, and no other of the batch."""
    A = np.stack([with_eigenvalues([3.0, 2.0, 1.0], seed) for seed in range(2)]).astype(np.float32)
    A[0, 1, 2] = np.nan
    Q = jnp.asarray(np.stack([random_basis(3, seed) for seed in range(2)]), jnp.float32)
    for new in (orthogonal_iteration(jnp.asarray(A), Q, method=method), eigenbasis(jnp.asarray(A))):
        chosen, failed = keep_last_good(new, Q)
        np.testing.assert_array_equal(failed, [True, False])
        np.testing.assert_array_equal(chosen[0], Q[0])
        np.testing.assert_array_equal(chosen[1], new[1])


@pytest.mark.usefixtures("x64")
def test_batched_equals_one_by_one() -> None:
    A = np.stack([with_eigenvalues([9.0, 4.0, 2.0, 1.0], seed) for seed in range(6)]).reshape(2, 3, 4, 4)
    Q = np.stack([random_basis(4, seed) for seed in range(6, 12)]).reshape(2, 3, 4, 4)
    functions: list[Any] = [project, off_diagonality, lambda A, Q: descending(Q, project(A, Q))]
    functions += [lambda A, Q, m=method: orthogonal_iteration(A, Q, method=m) for method in METHODS]
    functions += [lambda A, Q: eigenbasis(A)]
    for f in functions:
        batched = np.asarray(f(jnp.asarray(A), jnp.asarray(Q)))
        for index in np.ndindex(2, 3):
            np.testing.assert_allclose(batched[index], f(jnp.asarray(A[index]), jnp.asarray(Q[index])), atol=1e-13)


def test_errors() -> None:
    with pytest.raises(ValueError, match="method must be 'qr' or 'cholesky'; got 'svd'"):
        orthogonal_iteration(jnp.eye(2), jnp.eye(2), method="svd")


def test_columns_that_rounding_is_a_hundredth_of_stay() -> None:
    """Between 16 and 256 units of rounding a column is known, and not turned; larger ones are."""
    V = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0]
    turn = np.eye(6)
    turn[4:, 4:] = [[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]]
    Q, ε = jnp.asarray(V @ turn, jnp.float32), float(np.finfo(np.float32).eps)

    def next_basis(small: float) -> np.ndarray:
        values = np.array([1.0, 0.5, 0.25, 0.1, small, small / 8])
        A = jnp.asarray((V * values) @ V.T, jnp.float32)
        return np.asarray(orthogonal_iteration(A, Q))

    faint, clear = next_basis(100 * ε), next_basis(1e4 * ε)
    np.testing.assert_allclose(np.abs(faint[:, 4:].T @ Q[:, 4:]), np.eye(2), atol=1e-3)
    assert np.abs(clear[:, 4] @ Q[:, 5]) > 0.1
