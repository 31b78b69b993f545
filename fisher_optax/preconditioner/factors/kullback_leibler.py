"""The factors of KL-Shampoo: the Kronecker product nearest to the gradients' covariance in Kullback-Leibler divergence.

The divergence from ``N(0, E[g gᵀ])`` to ``N(0, L ⊗ R)`` is stationary where

    L = E[G R⁻¹ Gᵀ] / n;   R = E[Gᵀ L⁻¹ G] / m

and a step moves both sides there, through the eigenpairs ``L = Q_L diag(λ_L) Q_Lᵀ`` of the last refresh, whose values
are followed in between:

    L ← β L + (1-β)/n (G Q_R) diag(λ_R)⁻¹ (G Q_R)ᵀ;    λ_L,i ← β λ_L,i + (1-β) mean_j H_ij² / λ_R,j,   H = Q_Lᵀ G Q_R

and likewise R and λ_R. Source: Lin et al. 2025 (arXiv 2509.03378), equations for KL-Shampoo with a running average.

For ``L = R = s I`` the traces of both sides agree at ``s² = mean G²``. From that start, gradients c times as large make
either factor c times as large, at every step. The paper starts at I, whose remainder in gradients of size s is
forgotten only after ``log(1/s) / (1-β)`` steps, and until then turns the bases back to where they were.
"""

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float

from ... import linalg
from ..._arguments import value_at
from ..contracts import Eigenpairs, Factor, FactorRule, Kronecker

# Of the largest eigenvalue: smaller ones count as this much where they divide.
FLOOR = 1e-7
INITS = ("gradient", "identity")

Values = Float[Array, " d"] | None


def kullback_leibler(decay: optax.ScalarOrSchedule = 0.98, *, init: str = "gradient") -> FactorRule:
    """Factors that minimise the Kullback-Leibler divergence (see the top of this file).

    Args:
      decay: β, in [0, 1): a number, or a schedule of the calls so far. ``running_mean`` weighs all gradients equally,
        which recovers a covariance that does not change.
      init: "gradient" (``s I`` each, from the first gradient that is not zero; ``s² I`` where there is but one factor)
        or "identity" (the paper's).

    Raises:
      ValueError: for an unknown word.

    Example:
      >>> import fisher_optax as fo
      >>> rule = fo.factors.kullback_leibler(fo.factors.running_mean)
    """
    if init not in INITS:
        raise ValueError(f"kullback_leibler: init must be one of {', '.join(map(repr, INITS))}; got {init!r}.")

    def start(m: int, n: int, left: bool, right: bool, dtype: DTypeLike) -> Kronecker:
        size = float(init == "identity")
        eyes = (size * jnp.eye(d, dtype=dtype) if wanted else None for d, wanted in ((m, left), (n, right)))
        return Kronecker(*eyes, seen=jnp.zeros([], jnp.int32))

    def update(G: Float[Array, "m n"], factors: Kronecker, basis: Eigenpairs) -> Kronecker:
        β = jnp.asarray(value_at(decay, factors.seen), G.dtype)
        factors, basis = _begun(G, factors, basis)

        def follow(A: Factor, G: Array, Q: Array | None, values: Array | None) -> Factor:
            """The factor of G's rows, from the eigenpairs of its columns."""
            if A is None:
                return None
            X = G if Q is None else linalg.times(G, Q.astype(G.dtype))
            weighted = X if values is None else X / _floored(values)[None]
            return β * A + (1 - β) * linalg.times(weighted, X.mT) / G.shape[1]

        return Kronecker(
            follow(factors.left, G, basis.right, basis.right_values),
            follow(factors.right, G.mT, basis.left, basis.left_values),
            factors.seen + 1,
        )

    def track(G: Float[Array, "m n"], factors: Kronecker, basis: Eigenpairs) -> Eigenpairs:
        β = jnp.asarray(value_at(decay, factors.seen), G.dtype)
        _, basis = _begun(G, factors, basis)
        H = G if basis.left is None else linalg.times(basis.left.astype(G.dtype).mT, G)
        H = H if basis.right is None else linalg.times(H, basis.right.astype(G.dtype))

        def follow(own: Values, other: Array | None, H: Array) -> Values:
            if own is None:
                return None
            squares = jnp.square(H) if other is None else H * (H / _floored(other)[None])
            return (β * own + (1 - β) * jnp.mean(squares, 1)).astype(own.dtype)

        left, right = basis.left_values, basis.right_values
        return basis._replace(left_values=follow(left, right, H), right_values=follow(right, left, H.mT))

    return FactorRule("Kullback-Leibler", start, update, track)


def running_mean(count: ArrayLike) -> Array:
    """The decay ``1 - 1 / (t + 1)`` at call t = 1, 2, ...: after it, all gradients and the start weigh the same."""
    t = jnp.asarray(count, jnp.float32) + 1
    return t / (t + 1)


def _begun(G: Float[Array, "m n"], factors: Kronecker, basis: Eigenpairs) -> tuple[Kronecker, Eigenpairs]:
    """Factors and eigenvalues, those of ``s I`` where the factors are still zero: one in use never is."""
    present = [A for A in factors[:2] if A is not None]
    largest = jnp.max(jnp.abs(G))
    s = largest * jnp.sqrt(jnp.mean(jnp.square(G / jnp.where(largest > 0, largest, 1))))
    s = s if len(present) == 2 else s * s
    new = jnp.trace(present[0]) == 0

    def factor(A: Factor) -> Factor:
        return None if A is None else jnp.where(new, s * jnp.eye(len(A), dtype=A.dtype), A)

    def values(λ: Values) -> Values:
        return None if λ is None else jnp.where(new, s, λ).astype(λ.dtype)

    return (
        factors._replace(left=factor(factors.left), right=factor(factors.right)),
        basis._replace(left_values=values(basis.left_values), right_values=values(basis.right_values)),
    )


def _floored(values: Float[Array, " d"]) -> Float[Array, " d"]:
    """Positive, so that zero gradients, whose eigenvalues die out, divide by something."""
    return jnp.maximum(values, jnp.maximum(FLOOR * jnp.max(values), jnp.finfo(values.dtype).tiny))
