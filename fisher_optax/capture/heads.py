"""The layer that gives a softmax cross-entropy its logits: its outputs' Fisher is known without a gradient."""

from typing import Any

import jax.numpy as jnp

from ..types import Logits
from .leaves import LeafPlan
from .losses import example_weights
from .rows import spread


def marked_heads(watched: list[LeafPlan], kind: Any) -> list[LeafPlan]:
    """Heads marked as such where the statistics are to treat them apart."""
    if getattr(kind, "head_rows", None) is None:
        return [leaf._replace(head=None) for leaf in watched]
    if all(leaf.head is None for leaf in watched):
        raise ValueError(
            "head_rows= is of the layer whose outputs are the logits of fo.losses.softmax_cross_entropy, and no "
            "layer's are, as they come and once: fo.report(loss_fn, params, *args) lists the layers."
        )
    return watched


def tokens_of(given: dict[int, Any], leaf: LeafPlan, count: int) -> Logits:
    """Some of the tokens of the loss that a head gives logits to, spread over all of them."""
    if leaf.head not in given:
        raise ValueError(f"the loss of {leaf.path!r} stands inside a remat, out of which its logits cannot be handed.")
    z, y, *weights = given[leaf.head]
    w = example_weights(z, *weights).reshape(-1)
    chosen = spread(len(w), count)
    z, y = z.reshape(-1, z.shape[-1])[chosen], y.reshape(len(w), *y.shape[z.ndim - 1 :])[chosen]
    z, w = z.astype(jnp.promote_types(z.dtype, jnp.float32)), w[chosen]
    return Logits(jnp.where(w[:, None] > 0, z, 0), y, w)
