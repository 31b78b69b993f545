"""K-FAC's factors: moving averages of what capture sees of each layer."""

from collections.abc import Callable

import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, PyTree

from ... import linalg
from ..._arguments import value_at
from ..._xla import select
from ...linalg.eigenbasis import LowRank
from ...statistics import LayerFactors
from ..contracts import Factor, FactorRule, Kronecker


def kronecker(decay: optax.ScalarOrSchedule = 0.95, *, rank: int | None = None) -> FactorRule:
    """``A ← β A + (1-β) left;  B ← β B + (1-β) right``, divided by the sum of their weights when they are read.

    A matrix that no gradient reached (B = 0: an expert without rows) has nothing to say: its averages and their weights
    stay, and its decay counts its own updates.

    Args:
      decay: β, number or schedule of the updates with statistics. ``1 - 1/(t+1)`` gives plain means.
      rank: a side too long for a matrix keeps as many rows R, of which ``Rᵀ R`` is the average; None: it has no factor.

    Source: Martens and Grosse 2015 (arXiv 1503.05671), section 5.
    """

    def init(m: int, n: int, left: bool, right: bool, dtype: DTypeLike) -> Kronecker:
        def side(d: int, wanted: bool) -> Factor | LowRank:
            if wanted:
                return jnp.zeros((d, d), dtype)
            return None if rank is None else LowRank(jnp.zeros((rank, d), dtype))

        return Kronecker(side(m, left), side(n, right), (jnp.zeros([], jnp.int32), jnp.zeros([], dtype)))

    def follow(
        statistics: LayerFactors,
        factors: Kronecker,
        apply: Callable[..., Array],
        accept: Bool[Array, ""] | None,
    ) -> Kronecker:
        count, weight = factors.seen
        β, reached = value_at(decay, count), is_reached(statistics.right)
        accept = reached if accept is None else accept & reached

        def blend(A: Array, S: Array) -> Array:
            return select(accept, β * A + (1 - β) * S.astype(A.dtype), A)

        def side(A: Factor | LowRank, new: PyTree) -> Factor | LowRank:
            if isinstance(A, LowRank):
                S = jnp.concatenate([jnp.sqrt(β) * A.rows, jnp.sqrt(1 - β) * new.rows.astype(A.rows.dtype)])
                return select(accept, LowRank(linalg.strongest_rows(S, len(A.rows))), A)
            return None if A is None else apply(blend, A, new)

        sums = select(accept, (count + 1, (β * weight + (1 - β)).astype(weight.dtype)), factors.seen)
        return Kronecker(side(factors.left, statistics.left), side(factors.right, statistics.right), sums)

    def update(statistics: LayerFactors, factors: Kronecker, bases: PyTree) -> Kronecker:
        del bases
        return follow(statistics, factors, lambda f, A, S: f(A, S), None)

    def overwrite(statistics: LayerFactors, factors: Kronecker, accept: Bool[Array, ""] | None) -> Kronecker:
        return follow(statistics, factors, linalg.overwritten, accept)

    def begins(statistics: LayerFactors, factors: Kronecker) -> Bool[Array, "*stack"]:
        return (factors.seen[1] == 0) & is_reached(statistics.right)

    return FactorRule(
        "Kronecker", init, update, read=mean_factors, of_statistics=True, overwrite=overwrite, begins=begins
    )


def is_reached(B: Array | LowRank) -> Bool[Array, "*stack"]:
    """Of one matrix, or each of a stack, whether a gradient has reached it: whether ``B`` is more than zeros.

    >>> print(is_reached(jnp.stack([jnp.eye(2), jnp.zeros((2, 2))])))
    [ True False]
    """
    if isinstance(B, LowRank):
        return jnp.any(B.rows != 0, (-2, -1))
    return jnp.any(linalg.diagonal(B) != 0, -1)


def mean_factors(factors: Kronecker) -> Kronecker:
    """The factors divided by the sum of their weights."""
    weight = factors.seen[1]
    weight = jnp.where(weight == 0, 1, weight)

    def mean(A: Factor | LowRank) -> Factor | LowRank:
        return None if A is None else LowRank(A.rows / jnp.sqrt(weight)) if isinstance(A, LowRank) else A / weight

    return factors._replace(left=mean(factors.left), right=mean(factors.right))


def tikhonov(damping: optax.ScalarOrSchedule) -> Callable[[Kronecker], Kronecker]:
    """A reader of `kronecker` factors: ``A + π sqrt(λ) I`` and ``B + sqrt(λ)/π I`` with ``π² = (tr A / d_A) / (tr B /
    d_B)``, so that neither side's damping drowns the other.

    Source: Martens and Grosse 2015 (arXiv 1503.05671), section 6.3.
    """

    def read(factors: Kronecker) -> Kronecker:
        A, B, _ = mean_factors(factors)
        λ = jnp.asarray(value_at(damping, factors.seen[0]))
        mean_A, mean_B = (1.0 if X is None else jnp.trace(X) / len(X) for X in (A, B))
        known = (mean_A > 0) & (mean_B > 0)
        π = jnp.sqrt(jnp.where(known, mean_A, 1) / jnp.where(known, mean_B, 1))

        def damped(X: Factor, ε: Array) -> Factor:
            return None if X is None else X + (ε * jnp.eye(len(X))).astype(X.dtype)

        return factors._replace(left=damped(A, π * jnp.sqrt(λ)), right=damped(B, jnp.sqrt(λ) / π))

    return read
