"""A transformation that makes no step at its first call."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from .._xla import select
from .freeze import Freezable, freezable


class SkipFirstState(NamedTuple):
    """State of `skip_first_call`."""

    called: Int[Array, ""]  # 0 or 1: `optax.contrib.sam` multiplies and adds states, and makes a bool an int32
    inner: Any


def skip_first_call(tx: optax.GradientTransformation, freeze: bool = True) -> Freezable:
    """``tx``, but the first call updates nothing and, with ``freeze``, leaves its state alone (a schedule goes on)."""
    tx = freezable(tx)

    def init(params: Any) -> SkipFirstState:
        return SkipFirstState(jnp.zeros([], jnp.int32), tx.init(params))

    def update(updates: Any, state: Any, params: Any = None, *, accept: Any = None, **extra: Any) -> Any:
        called = state.called > 0
        later = called if accept is None else accept & called
        new, inner = tx.update(updates, state.inner, params, accept=later if freeze else accept, **extra)
        new = select(called, new, jax.tree.map(jnp.zeros_like, new))
        return new, SkipFirstState(select(accept, jnp.ones([], jnp.int32), state.called), inner)

    return Freezable(init, update)
