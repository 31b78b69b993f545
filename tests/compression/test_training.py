"""Pruning during training: masks hold, trajectories are the papers', shares are exact, and it pays."""

import functools
import itertools
from collections.abc import Callable
from fractions import Fraction
from math import ceil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisher_optax as fo
from tests.reference import movement as reference

SHAPES = {"conv": {"kernel": (2, 2, 2, 4)}, "dense": {"bias": (5,), "kernel": (8, 5)}}
apply_updates: Any = optax.apply_updates
IS_SHAPE = functools.partial(jax.tree.map, is_leaf=lambda x: isinstance(x, tuple))


def draw(seed: int, dtype: Any = np.float32) -> Any:
    rng = np.random.default_rng(seed)
    return IS_SHAPE(lambda shape: rng.normal(size=shape).astype(dtype), SHAPES)


def gradient(W: Any, t: int) -> Any:
    """Of ``½ |W - T_t|²``, with another T at each step."""
    return jax.tree.map(lambda w, target: w - target, W, draw(100 + t, np.float64))


def kernels(tree: Any) -> list[np.ndarray]:
    return [np.asarray(tree["conv"]["kernel"]), np.asarray(tree["dense"]["kernel"])]


def trained(tx: Any, params: Any, steps: int) -> list[tuple[Any, Any]]:
    """Parameters and state after each step on `gradient`."""
    state, update, points = tx.init(params), jax.jit(tx.update), []
    for t in range(1, steps + 1):
        updates, state = update(gradient(params, t), state, params)
        params = apply_updates(params, updates)
        points.append((params, state))
    return points


def cubic(t: int) -> Fraction:
    """What `SCHEDULE` is, exactly."""
    return Fraction(3, 4) * (1 - (1 - min(max(Fraction(t - 1, 6), Fraction(0)), Fraction(1))) ** 3)


SCHEDULE = fo.compression.cubic_schedule(0.75, begin=1, end=7)


@pytest.mark.parametrize(
    "tx",
    [
        optax.adamw(0.1, weight_decay=0.1),
        optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.05, momentum=0.9)),
        fo.soap(0.1, weight_decay=0.1, precondition_frequency=5),
    ],
    ids=["adamw", "sgd", "soap"],
)
def test_masked_weights_are_zero_whatever_the_optimizer_does(tx: Any) -> None:
    """For 100 steps, bit for bit, after 100 dense ones that have filled the state with momentum; by the same program,
    of which masks are no part.
    """
    params, dense = draw(0)["dense"], lambda seed: draw(seed)["dense"]
    masks = {"kernel": params["kernel"] > 0, "bias": None}
    keeping = fo.compression.keep_masks(tx, {"kernel": np.ones_like(masks["kernel"]), "bias": None})
    noise = jax.tree.map(lambda *x: jnp.stack(x), *map(dense, range(100)))
    traces = []

    @jax.jit
    def train(params: Any, state: Any) -> Any:
        traces.append(None)

        def step(carry: Any, noise: Any) -> Any:
            params, state = carry
            updates, state = keeping.update(jax.tree.map(lambda W, ε: W - 2 + ε, params, noise), state, params)
            params = apply_updates(params, updates)
            return (params, state), params

        return jax.lax.scan(step, (params, state), noise)

    (full, state), _ = train(params, keeping.init(params))
    assert full["kernel"].min() > 0  # all came from their normal starts towards 2
    _, points = train(full, state._replace(inner=state.inner._replace(masks=masks)))
    assert len(traces) == 1
    W, M = np.asarray(points["kernel"]), masks["kernel"]
    assert not W.view(np.uint32)[:, ~M].any()
    assert (W[-1][M] != W[-2][M]).all()
    assert (points["bias"][-1] != points["bias"][-2]).all()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_movement_is_the_papers_trajectory(kind: str) -> None:
    """Ten steps of momentum in float64: visible weights, masks and scores; the bias is trained and not pruned."""
    params, tx = draw(0, np.float64), optax.sgd(0.1, momentum=0.9)
    if kind == "hard":
        ours = fo.compression.movement(tx, SCHEDULE, score_learning_rate=0.5)
        mask: Callable[..., Any] = lambda S, t: reference.keep(S, float(cubic(t)))  # noqa: E731
        penalty = 0.0
    else:
        τ = fo.compression.cubic_schedule(0.55, begin=0, end=8, initial=0.4)
        penalty = 0.3
        ours = fo.compression.movement(
            tx, kind="soft", threshold=τ, regularization=penalty, score_learning_rate=optax.constant_schedule(0.5)
        )
        mask = lambda S, t: reference.sigmoid(S) > 0.55 - 0.15 * (1 - min(t / 8, 1)) ** 3  # noqa: E731
    points = trained(ours, params, 10)
    for name in ("conv", "dense"):
        of = lambda W, t, name=name: W - draw(100 + t, np.float64)[name]["kernel"]  # noqa: E731
        wanted = reference.movement(params[name]["kernel"], of, mask, 10, 0.5, penalty)
        for (W, state), (W_, M_, S_) in zip(points, wanted, strict=True):
            np.testing.assert_array_equal(fo.compression.movement_masks(state)[name]["kernel"], M_)
            np.testing.assert_allclose(W[name]["kernel"], W_, rtol=0, atol=1e-12)
            np.testing.assert_allclose(state.inner.scores[name]["kernel"], S_, rtol=0, atol=1e-12)
        assert any((M & ~before).any() for (_, before, _), (_, M, _) in itertools.pairwise(wanted))
        assert 0 < wanted[-1][1].mean() < 1
    bias, m = params["dense"]["bias"], 0.0
    for t in range(1, 11):
        m = 0.9 * m + bias - draw(100 + t, np.float64)["dense"]["bias"]
        bias = bias - 0.1 * m
    np.testing.assert_allclose(points[-1][0]["dense"]["bias"], bias, rtol=0, atol=1e-12)


def test_a_weight_that_is_gone_returns_with_its_old_value() -> None:
    """One weight is pushed towards 0 and goes; then its gradient, which no mask hides, pushes it away from 0."""
    tx = fo.compression.movement(optax.sgd(0.1), 0.5, score_learning_rate=1.0)
    params = {"kernel": jnp.array([[1.0], [1.0]])}
    state, update = tx.init(params), jax.jit(tx.update)
    seen = []
    for g in ([[2.0], [-1.0]], [[0.0], [1.0]], [[-4.0], [2.0]], [[-1.0], [0.0]]):
        updates, state = update({"kernel": jnp.array(g)}, state, params)
        params = apply_updates(params, updates)
        seen.append(params["kernel"].ravel())
    np.testing.assert_allclose(seen, [[0, 1.1], [0, 1.0], [0.8, 0], [0.9, 0]], atol=1e-6)


@pytest.mark.parametrize("scope", ["matrix", "output", "global"])
def test_shares_follow_the_schedule_exactly(scope: str) -> None:
    """⌈s n⌉ weights are 0 in each scope after each step, and none is before."""
    if scope == "output":
        tx = fo.compression.gradual(optax.sgd(0.1), SCHEDULE, every=1, scope=scope)
    else:
        tx = fo.compression.movement(optax.sgd(0.1), SCHEDULE, score_learning_rate=1.0, scope=scope)
    for t, (params, _) in enumerate(trained(tx, draw(0), 9), 1):
        conv, dense = ((W.reshape(8, -1) == 0).sum(0) for W in kernels(params))
        s = cubic(t)
        if scope == "output":
            assert {*conv, *dense} == {ceil(8 * s)}
        elif scope == "matrix":
            assert (conv.sum(), dense.sum()) == (ceil(32 * s), ceil(40 * s))
        else:
            assert conv.sum() + dense.sum() == ceil(72 * s)


@pytest.mark.usefixtures("x64")
def test_gradual_by_magnitude_is_the_reference() -> None:
    params = draw(0, np.float64)
    tx = fo.compression.gradual(optax.sgd(0.1, momentum=0.9), SCHEDULE, every=2)
    points = trained(tx, params, 10)
    for name in ("conv", "dense"):
        of = lambda W, t, name=name: W - draw(100 + t, np.float64)[name]["kernel"]  # noqa: E731
        wanted = reference.gradual(params[name]["kernel"], of, lambda t: float(cubic(t)), 10, 2)
        np.testing.assert_allclose([W[name]["kernel"] for W, _ in points], wanted, rtol=0, atol=1e-12)
        assert (wanted[3] == 0).sum() < (wanted[-1] == 0).sum() == ceil(0.75 * wanted[-1].size)


@pytest.mark.usefixtures("x64")
def test_gradual_by_obert_is_obert_on_the_gradients_since_the_last_pruning() -> None:
    """Of what is left, twice, over all layers and a stack of two. The block is smaller than the kernels, and no divisor
    of them.
    """
    rng, c, damping = np.random.default_rng(0), fo.compression, 1e-2
    params = {"a": rng.normal(size=(6, 4)), "stack": rng.normal(size=(2, 3, 4))}
    axes = {"a": fo.MatrixAxes(), "stack": fo.MatrixAxes(1, 2, 0)}
    tx = c.gradual(
        optax.sgd(0.1),
        lambda t: jnp.where(t < 6, 0.25, 0.5),
        **dict(method="obert", every=3, axes=axes, scope="global", block=5, damping=damping),
    )

    @jax.jit
    def wanted(W: Any, gradients: Any, stays: Any, share: Any) -> Any:
        seen = jax.tree.map(lambda g, M: g * M, gradients, stays)
        F = jax.tree.map(lambda g: c.block_moments(g, 5), seen)
        W = jax.tree.map(lambda W, g: W - 0.1 * g.sum(0), W, seen)
        scores = jax.tree.map(functools.partial(c.obert_scores, damping=damping), W, F)
        M = c.global_masks(scores, share)
        step = lambda W, F, M, was: c.obert_step(W, F, lambda _: M, damping=damping, stays=was)  # noqa: E731
        return jax.tree.map(step, W, F, M, stays)

    state, update = tx.init(params), jax.jit(tx.update)
    W, stays = params, jax.tree.map(lambda x: np.ones(x.shape, bool), params)
    for share in (0.25, 0.5):
        gradients = jax.tree.map(lambda x: rng.normal(size=(3, *x.shape)), params)
        for t in range(3):
            updates, state = update(jax.tree.map(lambda g, t=t: g[t], gradients), state, params)
            params = apply_updates(params, updates)
        pruned = wanted(W, gradients, stays, share)
        W, stays = ({name: p[i] for name, p in pruned.items()} for i in (0, 1))
        for name in params:
            np.testing.assert_array_equal(state.inner.masks[name], stays[name])
            np.testing.assert_array_equal(params[name] != 0, stays[name])
            np.testing.assert_allclose(params[name], W[name], rtol=0, atol=1e-12)
    assert sum(int(M.sum()) for M in jax.tree.leaves(stays)) == 24
    assert all(not x.any() for x in jax.tree.leaves((state.inner.moments, state.inner.gathered)))


def test_a_pattern_is_reached_at_once_and_stays() -> None:
    """In the leaves that `prune` names alone."""
    prune = {"conv": None, "dense": {"bias": False, "kernel": True}}
    points = trained(fo.compression.gradual(optax.sgd(0.1), "2:4", every=3, prune=prune), draw(0), 5)
    for t, (params, state) in enumerate(points, 1):
        conv, dense = kernels(params)
        assert conv.all()
        assert ((dense.reshape(2, 4, 5) == 0).sum(1) == (2 if t >= 3 else 0)).all()
        assert t < 3 or (state.inner.masks["dense"]["kernel"] == points[2][1].inner.masks["dense"]["kernel"]).all()


def test_pruning_while_training_beats_pruning_once() -> None:
    """Least squares with correlated inputs of sizes 0.2 to 3, from its dense minimum, at 80 % (seed 0): one removal by
    magnitude leaves a loss of 54, gradual ones with training between them 42, and where what the inputs are worth is
    seen, 19 (the Fisher) and 17 (movement).
    """
    rng = np.random.default_rng(0)
    X = rng.normal(size=(200, 20)) @ (np.eye(20) + 0.3 * rng.normal(size=(20, 20)))
    X = X * rng.permutation(np.geomspace(0.2, 3, 20))
    Y = X @ rng.normal(size=(20, 4)) + 0.1 * rng.normal(size=(200, 4))
    params = {"kernel": jnp.asarray(np.linalg.lstsq(X, Y)[0], jnp.float32)}
    X, Y = jnp.asarray(X, jnp.float32), jnp.asarray(Y, jnp.float32)
    batches = jnp.asarray(np.random.default_rng(1).integers(0, 200, (300, 32)))

    def loss(params: Any, batch: Any) -> jax.Array:
        return fo.losses.gaussian(X[batch] @ params["kernel"], Y[batch])

    def final(tx: Any) -> float:
        def step(carry: Any, batch: Any) -> Any:
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params, batch), state, params)
            return (apply_updates(params, updates), state), None

        (W, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, batches))((params, tx.init(params)))
        assert int((W["kernel"] == 0).sum()) == 64
        return float(loss(W, slice(None)))

    schedule, adam = fo.compression.cubic_schedule(0.8, begin=10, end=200), optax.adam(0.02)
    once = float(loss({"kernel": fo.compression.magnitude(params["kernel"], 0.8).weights}, slice(None)))
    assert final(fo.compression.gradual(adam, schedule, every=10)) < 0.85 * once
    assert final(fo.compression.gradual(adam, schedule, every=10, method="obert", block=20)) < 0.45 * once
    assert final(fo.compression.movement(adam, schedule, score_learning_rate=1.0)) < 0.45 * once
