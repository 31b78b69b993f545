"""The moment of a layer's inputs alone: of its Fisher, the half that needs no gradient."""

import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool

from ..._arguments import value_at
from ..._xla import select
from ...statistics import LayerFactors
from ..contracts import FactorRule, Kronecker


def inputs(decay: optax.ScalarOrSchedule = 0.95, damping: optax.ScalarOrSchedule = 0.2) -> FactorRule:
    """``A ← mean of a aᵀ`` over the tokens so far, those of the last call but one counting β as much as the last; what
    is decomposed is ``A + γ tr(A)/m I``.

    A call without tokens (A_t = 0: an expert that no token reached) changes nothing. Before the first tokens the factor
    is the identity.

    Args:
      decay: β, number or schedule of the updates with tokens.
      damping: γ, relative to A's mean eigenvalue, so that a rank below m, or another unit of the inputs, is all the
        same to it; number or schedule.
    """

    def init(m: int, n: int, left: bool, right: bool, dtype: DTypeLike) -> Kronecker:
        del n, right
        A = jnp.zeros((m, m), dtype) if left else None
        return Kronecker(A, None, (jnp.zeros([], jnp.int32), jnp.zeros([], dtype)))

    def update(statistics: LayerFactors, factors: Kronecker, basis: object) -> Kronecker:
        del basis
        A = factors.left
        if A is None:
            return factors
        (count, weight), S = factors.seen, statistics.left.astype(A.dtype)
        tokens = jnp.asarray(statistics.weight, weight.dtype)
        total = value_at(decay, count) * weight + tokens
        # The mean itself is kept, since sums of a million tokens are too long for short dtypes.
        share = (tokens / jnp.where(total == 0, 1, total)).astype(A.dtype)
        new = Kronecker(A + share * (S - A), None, (count + 1, total.astype(weight.dtype)))
        return select(_has_tokens(statistics), new, factors)

    def read(factors: Kronecker) -> Kronecker:
        A = factors.left
        if A is None:
            return factors
        identity = jnp.eye(len(A), dtype=A.dtype)
        γ = jnp.asarray(value_at(damping, factors.seen[0]), A.dtype)
        damped = A + γ * (jnp.trace(A) / len(A)) * identity
        return factors._replace(left=jnp.where(factors.seen[1] == 0, identity, damped))

    def begins(statistics: LayerFactors, factors: Kronecker) -> Bool[Array, "*stack"]:
        if statistics.left is None:
            return jnp.zeros(jnp.shape(factors.seen[1]), bool)
        return (factors.seen[1] == 0) & _has_tokens(statistics)

    return FactorRule("inputs", init, update, read=read, of_statistics=True, begins=begins)


def _has_tokens(statistics: LayerFactors) -> Bool[Array, "*stack"]:
    """Of one matrix, or each of a stack."""
    return jnp.any(jnp.diagonal(statistics.left, axis1=-2, axis2=-1) != 0, -1) & (statistics.weight > 0)
