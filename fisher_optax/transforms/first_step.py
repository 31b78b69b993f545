"""A transformation that makes no step at its first call."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from .._xla import chosen


class SkipFirstState(NamedTuple):
    """State of `skip_first_call`."""

    called: Int[Array, ""]  # 0 or 1: `optax.contrib.sam` multiplies and adds states, and makes a bool an int32
    inner: Any


def skip_first_call(tx: optax.GradientTransformation, hold: bool = True) -> optax.GradientTransformationExtraArgs:
    """``tx``, but the first call updates nothing and, with ``hold``, leaves its state alone (a schedule goes on)."""
    tx = optax.with_extra_args_support(tx)

    def init(params: Any) -> SkipFirstState:
        return SkipFirstState(jnp.zeros([], jnp.int32), tx.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        new, inner = tx.update(updates, state.inner, params, **extra)
        called = state.called > 0
        new = chosen(called, new, jax.tree.map(jnp.zeros_like, new))
        return new, SkipFirstState(jnp.ones([], jnp.int32), chosen(called, inner, state.inner) if hold else inner)

    return optax.GradientTransformationExtraArgs(init, update)
