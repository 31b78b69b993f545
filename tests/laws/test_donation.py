"""States may be donated: no two leaves of one share a buffer, and none belongs to the caller."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax.training.train_state import TrainState

import fisher_optax as fo
from tests.comparisons import assert_own_buffers, assert_same_bits
from tests.optimizers_table import (
    STATES,
    Row,
    compiled,
    each,
    standard_gradients,
    standard_params,
    trajectory,
    updater,
)


@each()
def test_a_fresh_state_has_a_buffer_for_each_leaf(row: Row) -> None:
    params = standard_params()
    assert_own_buffers(compiled(row).tx.init(params), params)


@each(STATES)
def test_donated_steps_are_the_steps(row: Row) -> None:
    """Parameters and a state straight from `init`, overwritten step by step, bit for bit."""
    update = updater(compiled(row).tx, **row.update_kwargs)

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    params = standard_params()
    state = compiled(row).tx.init(params)
    for grads, wanted in zip(standard_gradients(), trajectory(row), strict=True):
        given = jax.tree.leaves((params, state))
        params, state = step(params, state, grads)
        assert all(x.is_deleted() for x in given)
        assert_same_bits((params, state), (wanted.params, wanted.state))


def of_compression(wrap: str, **options: Any) -> Any:
    return lambda: getattr(fo.compression, wrap)(fo.soap(1e-2), **options)


OTHERS: dict[str, Any] = {
    "multisteps": lambda: optax.MultiSteps(fo.soap(1e-2), 2),
    "inject": lambda: optax.inject_hyperparams(fo.muon, static_args=fo.STATIC_ARGS["muon"])(1e-2),
    "true-head": lambda: fo.kfac(1e-2, head="true"),
    "empirical-head": lambda: fo.kfac(1e-2, head="empirical"),
    "graft-of-graft": lambda: fo.graft(fo.graft(fo.scale_by_soap(), "adam"), fo.scale_by_shampoo()),
    "cautious-decay": lambda: optax.chain(fo.soap(1e-2), fo.add_cautious_decay(0.1), fo.add_decay_after_step(1e-2)),
    "gradual": of_compression("gradual", sparsity=0.5, method="obert", block=8),
    "movement": of_compression("movement", sparsity=0.5, score_learning_rate=1.0),
}


@pytest.mark.parametrize("name", OTHERS)
def test_so_has_the_state_of_a_wrapper(name: str) -> None:
    params = standard_params()
    assert_own_buffers(OTHERS[name]().init(params), params)


@pytest.mark.parametrize("make", [fo.soap, fo.shampoo, fo.kfac])
def test_numbers_that_are_arrays_stay_the_callers(make: Any) -> None:
    """Also beside a schedule, and as what a schedule returns."""
    params, number = standard_params(), jnp.asarray(0.9, jnp.float32)
    momentum = "momentum" if make is fo.kfac else "b1"
    decay = "curvature_decay" if make is fo.kfac else "b2"
    assert_own_buffers(make(1e-2, **{momentum: lambda count: number, decay: number}).init(params), params, number)


def test_masks_stay_the_callers() -> None:
    params = standard_params()
    masks = jax.tree.map(lambda x: x > -0.5, params)
    tx = fo.compression.keep_masks(fo.soap(1e-2), masks)
    assert_own_buffers(tx.init(params), params, masks)


@pytest.mark.parametrize("make", [fo.soap, fo.muon, fo.dykaf, fo.kl_soap])
def test_a_state_from_adam_leaves_adams_alone(make: Any) -> None:
    """Also where its count goes to several places, and where one matrix is all of a stack."""
    tx = optax.chain(fo.graft(make(1e-2), "adam"), make(1e-2))
    for params in (standard_params(), {"kernel": jnp.ones((4, 3))}):
        adam = optax.adamw(1e-3).init(params)
        assert_own_buffers(fo.from_adam(tx, adam, params), params, adam)


def test_a_train_state_may_be_donated() -> None:
    step = jax.jit(lambda train, grads: train.apply_gradients(grads=grads), donate_argnums=0)
    for kind in (TrainState, fo.TrainState):
        tx = fo.kfac(1e-2) if kind is fo.TrainState else fo.muon(1e-2)
        train = kind.create(apply_fn=lambda *_: None, params=standard_params(), tx=tx)
        for grads in standard_gradients()[:2]:
            train = step(train, grads)
        assert int(train.step) == 2


def test_a_diagonal_fisher_has_a_buffer_for_each_leaf() -> None:
    params = standard_params()
    assert_own_buffers(fo.fisher.DiagonalFisher.zeros(params), params)
