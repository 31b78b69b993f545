"""Momentum that keeps the direction of ``m = β m + G`` and never overflows, and the plain one, overwritten in place."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from .branching import held
from .checks import at


class MomentumState(NamedTuple):
    """State of `momentum`: the weighted mean of the gradients, whose weights sum to ``weight``."""

    count: Int[Array, ""]
    weight: Float[Array, ""]
    mean: Any


def momentum(beta: Any, nesterov: bool, dtype: Any = None) -> optax.GradientTransformation:
    """``m = β m + G`` divided by the sum of its weights: the same direction, but it neither overflows nor vanishes at
    any scale of the dtype. Sums and results are float32 at least, and so is m unless ``dtype`` says otherwise.
    """

    def init(params: Any) -> MomentumState:
        mean = jax.tree.map(lambda x: jnp.zeros_like(x, dtype=dtype or _at_least_float32(x)), params)
        weight = jnp.zeros([], jnp.result_type(jnp.float32, *jax.tree.leaves(params)))
        return MomentumState(jnp.zeros([], jnp.int32), weight, mean)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, MomentumState]:
        del params
        β = at(beta, state.count)
        s = jnp.asarray(β * state.weight + 1, state.weight.dtype)

        def blend(m: Array, g: Array, old: Array) -> Array:
            dtype = _at_least_float32(g)
            m, g, old = m.astype(dtype), g.astype(dtype), old.astype(dtype)
            return old * m + (g - old * g)

        now, ahead = (w / (w + 1) for w in (β * state.weight, β * s))
        mean = jax.tree.map(lambda g, m: blend(m, g, now), updates, state.mean)
        u = jax.tree.map(lambda g, m: blend(m, g, ahead), updates, mean) if nesterov else mean
        mean = jax.tree.map(lambda m, old: m.astype(old.dtype), mean, state.mean)
        return u, MomentumState(state.count + 1, s, mean)

    return optax.GradientTransformation(init, update)


class TraceState(NamedTuple):
    """State of `held_trace`."""

    HOLDS_ITSELF = True  # under the argument ``go``

    inner: Any


def held_trace(decay: Any) -> optax.GradientTransformationExtraArgs:
    """`optax.trace`, whose step is made of what is kept: XLA computes a sum that is used twice twice, and where only
    one of the two is selected under ``go``, it copies the old state for the other.
    """
    tx = optax.trace(decay)

    def init(params: Any) -> TraceState:
        return TraceState(tx.init(params))

    def update(updates: Any, state: Any, params: Any = None, go: Any = None, **extra: Any) -> tuple[Any, TraceState]:
        del extra
        _, new = tx.update(updates, state.inner, params)
        kept: Any = held(go, new, state.inner)
        return kept.trace, TraceState(kept)

    return optax.GradientTransformationExtraArgs(init, update)


def _at_least_float32(x: Any) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)
