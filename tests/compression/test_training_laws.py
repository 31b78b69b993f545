"""Optimizers that prune are transformations like the others: pure, compiled once, saved, wrapped, hard to spoil."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest

import fisher_optax as fo
from fisher_optax.compression.training.keeping import transformation
from tests.comparisons import assert_finite, assert_same_bits, assert_updates_close, types
from tests.optimizers_table import Compiled, Point, run

PARAMS: Any = {
    "conv": {"kernel": np.random.default_rng(0).normal(size=(2, 2, 1, 4)).astype(np.float32)},
    "dense": {
        "bias": np.ones(5, np.float32),
        "kernel": np.random.default_rng(1).normal(size=(4, 5)).astype(np.float32),
    },
    "none": None,
}
MASKS: Any = jax.tree.map(lambda W: W > 0, PARAMS) | {"none": None}
MASKS["dense"]["bias"] = None
RISING = fo.compression.cubic_schedule(0.5, begin=0, end=6)


def times_stranger() -> Any:
    """A transformation that needs an argument no optimizer knows."""

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        return jax.tree.map(lambda u: u * extra["stranger"].astype(u.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def build(name: str) -> Any:
    tx = optax.chain(optax.adamw(0.1, weight_decay=0.1), times_stranger())
    c = fo.compression
    return {
        "keep": lambda: c.keep_masks(tx, MASKS),
        "hard": lambda: c.movement(tx, RISING, score_learning_rate=1.0),
        "soft": lambda: c.movement(tx, kind="soft", threshold=0.45, regularization=0.1, score_learning_rate=0.2),
        "magnitude": lambda: c.gradual(tx, RISING, every=2),
        "obert": lambda: c.gradual(tx, RISING, method="obert", every=2, block=7, damping=0.1),
    }[name]()


each = pytest.mark.parametrize("name", ["keep", "hard", "soft", "magnitude", "obert"])


def gradients(dtype: Any = np.float32) -> list[Any]:
    rng = np.random.default_rng(2)
    return [jax.tree.map(lambda W: rng.normal(size=W.shape).astype(dtype), PARAMS) for _ in range(6)]


def updater(tx: Any) -> Any:
    return lambda grads, state, params: tx.update(grads, state, params, stranger=jnp.ones([]))


@functools.cache
def compiled(name: str) -> Compiled:
    tx, traces = build(name), []

    @jax.jit
    def update(grads: Any, state: Any, params: Any) -> Any:
        traces.append(None)
        return updater(tx)(grads, state, params)

    return Compiled(tx, tx.init, update, traces)


@functools.cache
def trajectory(name: str) -> tuple[Point, ...]:
    c = compiled(name)
    return tuple(run(c.update, c.init(PARAMS), PARAMS, gradients()))


@each
def test_one_compile_fixed_types_and_a_state_of_arrays(name: str) -> None:
    """Six steps, prunings among them; from shapes alone `init` makes what it makes from arrays."""
    points, tx = trajectory(name), compiled(name).tx
    assert len(compiled(name).traces) == 1
    start = tx.init(PARAMS)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(start))
    abstract = jax.tree.map(lambda W: jax.ShapeDtypeStruct(W.shape, W.dtype), PARAMS)
    assert types(tx.init(abstract)) == types(start) == types(points[-1].state)
    assert types(points[-1].params) == types(jax.tree.map(jnp.asarray, PARAMS))
    assert 0.2 < np.mean(points[-1].params["dense"]["kernel"] == 0) < 0.8
    seen = []
    assert_same_bits(optax.tree.map_params(tx, lambda x: seen.append(x.shape) or x, points[2].state), points[2].state)
    assert seen


def test_eager_steps_are_the_compiled_ones_and_change_no_argument() -> None:
    """With a pruning, on NumPy arrays, which could be written to."""
    c = compiled("obert")
    start = jax.tree.map(np.array, (c.init(PARAMS), PARAMS, gradients()[:2]))
    before = jax.tree.map(np.copy, start)
    assert_updates_close(run(updater(c.tx), *start), trajectory("obert"), 1e-5)
    assert_same_bits(start, before)


@each
def test_a_gradient_that_is_not_finite_changes_nothing(name: str) -> None:
    """Neither weights nor scores, masks or moments, before a step at which something is pruned; it is counted."""
    c, grads = compiled(name), gradients()
    before, wanted = trajectory(name)[2], trajectory(name)[3]
    bad = grads[3] | {"dense": grads[3]["dense"] | {"kernel": np.where(np.eye(4, 5) > 0, np.nan, 1)}}
    updates, state = c.update(jax.tree.map(np.float32, bad), before.state, before.params)
    assert not any(u.any() for u in jax.tree.leaves(updates))
    assert_same_bits(state.inner, before.state.inner)
    assert fo.health(state).skipped == 1
    assert_same_bits(c.update(grads[3], state, before.params)[0], wanted.updates)


def test_a_run_resumed_from_a_checkpoint_is_the_same_run(tmp_path: Path) -> None:
    """Bitwise, in the middle, with weights hidden under the masks."""
    name = "hard"
    half = {"params": trajectory(name)[2].params, "state": trajectory(name)[2].state}
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", half)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "run", jax.eval_shape(lambda: half))
    points = run(compiled(name).update, restored["state"], restored["params"], gradients()[3:])
    assert_same_bits(points, list(trajectory(name)[3:]))


def test_under_multisteps_and_masked() -> None:
    """Every second call gives the update of the mean; what is hidden passes, and the matrices do as alone. Masks are
    found inside, and fit the whole tree.
    """
    shown = {"conv": {"kernel": True}, "dense": {"kernel": True, "bias": False}, "none": None}
    tx = optax.MultiSteps(optax.masked(build("hard"), shown), 2)
    twice = [g for g in gradients()[:2] for _ in range(2)]
    points: Any = run(jax.jit(updater(tx)), tx.init(PARAMS), PARAMS, twice)
    for i, point in enumerate(points):
        for path in (("conv", "kernel"), ("dense", "kernel")):
            got, wanted = (p.updates[path[0]][path[1]] for p in (point, trajectory("hard")[i // 2]))
            np.testing.assert_allclose(got, wanted if i % 2 else 0, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(points[1].updates["dense"]["bias"], twice[0]["dense"]["bias"])
    masks = fo.compression.movement_masks(points[3].state)
    state: Any = fo.compression.keep_masks(optax.sgd(0.1), masks).init(PARAMS)
    assert_same_bits(state.inner.masks["dense"], {"kernel": masks["dense"]["kernel"], "bias": None})


@pytest.mark.parametrize(("name", "dtype"), [("keep", jnp.float32), ("hard", jnp.bfloat16), ("obert", jnp.bfloat16)])
def test_half_precision_is_exact_where_it_matters(name: str, dtype: Any) -> None:
    """With gradients in bfloat16, and weights in it or not: types stay, what is gone is 0, what stays moves."""
    params = jax.tree.map(lambda W: jnp.asarray(W, dtype), PARAMS)
    tx: Any = build(name)
    points: Any = run(jax.jit(updater(tx)), tx.init(params), params, gradients(jnp.bfloat16)[:2])
    assert_finite(points[-1].state)
    assert types(points[-1].params) == types(params)
    for layer, M in points[-1].state.inner.masks.items():
        if M is not None:
            np.testing.assert_array_equal(points[-1].params[layer]["kernel"] != 0, M["kernel"])
            assert bool(M["kernel"].any()), layer
            assert not bool(M["kernel"].all()), layer


def test_masks_that_do_not_fit_are_named() -> None:
    def keep(kernel: Any = None, **more: Any) -> Any:
        masks = {"conv": None, "dense": {"kernel": kernel, "bias": None} | more}
        return fo.compression.keep_masks(optax.sgd(0.1), masks).init(PARAMS)

    assert keep(MASKS["dense"]["kernel"]).inner.masks["conv"]["kernel"] is None
    with pytest.raises(
        ValueError, match=r"masks at 'dense/kernel' have shape \(3, 5\); the weights there have \(4, 5\)"
    ):
        keep(np.ones((3, 5), bool))
    with pytest.raises(TypeError, match="masks at 'dense/kernel' are float32; wanted booleans"):
        keep(np.ones((4, 5), np.float32))
    with pytest.raises(ValueError, match="masks has an entry at 'dense/scale', unlike the parameters"):
        keep(scale=np.ones(5, bool))
    with pytest.raises(ValueError, match="masks has nothing at 'conv/kernel'"):
        fo.compression.keep_masks(optax.sgd(0.1), {"dense": MASKS["dense"]}).init(PARAMS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda c, tx: transformation("keep_masks", None), "keep_masks wraps an optimizer.* got NoneType"),
        (lambda c, tx: c.movement(tx, 0.5, score_learning_rate=1.0, kind="easy"), "kind must be 'hard' or 'soft'"),
        (lambda c, tx: c.movement(tx, score_learning_rate=1.0), "kind 'hard' takes sparsity.* without sparsity"),
        (lambda c, tx: c.movement(tx, 0.5, score_learning_rate=1.0, threshold=0.1), "got threshold"),
        (lambda c, tx: c.movement(tx, 50, score_learning_rate=1.0), "sparsity must be a share"),
        (lambda c, tx: c.movement(tx, 0.5, score_learning_rate=-1.0), "score_learning_rate must be at least 0"),
        (lambda c, tx: c.gradual(tx, c.cubic_schedule(80, 0, 9)), "sparsity must be a share"),
        (lambda c, tx: c.gradual(tx, 0.5, method="fisher"), "method must be 'magnitude' or 'obert'"),
        (lambda c, tx: c.gradual(tx, 0.5, every=0), "every must be a whole number"),
        (lambda c, tx: c.gradual(tx, 0.5, scope="layer"), "scope must be one of 'matrix', 'output', 'global'"),
        (lambda c, tx: c.gradual(tx, "2:4", scope="global"), "a pattern is by output"),
        (lambda c, tx: c.gradual(tx, "2:3").init(PARAMS), "2:3 needs inputs in groups of 3"),
        (lambda c, tx: c.gradual(tx, 0.5, prune=lambda p: jax.tree.map(lambda _: True, p)).init(PARAMS), "no matrix"),
        (lambda c, tx: c.gradual(tx, 0.5).update(PARAMS, c.gradual(tx, 0.5).init(PARAMS)), "without them"),
        (lambda c, tx: c.cubic_schedule(0.5, 9, 9), "end must come after begin"),
        (lambda c, tx: c.movement_masks(tx.init(PARAMS)), "0 states of movement"),
    ],
)
def test_errors_say_what_is_wrong(make: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make(fo.compression, optax.sgd(0.1))
