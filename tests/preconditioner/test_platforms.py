"""Choices by the platform that a program is lowered for, whatever the machine it is compiled on; and by precision."""

from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisher_optax as fo
from fisher_optax import linalg
from fisher_optax._xla import PLATFORMS, by_platform
from fisher_optax.statistics import LayerFactors
from tests.preconditioner.test_refresh import equations

PARAMS = {"layer": {"kernel": jnp.zeros((6, 4))}}
SIDE, RATIO, NOISE, STEPS = 8, 0.5, 0.2, 100


def lowered(platform: str, tx: optax.GradientTransformation) -> str:
    """The program of a step for that platform, made on this machine."""
    state = jax.eval_shape(tx.init, PARAMS)
    return jax.jit(tx.update).trace(PARAMS, state, PARAMS).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(("platform", "setting"), [("cpu", "cpu"), ("cuda", "gpu"), ("rocm", "gpu"), ("tpu", "tpu")])
def test_a_program_takes_the_choices_of_what_it_is_lowered_for(platform: str, setting: str) -> None:
    def f(x: Any) -> Any:
        return by_platform(lambda number, x: x + number, lambda p: list(PLATFORMS.values()).index(p) + 7, x)

    text = jax.jit(f).trace(jnp.zeros(2)).lower(lowering_platforms=(platform,)).as_text()
    there = {i for i in range(len(PLATFORMS)) if f"dense<{i + 7}.000000e+00>" in text}
    assert there == {list(PLATFORMS).index(setting)}


def test_outside_jit_the_device_of_the_arrays_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert by_platform(lambda way, x: way, lambda p: p.factorises, jnp.zeros(1))


@pytest.mark.parametrize("name", ["soap", "kl_soap", "dykaf"])
def test_soap_holds_no_factorisation_of_a_library_on_an_accelerator(name: str) -> None:
    """XLA's own Cholesky factorisation, and neither QR nor eigh."""
    tx = getattr(fo, name)(1e-2)
    on_tpu, on_cpu = lowered("tpu", tx), lowered("cpu", tx)
    assert "lapack_sgeqrf" in on_cpu
    assert "lapack_" not in on_tpu
    assert "Qr" not in on_tpu
    assert "Eigh" not in on_tpu
    assert on_tpu.count("stablehlo.cholesky") == 2  # lengths


def test_roots_and_eigenpairs_are_by_products_on_an_accelerator() -> None:
    assert "lapack_ssyevd" in lowered("cpu", fo.shampoo(1e-2))
    text = lowered("tpu", fo.shampoo(1e-2))
    assert "lapack_" not in text
    assert "Eigh" not in text


@pytest.mark.parametrize("rows", [7, 2, None])
def test_a_product_by_some_rows_at_once_is_the_product(rows: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rows do not divide it well, all at once; batched, under vmap too."""
    monkeypatch.setitem(PLATFORMS, "cpu", PLATFORMS["cpu"]._replace(rows_at_once=rows))
    rng = np.random.default_rng(0)
    X, Y = (rng.standard_normal(shape).astype(np.float32) for shape in ((3, 12, 5), (3, 5, 4)))
    for product in (linalg.times, jax.vmap(linalg.times), lambda X, Y: jax.jit(linalg.times)(X, Y)):
        np.testing.assert_allclose(product(jnp.asarray(X), jnp.asarray(Y)), X @ Y, rtol=1e-5, atol=1e-6)


def gradients(seed: int) -> np.ndarray:
    """Of known singular vectors with well-separated singular values, of random signs and with noise between them."""
    rng = np.random.default_rng(seed)
    L, R = (np.linalg.qr(rng.standard_normal((SIDE, SIDE)))[0] * RATIO ** (np.arange(SIDE) / 2) for _ in range(2))
    signs = rng.choice((-1.0, 1.0), (STEPS, SIDE))[:, None] * np.eye(SIDE)
    return (L @ (signs + NOISE * rng.standard_normal((STEPS, SIDE, SIDE))) @ R.T).astype(np.float32)


def after_steps(decomposition: str, seed: int) -> np.ndarray:
    tx = fo.soap(3e-3, weight_decay=0.0, refresh=fo.Refresh(decomposition=decomposition))

    def step(carry: Any, G: Any) -> Any:
        updates, state = tx.update({"kernel": G}, carry[1], carry[0])
        return (optax.apply_updates(carry[0], updates), state), None

    params = {"kernel": jnp.zeros((SIDE, SIDE))}
    (params, _), _ = jax.jit(lambda c, Gs: jax.lax.scan(step, c, Gs))((params, tx.init(params)), gradients(seed))
    return np.asarray(params["kernel"], np.float64)


@pytest.mark.parametrize("seed", range(2))
def test_soap_by_an_accelerators_refresh_goes_where_soap_by_qr_goes(seed: int) -> None:
    """From zero, in 100 steps with a refresh every ten: within a thousandth of the way."""
    by_qr, by_products = (after_steps(way, seed) for way in ("qr", "cholesky"))
    assert np.linalg.norm(by_products - by_qr) < 1e-3 * np.linalg.norm(by_qr)


def directions(tx: Any, captured: bool) -> np.ndarray:
    """Of 12 steps on statistics of 40 examples a step, with a refresh every third."""
    rng, params, found = np.random.default_rng(3), {"kernel": jnp.zeros((6, 4))}, []
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(12):
        a, d = rng.standard_normal((40, 6)) * 0.7 ** np.arange(6), rng.standard_normal((40, 4)) * 0.7 ** np.arange(4)
        squares = jnp.asarray((a.T**2 @ d**2) / 40, jnp.float32)
        A, B = (jnp.asarray(x.T @ x / 40, jnp.float32) for x in (a, d))
        given = {"kernel": LayerFactors(A, B, squares, jnp.asarray(40.0))}
        extra = {"statistics": given} if captured else {}
        updates, state = update({"kernel": jnp.asarray(a.T @ d / 40, jnp.float32)}, state, params, **extra)
        found.append(np.asarray(updates["kernel"], np.float64))
    return np.stack(found)


@pytest.mark.parametrize(
    ("make", "captured", "within"),
    [
        (lambda: fo.scale_by_kfac(damping=1e-3, precondition_frequency=3), True, 0.02),
        (lambda: fo.scale_by_ekfac(damping=1e-3, precondition_frequency=3), True, 0.02),
        (lambda: fo.scale_by_shampoo(precondition_frequency=3), False, 1e-3),
    ],
    ids=["kfac", "ekfac", "shampoo"],
)
def test_an_accelerators_stand_ins_for_eigh_are_near_it(
    make: Any, captured: bool, within: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four rounds of orthogonal iteration for K-FAC, coupled Newton for Shampoo."""
    exact = directions(make(), captured)
    monkeypatch.setitem(PLATFORMS, "cpu", PLATFORMS["tpu"]._replace(one_factorisation=True))
    by_products = directions(make(), captured)
    assert np.linalg.norm(by_products - exact) < within * np.linalg.norm(exact)
    assert np.any(by_products != exact)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_dominant_eigenvector_is_found_by_squarings(scale: float) -> None:
    """Of any scale, with a close second; of equal ones some vector of their space; of zero none."""
    V = np.linalg.qr(np.random.default_rng(0).standard_normal((5, 5)))[0]
    find = jax.jit(linalg.dominant_eigenvector)

    def matrix(*values: float) -> Any:
        return jnp.asarray(scale * (V * np.array(values)) @ V.T, jnp.float32)

    np.testing.assert_allclose(np.abs(V[:, 0] @ np.asarray(find(matrix(1, 0.99, 0.5, 0.1, 0)))), 1, atol=1e-5)
    tied = np.asarray(find(matrix(1, 1, 0.5, 0.1, 0)))
    np.testing.assert_allclose(np.linalg.norm(V[:, :2].T @ tied), 1, atol=1e-5)
    assert not np.any(find(jnp.zeros((5, 5))))


@pytest.mark.parametrize("d", [1, 5, 128, 130, 260])
def test_the_q_of_a_qr_by_blocks(d: int) -> None:
    """Orthonormal, and the leading columns span what the leading ones did; more blocks than one, and uneven ones."""
    M = np.random.default_rng(d).standard_normal((d, d)).astype(np.float32)
    Q = np.asarray(jax.jit(linalg.cholesky_qr)(jnp.asarray(M)), np.float64)
    np.testing.assert_allclose(Q.T @ Q, np.eye(d), atol=3e-6)
    wanted = np.linalg.qr(M.astype(np.float64))[0]
    np.testing.assert_allclose(np.abs(np.sum(Q * wanted, 0)), 1, atol=1e-4)


@pytest.mark.parametrize("field", ["factors", "rotations", "basis"])
def test_each_product_has_its_own_precision(field: str) -> None:
    """A program with one of them lowered holds as many products as one in float32, and fewer of these."""

    def products(**lower: str) -> Counter[str]:
        tx = fo.soap(1e-2, products=fo.Products(**lower))
        state = jax.eval_shape(tx.init, PARAMS)
        program = equations(jax.make_jaxpr(tx.update)(PARAMS, state, PARAMS).jaxpr, "cpu")
        return Counter(str(eqn.params["precision"]) for eqn in program if eqn.primitive.name == "dot_general")

    exact, lower = products(), products(**{field: "high"})
    assert lower.total() == exact.total()
    assert {name for name in exact if "HIGH" in name} == set(exact)
    assert 0 < sum(count for name, count in lower.items() if "HIGHEST" not in name) < exact.total()


@pytest.mark.parametrize(
    "make",
    [
        lambda: fo.factors.outer_product(precision="fast"),
        lambda: fo.decompositions.orthogonal_iteration(precision="fast"),
        lambda: fo.in_eigenbasis(optax.scale_by_lion(), precision="fast"),
    ],
    ids=["factors", "decomposition", "application"],
)
def test_a_part_refuses_an_unknown_precision(make: Any) -> None:
    with pytest.raises(ValueError, match="precision must be one of 'highest', 'high', 'default'; got 'fast'"):
        make()


def test_products_are_an_object() -> None:
    with pytest.raises(TypeError, match="products"):
        fo.soap(1e-2, products="high")  # type: ignore[arg-type]


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="rotations must be one of 'highest', 'high', 'default'; got 'fast'"):
        fo.Products(rotations="fast")
