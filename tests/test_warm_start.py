"""A state made from an Adam run continues it, and what it cannot be made from is refused."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisher_optax as fo

PARAMS: dict[str, Any] = {"Dense_0": {"kernel": jnp.ones((4, 6)), "bias": jnp.zeros(6)}}


def gradient(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), PARAMS)


def after_adam(steps: int = 20) -> Any:
    tx = optax.chain(optax.clip_by_global_norm(10.0), optax.adamw(1e-3, b2=0.95))
    state = tx.init(PARAMS)
    for seed in range(steps):
        _, state = tx.update(gradient(seed), state, PARAMS)
    return state


def test_soap_without_bases_goes_on_as_adam() -> None:
    """With no side rotated SOAP is Adam, so the next direction is Adam's up to its place of eps."""
    options = {"b1": 0.9, "b2": 0.95, "max_precond_dim": 0, "first_step": "adam"}
    tx, adam = fo.scale_by_soap(**options), optax.scale_by_adam(0.9, 0.95)
    state = fo.from_adam(tx, after_adam(), PARAMS)
    (adam_state,) = (
        s
        for s in jax.tree.leaves(after_adam(), is_leaf=lambda s: isinstance(s, optax.ScaleByAdamState))
        if isinstance(s, optax.ScaleByAdamState)
    )
    ours, wanted = tx.update(gradient(99), state, PARAMS)[0], adam.update(gradient(99), adam_state)[0]
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"block_size": 3}, {"factor_storage": "packed"}, {"sides": "shorter"}])
def test_factors_have_the_diagonals_that_adam_knows(options: dict[str, Any]) -> None:
    tx = fo.soap(1e-3, **options)
    state = fo.from_adam(tx, after_adam(), PARAMS)
    fo.check_state(tx, state, PARAMS)
    if not options:
        nu = next(
            s.nu
            for s in jax.tree.leaves(after_adam(), is_leaf=lambda s: isinstance(s, optax.ScaleByAdamState))
            if isinstance(s, optax.ScaleByAdamState)
        )["Dense_0"]["kernel"]
        left = [x for path, x in jax.tree.leaves_with_path(state) if "factors" in str(path) and "left" in str(path)]
        np.testing.assert_allclose(left[0][0], np.diag(nu.sum(1)), rtol=1e-6)


def test_muon_takes_over_the_momentum() -> None:
    """Adam's first moment is Muon's momentum but for a factor, which the polar factor does not see."""
    tx = fo.scale_by_muon(beta=0.9, nesterov=False)
    state = fo.from_adam(tx, after_adam(), PARAMS, b1=0.9)
    momentum = sum(0.9 ** (20 - seed) * gradient(seed)["Dense_0"]["kernel"] for seed in range(20))
    momentum = momentum + gradient(99)["Dense_0"]["kernel"]
    wanted = 0.2 * np.sqrt(6) * fo.linalg.orthogonalize(momentum)
    direction = tx.update(gradient(99), state, PARAMS)[0]["Dense_0"]["kernel"]
    np.testing.assert_allclose(direction, wanted, atol=2e-3)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one optax\.ScaleByAdamState, found 0"):
        fo.from_adam(fo.soap(1e-3), optax.sgd(1.0).init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match="shapes"):
        fo.from_adam(fo.soap(1e-3), optax.adam(1e-3).init({"w": jnp.ones(3)}), PARAMS)
    with pytest.raises(ValueError, match="keeps nothing"):
        fo.from_adam(optax.sgd(1.0), after_adam(), PARAMS)


@pytest.mark.parametrize("make", [fo.dykaf, fo.kl_soap])
def test_relatives_of_soap_start_from_adam(make: Any) -> None:
    """Moments and factors come over; the KL factors' product, and that of their eigenvalues, is as large as v."""
    params = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32)}
    adam, state = optax.adam(1e-3), optax.adam(1e-3).init(params)
    for _ in range(3):
        _, state = adam.update(params, state, params)
    started = fo.from_adam(make(1e-3, first_step="adam"), state, params)
    matrix = next(
        node.matrices["4x6"]
        for node in jax.tree.leaves(started, is_leaf=lambda x: hasattr(x, "matrices"))
        if hasattr(node, "matrices")
    )
    np.testing.assert_allclose(matrix.application.nu[0], state[0].nu["kernel"], rtol=1e-6)
    if make is fo.kl_soap:
        size = jnp.trace(matrix.factors.left[0]) * jnp.trace(matrix.factors.right[0])
        np.testing.assert_allclose(size, jnp.sum(state[0].nu["kernel"]), rtol=1e-5)
        values = jnp.sum(matrix.basis.left_values) * jnp.sum(matrix.basis.right_values)
        np.testing.assert_allclose(values, size, rtol=1e-5)
    updates, _ = make(1e-3, first_step="adam").update(params, started, params)
    assert bool(jnp.isfinite(updates["kernel"]).all())
    assert bool(updates["kernel"].any())
