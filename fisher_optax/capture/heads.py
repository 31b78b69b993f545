"""The layer that gives a softmax cross-entropy its logits: its outputs' Fisher is known without a gradient."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._xla import automatic, in_scope
from ..linalg.eigenbasis import LowRank
from ..statistics import LayerFactors, Logits
from .devices import devices_along
from .kinds.protocol import StatisticsKind
from .kinds.rows import picked
from .losses import example_weights
from .program.jaxprs import Value, split_over, varying
from .program.leaves import LeafPlan


def marked_heads(watched: list[LeafPlan], kind: StatisticsKind) -> list[LeafPlan]:
    """Heads marked as such where the statistics are to treat them apart."""
    if kind.head_tokens() is None:
        return [leaf._replace(head=None) for leaf in watched]
    if all(leaf.head is None for leaf in watched):
        raise ValueError(
            "head_rows= is of the layer whose outputs are the logits of fo.losses.softmax_cross_entropy, and no "
            "layer's are, as they come and once: fo.report(loss_fn, params, *args) lists the layers."
        )
    return watched


def with_tokens(factors: LayerFactors, tokens: Logits, times: Array | int) -> LayerFactors:
    """The factors of a head, tokens in place of the right side. They tell the Fisher of their loss, and ``times``, how
    often that counts in the whole, is with the other side.
    """
    left = factors.left
    if isinstance(left, LowRank):
        left = LowRank(left.rows * jnp.sqrt(jnp.asarray(times, left.rows.dtype)))
    elif isinstance(left, Array):
        left = left * jnp.asarray(times, left.dtype)
    return dataclasses.replace(factors, left=left, right=tokens)


def tokens_of(operands: dict[int, Any], leaf: LeafPlan, parameter: Value, count: int) -> Logits:
    """Some of the tokens of the loss that a head gives logits to, spread over all of them."""
    if leaf.head not in operands:
        raise ValueError(
            f"the loss of {leaf.path!r} stands inside a remat or shard_map, out of which its logits cannot be handed."
        )
    axes = [axis for axis in split_over(*operands[leaf.head]) if axis[0] not in varying(parameter)]
    names = tuple(name for name, _ in axes)

    def tokens(z: Array, y: Array, *weights: Array) -> Logits:
        w = example_weights(z, *weights).reshape(-1)
        chosen = picked(len(w), count, devices_along(axes), jax.lax.axis_index(names) if axes else 0)
        flat = z.reshape(-1, z.shape[-1]), y.reshape(len(w), *y.shape[z.ndim - 1 :]), w
        z, y, w = (chosen.of(x, 0) for x in flat)
        if names:
            z, y, w = (jax.lax.psum(x, names) for x in (z, y, w))
        z = z.astype(jnp.promote_types(z.dtype, jnp.float32))
        return Logits(jnp.where(w[:, None] > 0, z, 0), y, w)

    return automatic(tokens, *in_scope(operands[leaf.head]))
