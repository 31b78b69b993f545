"""Adam in the basis with a second moment of rank one: m + n numbers instead of m n."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.lax import Precision
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from ..._arguments import value_at
from .eigenbasis import ratio


class Rank1AdamState(NamedTuple):
    """State of `rank1_adam`, in the basis."""

    count: Int[Array, ""]
    mu: PyTree
    nu_left: PyTree  # v ≈ nu_left nu_rightᵀ
    nu_right: PyTree


def rank1_adam(
    b1: optax.ScalarOrSchedule = 0.95,
    b2: optax.ScalarOrSchedule = 0.95,
    eps: optax.ScalarOrSchedule = 1e-8,
    bias_correction: bool = True,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformation:
    """Adam whose second moment is followed by one outer product, by parallel projector splitting of ``g²``.

        D = g²;   s0 = b2 |l| |r|;   l̄ = l / |l|;   r̄ = r / |r|
        p = unit(s0 l̄ + (1-b2) D r̄);   q = unit(s0 r̄ + (1-b2) Dᵀ l̄)
        c = s0 <p, l̄> <q, r̄> + (1-b2) pᵀ D q;   l ← sqrt(c) p;   r ← sqrt(c) q
        u = sqrt(1-b2ᵗ) / (1-b1ᵗ) · m / (sqrt(l rᵀ) + eps)

    Args:
      b1, b2: decay rates, numbers or schedules of the step.
      eps: number or schedule, in units of the gradient; l and r start at eps each, at next to nothing for 0. Rounding
        is kept out as for `adam`.
      bias_correction: whether the factor in front is applied.
      mu_dtype: storage of m; the gradient's by default.

    Source: Yudin et al. 2025 (arXiv 2511.06477), ``rank1_second_moment``: good for fine-tuning, worse than the full
      second moment in pre-training (their Figure 3).
    """

    def init(params: PyTree) -> Rank1AdamState:
        mu = jax.tree.map(lambda x: jnp.zeros_like(x, dtype=mu_dtype), params)

        def side(axis: int) -> PyTree:
            # Zero would stay zero.
            start = lambda x: jnp.maximum(jnp.asarray(value_at(eps, 0), x.dtype), jnp.finfo(x.dtype).tiny)  # noqa: E731
            return jax.tree.map(lambda x: jnp.full(x.shape[axis], start(x), x.dtype), params)

        return Rank1AdamState(jnp.zeros([], jnp.int32), mu, side(-2), side(-1))

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, Rank1AdamState]:
        del params
        t = state.count + 1
        β1, β2, ε = (value_at(value, state.count) for value in (b1, b2, eps))
        scale = jnp.sqrt(1 - β2**t) / (1 - β1**t) if bias_correction else 1.0

        def step(g: Array, m: Array, l: Array, r: Array) -> tuple[Array, ...]:
            m_new = β1 * m.astype(g.dtype) + (1 - β1) * g
            l_new, r_new = follow(jnp.square(g), l, r, β2)
            u = scale * ratio(m_new, jnp.sqrt(jnp.outer(l_new, r_new)) + ε)
            return u.astype(g.dtype), m_new.astype(m.dtype), l_new.astype(l.dtype), r_new.astype(r.dtype)

        steps = jax.tree.map(step, updates, state.mu, state.nu_left, state.nu_right)
        u, *moments = jax.tree.transpose(jax.tree.structure(updates), jax.tree.structure((0,) * 4), steps)
        return u, Rank1AdamState(t, *moments)

    return optax.GradientTransformation(init, update)


def follow(
    D: Float[Array, "m n"], l: Float[Array, " m"], r: Float[Array, " n"], decay: float | Array
) -> tuple[Array, Array]:
    """The outer product that follows ``decay l rᵀ + (1 - decay) D``, all entries non-negative."""
    dot = lambda x, y: jnp.matmul(x, y, precision=Precision.HIGHEST)  # noqa: E731
    (l_, l_size), (r_, r_size) = _unit(l), _unit(r)
    s0 = decay * l_size * r_size
    (p, _), (q, _) = _unit(s0 * l_ + (1 - decay) * dot(D, r_)), _unit(s0 * r_ + (1 - decay) * dot(D.mT, l_))
    c = s0 * dot(p, l_) * dot(q, r_) + (1 - decay) * dot(p, dot(D, q))
    return jnp.sqrt(c) * p, jnp.sqrt(c) * q


def _unit(x: Float[Array, " d"]) -> tuple[Array, Array]:
    """``x / |x|`` and ``|x|``; zero stays zero, at any scale."""
    largest = jnp.max(jnp.abs(x), initial=0)
    y = x / jnp.where(largest == 0, 1, largest)
    size = jnp.sqrt(jnp.sum(jnp.square(y)))
    return y / jnp.where(size == 0, 1, size), largest * size
