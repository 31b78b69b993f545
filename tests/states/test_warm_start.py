"""A state made from an Adam run continues it, and what it cannot be made from is refused."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import fisher_optax as fo
from tests.grouped import grouped

PARAMS: dict[str, Any] = {"Dense_0": {"kernel": jnp.ones((4, 6)), "bias": jnp.zeros(6)}}


def gradient(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), PARAMS)


@functools.cache
def after_adam(steps: int = 20) -> Any:
    tx = optax.chain(optax.clip_by_global_norm(10.0), optax.adamw(1e-3, b2=0.95))
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    for seed in range(steps):
        _, state = update(gradient(seed), state, PARAMS)
    return state


def adam_of(state: Any) -> Any:
    is_adam = lambda s: isinstance(s, optax.ScaleByAdamState)  # noqa: E731
    [adam] = [s for s in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(s)]
    return adam


def test_soap_without_bases_goes_on_as_adam() -> None:
    """With no side rotated SOAP is Adam, so the next direction is Adam's up to its place of eps."""
    options = {"b1": 0.9, "b2": 0.95, "max_precond_dim": 0, "refresh": fo.Refresh(first_step="adam")}
    tx, adam = fo.scale_by_soap(**options), optax.scale_by_adam(0.9, 0.95)
    state = fo.from_adam(tx, after_adam(), PARAMS)
    adam_state = adam_of(after_adam())
    ours, wanted = jax.jit(tx.update)(gradient(99), state, PARAMS)[0], adam.update(gradient(99), adam_state)[0]
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"block_size": 3}, {"packed": True}, {"sides": "shorter"}])
def test_factors_have_the_diagonals_that_adam_knows(options: dict[str, Any]) -> None:
    tx = fo.soap(1e-3, **grouped(**options))
    state = fo.from_adam(tx, after_adam(), PARAMS)
    fo.check_state(tx, state, PARAMS)
    if not options:
        nu = adam_of(after_adam()).nu["Dense_0"]["kernel"]
        left = [x for path, x in jax.tree.leaves_with_path(state) if "factors" in str(path) and "left" in str(path)]
        np.testing.assert_allclose(left[0][0], np.diag(nu.sum(1)), rtol=1e-6)


def test_muon_takes_over_the_momentum() -> None:
    """Adam's first moment is Muon's momentum but for a factor, which the polar factor does not see."""
    tx = fo.scale_by_muon(beta=0.9, nesterov=False)
    state = fo.from_adam(tx, after_adam(), PARAMS, b1=0.9)
    momentum = sum(0.9 ** (20 - seed) * gradient(seed)["Dense_0"]["kernel"] for seed in range(20))
    momentum = momentum + gradient(99)["Dense_0"]["kernel"]
    wanted = 0.2 * np.sqrt(6) * fo.linalg.orthogonalize(momentum)
    direction = jax.jit(tx.update)(gradient(99), state, PARAMS)[0]["Dense_0"]["kernel"]
    np.testing.assert_allclose(direction, wanted, atol=2e-3)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one optax\.ScaleByAdamState, found 0"):
        fo.from_adam(fo.soap(1e-3), optax.sgd(1.0).init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match="shapes"):
        fo.from_adam(fo.soap(1e-3), optax.adam(1e-3).init({"w": jnp.ones(3)}), PARAMS)
    with pytest.raises(ValueError, match="keeps nothing"):
        fo.from_adam(optax.sgd(1.0), after_adam(), PARAMS)


REFUSED = {
    "PowerState": fo.shampoo(1e-3),
    "EigenvaluesState": fo.kl_shampoo(1e-3),
    "DampedState": fo.kfac(1e-3),
    "CorrectedState": fo.ekfac(1e-3),
    "Rank1AdamState": fo.dykaf(1e-3, rank1_second_moment=True),
    "ScaleByLionState": fo.precondition(
        fo.factors.outer_product(0.95), fo.decompositions.eigh(), fo.in_eigenbasis(optax.scale_by_lion())
    ),
}


@pytest.mark.parametrize("state", REFUSED)
def test_matrices_are_not_left_cold_beside_a_warm_fallback(state: str) -> None:
    with pytest.raises(ValueError, match=f"keeps {state} of its [45]x6 matrices, .* Start it anew"):
        fo.from_adam(REFUSED[state], after_adam(), PARAMS)


def joined(tree: Any) -> Any:
    return jnp.concatenate([tree["Dense_0"]["kernel"], tree["Dense_0"]["bias"][None]])


def arrays(state: Any, *words: str) -> list[Any]:
    """Those in whose path the words stand."""
    found = [(jax.tree_util.keystr(path), x) for path, x in jax.tree.leaves_with_path(state)]
    return [x for path, x in found if all(word in path for word in words)]


def test_a_bias_is_a_row_of_its_matrix() -> None:
    adam = adam_of(after_adam())
    state = fo.from_adam(fo.kfac_soap(1e-3), after_adam(), PARAMS)
    for name in ("mu", "nu"):
        np.testing.assert_array_equal(arrays(state, "5x6", f".{name}")[0][0], joined(getattr(adam, name)))
    assert not any(x.any() for x in arrays(state, "5x6", "factors"))
    for make in (fo.frog, fo.kfrog):
        mean = arrays(fo.from_adam(make(1e-3), after_adam(), PARAMS), ".mean")
        np.testing.assert_allclose(mean[0], joined(adam.mu) / (1 - 0.9**20), rtol=1e-6)


def test_each_part_gets_the_moments_of_its_own_matrices() -> None:
    """Two of one shape in two parts of a partition, and in a method and its fallback; a part may have none."""
    params = {name: {"kernel": jnp.ones((4, 4))} for name in ("a", "lm_head")} | {"b": {"bias": jnp.ones(4)}}
    adam: Any = optax.adamw(1e-3)
    grads = jax.tree.map(
        lambda x, k: k * x, params, {"a": {"kernel": 1.0}, "b": {"bias": 2.0}, "lm_head": {"kernel": 3.0}}
    )
    adam_state = adam.update(grads, adam.init(params), params)[1]
    parts = {name: fo.soap(1e-3) for name in params}
    whole = optax.partition(parts, {name: jax.tree.map(lambda _, n=name: n, params[name]) for name in params})
    state = fo.from_adam(whole, adam_state, params)
    for name, size in (("a", 1.0), ("lm_head", 3.0)):
        np.testing.assert_allclose(arrays(state, f"['{name}']", "4x4", ".mu")[0], jnp.full((1, 4, 4), 0.1 * size))
    state = fo.from_adam(fo.muon(1e-3, fallback=fo.soap(1e-3)), adam_state, params)
    np.testing.assert_allclose(arrays(state, "4x4", ".mu")[0], jnp.full((1, 4, 4), 0.3), rtol=1e-6)
    np.testing.assert_allclose(arrays(state, ".mean['a']")[0], jnp.ones((4, 4)), rtol=1e-6)


def test_a_state_and_parameters_of_nnx() -> None:
    model = nnx.Linear(4, 6, rngs=nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    optimizer.update(model, params)
    for make in (fo.soap, fo.frog):
        tx = make(1e-3)
        state = fo.from_adam(tx, optimizer.opt_state, params)
        fo.check_state(tx, state, params)


def test_the_state_can_be_donated() -> None:
    tx = fo.graft(fo.scale_by_soap(), "adam")
    state = fo.from_adam(tx, after_adam(), PARAMS)
    filled = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(adam_of(state.inner.magnitude))]
    rest = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state.inner.direction)]
    assert not set(filled) & set(rest)


@pytest.mark.parametrize("make", [fo.dykaf, fo.kl_soap])
def test_relatives_of_soap_start_from_adam(make: Any) -> None:
    """Moments and factors come over; the KL factors' product, and that of their eigenvalues, is as large as v."""
    params = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32)}
    adam, state = optax.adam(1e-3), optax.adam(1e-3).init(params)
    for _ in range(3):
        _, state = adam.update(params, state, params)
    started = fo.from_adam(make(1e-3, refresh=fo.Refresh(first_step="adam")), state, params)
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
    tx = make(1e-3, refresh=fo.Refresh(first_step="adam"))
    updates, _ = jax.jit(tx.update)(params, started, params)
    assert bool(jnp.isfinite(updates["kernel"]).all())
    assert bool(updates["kernel"].any())
