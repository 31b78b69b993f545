"""JAX's strict modes change nothing about statistics; optimizers under them are in `laws/test_states.py`."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import fisher_optax as fo

KINDS = {
    "sums": (fo.KroneckerFactors(), "true"),
    "sums over examples": (fo.KroneckerFactors(mode="reduce", max_examples=3), "empirical"),
    "rows": (fo.KroneckerFactors(max_dim=4, rank=2), "mc"),
    "samples": (fo.LayerSamples(4), "mc"),
}


def loss(params: Any, tokens: jax.Array, images: jax.Array) -> jax.Array:
    """Of an embedding, a dense layer and a convolution; every axis is added by hand."""
    window = params["conv"]["kernel"]
    maps = jax.lax.conv_general_dilated(images, window, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    h = jnp.take(params["embed"]["embedding"], tokens, axis=0) + maps.mean((1, 2))[:, None]
    z = h @ params["out"]["kernel"]
    return fo.losses.softmax_cross_entropy(z + jnp.broadcast_to(params["out"]["bias"], z.shape), tokens)


PARAMS = {
    "conv": {"kernel": jnp.ones((2, 2, 3, 5))},
    "embed": {"embedding": jnp.ones((7, 5))},
    "out": {"kernel": jnp.ones((5, 7)), "bias": jnp.ones(7)},
}


@pytest.mark.parametrize("name", KINDS)
def test_no_axis_is_added_by_itself(name: str) -> None:
    """Statistics with `jax.numpy_rank_promotion` at "raise"."""
    kind, fisher = KINDS[name]
    key: dict[str, Any] = {"fisher_key": jax.random.key(0)} if fisher == "mc" else {}
    grad_fn, tokens, images = fo.value_and_grad(loss, kind, fisher), jnp.ones((4, 3), int), jnp.ones((4, 6, 6, 3))
    with jax.numpy_rank_promotion("raise"):
        _, grads, stats = jax.eval_shape(lambda p: grad_fn(p, tokens, images, **key), PARAMS)
    assert jax.tree.structure(grads) == jax.tree.structure(PARAMS)
    assert stats["out"]["kernel"] is not None
