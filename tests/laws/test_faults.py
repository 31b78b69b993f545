"""Bad, empty and extreme gradients: skipped whole or survived, and always counted."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisher_optax as fo
from fisher_optax._xla import PLATFORMS
from tests.comparisons import assert_close, assert_finite, assert_same_bits, assert_updates_close, types
from tests.optimizers_table import (
    METHODS,
    ROWS,
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


def zeros_like(tree: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, tree)


def scaled(tree: Any, factor: float) -> Any:
    return jax.tree.map(lambda x: x * jnp.asarray(factor, x.dtype), tree)


def spoiled(grads: Any, where: tuple[str, str], value: float) -> Any:
    """``grads`` with one entry of one leaf replaced."""
    outer, inner = where
    leaf = grads[outer][inner]
    return grads | {outer: grads[outer] | {inner: leaf.ravel().at[-1].set(value).reshape(leaf.shape)}}


def changed(before: Any, after: Any) -> list[tuple[Any, Any]]:
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    return [(x, y) for x, y in pairs if not np.array_equal(x, y)]


BAD = {
    "nan-in-a-matrix": (("dense", "kernel"), np.nan),
    "inf-in-a-kernel": (("conv", "kernel"), np.inf),
    "nan-in-the-fallback": (("dense", "bias"), np.nan),
    "overflowing-square-in-a-vector": (("norm", "scale"), 1e30),
    "overflowing-square-in-an-embedding": (("embed", "embedding"), -1e30),
}


@pytest.mark.parametrize("bad", BAD)
@each()
def test_a_bad_gradient_skips_the_whole_step(row: Row, bad: str) -> None:
    """One bad entry anywhere: the update is zero everywhere, decay and fallback included, and the next step is as if
    the bad one had not been."""
    c = compiled(row)
    before, wanted = trajectory(row)[2], trajectory(row)[3]
    grads = standard_gradients()
    updates, state = c.update(spoiled(grads[3], *BAD[bad]), before.state, before.params)
    assert_same_bits(updates, zeros_like(updates))
    health = fo.health(state)
    assert (int(health.skipped), int(health.failures)) == (1, 0)
    if row.one_guard:
        [(count, counted)] = changed(before.state, state)
        assert int(counted) == int(count) + 1
    updates, state = c.update(grads[3], state, before.params)
    assert_same_bits(updates, wanted.updates) if row.one_guard else assert_finite(updates)
    assert int(fo.health(state).skipped) == 1


@pytest.mark.parametrize("make", [fo.muon, fo.soap], ids=["muon", "soap"])
def test_a_fallback_of_this_package_is_held_with_the_rest(make: Any) -> None:
    """A fallback whose own gradients are good takes no step, and keeps its state, where a matrix's are bad; and it
    waits with the matrices where these make no step at the first call."""
    params, grads = standard_params(), standard_gradients()
    tx = make(1e-2, fallback=fo.muon(1e-2))
    update = jax.jit(tx.update)
    start = tx.init(params)
    _, before = update(grads[0], start, params)
    updates, state = update(spoiled(grads[1], *BAD["nan-in-a-matrix"]), before, params)
    assert_same_bits(updates, zeros_like(updates))
    assert len(changed(before, state)) == 1
    if make is fo.soap:
        pairs = zip(jax.tree.leaves_with_path(start), jax.tree.leaves(before), strict=True)
        moved = [jax.tree_util.keystr(path) for (path, x), y in pairs if not np.array_equal(x, y)]
        assert [path.rpartition(".")[2] for path in moved if "fallback" in path] == ["called"]


def test_a_large_fallback_is_held_as_a_small_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments that are too large to be copied are left alone by a conditional: a bad step changes its counter only, and
    the next step is the same as where moments are selected."""
    params, grads = standard_params(), standard_gradients()

    def steps() -> list[Any]:
        tx = fo.muon(1e-2)
        update = jax.jit(tx.update)
        _, before = update(grads[0], tx.init(params), params)
        updates, state = update(scaled(grads[1], np.nan), before, params)
        assert_same_bits(updates, zeros_like(updates))
        [(count, counted)] = changed(before, state)
        assert (int(count), int(counted)) == (0, 1)
        return [before, update(grads[2], state, params)]

    selected = steps()
    monkeypatch.setitem(PLATFORMS, "cpu", PLATFORMS["cpu"]._replace(copied=-1))
    assert_close(steps(), selected, 1e-6)


@each(METHODS)
def test_a_run_may_start_with_a_bad_gradient(row: Row) -> None:
    """It is not taken for the first one: the run that follows is the run without it."""
    c = compiled(row)
    params = standard_params()
    grads = standard_gradients()
    _, state = c.update(scaled(grads[0], np.nan), c.init(params), params)
    points = run(c.update, state, params, grads[:3])
    assert_same_bits([point.updates for point in points], [point.updates for point in trajectory(row)[:3]])


@each(row for row in ROWS if not row.any_scale)
def test_matrix_statistics_that_overflow_skip_the_step(row: Row) -> None:
    c = compiled(row)
    before = trajectory(row)[2]
    grads = standard_gradients()[3]
    updates, state = c.update(grads | {"conv": scaled(grads["conv"], 1e30)}, before.state, before.params)
    assert_same_bits(updates, zeros_like(updates))
    assert int(fo.health(state).skipped) == 1


@each()
def test_health_of_a_good_run(row: Row) -> None:
    health = fo.health(trajectory(row)[-1].state)
    assert set(health._fields) >= {"version", "steps", "skipped", "failures"}
    assert (int(health.skipped), int(health.failures)) == (0, 0)


@each()
def test_zero_gradients_move_nothing(row: Row) -> None:
    """At the start, at zero parameters where there is nothing to decay; and later they are no reason for a NaN."""
    c = compiled(row)
    params = zeros_like(standard_params())
    for point in run(c.update, c.init(params), params, [params] * 4):
        assert_same_bits(point.updates, params)
        assert_finite(point.state)
    last = trajectory(row)[-1]
    assert_finite(run(c.update, last.state, last.params, [params] * 4))


@each()
def test_rank_one_gradients(row: Row) -> None:
    """Singular factors, the same direction every step: every update is finite and not zero."""
    c = compiled(row)
    params = standard_params()
    rng = np.random.default_rng(5)

    def rank_one(x: jax.Array) -> jax.Array:
        if x.ndim < 2:
            return jnp.ones_like(x)
        u, v = rng.normal(size=x.size // x.shape[-1]), rng.normal(size=x.shape[-1])
        return jnp.asarray(np.outer(u, v).reshape(x.shape), x.dtype)

    points = run(c.update, c.init(params), params, [jax.tree.map(rank_one, params)] * 5)
    assert_finite(points)
    assert all(bool(jnp.any(u)) for point in points[1:] for u in jax.tree.leaves(point.updates))
    assert int(fo.health(points[-1].state).failures) == 0


@pytest.mark.parametrize("exponent", [-50, 50])
@each()
def test_gradients_of_1e15_and_of_its_inverse(row: Row, exponent: int) -> None:
    """Large gradients, next to which eps is nothing, move parameters as others do; tiny ones move them at all."""
    c = compiled(row)
    params = standard_params()
    points = run(c.update, c.init(params), params, scaled(standard_gradients(), 2.0**exponent))
    assert_finite(points)
    if exponent > 0 and row.scale_free:
        assert_updates_close(points, trajectory(row), row.tolerance)
    assert all(bool(jnp.any(u)) for u in jax.tree.leaves(points[-1].updates))
    assert (int(fo.health(points[-1].state).skipped), int(fo.health(points[-1].state).failures)) == (0, 0)


@pytest.mark.parametrize("exponent", [-100, 100, 120])
@each(row for row in ROWS if row.any_scale)
def test_orthogonalisation_works_over_the_whole_range(row: Row, exponent: int) -> None:
    """From 1e-30 to 1e36, where squares leave float32's range, a power of two changes a matrix's steps by rounding."""
    c = compiled(row)
    params = standard_params()

    def matrices_scaled(grads: Any) -> Any:
        large = scaled(matrices_of(grads), 2.0**exponent)
        return grads | {name: grads[name] | large[name] for name in large}

    gradients = [matrices_scaled(grads) for grads in standard_gradients()[:3]]
    points = run(c.update, c.init(params), params, gradients)
    for point, wanted in zip(points, trajectory(row)[:3], strict=True):
        assert_close(matrices_of(point.updates), matrices_of(wanted.updates), row.tolerance)
    assert int(fo.health(points[-1].state).skipped) == 0


def odd_params() -> dict[str, Any]:
    return {
        "complex": jnp.asarray([[1 + 2j, 3j], [1.0, -1j]], jnp.complex64),
        "deep": {"wide": {"kernel": jnp.ones((1, 3))}, "tall": {"kernel": jnp.ones((3, 1))}, "none": None},
        "empty": jnp.zeros((0, 3)),
        "empty_vector": jnp.zeros((0,)),
        "eighth": {"kernel": jnp.ones((2, 3), jnp.float8_e5m2)},
        "flags": {"kernel": jnp.ones((2, 3), bool)},
        "number": 0.5,
        "one": {"kernel": jnp.ones((1, 1))},
        "scalar": jnp.ones(()),
        "single": jnp.ones((1,)),
        "steps": {"kernel": jnp.ones((2, 3), jnp.int32)},
        "whole": 3,
    }


@each(METHODS)
def test_odd_leaves(row: Row) -> None:
    """Complex, empty, scalar, single-entry and missing leaves, sides of length one, numbers, integers, booleans and
    float8: updates have the types that AdamW's have, and the state keeps its own."""
    tx = compiled(row).tx
    params = odd_params()
    rng = np.random.default_rng(2)

    def draw(x: Any) -> jax.Array:
        noise, dtype = rng.normal(size=(2, *jnp.shape(x))), jnp.result_type(x)
        if not jnp.issubdtype(dtype, jnp.inexact):
            return jnp.ones(jnp.shape(x), dtype)
        return jnp.asarray(noise[0] + 1j * noise[1] if jnp.iscomplexobj(x) else noise[0], dtype)

    gradients = [jax.tree.map(draw, params) for _ in range(4)]
    points = run(jax.jit(updater(tx, **row.update_kwargs)), tx.init(params), params, gradients)
    assert_finite(points)
    adamw = optax.adamw(0.1)
    wanted = jax.eval_shape(adamw.update, gradients[0], jax.eval_shape(adamw.init, params), params)[0]
    assert types(points[-1].updates) == types(wanted)
    assert types(points[-1].state) == types(points[0].state)
    methods = {leaf.path: leaf.method for leaf in fo.report(tx, params).rows}
    odd = ("complex", "flags/kernel", "number", "steps/kernel", "whole")
    assert {methods[path] for path in odd} <= {"fallback", "-", "scale_by_adam"}  # the last is a group's
    assert methods["eighth/kernel"] not in ("fallback", "-", "scale_by_adam")
    # A single entry that keeps its size does not move.
    assert all(bool(jnp.any(u)) for u in jax.tree.leaves(points[-1].updates) if u.size > row.keeps_norms)


@pytest.mark.parametrize("tree", [{}, {"none": None}, {"empty": jnp.zeros((0, 3))}], ids=str)
@each(METHODS)
def test_a_tree_with_nothing_in_it(row: Row, tree: Any) -> None:
    tx = build(row)
    updates, state = tx.update(tree, tx.init(tree), tree, **row.update_kwargs)
    assert types(updates) == types(tree)
    assert int(fo.health(state).skipped) == 0


@each(METHODS)
def test_health_is_found_under_wrappers(row: Row) -> None:
    """`masked`, `MultiSteps` and `chain` around an optimizer hide no skipped step."""
    c = compiled(row)
    tx = optax.chain(optax.masked(c.tx, lambda tree: jax.tree.map(lambda _: True, tree)), optax.identity())
    params = standard_params()
    bad = scaled(params, np.nan)
    _, state = tx.update(bad, tx.init(params), params, **row.update_kwargs)
    assert int(fo.health(state).skipped) == 1
