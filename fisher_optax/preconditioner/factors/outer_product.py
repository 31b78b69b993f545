"""Shampoo's and SOAP's factors: sums or averages of ``G Gᵀ`` and ``Gᵀ G``.

    L ← β L + (1 - β) G Gᵀ        R ← β R + (1 - β) Gᵀ G

The gradient is the mini-batch mean, so this is neither the true nor the empirical Fisher.
Source: Vyas et al. 2024 (arXiv 2409.11321), Algorithm 3, lines 14-15; Gupta et al. 2018 (arXiv 1802.09568), Algorithm
  1; trace scaling: Morwani et al. 2024 (arXiv 2406.17748).
"""

import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from ... import linalg
from ..._arguments import one_of, value_at
from ..contracts import PRECISIONS, Factor, FactorRule, Kronecker

KINDS = ("ema", "mean", "sum")


def outer_product(
    decay: optax.ScalarOrSchedule = 0.95, *, kind: str = "ema", trace_scaling: bool = False, precision: str = "highest"
) -> FactorRule:
    """Outer products of the gradient with itself, on each side.

    Args:
      decay: β, in [0, 1), a number or a schedule of the calls so far; 0 keeps the last gradient's alone. A half life of
        14 steps by default, as the SOAP authors'.
      kind: "ema", without bias correction (enough for an eigenbasis, which no scale turns); "mean", the same divided by
        the sum of its weights, unbiased from the first step on; "sum" of all so far, which has no decay.
      trace_scaling: read the factors as ``L / sqrt(tr L)`` and ``R / sqrt(tr R)``, whose product has the scale of
        ``E[g gᵀ]``: where gradients are independent draws with a Kronecker covariance, it is that covariance.
      precision: of the products, as in `fo.Products`.

    Raises:
      ValueError: for an unknown kind or precision.

    Example:
      >>> import fisher_optax as fo
      >>> fo.factors.outer_product(0.9).name
      'outer product'
    """
    one_of("precision", precision, PRECISIONS)
    if kind not in KINDS:
        raise ValueError(f"outer_product: kind must be one of {', '.join(map(repr, KINDS))}; got {kind!r}.")

    def init(m: int, n: int, left: bool, right: bool, dtype: DTypeLike) -> Kronecker:
        count = jnp.zeros([], jnp.int32) if callable(decay) else ()
        weight = jnp.zeros([], dtype) if kind == "mean" else ()
        L, R = (jnp.zeros((d, d), dtype) if wanted else None for d, wanted in ((m, left), (n, right)))
        return Kronecker(L, R, (count, weight))

    def update(G: Float[Array, "m n"], factors: Kronecker, bases: PyTree) -> Kronecker:
        del bases
        count, weight = factors.seen
        now = value_at(decay, count)
        β, new = (1, 1) if kind == "sum" else (now, 1 - now)

        def follow(A: Factor, G: Array) -> Factor:
            return None if A is None else β * A + new * linalg.times(G, G.mT, precision)

        weight = (β * weight + new).astype(weight.dtype) if kind == "mean" else ()
        counts = (count + 1 if callable(decay) else (), weight)
        return Kronecker(follow(factors.left, G), follow(factors.right, G.mT), counts)

    def read(factors: Kronecker) -> Kronecker:
        weight = factors.seen[1]
        weight = jnp.where(weight == 0, 1, weight) if kind == "mean" else 1
        L, R = (None if A is None else A / weight for A in (factors.left, factors.right))
        return _trace_scaled(L, R) if trace_scaling else Kronecker(L, R)

    rule = FactorRule("outer product", init, update, ignores_zeros=True)
    return rule if kind != "mean" and not trace_scaling else rule._replace(read=read)


def _trace_scaled(L: Float[Array, "m m"] | None, R: Float[Array, "n n"] | None) -> Kronecker:
    def scaled(A: Factor) -> Factor:
        if A is None:
            return None
        size = jnp.trace(A)
        return A / jnp.where(size > 0, jnp.sqrt(size), 1)

    return Kronecker(scaled(L), scaled(R))
