"""Momentum that keeps the direction of ``m = β m + G`` and never overflows."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._arguments import value_at
from .._xla import select, sequenced_after
from ..matrices.axes import Typed
from .skip_nonfinite import Freezable, counted, freezable


class MomentumState(NamedTuple):
    """The weighted mean of the gradients, whose weights sum to ``weight``."""

    count: Int[Array, ""]
    weight: Float[Array, ""]
    mean: PyTree


def momentum(beta: optax.ScalarOrSchedule, dtype: DTypeLike | None = None) -> Freezable:
    """``m = β m + G`` divided by the sum of its weights: the same direction, but it neither overflows nor vanishes at
    any scale of the dtype. Sums and results are float32 at least, and so is m unless ``dtype`` says otherwise.
    """

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, *, accept: Bool[Array, ""] | None = None, **extra: PyTree
    ) -> tuple[PyTree, MomentumState]:
        del params, extra
        (now, _), s = _weights(beta, state)
        mean = _means(now, state.mean, updates)
        return mean, _next(state, s, mean, accept)

    return Freezable(lambda params: _start(params, dtype), update)


def with_momentum(
    inner: optax.GradientTransformation, beta: optax.ScalarOrSchedule, nesterov: bool, dtype: DTypeLike | None = None
) -> Freezable:
    """``inner`` of `momentum`, or of the next one for the same gradient (``nesterov``).

    The old m is overwritten last, and what ``inner`` gets is made of it: then it need not be in memory as a whole.
    """
    tx = freezable(inner)

    def init(params: PyTree) -> tuple[MomentumState, PyTree]:
        return _start(params, dtype), tx.init(params)

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, *, accept: Bool[Array, ""] | None = None, **extra: PyTree
    ) -> tuple[PyTree, PyTree]:
        old, inside = state
        (now, ahead), s = _weights(beta, old)
        u = _means(now * ahead if nesterov else now, old.mean, updates)
        u, inside = tx.update(u, inside, params, accept=accept, **extra)
        return u, (_next(old, s, _means(sequenced_after(inside, now, old.count), old.mean, updates), accept), inside)

    return Freezable(init, update)


def _start(params: PyTree, dtype: DTypeLike | None) -> MomentumState:
    def zeros(x: Typed) -> Array:
        stored = jnp.promote_types(dtype, jnp.complex64) if dtype and jnp.iscomplexobj(x) else dtype
        return jnp.zeros_like(x, dtype=stored or _at_least_float32(x))

    mean = jax.tree.map(zeros, params)
    weight = jnp.zeros([], jnp.finfo(jnp.result_type(jnp.float32, *jax.tree.leaves(params))).dtype)
    return MomentumState(jnp.zeros([], jnp.int32), weight, mean)


def _weights(beta: optax.ScalarOrSchedule, state: MomentumState) -> tuple[tuple[Array, Array], Array]:
    """The share of the old mean in the new one, and of that in the one after it; the sum of all weights."""
    β = value_at(beta, state.count)
    s = jnp.asarray(β * state.weight + 1, state.weight.dtype)
    now, ahead = (w / (w + 1) for w in (β * state.weight, β * s))
    return (now, ahead), s


def _means(w: Array, mean: PyTree, updates: PyTree) -> PyTree:
    """``w m + (1 - w) g``."""

    def blend(g: Array, m: Array) -> Array:
        dtype = _at_least_float32(g)
        m, g, old = m.astype(dtype), g.astype(dtype), w.astype(dtype)
        return old * m + (1 - old) * g

    return jax.tree.map(blend, updates, mean)


def _next(state: MomentumState, weight: Array, mean: PyTree, accept: Bool[Array, ""] | None) -> MomentumState:
    mean = jax.tree.map(lambda m, old: m.astype(old.dtype), mean, state.mean)
    return MomentumState(counted(accept, state.count), *select(accept, (weight, mean), (state.weight, state.mean)))


def _at_least_float32(x: Typed) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)
