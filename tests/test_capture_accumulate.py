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


@pytest.mark.parametrize("name", OF_BATCH)
@pytest.mark.usefixtures("x64")
def test_devices_of_different_weights_add_up_to_the_batch(name: str) -> None:
    w = WEIGHTS["fractions"]

    def of_device(part: jax.Array) -> Any:
        return fo.all_reduce_statistics(statistics_of(name, part, w), "data")

    every = jax.vmap(of_device, axis_name="data")(jnp.arange(12).reshape(3, 4))
    wanted = statistics_of(name, slice(None), w)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b, rtol=1e-10, atol=1e-14), every, wanted)
