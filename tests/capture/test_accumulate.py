"""Statistics of several batches or devices are those of one batch, whatever the examples' weights."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_optax as fo

rng = np.random.default_rng(0)
PARAMS = {"first": rng.normal(size=(3, 5)), "second": rng.normal(size=(5, 4))}
X, Y = rng.normal(size=(12, 3)), rng.integers(4, size=12)
WEIGHTS = {
    "fractions": rng.uniform(0.1, 3, size=12),
    "padded": np.asarray([1.0] * 5 + [0.0] + [1.0] + [0.0] * 5),
    "one part counts for nothing": np.asarray([1.0] * 4 + [0.0] * 8),
}
PARTS = (slice(0, 4), slice(4, 6), slice(6, 12))


def loss(p: Any, x: jax.Array, y: jax.Array, w: jax.Array) -> jax.Array:
    return fo.losses.softmax_cross_entropy(jnp.tanh(x @ p["first"]) @ p["second"], y, w)


def jitted(**options: Any) -> Any:
    grad_fn = fo.value_and_grad(loss, **options)
    bases = {"bases": dict.fromkeys(PARAMS, (None, None))} if "statistics" in options else {}
    return jax.jit(lambda *args: grad_fn(*args, **bases)[2])


OF_BATCH = {
    "empirical": jitted(),
    "squares": jitted(statistics=fo.KroneckerFactors(squares=True)),
    "true": jitted(fisher="true"),
}


def statistics_of(name: str, part: Any, w: np.ndarray) -> Any:
    params, *batch = jax.tree.map(jnp.asarray, (PARAMS, X, Y, w))
    return OF_BATCH[name](params, *(x[part] for x in batch))


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", OF_BATCH)
@pytest.mark.usefixtures("x64")
def test_micro_batches_add_up_to_the_batch(name: str, weights: str) -> None:
    w, total = WEIGHTS[weights], None
    for part in PARTS:
        total = fo.accumulate_statistics(total, statistics_of(name, part, w))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14),
        total,
        statistics_of(name, slice(None), w),
    )


def test_of_several_losses_labels_drawn_are_averaged_by_positions() -> None:
    """Each loss has weights of its own, and no sum of them is the batch's."""

    def two(p: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        logits = jnp.tanh(x @ p["first"]) @ p["second"]
        return fo.losses.softmax_cross_entropy(logits, y) + fo.losses.gaussian(logits, jnp.zeros_like(logits))

    params, x, y = jax.tree.map(jnp.asarray, (PARAMS, X, Y))
    grad_fn = fo.value_and_grad(two, fisher="mc")
    parts = [grad_fn(params, x[p], y[p], fisher_key=jax.random.key(0))[2] for p in (slice(0, 2), slice(2, 12))]
    total = fo.accumulate_statistics(*parts)["first"]
    assert float(total.divisor) == float(total.weight) == 12
    wanted = sum(part["first"].weight * part["first"].right for part in parts) / 12
    np.testing.assert_allclose(total.right, wanted, rtol=1e-5)


def test_the_divisor_is_no_coarser_than_the_count() -> None:
    """A sum of weights in bfloat16 would stand still at 256."""
    grad_fn = fo.value_and_grad(lambda W, x: fo.losses.gaussian(x @ W, x), normalizer=jnp.ones([], jnp.bfloat16))
    assert grad_fn(jnp.ones((3, 3)), jnp.ones((4, 3)))[2].divisor.dtype == jnp.float32


@pytest.mark.parametrize("name", OF_BATCH)
@pytest.mark.usefixtures("x64")
def test_devices_of_different_weights_add_up_to_the_batch(name: str) -> None:
    w = WEIGHTS["fractions"]

    def of_device(part: jax.Array) -> Any:
        return fo.all_reduce_statistics(statistics_of(name, part, w), "data")

    every = jax.vmap(of_device, axis_name="data")(jnp.arange(12).reshape(3, 4))
    wanted = statistics_of(name, slice(None), w)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b, rtol=1e-10, atol=1e-14), every, wanted)
