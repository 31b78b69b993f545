"""Decay after the step, cautious decay and NorMuon do what their formulas say."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisher_optax as fo

W = {"a": jnp.asarray([[1.0, -2.0], [3.0, -4.0]]), "b": jnp.asarray([2.0, -1.0])}
U = {"a": jnp.asarray([[0.1, 0.1], [-0.1, -0.1]]), "b": jnp.asarray([0.5, 0.5])}


def applied(tx: Any, updates: Any = U) -> Any:
    return tx.update(updates, tx.init(W), W)[0]


def test_decay_after_the_step_shrinks_the_moved_weights() -> None:
    got = applied(fo.add_decay_after_step(0.1, 0.5, mask={"a": True, "b": False}))
    np.testing.assert_allclose(got["a"], U["a"] - 0.05 * (W["a"] + U["a"]), rtol=1e-6)
    np.testing.assert_array_equal(got["b"], U["b"])


def test_decay_after_the_step_leaves_a_skipped_call_alone() -> None:
    zero = jax.tree.map(jnp.zeros_like, U)
    for leaf in jax.tree.leaves(applied(fo.add_decay_after_step(0.1, 0.5), zero)):
        np.testing.assert_array_equal(leaf, 0)


def test_cautious_decay_decays_where_signs_agree() -> None:
    got = applied(fo.add_cautious_decay(0.5))
    np.testing.assert_allclose(got["a"], [[0.6, 0.1], [-0.1, -2.1]], rtol=1e-6)
    np.testing.assert_allclose(got["b"], [1.5, 0.5], rtol=1e-6)


def test_decays_take_numbers_as_optax_does() -> None:
    """Whole ones too: what is added to them is not."""
    updates, params = {"n": 2, "x": 0.5, "flag": True}, {"n": 3, "x": 1.0, "flag": True}
    for decay, wanted in ((fo.add_cautious_decay(0.5), (1.5, 3.5, 1.0)), (fo.add_decay_after_step(0.1, 0.5), None)):
        got = decay.update(updates, decay.init(params), params)[0]
        optaxs = optax.add_decayed_weights(0.5).update(updates, optax.EmptyState(), params)[0]
        assert [x.dtype for x in jax.tree.leaves(got)] == [jnp.asarray(x).dtype for x in jax.tree.leaves(optaxs)]
        np.testing.assert_allclose(jax.tree.leaves(got), wanted or (0.9, 1.75, 0.425), rtol=1e-6)


@pytest.mark.parametrize("decay", [fo.add_decay_after_step(0.1, 0.5), fo.add_cautious_decay(0.5)])
def test_decay_without_parameters_says_so(decay: Any) -> None:
    with pytest.raises(ValueError, match="update was called without them"):
        decay.update(U, decay.init(W))


FACTORS = {
    "coupled": lambda lr, wd, peak: lr * wd,
    "independent": lambda lr, wd, peak: wd * lr / peak,
    "corrected": lambda lr, wd, peak: lr * wd * lr / peak,
}
PEAK = 0.1


def rate(count: Any) -> Any:
    return PEAK * 0.8**count


def stepped(W: np.ndarray, u: np.ndarray, lr: float, wd: float, mode: str) -> np.ndarray:
    """The formulas in NumPy; u is a direction."""
    if mode == "after":
        return (W - lr * u) * (1 - lr * wd)
    if mode == "cautious":
        return W - lr * (u + wd * W * (u * W > 0))
    return W - lr * u - FACTORS[mode](lr, wd, PEAK) * W


def run_of(tx: Any, steps: int = 5) -> list[Any]:
    """Weights after each of several calls, from the same weights and with the same gradients for all."""
    rng = np.random.default_rng(0)
    params = {"dense": {"kernel": jnp.asarray(rng.normal(size=(4, 4))), "bias": jnp.asarray(rng.normal(size=4))}}
    state, update, points = tx.init(params), jax.jit(tx.update), [params]
    for _ in range(steps):
        G = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), params)
        updates, state = update(G, state, params)
        params = optax.apply_updates(params, updates)
        points.append(params)
    return points


METHODS: dict[str, Any] = {
    "muon": fo.muon,
    "soap": functools.partial(fo.soap, refresh=fo.Refresh(first_step="adam")),
    "shampoo": fo.shampoo,
    "chain": lambda lr, weight_decay: optax.chain(
        fo.scale_by_muon(), optax.scale_by_learning_rate(lr), fo.add_decay(lr, weight_decay)
    ),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", ["coupled", "after", "independent", "corrected", "cautious"])
def test_a_decay_is_its_formula(method: str, mode: str) -> None:
    """Matrices and fallback; with a schedule for the rate and another for the decay. Directions do not depend on
    weights, so that a run without decay has them."""
    with jax.enable_x64():
        wd = lambda count: 0.5 / (1 + count)  # noqa: E731
        plain = run_of(METHODS[method](rate, weight_decay=0.0))
        got = run_of(METHODS[method](rate, weight_decay=fo.Decay(wd, mode, peak_learning_rate=PEAK)))
        wanted = jax.tree.map(np.asarray, plain[0])
        for t in range(5):
            lr = rate(t)
            u = jax.tree.map(lambda before, after, lr=lr: (before - after) / lr, plain[t], plain[t + 1])
            wanted = jax.tree.map(lambda W, u, t=t: stepped(W, np.asarray(u), rate(t), wd(t), mode), wanted, u)
            for W, w in zip(jax.tree.leaves(got[t + 1]), jax.tree.leaves(wanted), strict=True):
                np.testing.assert_allclose(W, w, atol=1e-9)


def test_independent_is_coupled_in_units_of_the_peak() -> None:
    """For every schedule; and with a constant rate, whose peak it is, corrected is coupled."""
    with jax.enable_x64():
        pairs = [
            (fo.muon(rate, weight_decay=0.5), fo.muon(rate, weight_decay=fo.Decay(0.5 * PEAK, "independent", PEAK))),
            (fo.muon(0.1, weight_decay=0.5), fo.muon(0.1, weight_decay=fo.Decay(0.5, "corrected"))),
            (fo.soap(0.1, weight_decay=0.5), fo.soap(0.1, weight_decay=fo.Decay(0.5, "after"))),
        ]
        for one, other in pairs:
            for a, b in zip(run_of(one), run_of(other), strict=True):
                np.testing.assert_allclose(a["dense"]["kernel"], b["dense"]["kernel"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fo.Decay(-1.0), "weight_decay must be at least 0"),
        (lambda: fo.Decay(0.1, "late"), "mode must be one of 'coupled', 'after', .* got 'late'"),
        (lambda: fo.muon(rate, weight_decay=fo.Decay(0.1, "corrected")), "pass fo.Decay.*peak_learning_rate="),
        (lambda: fo.add_decay(rate, fo.Decay(0.1, "independent")), "pass fo.Decay.*peak_learning_rate="),
        (lambda: fo.kfac(0.1, weight_decay=-1.0), "weight_decay must be at least 0"),
    ],
)
def test_bad_decays_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_normuon_evens_out_the_neurons_and_keeps_the_norm() -> None:
    """After one step every output has the same mean square, and the matrix its old Frobenius norm; zero stays zero."""
    G = {"dense": {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)) * [1, 10, 0.1, 3], jnp.float32)}}
    tx = fo.scale_by_normuon()
    got = tx.update(G, tx.init(G), G)[0]["dense"]["kernel"]
    squares = jnp.mean(got**2, 0)
    np.testing.assert_allclose(squares, squares[0], rtol=1e-4)
    np.testing.assert_allclose(jnp.linalg.norm(got), jnp.linalg.norm(G["dense"]["kernel"]), rtol=1e-5)
    zero = jax.tree.map(jnp.zeros_like, G)
    np.testing.assert_array_equal(tx.update(zero, tx.init(G), G)[0]["dense"]["kernel"], 0)


def test_soap_then_orthogonalise_is_a_chain() -> None:
    """What the docstring of `scale_by_soap` shows: the last direction has singular values near the scale."""
    polar = fo.precondition(None, None, fo.applications.orthogonal(fo.polar_express(8)), fallback=optax.identity())
    tx = optax.chain(
        optax.trace(0.95, nesterov=True), fo.scale_by_soap(b1=0.0, refresh=fo.Refresh(first_step="adam")), polar
    )
    params = {"dense": {"kernel": jnp.ones((4, 4))}}
    G = {"dense": {"kernel": jax.random.normal(jax.random.key(0), (4, 4))}}
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(2):
        updates, state = update(G, state, params)
    values = jnp.linalg.svd(updates["dense"]["kernel"])[1]
    np.testing.assert_allclose(values, 1, atol=0.02)
