"""Shampoo's and SOAP's factors: moving averages of ``G Gᵀ`` and ``Gᵀ G``.

    L ← β L + (1 - β) G Gᵀ        R ← β R + (1 - β) Gᵀ G

No bias correction: a scale does not change an eigenbasis. The gradient is the mini-batch mean, so this is neither the
  true nor the empirical Fisher.
Source: Vyas et al. 2024 (arXiv 2409.11321), Algorithm 3, lines 14-15; Gupta et al. 2018 (arXiv 1802.09568), Algorithm
  1.
"""

from typing import Any

import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array, Float

from ..types import FactorRule, Kronecker


def outer_product(decay: float | Array = 0.95) -> FactorRule:
    """Exponential moving average of the outer products of the gradient with itself, on each side.

    Args:
      decay: β, in [0, 1); 0 keeps the last gradient's alone. A half life of 14 steps by default, as the SOAP authors'.

    Example:
      >>> import fisher_optax as fo
      >>> fo.factors.outer_product(0.9).name
      'outer product'
    """

    def init(m: int, n: int, left: bool, right: bool, dtype: Any) -> Kronecker:
        return Kronecker(jnp.zeros((m, m), dtype) if left else None, jnp.zeros((n, n), dtype) if right else None)

    def update(G: Float[Array, "m n"], factors: Kronecker, bases: Any) -> Kronecker:
        L, R = factors
        return Kronecker(
            None if L is None else decay * L + (1 - decay) * jnp.matmul(G, G.mT, precision=Precision.HIGHEST),
            None if R is None else decay * R + (1 - decay) * jnp.matmul(G.mT, G, precision=Precision.HIGHEST),
        )

    return FactorRule("outer product", init, update)
