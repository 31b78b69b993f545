"""DyKAF's factors: the Kronecker product that follows ``F ← β F + (1-β) g gᵀ`` by projector splitting.

The nearest Kronecker product is the best rank-one approximation of F rearranged, and ``(L, R)`` its two vectors; a
step of the integrator updates one, then the other, at the cost of SOAP's outer products.

    s0 = β |L| |R|;   L̄ = L / |L|;   R̄ = R / |R|
    K = s0 L̄ + (1-β) G R̄ Gᵀ;   U = K / |K|
    H = s0 <U, L̄> R̄ + (1-β) Gᵀ U G;   V = H / |H|
    L ← sqrt(|H|) U;   R ← sqrt(|H|) V

Source: Yudin et al. 2025 (arXiv 2511.06477), Algorithm 1; Lubich and Oseledets 2014 for the integrator. ``"parallel"``
is what the authors' released code does: H with L̄ instead of U, and the size from both projections.
"""

import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from ... import linalg
from ..._arguments import value_at
from ..._xla import branch, by_platform
from ..contracts import FactorRule, Kronecker

VARIANTS = ("sequential", "parallel")
SIDES = ("inputs", "outputs")
INITS = ("dominant", "dominant_released", "identity")


def projector_splitting(
    decay: optax.ScalarOrSchedule = 0.95, *, variant: str = "sequential", init: str = "dominant", first: str = "inputs"
) -> FactorRule:
    """Follow the running mean of ``g gᵀ`` by one Kronecker product (see the top of this file for the step).

    A matrix with one factor has ``F ≈ L ⊗ I``, whose nearest L is the mean of ``G Gᵀ / n``.

    Args:
      decay: β, in [0, 1), a number or a schedule of the calls so far.
      variant: "sequential" (the integrator) or "parallel" (the released code's).
      init: from the first gradient that is not zero. "dominant": its largest singular triple, ``σ u uᵀ`` and
        ``σ v vᵀ``, whose product has the scale of ``g gᵀ``; "dominant_released": ``sqrt(σ)`` on each, as the released
        code has it; "identity": ``1e-3 I / |I|`` each.
      first: which side a sequential step updates first, "inputs" or "outputs".

    Raises:
      ValueError: for an unknown word.

    Example:
      >>> import fisher_optax as fo
      >>> fo.factors.projector_splitting(0.9, variant="parallel").name
      'projector splitting'
    """
    for name, value, known in (("variant", variant, VARIANTS), ("init", init, INITS), ("first", first, SIDES)):
        if value not in known:
            raise ValueError(
                f"projector_splitting: {name} must be one of {', '.join(map(repr, known))}; got {value!r}."
            )

    def start(m: int, n: int, left: bool, right: bool, dtype: DTypeLike) -> Kronecker:
        def factor(d: int) -> Array:
            return 1e-3 * jnp.eye(d, dtype=dtype) / d**0.5 if init == "identity" else jnp.zeros((d, d), dtype)

        count = jnp.zeros([], jnp.int32) if callable(decay) else ()
        return Kronecker(factor(m) if left else None, factor(n) if right else None, count)

    def update(G: Float[Array, "m n"], factors: Kronecker, basis: PyTree) -> Kronecker:
        del basis
        L, R, count = factors
        β, counted = value_at(decay, count), count + 1 if callable(decay) else ()
        if L is None or R is None:
            return one_sided(G, factors, β)._replace(seen=counted)

        if init != "identity":
            # A factor in use is never zero.
            L, R = branch(jnp.trace(L) > 0, lambda: (L, R), lambda: dominant(G, squared=init == "dominant"))
        if variant == "parallel":
            return Kronecker(*parallel_step(L, R, G, β), seen=counted)
        if first == "inputs":
            return Kronecker(*sequential_step(L, R, G, β), seen=counted)
        R, L = sequential_step(R, L, G.mT, β)
        return Kronecker(L, R, counted)

    return FactorRule("projector splitting", start, update, ignores_zeros=init != "identity")


def sequential_step(
    L: Float[Array, "m m"], R: Float[Array, "n n"], G: Float[Array, "m n"], decay: float | Array
) -> tuple[Array, Array]:
    """One step of the integrator, L first."""
    L_, R_ = linalg.unit_frobenius(L), linalg.unit_frobenius(R)
    s0 = decay * _inner(L_, L) * _inner(R_, R)
    U = linalg.unit_frobenius(s0 * L_ + (1 - decay) * _sandwich(G, R_))
    # s0 <U, L_> is |K| - <U, (1-β) G R_ Gᵀ> without its cancellation.
    H = s0 * _inner(U, L_) * R_ + (1 - decay) * _sandwich(G.mT, U)
    V = linalg.unit_frobenius(H)
    root = jnp.sqrt(_inner(V, H))
    return root * U, root * V


def parallel_step(
    L: Float[Array, "m m"], R: Float[Array, "n n"], G: Float[Array, "m n"], decay: float | Array
) -> tuple[Array, Array]:
    """The released code's step: both sides from the old ones, then the size of F's projection on them."""
    L_, R_ = linalg.unit_frobenius(L), linalg.unit_frobenius(R)
    s0 = decay * _inner(L_, L) * _inner(R_, R)
    U = linalg.unit_frobenius(s0 * L_ + (1 - decay) * _sandwich(G, R_))
    V = linalg.unit_frobenius(s0 * R_ + (1 - decay) * _sandwich(G.mT, L_))
    s = s0 * _inner(L_, U) * _inner(R_, V) + (1 - decay) * _inner(U, _sandwich(G, V))
    return jnp.sqrt(s) * U, jnp.sqrt(s) * V


def one_sided(G: Float[Array, "m n"], factors: Kronecker, decay: float | Array) -> Kronecker:
    """The nearest ``L ⊗ I`` or ``I ⊗ R`` to the running mean."""
    if factors.left is not None:
        return Kronecker(decay * factors.left + (1 - decay) * _outer(G) / G.shape[1], None)
    return Kronecker(
        None, None if factors.right is None else decay * factors.right + (1 - decay) * _outer(G.mT) / G.shape[0]
    )


def _dominant(exact: bool, A: Array) -> Array:
    return linalg.eigenbasis(A)[:, :1] if exact else linalg.dominant_eigenvector(A)


def dominant(G: Float[Array, "m n"], *, squared: bool) -> tuple[Array, Array]:
    """``c u uᵀ`` and ``c v vᵀ`` of the largest singular triple; c = σ if ``squared``, so that the product has the
    scale σ² of ``g gᵀ``, else ``sqrt(σ)``.
    """
    X = linalg.unit_frobenius(G)
    tall = G.shape[0] > G.shape[1]
    wide = X.mT if tall else X
    u = by_platform(_dominant, lambda platform: platform.factorises, _outer(wide))
    v = linalg.unit_frobenius(linalg.times(wide.mT, u))
    u, v = (v, u) if tall else (u, v)
    # |u' G v| of entries that may be too small to square.
    σ = jnp.abs(_inner(u, linalg.times(G, v)))
    c = σ if squared else jnp.sqrt(σ)
    return c * u * u.mT, c * v * v.mT


def _outer(G: Float[Array, "m n"]) -> Float[Array, "m m"]:
    return linalg.times(G, G.mT)


def _sandwich(G: Float[Array, "m n"], Y: Float[Array, "n n"]) -> Float[Array, "m m"]:
    """``G Y Gᵀ``: the rearranged ``g gᵀ`` times ``vec Y``."""
    return linalg.times(linalg.times(G, Y), G.mT)


def _inner(X: Array, Y: Array) -> Array:
    return jnp.sum(X * Y)
