"""`health` and `check_state` read a state wherever it lies, and say in few words what does not fit."""

from collections.abc import Callable
from typing import Any

import flax.core
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import nnx

import fisher_optax as fo


def layers(count: int, width: int = 4) -> dict[str, Any]:
    return {f"Dense_{i}": {"kernel": jnp.ones((width, width)), "bias": jnp.zeros(width)} for i in range(count)}


def kernels(count: int) -> dict[str, Any]:
    return {f"Dense_{i}": {"kernel": jnp.ones((4, 4))} for i in range(count)}


def message(state: Any, tx: Any, params: Any) -> str:
    with pytest.raises(ValueError, match="check_state: ") as error:
        fo.check_state(tx, state, params)
    assert len(str(error.value)) <= 1000
    assert str(error.value).count("\n") < 10
    return str(error.value)


@pytest.mark.parametrize("make", [fo.soap, fo.muon])
def test_a_layer_more_or_renamed_is_named(make: Callable[..., Any]) -> None:
    tx, old = make(1e-3), layers(23)
    state = jax.jit(tx.init)(old)
    assert "Dense_23/bias: the state has nothing for it" in message(state, tx, layers(24))
    assert "Dense_22/bias: the state holds it, and nothing here needs it" in message(state, tx, layers(22))
    text = message(state, tx, {("A" if k == "Dense_1" else k): v for k, v in old.items()})
    assert "A/bias: the state has nothing" in text
    assert "Dense_1/bias: the state holds it" in text


@pytest.mark.parametrize(
    ("make", "what"), [(fo.kfac, "5x4/factors/left: float32[2, 5, 5]"), (fo.frog, "mean/2: the state has nothing")]
)
def test_where_biases_are_rows_of_matrices_these_are_named(make: Callable[..., Any], what: str) -> None:
    tx = make(1e-3)
    assert what in message(jax.jit(tx.init)(layers(2)), tx, layers(3))


def test_matrices_of_one_shape_are_counted() -> None:
    tx = fo.soap(1e-3)
    text = message(tx.init(kernels(2)), tx, kernels(3))
    assert "matrices/4x4/" in text
    assert "[2, 4, 4] in the state, and float32[3, 4, 4] is needed" in text


def test_a_state_of_other_types_is_refused_with_the_way_back() -> None:
    params = layers(1)
    for tx in (fo.soap(1e-3), optax.MultiSteps(fo.muon(1e-3), 2)):
        restored = flax.serialization.to_state_dict(tx.init(params))
        assert "dict, and a" in (text := message(restored, tx, params))
        assert "jax.eval_shape(tx.init, params)" in text
        fo.check_state(tx, flax.serialization.from_state_dict(tx.init(params), restored), params)
    tx = fo.muon(1e-3)
    assert "mu: a FrozenDict, and a dict is needed" in message(tx.init(flax.core.freeze(params)), tx, params)


def test_every_kind_of_parameters_is_accepted() -> None:
    tx = fo.muon(1e-3)
    as_arrays = jax.tree.map(np.asarray, layers(1))
    for params in (layers(1), flax.core.freeze(layers(1)), as_arrays):
        fo.check_state(tx, tx.init(params), params)
        fo.check_state(tx, jax.tree.map(np.asarray, tx.init(params)), jax.eval_shape(lambda p=params: p))


def test_nnx_holds_states_in_boxes_and_both_helpers_read_them() -> None:
    model = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    for tx in (fo.soap(1e-3), fo.kfac(1e-3), optax.chain(optax.clip(1.0), fo.muon(1e-3)), fo.frog(1e-3)):
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        for held in (optimizer, optimizer.opt_state):
            assert fo.health(held).steps == 0
            fo.check_state(tx, held, params)
        assert "nnx.update(optimizer, state)" in message(nnx.state(optimizer)["opt_state"], tx, params)
        assert fo.health(nnx.state(optimizer)).steps == 0
    wider = nnx.state(nnx.Linear(4, 5, rngs=nnx.Rngs(0)), nnx.Param)
    assert "bias: float32[4] in the state, and float32[5] is needed" in message(
        nnx.Optimizer(model, fo.muon(1e-3), wrt=nnx.Param), fo.muon(1e-3), wider
    )


def test_of_members_health_is_summed_and_check_state_wants_all_parameters() -> None:
    tx, params = optax.apply_if_finite(fo.muon(1e-3), 5), layers(1)
    many = jax.tree.map(lambda x: jnp.stack([x, x, x]), params)
    state: Any = jax.vmap(tx.init)(many)
    gradients = jax.tree.map(lambda x: x.at[0].set(jnp.inf) if x.ndim == 3 else x, many)
    state = state._replace(inner_state=jax.jit(jax.vmap(fo.muon(1e-3).update))(gradients, state.inner_state, many)[1])
    assert fo.health(state) == fo.Health(1, steps=1, skipped=1, failures=0)
    assert fo.health([state, state]).skipped == 2
    fo.check_state(tx, state, many)
    text = message(state, tx, params)
    assert "of 3 members" in text
    assert "'Dense_0/bias' of shape (4,)" in text
    twice = jax.tree.map(lambda x: jnp.stack([x, x]), many)
    fo.check_state(tx, jax.vmap(jax.vmap(tx.init))(twice), twice)


def test_a_wrapper_with_a_field_called_opt_state_is_whole() -> None:
    tx, params = optax.contrib.sam(fo.muon(1e-3), optax.sgd(0.1)), layers(1)
    fo.check_state(tx, tx.init(params), params)


def test_a_guard_inside_another_counts_what_it_skips() -> None:
    params = {"kernel": jnp.ones((2, 2))}
    tx = fo.compression.keep_masks(fo.muon(1e-3), {"kernel": jnp.ones((2, 2), bool)})
    state: Any = tx.init(params)
    inner = state.inner.inner._replace(skipped=state.inner.inner.skipped + 1)
    assert fo.health(state._replace(inner=state.inner._replace(inner=inner))).skipped == 1


def test_health_inside_jit_says_to_call_it_outside() -> None:
    state = fo.muon(1e-3).init(layers(1))
    with pytest.raises(ValueError, match="call it outside"):
        jax.jit(lambda s: fo.health(s))(state)
    with pytest.raises(ValueError, match="described by"):
        fo.health(jax.eval_shape(lambda: state))


def test_parameters_that_are_called_as_counters_are_not_counted() -> None:
    tree = {"version": 0.0, "steps": 0.0, "skipped": 0.0, "failures": 9.0, "count": 0.0}
    params = {name: jnp.full((2, 2), value) for name, value in tree.items()}
    tx = fo.muon(1e-3)
    _, state = tx.update(params, tx.init(params), params)
    assert fo.health(state) == fo.Health(1, steps=1, skipped=0, failures=0)
    fo.check_state(tx, state, params)
