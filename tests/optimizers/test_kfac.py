"""K-FAC, EKFAC and KFAC-SOAP against dense float64 references, and where they are another method exactly."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.sparse.linalg

import fisher_optax as fo
from fisher_optax.linalg.eigenbasis import LowRank
from fisher_optax.preconditioner.applications import damped, eigenvalue_corrected
from fisher_optax.preconditioner.contracts import Eigenpairs
from fisher_optax.statistics import LayerFactors
from tests.grouped import grouped
from tests.reference.kfac import Kfac, power
from tests.reference.soap import Soap

M, N, STEPS = 4, 3, 12  # inputs (a bias makes one more), outputs


def sequence() -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Inputs (with a last column of ones), output gradients and the mean gradient of 12 batches of 9 examples."""
    rng = np.random.default_rng(0)
    mix, turn = rng.normal(size=(M, M)), rng.normal(size=(N, N))
    out = []
    for _ in range(STEPS):
        X = np.c_[rng.normal(size=(9, M)) @ mix, np.ones(9)]
        D = rng.normal(size=(9, N)) @ turn
        out.append((X, D, X.T @ D / 9))
    return out


def tree(G: np.ndarray) -> dict[str, Any]:
    return {"kernel": jnp.asarray(G[:-1]), "bias": jnp.asarray(G[-1])}


def joined(params: dict[str, Any]) -> np.ndarray:
    return np.concatenate([params["kernel"], params["bias"][None]])


def statistics(X: Any, D: Any, basis: Any = None) -> dict[str, Any]:
    squares = None if basis is None else (X @ basis.left).T ** 2 @ (D @ basis.right) ** 2 / len(X)
    left, right = jnp.asarray(X.T @ X / len(X)), jnp.asarray(D.T @ D / len(D))
    return {"kernel": LayerFactors(left, right, squares, jnp.asarray(float(len(X))), "bias"), "bias": None}


def run(tx: Any, *, squares: bool = False, without: tuple[int, ...] = ()) -> np.ndarray:
    """The weights after each of the steps; at those in ``without`` there are no statistics."""
    params, out = tree(np.ones((M + 1, N))), []
    state = tx.init(params)

    @jax.jit
    def step(params: Any, state: Any, G: Any, seen: Any) -> Any:
        basis = fo.eigenbases(state, params)["kernel"] if squares else None
        stats = None if seen is None else statistics(*seen, basis)
        updates, state = tx.update(tree(G), state, params, statistics=stats)
        return optax.apply_updates(params, updates), state

    for i, (X, D, G) in enumerate(sequence()):
        params, state = step(params, state, G, None if i in without else (X, D))
        out.append(joined(params))
    return np.stack(out)


def reference(method: Kfac, *, squares: bool = False, without: tuple[int, ...] = ()) -> np.ndarray:
    out = []
    for i, (X, D, G) in enumerate(sequence()):

        def measured(Q_A: Any, Q_B: Any, X: Any = X, D: Any = D) -> Any:
            return (X @ Q_A).T ** 2 @ (D @ Q_B) ** 2 / len(X)

        seen = () if i in without else (X.T @ X / 9, D.T @ D / 9, measured if squares else None)
        out.append(method.step(G, *seen))
    return np.stack(out)


OPTIONS = {
    "defaults": ({}, {}),
    "every-step": ({"precondition_frequency": 1, "damping": 0.1}, {}),
    "half": ({"exponent": -0.5, "precondition_frequency": 2, "momentum": 0.5}, {}),
    "decay": ({"weight_decay": 0.3, "curvature_decay": 0.5, "precondition_frequency": 3}, {}),
    "grafted": ({"precondition_frequency": 2}, {"grafting": ("sgd", True)}),
    "clipped": ({"precondition_frequency": 2, "kl_clip": 1e-4}, {}),
    "factored": ({"precondition_frequency": 2}, {"decomposition": ("inverse", None), "factored": (None, True)}),
    "factored-half": (
        {"precondition_frequency": 2, "exponent": -0.5},
        {"decomposition": ("inverse", None), "factored": (None, True)},
    ),
}


@pytest.mark.parametrize(("shared", "own"), OPTIONS.values(), ids=OPTIONS)
@pytest.mark.usefixtures("x64")
def test_the_reference(shared: dict[str, Any], own: dict[str, Any]) -> None:
    """12 steps of a kernel with its bias, statistics missing at two of them, equal dense ``(A ⊗ B + λ I)^p``."""
    ours = {k: v[0] for k, v in own.items() if v[0] is not None}
    theirs = {k: v[1] for k, v in own.items() if v[1] is not None}
    wanted = reference(Kfac(np.ones((M + 1, N)), 0.01, **shared, **theirs), without=(4, 5))
    np.testing.assert_allclose(run(fo.kfac(0.01, **grouped(**shared, **ours)), without=(4, 5)), wanted, atol=1e-9)


@pytest.mark.parametrize("exponent", [-1.0, -0.5])
@pytest.mark.usefixtures("x64")
def test_ekfac_is_the_reference(exponent: float) -> None:
    """The diagonal is measured in the basis of the moment and turned by squared overlaps when that is renewed."""
    options = {"exponent": exponent, "precondition_frequency": 3, "weight_decay": 0.1}
    wanted = reference(Kfac(np.ones((M + 1, N)), 0.01, corrected=True, **options), squares=True)
    np.testing.assert_allclose(run(fo.ekfac(0.01, **options), squares=True), wanted, atol=1e-9)


@pytest.mark.usefixtures("x64")
def test_kfac_soap_is_soap_in_the_bases_of_a_and_b() -> None:
    method = Soap(np.ones((M + 1, N)), 0.01, precondition_frequency=2)
    wanted = np.stack([method.step(G, (X.T @ X / 9, D.T @ D / 9)) for X, D, G in sequence()])
    np.testing.assert_allclose(run(fo.kfac_soap(0.01, precondition_frequency=2)), wanted, atol=1e-9)


def test_nothing_moves_before_the_first_statistics() -> None:
    for options in ({}, {"decomposition": "inverse"}):
        points = run(fo.kfac(0.1, **grouped(**options)), without=(0, 1))
        np.testing.assert_array_equal(points[:2], 1)
        assert not np.array_equal(points[2], points[1])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("decomposition", ["eigh", "inverse"])
def test_bases_are_made_of_the_first_statistics(decomposition: str) -> None:
    """Whenever they come, and not at the next refresh."""
    wanted = reference(Kfac(np.ones((M + 1, N)), 0.01, factored=decomposition == "inverse"), without=(0, 1, 5))
    found = run(fo.kfac(0.01, **grouped(decomposition=decomposition)), without=(0, 1, 5))
    np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-10)


@functools.cache
def layer() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    X, D, G = sequence()[0]
    return X.T @ X / 9, D.T @ D / 9, G


def pairs(A: np.ndarray, B: np.ndarray) -> Eigenpairs:
    (a, Q_A), (b, Q_B) = np.linalg.eigh(A), np.linalg.eigh(B)
    return Eigenpairs(*map(jnp.asarray, (Q_A, Q_B, a, b)))


@pytest.mark.usefixtures("x64")
def test_three_ways_to_one_inverse() -> None:
    """EKFAC with Kronecker eigenvalues = K-FAC = conjugate gradients on ``A ⊗ B + λ I``."""
    A, B, G = layer()
    basis, λ = pairs(A, B), 0.01
    kfac, ekfac = damped(λ), eigenvalue_corrected(λ)
    by_kfac = kfac.update(jnp.asarray(G), kfac.init(jnp.asarray(G)), basis)[0]
    state = ekfac.init(jnp.asarray(G))._replace(
        weight=jnp.asarray(1.0), nu=jnp.outer(basis.left_values, basis.right_values)
    )
    by_ekfac = ekfac.update(jnp.asarray(G), state, basis)[0]
    F = np.kron(A, B) + λ * np.eye(G.size)
    by_cg, failed = scipy.sparse.linalg.cg(F, G.ravel(), rtol=1e-14, maxiter=1000)
    assert failed == 0
    np.testing.assert_allclose(by_kfac.ravel(), by_cg, rtol=1e-10)
    np.testing.assert_allclose(by_ekfac.ravel(), by_cg, rtol=1e-10)


@pytest.mark.parametrize("exponent", [-1.0, -0.5])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (6, 5)], ids=str)
@pytest.mark.usefixtures("x64")
def test_sides_of_low_rank(shape: tuple[int, int], exponent: float) -> None:
    """Sides longer than 4 come as rows, of a moment of rank 2: the step is the dense power of the damped Fisher."""
    rng = np.random.default_rng(1)
    rows = [rng.normal(size=(2 if d > 4 else d, d)) for d in shape]
    A, B = (R.T @ R for R in rows)
    left, right = (LowRank(jnp.asarray(R)) if len(R) == 2 else jnp.asarray(R.T @ R) for R in rows)
    tx = fo.scale_by_kfac(damping=0.1, exponent=exponent, max_precond_dim=4, storage=fo.Storage(rank=3))
    params = {"kernel": jnp.asarray(rng.normal(size=shape))}
    stats = {"kernel": LayerFactors(left, right, None, jnp.asarray(2.0))}
    updates = jax.jit(tx.update)(params, tx.init(params), params, statistics=stats)[0]
    dense = power(np.kron(A, B) + 0.1 * np.eye(len(A) * len(B)), exponent) @ np.ravel(params["kernel"])
    np.testing.assert_allclose(updates["kernel"].ravel(), dense, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("x64")
def test_a_large_vocabulary_needs_no_square_of_it() -> None:
    """A head of 400 outputs: samples of its output gradients take the place of a matrix, from capture to step."""
    rng = np.random.default_rng(2)
    params = {"head": {"kernel": jnp.asarray(rng.normal(size=(3, 400)) / 20)}}
    x, y = jnp.asarray(rng.normal(size=(16, 3))), jnp.asarray(rng.integers(400, size=16))
    loss = lambda p: fo.losses.softmax_cross_entropy(x @ p["head"]["kernel"], y)  # noqa: E731
    grad_fn = jax.jit(fo.value_and_grad(loss, fo.KroneckerFactors(max_dim=100, rank=16)))
    tx = fo.kfac(1.0, damping=1e-3, max_precond_dim=100, storage=fo.Storage(rank=16))
    first, grads, stats = grad_fn(params)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params, statistics=stats)
    after = grad_fn(optax.apply_updates(params, updates))[0]
    assert after < first
    assert max(leaf.size for leaf in jax.tree.leaves(state)) <= 16 * 400
    right = stats["head"]["kernel"].right.rows
    delta = (jax.nn.softmax(x @ params["head"]["kernel"]) - jax.nn.one_hot(y, 400)) / 16
    B = 16 * delta.T @ delta
    np.testing.assert_allclose(right.T @ right, B, atol=1e-12)
    A = x.T @ x / 16
    a, Q = np.linalg.eigh(A)
    G = Q.T @ grads["head"]["kernel"]
    U = np.stack([np.linalg.solve(a_i * np.asarray(B) + 1e-3 * np.eye(400), g) for a_i, g in zip(a, G, strict=True)])
    np.testing.assert_allclose(updates["head"]["kernel"], -(Q @ U), rtol=1e-6, atol=1e-8)


@pytest.mark.usefixtures("x64")
def test_blocks_are_blocks_of_the_factors() -> None:
    """``block_size`` cuts A and B into diagonal blocks, each pair damped alone."""
    A, B, G = layer()
    tx = fo.scale_by_kfac(damping=0.1, storage=fo.Storage(block_size=3))
    params = {"kernel": jnp.asarray(G)}
    stats = {"kernel": LayerFactors(jnp.asarray(A), jnp.asarray(B), None, jnp.asarray(9.0))}
    updates = jax.jit(tx.update)(params, tx.init(params), params, statistics=stats)[0]["kernel"]
    for rows in (slice(0, 3), slice(3, 5)):
        dense = np.linalg.solve(np.kron(A[rows, rows], B) + 0.1 * np.eye(3 * len(A[rows])), G[rows].ravel())
        np.testing.assert_allclose(updates[rows].ravel(), dense, rtol=1e-9)
