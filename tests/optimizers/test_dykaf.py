"""DyKAF against its authors' trajectories, the generic integrator, and the laws of the nearest Kronecker product."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisher_optax as fo
from tests.grouped import grouped
from tests.optimizers.test_soap import gradients, trajectory
from tests.reference import dykaf as reference

FOLDER = Path(__file__).parent / "golden"
FACTORS, TRAJECTORIES = np.load(FOLDER / "dykaf_factors.npz"), np.load(FOLDER / "dykaf.npz")
FACTOR_CASES = sorted({key.split("/")[0] for key in FACTORS.files})
TRAJECTORY_CASES = {
    "full": {"precondition_frequency": 1, "weight_decay": 0.0},
    "rank1": {"precondition_frequency": 2, "weight_decay": 0.0, "rank1_second_moment": True},
    "full_f4_wd": {"precondition_frequency": 4, "weight_decay": 0.05},
}


def follow(rule: Any, grads: np.ndarray) -> list[Any]:
    """The factors after each gradient."""
    factors, path = rule.init(*grads.shape[1:], True, True, jnp.float64), []
    update = jax.jit(lambda G, factors: rule.update(G, factors, None))
    for G in grads:
        factors = update(jnp.asarray(G), factors)
        path.append(factors)
    return path


def splitting(**options: Any) -> Any:
    return fo.factors.projector_splitting(**options)


@pytest.mark.parametrize("case", FACTOR_CASES)
@pytest.mark.usefixtures("x64")
def test_the_authors_factors(case: str) -> None:
    """Released variant, to 1e-10."""
    init = "identity" if case.startswith("eps") else "dominant_released"
    rule = splitting(decay=float(case.split("beta")[1]), variant="parallel", init=init)
    path = follow(rule, FACTORS[f"{case}/grads"])
    for factors, L, R in zip(path, FACTORS[f"{case}/L"], FACTORS[f"{case}/R"], strict=True):
        assert np.linalg.norm(factors.left - L) <= 1e-10 * np.linalg.norm(L)
        assert np.linalg.norm(factors.right - R) <= 1e-10 * np.linalg.norm(R)


@pytest.mark.parametrize("case", TRAJECTORY_CASES)
@pytest.mark.usefixtures("x64")
def test_the_authors_trajectories(case: str) -> None:
    """To 1e-4 of the distance moved: the authors factorise in float32."""
    grads, W, wanted = (TRAJECTORIES[f"{case}/{name}"] for name in ("grads", "params0", "params"))
    options = {"init": "identity", "variant": "parallel", "factor_dtype": jnp.float64, **TRAJECTORY_CASES[case]}
    # The authors' matrices are out x in.
    path = trajectory(fo.dykaf(3e-3, **grouped(**options)), W.T, grads.transpose(0, 2, 1)).transpose(0, 2, 1)
    moved = np.linalg.norm(wanted - W, axis=(1, 2))
    assert moved[-1] > 0.1
    assert (np.linalg.norm(path - wanted, axis=(1, 2)) <= 1e-4 * moved).all()


@pytest.mark.parametrize(("m", "n"), [(3, 5), (4, 4), (6, 2)])
@pytest.mark.usefixtures("x64")
def test_the_sequential_step_is_projector_splitting(m: int, n: int) -> None:
    """One generic rank-one step of the integrator on the dense rearrangement of the Fisher's change, to 1e-12."""
    rng = np.random.default_rng(0)
    G, A, B = rng.normal(size=(m, n)), rng.normal(size=(m, m)), rng.normal(size=(n, n))
    L, R, beta = A @ A.T, B @ B.T, 0.9
    l, r = L.ravel(), R.ravel()
    s = np.linalg.norm(l) * np.linalg.norm(r)
    change = (1 - beta) * (reference.rearranged(np.outer(G, G), m, n) - np.outer(l, r))
    u, s1, v = reference.lubich_oseledets(l / np.linalg.norm(l), s, r / np.linalg.norm(r), change)
    got = splitting(decay=beta).update(jnp.asarray(G), fo.factors.Kronecker(jnp.asarray(L), jnp.asarray(R)), None)
    product = np.outer(np.ravel(got.left), np.ravel(got.right))
    np.testing.assert_allclose(product, s1 * np.outer(u, v), atol=1e-12 * s1)
    wanted = reference.sequential(L, R, G, beta)
    np.testing.assert_allclose(got.left, wanted[0], atol=1e-12 * np.linalg.norm(L))
    np.testing.assert_allclose(got.right, wanted[1], atol=1e-12 * np.linalg.norm(R))


@pytest.mark.parametrize("variant", ["sequential", "parallel"])
@pytest.mark.parametrize("init", ["dominant", "dominant_released", "identity"])
@pytest.mark.usefixtures("x64")
def test_factors_stay_positive_semidefinite(variant: str, init: str) -> None:
    for factors in follow(splitting(variant=variant, init=init), gradients((4, 6))):
        for A in factors[:2]:
            values = np.linalg.eigvalsh(A)
            assert values[0] >= -1e-12 * values[-1] > -np.inf
            assert values[-1] > 0


@pytest.mark.parametrize("variant", ["sequential", "parallel"])
@pytest.mark.usefixtures("x64")
def test_a_kronecker_sequence_is_followed_exactly(variant: str) -> None:
    """Gradients c u vᵀ keep F a Kronecker product: the factors' product is F at every step."""
    rng = np.random.default_rng(1)
    u, v, c = rng.normal(size=(4, 1)), rng.normal(size=(1, 3)), rng.uniform(0.5, 2, size=12)
    grads, beta = c[:, None, None] * (u @ v), 0.8
    F = c[0] ** 2 * np.kron(u @ u.T, v.T @ v)
    for factors, size in zip(follow(splitting(decay=beta, variant=variant), grads), c, strict=True):
        F = beta * F + (1 - beta) * size**2 * np.kron(u @ u.T, v.T @ v)
        np.testing.assert_allclose(np.kron(factors.left, factors.right), F, atol=1e-12 * np.linalg.norm(F))


@pytest.mark.parametrize("variant", ["sequential", "parallel"])
@pytest.mark.usefixtures("x64")
def test_scale(variant: str) -> None:
    """G to c G takes the product to c² of it; a zero gradient to β of it."""
    grads, rule = gradients((4, 6)), splitting(decay=0.9, variant=variant)
    products = [np.kron(f.left, f.right) for f in follow(rule, grads)]
    for product, scaled in zip(products, follow(rule, 1e4 * grads), strict=True):
        np.testing.assert_allclose(np.kron(scaled.left, scaled.right), 1e8 * product, rtol=1e-8, atol=1e-2)
    last = follow(rule, np.concatenate([grads, np.zeros((1, 4, 6))]))[-1]
    np.testing.assert_allclose(np.kron(last.left, last.right), 0.9 * products[-1], atol=1e-12 * products[-1].max())


@pytest.mark.usefixtures("x64")
def test_transposing_swaps_the_factors() -> None:
    """In the parallel variant always; in the sequential one together with the side that goes first."""
    grads = gradients((4, 6))
    for rule, other in (
        (splitting(variant="parallel"), splitting(variant="parallel")),
        (splitting(first="inputs"), splitting(first="outputs")),
    ):
        a, b = follow(rule, grads)[-1], follow(other, grads.transpose(0, 2, 1))[-1]
        np.testing.assert_allclose(a.left, b.right, atol=1e-10 * np.linalg.norm(a.left))
        np.testing.assert_allclose(a.right, b.left, atol=1e-10 * np.linalg.norm(a.right))
    a, b = follow(splitting(), grads)[-1], follow(splitting(), grads.transpose(0, 2, 1))[-1]
    assert np.linalg.norm(a.left - b.right) > 1e-4 * np.linalg.norm(a.left)


@pytest.mark.usefixtures("x64")
def test_one_side_is_the_mean_of_the_outer_products() -> None:
    """With decay, from zero, divided by the other side's length; in either orientation."""
    rule, grads, wanted = splitting(decay=0.8), gradients((3, 5)), np.zeros((3, 3))
    left, right = rule.init(3, 5, True, False, jnp.float64), rule.init(5, 3, False, True, jnp.float64)
    for G in grads:
        wanted = 0.8 * wanted + 0.2 * G @ G.T / 5
        left = rule.update(jnp.asarray(G), left, None)
        right = rule.update(jnp.asarray(G.T), right, None)
    np.testing.assert_allclose(left.left, wanted, rtol=1e-12)
    np.testing.assert_allclose(right.right, wanted, rtol=1e-12)


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_single_precision_at_any_scale(scale: float) -> None:
    """Finite, not zero, and the float64 factors up to rounding."""
    grads = gradients((4, 6)).astype(np.float32)
    factors = fo.factors.projector_splitting().init(4, 6, True, True, jnp.float32)
    for G in grads:
        factors = splitting().update(jnp.asarray(scale * G, jnp.float32), factors, None)
    u, σ, v = np.linalg.svd(grads[0].astype(np.float64))
    wanted = σ[0] * np.outer(u[:, 0], u[:, 0]), σ[0] * np.outer(v[0], v[0])
    for G in grads.astype(np.float64):
        wanted = reference.sequential(*wanted, G, 0.95)
    for got, A in zip(factors[:2], wanted, strict=True):
        got = np.asarray(got, np.float64)
        np.testing.assert_allclose(got / np.linalg.norm(got), A / np.linalg.norm(A), atol=1e-5)


def test_the_rank_one_moment_takes_a_side_each() -> None:
    """m + n numbers for v instead of m n, and the rest of SOAP's state."""
    params = {"kernel": jnp.ones((6, 8))}
    size = lambda tx: sum(x.size for x in jax.tree.leaves(tx.init(params)))  # noqa: E731
    assert size(fo.dykaf()) - size(fo.dykaf(rank1_second_moment=True)) == 6 * 8 - (6 + 8)
    assert size(fo.dykaf()) == size(fo.soap())


def test_a_second_moment_of_rank_one_grows_from_an_eps_of_zero() -> None:
    """As the one that starts at a tiny eps: zero times zero would stay zero."""
    G = jnp.asarray(np.random.default_rng(3).normal(size=(3, 4, 5)), jnp.float32)
    inner = fo.applications.rank1_adam(eps=0.0), fo.applications.rank1_adam(eps=1e-20)
    states = [tx.init(G[0]) for tx in inner]
    for g in G:
        (u, states[0]), (wanted, states[1]) = (tx.update(g, state) for tx, state in zip(inner, states, strict=True))
        np.testing.assert_allclose(u, wanted, rtol=1e-5)


def test_the_rank_one_moment_is_exact_on_products() -> None:
    """Squares p qᵀ are an outer product: the step is then the full second moment's, but for its start at eps."""
    g = {"kernel": jnp.outer(jnp.array([1.0, -2.0, 3.0]), jnp.array([0.5, 4.0]))}
    inner = fo.applications.rank1_adam(0.9, 0.9, 1e-12), fo.applications.adam(0.9, 0.9, 1e-12)
    states = [tx.init(g) for tx in inner]
    for _ in range(3):
        (u, states[0]), (wanted, states[1]) = (tx.update(g, state) for tx, state in zip(inner, states, strict=True))
        np.testing.assert_allclose(u["kernel"], wanted["kernel"], rtol=1e-5)


def test_words_are_checked() -> None:
    for options in ({"init": "svd"}, {"variant": "both"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            fo.dykaf(**options)
    with pytest.raises(ValueError, match="first"):
        fo.factors.projector_splitting(first="left")
    with pytest.raises(TypeError, match="precondition_frequncy"):
        fo.dykaf(precondition_frequncy=3)


def test_it_trains_beside_others() -> None:
    """As a link of a chain, on a matrix and a bias."""
    params = {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}
    tx = optax.chain(optax.clip_by_global_norm(1.0), fo.dykaf(0.05, weight_decay=0.0))
    state, step = tx.init(params), jax.jit(tx.update)
    for _ in range(150):
        grads = jax.tree.map(lambda w: w - 0.5, params)
        updates, state = step(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert all(float(jnp.max(jnp.abs(w - 0.5))) < 0.05 for w in jax.tree.leaves(params))
