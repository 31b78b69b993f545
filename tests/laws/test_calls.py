"""How optimizers may be called: once compiled, eagerly, mapped, wrapped by optax, with traced or scheduled numbers."""

import inspect
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisher_optax as fo
from tests.comparisons import assert_close, assert_own_buffers, assert_same_bits, assert_updates_close, types
from tests.optimizers_table import (
    FACTORIES,
    METHODS,
    ROWS,
    SOME,
    STATES,
    STEPS,
    Row,
    build,
    compiled,
    each,
    matrices_of,
    run,
    standard_gradients,
    standard_params,
    trajectory,
    updater,
)


@each(FACTORIES)
def test_unknown_arguments_are_accepted_and_nothing_compiles_twice(row: Row) -> None:
    """Six steps, refreshes among them, from a state made eagerly."""
    assert len(trajectory(row)) == STEPS
    assert len(compiled(row).traces) == 1


@each()
def test_jitted_equals_eager(row: Row) -> None:
    """And of what an eager step leaves in the state, nothing is there twice or belongs to the caller."""
    c = compiled(row)
    params, gradients = standard_params(), standard_gradients()[:3]
    eager = run(updater(c.tx, **row.update_kwargs), c.tx.init(params), params, gradients)
    assert_updates_close(eager, trajectory(row), row.tolerance)
    for point in eager:
        assert_own_buffers(point.state, point.updates, point.params, params, gradients)


@each(METHODS)
def test_arguments_are_not_mutated(row: Row) -> None:
    """NumPy arrays, which could be written to, come back as they were."""
    c = compiled(row)
    start = jax.tree.map(np.array, (standard_gradients()[1], trajectory(row)[0].state, standard_params()))
    before = jax.tree.map(np.copy, start)
    c.tx.update(*start, **row.update_kwargs)
    assert_same_bits(start, before)


@each(SOME)
def test_an_ensemble_under_vmap_equals_a_loop(row: Row) -> None:
    c = compiled(row)
    params, seeds = standard_params(), (1, 7)
    gradients = [standard_gradients(seed)[:4] for seed in seeds]
    alone = [run(c.update, c.init(params), params, g) for g in gradients]
    both = jax.tree.map(lambda x: jnp.stack([x, x]), params)
    stacked = [jax.tree.map(lambda *x: jnp.stack(x), *pair) for pair in zip(*gradients, strict=True)]
    mapped = run(jax.jit(jax.vmap(updater(c.tx, **row.update_kwargs))), jax.vmap(c.tx.init)(both), both, stacked)
    for i, points in enumerate(alone):
        member = jax.tree.map(operator.itemgetter(i), mapped)
        assert_updates_close(member, points, row.tolerance)


def assert_stops_after_three(row: Row, tx: optax.GradientTransformationExtraArgs, state: Any) -> None:
    """Three calls as in the row's run, then none: with a rate of zero there is no weight decay either."""
    params = standard_params()
    points = run(jax.jit(updater(tx, **row.update_kwargs)), state, params, standard_gradients()[:5])
    assert_updates_close(points[:3], trajectory(row), row.tolerance)
    for point in points[3:]:
        assert_same_bits(point.updates, jax.tree.map(jnp.zeros_like, params))


def numbers(row: Row) -> dict[str, float]:
    defaults = {name: p.default for name, p in inspect.signature(row.make).parameters.items()}
    return defaults | {"learning_rate": row.rate_after} | row.options


@each(row for row in FACTORIES if row.static_args)
def test_injected_hyperparameters_are_the_ones_used(row: Row) -> None:
    """Every rate, beta and decay is traced, the rate a schedule evaluated outside, and a decay of zero may be raised.
    The state inside is the one without."""
    rate = optax.piecewise_constant_schedule(numbers(row)["learning_rate"], {3: 0.0})
    tx = build(row, wrap=optax.inject_hyperparams, learning_rate=rate, **row.undecayed)
    state = tx.init(standard_params())
    injected, plain = (s if row.rate_after is None else s[0] for s in (state, trajectory(row)[0].state))
    assert jax.tree.structure(injected.inner_state) == jax.tree.structure(plain)
    injected.hyperparams.update({name: jnp.asarray(numbers(row)[name]) for name in row.undecayed})
    assert_stops_after_three(row, tx, state)


@each(row for row in ROWS if row.scheduled)
def test_numbers_in_float32_leave_half_precision_as_it_is(row: Row) -> None:
    """As `optax.inject_hyperparams` and schedules give them: JAX would promote what they are multiplied with."""
    tx = build(row, **{name: jnp.float32(numbers(row)[name]) for name in row.scheduled})
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), standard_params())
    state = jax.eval_shape(tx.init, params)
    step = updater(tx, **row.update_kwargs)
    assert types(jax.eval_shape(step, params, state, params)) == types((params, state))


@each(row for row in FACTORIES if row.scheduled)
def test_schedules_are_the_numbers_they_give(row: Row) -> None:
    """Rates, decay and momentum may be schedules, of the number of the call."""
    schedules = {name: optax.constant_schedule(numbers(row)[name]) for name in row.scheduled}
    schedules["learning_rate"] = optax.piecewise_constant_schedule(numbers(row)["learning_rate"], {3: 0.0})
    tx = build(row, **schedules)
    assert_stops_after_three(row, tx, tx.init(standard_params()))


@each(STATES)
def test_micro_steps_of_multisteps_do_nothing(row: Row) -> None:
    """Three of four calls give zero; the fourth gives the update of the mean gradient."""
    c = compiled(row)
    tx = optax.MultiSteps(c.tx, 4)
    params = standard_params()
    gradients = [g for g in standard_gradients()[:2] for _ in range(4)]
    points = run(jax.jit(updater(tx, **row.update_kwargs)), tx.init(params), params, gradients)
    zero = jax.tree.map(jnp.zeros_like, params)
    for call, point in enumerate(points):
        wanted = trajectory(row)[call // 4].updates if call % 4 == 3 else zero
        assert_close(point.updates, wanted, row.tolerance)


@each(STATES)
def test_masked_leaves_pass_and_the_others_move_as_before(row: Row) -> None:
    params = standard_params()
    mask = jax.tree.map(lambda _: False, params) | jax.tree.map(lambda _: True, matrices_of(params))
    mask["dense"]["bias"] = row.joined
    c = compiled(row)
    tx = optax.masked(c.tx, mask)
    gradients = standard_gradients()[:4]
    points = run(jax.jit(updater(tx, **row.update_kwargs)), tx.init(params), params, gradients)
    for point, wanted, grads in zip(points, trajectory(row)[:4], gradients, strict=True):
        assert_close(matrices_of(point.updates), matrices_of(wanted.updates), row.tolerance)
        assert_same_bits(point.updates["norm"], grads["norm"])


@each(SOME)
def test_partition_by_our_labels_changes_nothing(row: Row) -> None:
    """Matrices on one optimizer and the rest on another equal one optimizer for all."""
    params = standard_params()
    assert set(jax.tree.leaves(fo.label_params(params))) == {"matrix", "head", "embedding", "other"}

    def groups(tree: Any) -> Any:
        labels = jax.tree.map(lambda label: label in ("matrix", "head"), fo.label_params(tree))
        return labels | {"dense": labels["dense"] | {"bias": row.joined}}

    tx = optax.partition({True: build(row), False: build(row)}, groups)
    points = run(jax.jit(updater(tx, **row.update_kwargs)), tx.init(params), params, standard_gradients()[:4])
    assert_updates_close(points, trajectory(row), row.tolerance)


@each(row for row in METHODS if row.takes_axes)
def test_stacked_layers_equal_separate_ones(row: Row) -> None:
    """A leaf (2, 4, 4) with a batch axis, as `nn.scan` stores it, moves as two leaves (4, 4)."""
    rng = np.random.default_rng(3)
    layers, params = 2, standard_params()["dense"]["kernel"]
    stacked = jnp.stack([params + i for i in range(layers)])
    gradients = [jnp.asarray(np.eye(4) + 0.4 * rng.normal(size=(layers, 4, 4)), jnp.float32) for _ in range(4)]
    together = build(row, axes={"kernel": fo.MatrixAxes(inputs=(1,), outputs=(2,), batch=(0,))})
    apart = build(row)

    def split(x: jax.Array) -> dict[str, Any]:
        return {f"layer_{i}": {"kernel": x[i]} for i in range(layers)}

    whole = {"kernel": stacked}
    one = run(jax.jit(updater(together)), together.init(whole), whole, [{"kernel": g} for g in gradients])
    many = run(jax.jit(updater(apart)), apart.init(split(stacked)), split(stacked), [split(g) for g in gradients])
    for a, b in zip(one, many, strict=True):
        assert_close(split(a.updates["kernel"]), b.updates, row.tolerance)


@pytest.mark.parametrize("name", sorted(fo.STATIC_ARGS))
def test_static_arguments_are_arguments_of_their_factory(name: str) -> None:
    optax.inject_hyperparams(getattr(fo, name), static_args=fo.STATIC_ARGS[name])
