"""Rounding is not made into steps: gradients that span less than the matrix, at any scale, with every decomposition."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisher_optax as fo
from fisher_optax._xla import PLATFORMS
from fisher_optax.linalg import eigenbasis, orthogonal_iteration
from fisher_optax.preconditioner.applications.eigenbasis import counts
from tests.grouped import grouped
from tests.linalg.test_eigenbasis import assert_orthonormal, random_basis

M, N, RANK = 12, 9, 3
DECOMPOSITIONS = ("qr", "cholesky", "eigh")


def lion_inside(decomposition: str) -> optax.GradientTransformationExtraArgs:
    decompose = {"eigh": fo.decompositions.eigh}.get(
        decomposition, functools.partial(fo.decompositions.orthogonal_iteration, decomposition)
    )
    return fo.precondition(
        fo.factors.outer_product(0.95), decompose(), fo.in_eigenbasis(optax.scale_by_lion()), precondition_frequency=3
    )


def in_a_basis(make: Callable[..., Any], **options: Any) -> Callable[[str], Any]:
    return lambda decomposition: make(**grouped(decomposition=decomposition, precondition_frequency=3, **options))


METHODS: dict[str, Callable[[str], Any]] = {
    "soap": in_a_basis(fo.scale_by_soap),
    "soap-squared": in_a_basis(fo.scale_by_soap, transport="squared", refresh="staggered"),
    "soap-adam-first": in_a_basis(fo.scale_by_soap, first_step="adam"),
    "soap-bf16": in_a_basis(fo.scale_by_soap, factor_dtype=jnp.bfloat16),
    "dykaf": in_a_basis(fo.scale_by_dykaf),
    "dykaf-rank1": in_a_basis(fo.scale_by_dykaf, rank1_second_moment=True),
    "kl_soap": in_a_basis(fo.scale_by_kl_soap),
    "kl_shampoo": in_a_basis(fo.scale_by_kl_shampoo),
    "lion": lion_inside,
}
ROOTS = {
    f"shampoo{exponent}-{root}": functools.partial(
        fo.scale_by_shampoo, exponent=exponent, refresh=fo.Refresh(decomposition=root), grafting=None
    )
    for exponent in (-0.25, -0.5)
    for root in ("eigh", "newton", "polynomial")
}
OTHERS = {"muon": fo.scale_by_muon, "normuon": lambda: optax.chain(fo.scale_by_muon(), fo.scale_by_normuon())}
WITHOUT_EPS = {
    "normalized": lambda: fo.scale_by_soap(eps=0.0, normalize_updates=True),
    "no-basis": lambda: fo.scale_by_soap(eps=0.0, max_precond_dim=0),
    "no-basis-rank1": lambda: fo.scale_by_dykaf(eps=0.0, max_precond_dim=0, rank1_second_moment=True),
}
STEPS = 20


@functools.cache
def stepper(name: str, decomposition: str = "") -> Callable[[np.ndarray], np.ndarray]:
    """The updates of one matrix by a method, after the first; compiled once for all gradients of as many steps."""
    tx = METHODS[name](decomposition) if decomposition else (ROOTS | OTHERS | WITHOUT_EPS)[name]()

    def step(state: Any, G: jax.Array) -> tuple[Any, jax.Array]:
        u, state = tx.update({"w": G}, state)
        return state, u["w"]

    scan = jax.jit(lambda gradients: jax.lax.scan(step, tx.init({"w": jnp.zeros((M, N))}), gradients)[1][1:])
    return lambda gradients: np.asarray(scan(jnp.asarray(gradients, jnp.float32)))


@functools.cache
def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).normal(size=shape)


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
@pytest.mark.parametrize("name", METHODS)
def test_weights_that_never_had_a_gradient_stay_in_a_basis(name: str, decomposition: str) -> None:
    assert_dead_weights_stay(stepper(name, decomposition))


@pytest.mark.parametrize("name", [*ROOTS, *OTHERS])
def test_weights_that_never_had_a_gradient_stay(name: str) -> None:
    assert_dead_weights_stay(stepper(name))


def assert_dead_weights_stay(steps: Callable[[np.ndarray], np.ndarray]) -> None:
    """Inputs and outputs that are never active, wherever they are, beside others of many sizes: to the bit."""
    gradients = normal(STEPS, M, N) * np.geomspace(1, 1e-3, N)
    gradients[:, [0, 5, 11]] = 0
    gradients[:, :, [2, 6]] = 0
    for scale in (1e-4, 1e4):
        u = steps(gradients * scale)
        assert not u[:, [0, 5, 11]].any()
        assert not u[:, :, [2, 6]].any()
        assert np.all(np.abs(u[-1]).sum(axis=1)[[1, 2, 3, 4]] > 0)


@pytest.mark.parametrize("name", ["soap", "dykaf", "kl_soap"])
def test_weights_beside_others_with_far_larger_gradients_are_trained(name: str) -> None:
    """Several of a thousandth, whose eigenvalues cannot be told apart, and all beside one of some thousand times."""
    for small, size in (([1, 4, 8], 1e-3), (list(range(1, M)), 3e-4)):
        gradients = normal(STEPS, M, N).copy()
        gradients[:, small] *= size
        u = np.abs(stepper(name, "qr")(gradients)[8:])
        assert np.mean(u[:, small]) > 0.1 * np.mean(np.delete(u, small, axis=1))


@pytest.mark.parametrize("name", WITHOUT_EPS)
def test_weights_that_never_had_a_gradient_stay_without_eps(name: str) -> None:
    """Also where there is no basis, and where all entries are scaled by their common size."""
    assert_dead_weights_stay(stepper(name))


@functools.cache
def low_rank() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of rank 3, and what their columns and rows span."""
    U, V = random_basis(M, 1)[:, :RANK], random_basis(N, 2)[:, :RANK]
    core = np.diag([1.0, 0.5, 0.25]) @ (np.eye(RANK) + 0.3 * normal(STEPS, RANK, RANK))
    return U @ core @ V.T, U, V


@pytest.mark.parametrize("scale", [1e-3, 1e6])
@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
@pytest.mark.parametrize("name", [name for name in METHODS if name != "soap-bf16"])
def test_steps_stay_in_the_span_of_the_gradients(name: str, decomposition: str, scale: float) -> None:
    """In a basis that has seen all of it, which a DyKAF from the first gradient's dominant triple has not at first."""
    gradients, U, V = low_rank()
    u = stepper(name, decomposition)(gradients * scale)[8:]
    outside = u - U @ U.T @ u @ V @ V.T
    assert np.all(np.linalg.norm(outside, axis=(1, 2)) < 1e-2 * np.linalg.norm(u, axis=(1, 2)))


@pytest.mark.parametrize("make", [fo.scale_by_soap, fo.scale_by_dykaf, fo.scale_by_kl_soap, fo.scale_by_kl_shampoo])
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_a_matrix_in_a_batch_moves_as_alone(
    make: Callable[..., Any], platform: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not square, so that one factor is singular: compiled, mapped and uncompiled take the same basis of its rest."""
    monkeypatch.setitem(PLATFORMS, "cpu", PLATFORMS[platform]._replace(one_factorisation=True))
    tx, gradients = make(precondition_frequency=2), normal(3, 5, 5, 8).astype(np.float32)

    def run(gradients: Any, state: Any, update: Any) -> Any:
        for G in gradients:
            u, state = update({"w": G}, state)
        return u["w"]

    start = tx.init({"w": jnp.zeros((5, 8))})
    starts = jax.tree.map(lambda x: jnp.stack([x] * len(gradients)), start)
    mapped = run(gradients.swapaxes(0, 1), starts, jax.jit(jax.vmap(tx.update)))
    update = jax.jit(tx.update)
    alone = [run(g, start, update) for g in gradients]
    np.testing.assert_allclose(mapped, np.stack(alone), atol=0.02)
    np.testing.assert_allclose(run(gradients[0], start, tx.update), alone[0], atol=0.02)


# --- which entries count ---


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1.0, 3e37])
def test_the_same_entries_count_at_every_scale(scale: float) -> None:
    g = np.array([[1.0, 1e-3, 1e-7], [1e-3, 1e-3, 1e-7], [1e-7, 0.0, 1e-7]], np.float32)
    v = jnp.asarray(np.square(g) * scale, jnp.float32)
    assert counts(v).tolist() == [[True, True, False], [True, True, False], [False, False, False]]
    assert not counts(jnp.zeros((2, 3))).any()


def test_at_the_first_step_less_counts() -> None:
    v = jnp.asarray([[1.0, 1e-8], [1e-8, 1e-2]])
    assert counts(v).all()
    assert counts(v, first=True).tolist() == [[True, False], [False, True]]


# --- bases of singular matrices ---


def singular(rank: int = 4, d: int = 10) -> np.ndarray:
    G = random_basis(d, 5)[:, :rank] * np.geomspace(1, 0.1, rank)
    return G @ G.T


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("start", ["axes", "random"])
def test_a_basis_hangs_on_its_matrix_and_not_on_rounding(start: str, dtype: Any) -> None:
    """All of it, where six of ten directions are in the null space; stored in half precision too."""
    A, B = (jnp.asarray(singular() * s, jnp.float32) for s in (1, 1 + 3e-7))
    old = jnp.asarray(np.eye(10) if start == "axes" else random_basis(10, 3), dtype)
    for basis in (eigenbasis, lambda A: orthogonal_iteration(A, old)):
        P, Q = basis(A), basis(B)
        assert_orthonormal(P, 3e-6)
        np.testing.assert_allclose(P, Q * np.sign(np.sum(P * Q, axis=0)), atol=1e-4)


def test_the_null_space_keeps_the_old_basis() -> None:
    """What a step of orthogonal iteration does not reach stays, as far as it is orthogonal to what it does reach."""
    old = jnp.asarray(random_basis(10, 3), jnp.float32)
    A = np.asarray(old, np.float64)[:, :4] @ np.diag([4.0, 3.0, 2.0, 1.0]) @ np.asarray(old, np.float64)[:, :4].T
    np.testing.assert_allclose(
        np.abs(orthogonal_iteration(jnp.asarray(A, jnp.float32), old).T @ old), np.eye(10), atol=1e-5
    )


def test_a_basis_of_pairs_of_axes_with_the_same_share() -> None:
    """Only one of each may be left out, and at the first basis it is not rounding that says which."""
    A = np.kron(np.diag([2.0, 1.0]), np.ones((2, 2))).astype(np.float32)
    Q = eigenbasis(jnp.asarray(A))
    assert_orthonormal(Q, 1e-6)
    pairs = np.array([[1, 0, 1, 0], [1, 0, 1, 0], [0, 1, 0, 1], [0, 1, 0, 1]])
    np.testing.assert_allclose(np.abs(Q), pairs * 0.5**0.5, atol=1e-6)


def test_bases_of_what_is_not_finite_are_not_finite() -> None:
    A = jnp.asarray(singular(), jnp.float32).at[3, 3].set(jnp.nan)
    assert not jnp.isfinite(eigenbasis(A)).all()
    assert not jnp.isfinite(orthogonal_iteration(A, jnp.eye(10))).all()
