"""Norm-controlled steps are what their float64 formulas say, matrix by matrix."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisher_optax as fo
from tests.reference import norm_control as reference


def RATE(count: Any) -> Any:
    return 0.3 * 0.9**count


AXES = {"W": fo.MatrixAxes(1, 2, batch=0)}  # three matrices of 5 x 4


def drawn(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def followed(tx: Any, W: np.ndarray, axes: Any = None, steps: int = 20) -> list[np.ndarray]:
    """The weights after each of several steps with drawn directions."""
    params = {"W": jnp.asarray(W)}
    state, update, seen = tx.init(params), jax.jit(tx.update), []
    for t in range(steps):
        updates, state = update({"W": jnp.asarray(drawn(t + 1, *W.shape))}, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(np.asarray(params["W"]))
    return seen


def before_the_rate(tx: Any) -> Any:
    return optax.chain(tx, optax.scale_by_learning_rate(RATE))


# Each transformation, and what it makes of (W, u, lr, W_0).
RULES: dict[str, tuple[Callable[[Any], Any], Callable[..., np.ndarray]]] = {
    "relative": (
        lambda axes: before_the_rate(fo.relative_update(axes=axes)),
        lambda W, u, lr, start: W - lr * reference.relative(W, u),
    ),
    "brake": (
        lambda axes: before_the_rate(fo.radial_brake(0.5, 0.8, axes=axes)),
        lambda W, u, lr, start: W - lr * reference.brake(W, u, 0.5, 0.8),
    ),
    "floor by neuron": (
        lambda axes: before_the_rate(fo.update_floor(1.5, axes=axes)),
        lambda W, u, lr, start: W - lr * reference.floor(W, u, 1.5, axis=0),
    ),
    "floor by matrix": (
        lambda axes: before_the_rate(fo.update_floor(1.2, per="matrix", axes=axes)),
        lambda W, u, lr, start: W - lr * reference.floor(W, u, 1.2),
    ),
    "hyperball": (
        lambda axes: fo.hyperball(RATE, axes=axes),
        lambda W, u, lr, start: reference.hyperball(W, u, lr, np.linalg.norm(start)),
    ),
    "hyperball of now": (
        lambda axes: fo.hyperball(RATE, "current", axes=axes),
        lambda W, u, lr, start: reference.hyperball(W, u, lr, np.linalg.norm(W)),
    ),
    "hyperball of 3": (
        lambda axes: fo.hyperball(RATE, 3.0, axes=axes),
        lambda W, u, lr, start: reference.hyperball(W, u, lr, 3.0),
    ),
    "pinned": (
        lambda axes: fo.pinned_step(RATE, 0.5, axes=axes),
        lambda W, u, lr, start: reference.pinned(W, u, lr, 0.5),
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_each_matrix_of_a_stack_follows_the_formula(name: str) -> None:
    make, rule = RULES[name]
    with jax.enable_x64():
        W = start = drawn(0, 3, 5, 4)
        for t, got in enumerate(followed(make(AXES), W)):
            u, lr = drawn(t + 1, *W.shape), RATE(t)
            W = np.stack([rule(*each, lr, first) for *each, first in zip(W, u, start, strict=True)])
            np.testing.assert_allclose(got, W, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", RULES)
def test_parts_of_a_fused_kernel_are_matrices(name: str) -> None:
    with jax.enable_x64():
        W = drawn(0, 5, 6)
        got = followed(RULES[name][0]({"W": fo.MatrixAxes(0, 1, parts={1: (4, 2)})}), W, steps=3)[-1]
        directions = [{"a": u[:, :4], "b": u[:, 4:]} for u in (drawn(t + 1, 5, 6) for t in range(3))]
        params = {"a": jnp.asarray(W[:, :4]), "b": jnp.asarray(W[:, 4:])}
        tx = RULES[name][0]({"a": fo.MatrixAxes(0, 1), "b": fo.MatrixAxes(0, 1)})
        state = tx.init(params)
        for u in directions:
            updates, state = tx.update(jax.tree.map(jnp.asarray, u), state, params)
            params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(got, np.concatenate([params["a"], params["b"]], 1), rtol=1e-9)


def test_one_radius_for_a_leaf_is_said_so() -> None:
    """All experts together: their sizes may then change among them."""
    with jax.enable_x64():
        W = drawn(0, 3, 5, 4)
        got = followed(fo.hyperball(RATE, radius_over="leaf", axes=AXES), W, steps=2)
        after = reference.hyperball(W, drawn(1, *W.shape), RATE(0), np.linalg.norm(W))
        np.testing.assert_allclose(got[0], after, rtol=1e-12)
        assert np.abs(np.linalg.norm(got[1], axis=(1, 2)) / np.linalg.norm(W, axis=(1, 2)) - 1).max() > 1e-3


def test_the_size_of_the_direction_does_nothing_on_a_sphere() -> None:
    """At any size: 1e-30 and 1e30 in float32, where squares are out of range."""
    params, u = (
        {"dense": {"kernel": jnp.asarray(drawn(0, 5, 4), jnp.float32)}},
        jnp.asarray(drawn(1, 5, 4), jnp.float32),
    )
    tx = fo.hyperball(0.1)
    steps = [
        tx.update({"dense": {"kernel": c * u}}, tx.init(params), params)[0]["dense"]["kernel"]
        for c in (1.0, 1e-30, 1e30)
    ]
    np.testing.assert_allclose(steps[1], steps[0], atol=1e-6)
    np.testing.assert_allclose(steps[2], steps[0], atol=1e-6)


def test_the_rate_is_the_tangent_of_the_angle() -> None:
    with jax.enable_x64():
        W, u = drawn(0, 5, 4), drawn(1, 5, 4)
        u -= W * (u * W).sum() / (W * W).sum()
        tx, params = fo.hyperball(0.25), {"dense": {"kernel": jnp.asarray(W)}}
        after = W + tx.update({"dense": {"kernel": jnp.asarray(u)}}, tx.init(params), params)[0]["dense"]["kernel"]
        cosine = (after * W).sum() / np.linalg.norm(after) / np.linalg.norm(W)
        np.testing.assert_allclose(np.tan(np.arccos(cosine)), 0.25, rtol=1e-9)


def test_pinning_an_update_across_the_weights_is_the_sphere() -> None:
    with jax.enable_x64():
        W, u = drawn(0, 5, 4), drawn(1, 5, 4)
        u -= W * (u * W).sum() / (W * W).sum()
        u *= np.linalg.norm(W) / np.linalg.norm(u)
        params, updates = {"dense": {"kernel": jnp.asarray(W)}}, {"dense": {"kernel": jnp.asarray(u)}}
        pinned, sphere = (
            tx.update(updates, tx.init(params), params)[0]["dense"]["kernel"]
            for tx in (fo.pinned_step(0.2), fo.hyperball(0.2))
        )
        np.testing.assert_allclose(pinned, sphere, atol=1e-12)


@pytest.mark.parametrize("name", RULES)
def test_zeros_stay_and_zero_weights_get_the_plain_step(name: str) -> None:
    make = RULES[name][0]
    params = {"W": jnp.asarray(drawn(0, 3, 5, 4), jnp.float32).at[1].set(0)}
    tx = make(AXES)
    state = tx.init(params)
    still, _ = tx.update({"W": jnp.zeros((3, 5, 4))}, state, params)
    np.testing.assert_array_equal(still["W"], 0)
    u = jnp.asarray(drawn(1, 3, 5, 4), jnp.float32)
    moved, _ = tx.update({"W": u}, state, params)
    np.testing.assert_allclose(moved["W"][1], -0.3 * u[1], rtol=1e-6)


def test_the_first_size_of_a_matrix_of_zeros_is_its_radius() -> None:
    with jax.enable_x64():
        sizes = [
            np.linalg.norm(W) for W in followed(fo.hyperball(0.1, axes={"W": fo.MatrixAxes(0, 1)}), np.zeros((5, 4)))
        ]
        np.testing.assert_allclose(sizes, sizes[0], rtol=1e-12)
        assert sizes[0] > 0


def test_what_is_no_matrix_is_stepped_as_ever() -> None:
    params = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}, "embed": {"embedding": jnp.ones((7, 4))}}
    updates = jax.tree.map(lambda x: 0.5 * jnp.ones_like(x), params)
    for tx, rate in ((fo.hyperball(0.1), -0.1), (fo.pinned_step(0.1), -0.1), (fo.update_floor(9.0), 1.0)):
        new, _ = tx.update(updates, tx.init(params), params)
        np.testing.assert_allclose(new["dense"]["bias"], rate * 0.5, rtol=1e-6)
        np.testing.assert_allclose(new["embed"]["embedding"], rate * 0.5, rtol=1e-6)


def test_a_sphere_over_a_mesh_is_that_of_one_device() -> None:
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    W, u = (jnp.asarray(drawn(seed, 8, 4), jnp.float32) for seed in (0, 1))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    tx, alone = fo.hyperball(0.1), {"dense": {"kernel": W}}
    shared = jax.device_put(alone, rows)
    wanted, _ = tx.update({"dense": {"kernel": u}}, tx.init(alone), alone)
    got, _ = jax.jit(tx.update)(jax.device_put({"dense": {"kernel": u}}, rows), tx.init(shared), shared)
    np.testing.assert_allclose(got["dense"]["kernel"], wanted["dense"]["kernel"], atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fo.hyperball(0.1, "first"), "radius must be one of 'initial', 'current'; got 'first'"),
        (lambda: fo.hyperball(0.1, 0.0), "radius must be 'initial', 'current' or a positive number; got 0.0"),
        (lambda: fo.hyperball(0.1, radius_over="expert"), "radius_over must be one of 'matrix', 'leaf'"),
        (lambda: fo.update_floor(-1.0), "share must be at least 0"),
        (lambda: fo.update_floor(per="row"), "per must be one of 'neuron', 'matrix'"),
        (lambda: fo.radial_brake(-0.5), "outward must be at least 0"),
        (lambda: fo.pinned_step(-1.0), "learning_rate must be at least 0"),
    ],
)
def test_bad_arguments_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", RULES)
def test_without_parameters_it_says_so(name: str) -> None:
    tx, params = RULES[name][0](AXES), {"W": jnp.ones((3, 5, 4))}
    with pytest.raises(ValueError, match="measures steps against the parameters"):
        tx.update(params, tx.init(params))
