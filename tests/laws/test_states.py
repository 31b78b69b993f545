"""What an optimizer's state is: fixed types, any saved form, and what Flax and optax do with it."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
import orbax.checkpoint
import pytest
from flax import nnx
from flax.training.train_state import TrainState

from tests.comparisons import assert_close, assert_finite, assert_same_bits, types
from tests.optimizers_table import (
    METHODS,
    SOME,
    STATES,
    Row,
    build,
    compiled,
    each,
    run,
    standard_gradients,
    standard_params,
    trajectory,
    updater,
)

DTYPES = ("float16", "bfloat16", "float32", "float64")


def abstract(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), tree)


@pytest.mark.parametrize("dtype", DTYPES)
@each()
def test_types_are_stable(row: Row, dtype: str) -> None:
    """Updates have the parameters' types; the state keeps its own through a step, and through a cond's branches. Also
    where JAX refuses to add axes to arrays by itself.
    """
    with jax.enable_x64(dtype == "float64"), jax.numpy_rank_promotion("raise"):
        tx = build(row)
        params = abstract(standard_params(), dtype)
        state = jax.eval_shape(tx.init, params)

        def maybe(grads: Any, state: Any, params: Any) -> Any:
            step = updater(tx, **row.update_kwargs)
            return jax.lax.cond(jnp.ones([], bool), step, lambda g, s, p: (g, s), grads, state, params)

        assert types(jax.eval_shape(maybe, params, state, params)) == types((params, state))


@each(METHODS)
def test_a_state_that_is_multiplied_keeps_its_types(row: Row) -> None:
    """`optax.contrib.sam` adds states weighted by 0 and 1, which makes a boolean an integer."""
    tx = optax.contrib.sam(compiled(row).tx, optax.sgd(0.1))
    params = abstract(standard_params(), jnp.float32)
    state = jax.eval_shape(tx.init, params)
    assert types(jax.eval_shape(updater(tx), params, state, params)[1]) == types(state)


@each()
def test_state_from_shapes_is_the_state_from_arrays(row: Row) -> None:
    """`init` sees shapes only, and every state leaf is an array."""
    tx = compiled(row).tx
    params = standard_params()
    concrete = tx.init(params)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(concrete))
    assert types(tx.init(abstract(params, jnp.float32))) == types(concrete)
    assert types(jax.eval_shape(tx.init, params)) == types(concrete)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@each(STATES)
def test_half_precision_steps_are_finite(row: Row, dtype: str) -> None:
    """Also where the sum of squares of a gradient leaves float16's range."""
    tx = compiled(row).tx
    params = standard_params(dtype)
    gradients = standard_gradients(dtype=dtype)[:3]
    large = jax.tree.map(lambda g: g * 1000, gradients)
    update = jax.jit(updater(tx, **row.update_kwargs))
    for run_on in (gradients, large):
        points = run(update, tx.init(params), params, run_on)
        assert_finite(points)
        assert types(points[-1].params) == types(params)
        assert all(bool(jnp.any(u)) for u in jax.tree.leaves(points[-1].updates))


@each()
def test_map_params_reaches_the_state(row: Row) -> None:
    """The identity, mapped over what is shaped like the parameters, changes nothing and is called at all."""
    tx = compiled(row).tx
    state = trajectory(row)[2].state
    seen = []
    mapped = optax.tree.map_params(tx, lambda x: seen.append(x.shape) or x, state)
    assert_same_bits(mapped, state)
    assert seen


@each(METHODS)
def test_a_run_resumed_from_a_checkpoint_is_the_same_run(row: Row, tmp_path: Path) -> None:
    """Bitwise, from Orbax, in the middle."""
    half, full = trajectory(row)[2], trajectory(row)
    saved = {"params": half.params, "state": half.state}
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", saved)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "run", jax.eval_shape(lambda: saved))
    points = run(compiled(row).update, restored["state"], restored["params"], standard_gradients()[3:])
    assert_same_bits(points, list(full[3:]))


@each(SOME)
def test_in_a_linen_train_state(row: Row) -> None:
    train = TrainState.create(apply_fn=lambda *_: None, params=standard_params(), tx=compiled(row).tx)
    step = jax.jit(lambda train, grads: train.apply_gradients(grads=grads))
    for grads in standard_gradients()[:4]:
        train = step(train, grads)
    assert_close(train.params, trajectory(row)[3].params, row.tolerance)


class Model(nnx.Module):
    """A module whose attributes are a tree of parameters."""

    def __init__(self, tree: dict[str, Any]) -> None:
        for name, value in tree.items():
            setattr(self, name, Model(value) if isinstance(value, dict) else nnx.Param(value))


@each(SOME)
def test_in_an_nnx_optimizer(row: Row) -> None:
    """The parameters of an nnx module, which have other paths, are treated as the same parameters in a dict."""
    model = Model(standard_params())
    optimizer = nnx.Optimizer(model, compiled(row).tx, wrt=nnx.Param)

    @nnx.jit
    def step(model: Model, optimizer: nnx.Optimizer, grads: nnx.State) -> None:
        optimizer.update(model, grads)

    for grads in standard_gradients()[:4]:
        step(model, optimizer, nnx.state(Model(grads), nnx.Param))
    assert_close(nnx.to_pure_dict(nnx.state(model, nnx.Param)), trajectory(row)[3].params, row.tolerance)
