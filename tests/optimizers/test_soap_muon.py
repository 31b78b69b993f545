"""SOAP-Muon follows its formulas, and is Muon where nothing is there to scale."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisher_optax as fo
from tests.reference import soap_muon as reference

# Enough to be the polar factor to the last digits, of singular values down to a thousandth of the largest.
EXACT = (*fo.polar_express(8), *((1.5, -0.5, 0.0),) * 6)
SIDE = 16  # where a matrix of signs is not singular by chance


def gradients(steps: int = 20, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(steps, SIDE, SIDE))


def directions(tx: Any, Gs: np.ndarray) -> list[np.ndarray]:
    params = {"dense": {"kernel": jnp.zeros(Gs.shape[1:], Gs.dtype)}}
    state, update, out = tx.init(params), jax.jit(tx.update), []
    for G in Gs:
        updates, state = update({"dense": {"kernel": jnp.asarray(G)}}, state, params)
        out.append(np.asarray(updates["dense"]["kernel"]))
    return out


def make(factory: Any = fo.scale_by_soap_muon, **options: Any) -> Any:
    return factory(scale=1.0, polynomial=EXACT, refresh=fo.Refresh(decomposition="qr"), **options)


def kl_direction(**options: Any) -> Any:
    return optax.chain(fo.kl_soap_muon(1.0, **options), optax.scale(-1.0))


def test_twenty_steps_are_the_formulas() -> None:
    with jax.enable_x64():
        Gs = gradients()
        for got, wanted in zip(directions(make(), Gs), reference.directions(Gs), strict=True):
            np.testing.assert_allclose(got, wanted, atol=1e-9)


def test_other_decays_are_the_formulas_too() -> None:
    with jax.enable_x64():
        Gs, options = gradients(8, seed=1), {"b1": 0.5, "b2": 0.8}
        wanted = reference.directions(Gs, **options, beta=0.7)
        for got, w in zip(directions(make(shampoo_beta=0.7, **options), Gs), wanted, strict=True):
            np.testing.assert_allclose(got, w, atol=1e-9)


@pytest.mark.parametrize("factory", [fo.scale_by_soap_muon, kl_direction])
def test_a_constant_direction_gives_muon(factory: Any) -> None:
    with jax.enable_x64():
        G = gradients(1)[0]
        sizes = np.random.default_rng(2).uniform(0.5, 2, size=6)
        got = directions(make(factory), G * sizes[:, None, None])
        for U in got:
            np.testing.assert_allclose(U, reference.polar(G), atol=1e-8)


def test_it_turns_with_its_gradients() -> None:
    """``G -> P G Sᵀ`` gives ``P U Sᵀ``; scaling and transposing likewise."""
    with jax.enable_x64():
        rng, Gs = np.random.default_rng(3), gradients(6)
        P, S = (np.linalg.qr(rng.normal(size=(SIDE, SIDE)))[0] for _ in range(2))
        plain = directions(make(), Gs)
        for U, turned, scaled, transposed in zip(
            plain,
            directions(make(), P @ Gs @ S.T),
            directions(make(), 1e-3 * Gs),
            directions(make(), Gs.transpose(0, 2, 1)),
            strict=True,
        ):
            np.testing.assert_allclose(turned, P @ U @ S.T, atol=1e-8)
            np.testing.assert_allclose(scaled, U, atol=1e-8)
            np.testing.assert_allclose(transposed, U.T, atol=1e-8)


def test_what_never_had_a_gradient_stays() -> None:
    """Dead inputs, in float32: not a weight of theirs moves."""
    Gs = gradients(5).astype(np.float32)
    Gs[:, 3:7] = 0
    for U in directions(fo.soap_muon(0.1), Gs):
        np.testing.assert_array_equal(U[3:7], 0)
        assert np.isfinite(U).all()


def test_a_gradient_of_zeros_does_not_count_as_the_first() -> None:
    with jax.enable_x64():
        Gs = gradients(4)
        late = directions(make(b1=0.0), np.concatenate([np.zeros_like(Gs[:1]), Gs]))
        np.testing.assert_array_equal(late[0], 0)
        np.testing.assert_allclose(late[1], reference.polar(Gs[0]), atol=1e-9)


def test_many_near_shapes_are_stepped_as_each_alone() -> None:
    """Where others share a stack with zeros: a polar factor's scale is that of the matrix's own sides."""
    with jax.enable_x64():
        rng = np.random.default_rng(5)
        shapes = [(8 + i, 16 + 2 * i) for i in range(5)]
        params = {f"layer_{i}": {"kernel": jnp.asarray(rng.normal(size=shape))} for i, shape in enumerate(shapes)}
        tx = fo.soap_muon(1.0)
        alone = {name: {name: layer} for name, layer in params.items()}
        states = {name: tx.init(tree) for name, tree in alone.items()}
        state, update = tx.init(params), jax.jit(tx.update)
        for _ in range(3):
            G = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), params)
            together, state = update(G, state, params)
            for name, tree in alone.items():
                own, states[name] = update({name: G[name]}, states[name], tree)
                np.testing.assert_allclose(together[name]["kernel"], own[name]["kernel"], atol=1e-8)


def test_it_descends() -> None:
    """More slowly than Muon where gradients have no noise: entries that are next to nothing count as others do."""
    rng = np.random.default_rng(4)
    A = jnp.asarray(rng.normal(size=(SIDE, SIDE)) * np.logspace(0, -1, SIDE), jnp.float32)
    target = jnp.asarray(rng.normal(size=(SIDE, SIDE)), jnp.float32)
    params = {"dense": {"kernel": jnp.zeros((SIDE, SIDE))}}
    rate = optax.linear_schedule(0.3, 0.0, 200)

    def loss(params: Any) -> jax.Array:
        return jnp.sum((A @ (params["dense"]["kernel"] - target)) ** 2)

    def end(tx: optax.GradientTransformation) -> jax.Array:
        def step(carry: Any, _: None) -> Any:
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        (last, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=200))((params, tx.init(params)))
        return loss(last)

    assert end(fo.muon(rate)) < end(fo.soap_muon(rate)) < 0.2 * loss(params)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refresh": fo.Refresh(first_step="skip")}, "takes no first_step"),
        ({"scale": "adam"}, "scale must be a number or one of"),
        ({"storage": fo.Storage(rank=2)}, "takes no rank"),
        ({"b2": 1.0}, "b2 must be at least 0"),
    ],
)
def test_bad_arguments_are_named(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fo.soap_muon(0.1, **options)
