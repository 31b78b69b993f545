"""The last stage on layers: no step before there was curvature, and none that changes the model's outputs too much."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from .._checks import value_at
from .._xla import select
from .freeze import Freezable, counted, freezable


class ClipState(NamedTuple):
    """State of the last stage on layers: how often it was called, and whether there were statistics yet."""

    count: Int[Array, ""]
    seen: Int[Array, ""]  # 0 or 1, as in `SkipFirstState`
    inner: Any


def once_seen(inner: optax.GradientTransformation, clip: Any, learning_rate: Any) -> Freezable:
    """``ν U``, and 0 as long as no statistics have come."""

    tx = freezable(inner)

    def init(params: Any) -> ClipState:
        return ClipState(jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32), tx.init(params))

    def update(
        updates: Any, state: Any, params: Any = None, *, accept: Any = None, **extra: Any
    ) -> tuple[Any, ClipState]:
        G = updates
        U, new = tx.update(G, state.inner, params, accept=accept, **extra)
        seen = state.seen | (extra["statistics"] is not None)
        ν: Any = 1.0
        if clip is not None:
            dots = (jnp.vdot(u, g.astype(u.dtype)) for u, g in zip(jax.tree.leaves(U), jax.tree.leaves(G), strict=True))
            change = value_at(learning_rate, state.count) ** 2 * jnp.abs(sum(dots, jnp.zeros([])))
            ν = jnp.minimum(1, jnp.sqrt(value_at(clip, state.count) / jnp.where(change > 0, change, 1)))
            ν = jnp.where(change > 0, ν, 1)
        U = jax.tree.map(lambda u: jnp.where(seen > 0, (ν * u).astype(u.dtype), 0), U)
        return U, ClipState(counted(accept, state.count), select(accept, seen, state.seen), new)

    return Freezable(init, update)
