"""The Cholesky factor of an inverse, without the inverse.

With J the matrix that reverses the order, ``J H J = L Lᵀ`` gives ``H⁻¹ = Uᵀ U`` for the upper triangular
``U = J L⁻¹ J``: one factorisation and one triangular inverse. Row i of U is what optimal brain surgery needs where
inputs are taken in order: ``1 / U_ii²`` is the variance of input i given those after it, and ``U_i,i: / U_ii`` how
these make up for it (Frantar and Alistarh 2023, arXiv 2301.00774, section 3.3).
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from .blocks import one_by_one
from .products import times

# Where a factorisation fails, damping becomes ten times as large, and this at least; after so many tries, NaN.
LEAST_RAISED, TRIES = 1e-6, 8
# A pivot below this many units of rounding of its diagonal entry is rounding alone.
ROUNDING = 16


def inverse_cholesky(
    H: Float[Array, "*batch d d"], damping: ArrayLike = 0.0
) -> tuple[Float[Array, "*batch d d"], Float[Array, "*batch"]]:
    """Upper triangular ``U`` with ``(H + damping_used mean(diag H) I)⁻¹ = Uᵀ U``, and ``damping_used``.

    Args:
      H: symmetric, positive semi-definite; computed in float32 at least.
      damping: of the mean of the diagonal, so that H's units do not matter.

    Returns:
      ``U``, and the damping of each matrix: the one given, or where that matrix is singular to rounding, the first of
      ``max(10 damping, 1e-6)``, ten times that, ... with which it is not. Both are NaN where eight tries fail.

    >>> U, used = inverse_cholesky(jnp.array([[0.25, 0.0], [0.0, 1.0]]))
    >>> print(abs(U), used)
    [[2. 0.]
     [0. 1.]] 0.0
    >>> print(f"{float(inverse_cholesky(jnp.ones((2, 2)))[1]):.0e}")  # singular
    1e-05
    """
    H = H.astype(jnp.promote_types(H.dtype, jnp.float32))
    damping = jnp.broadcast_to(jnp.asarray(damping, H.dtype), H.shape[:-2])
    f = _raising
    for _ in H.shape[:-2]:
        f = jax.vmap(f)
    return f(H, damping)


def _raising(H: Array, damping: Array) -> tuple[Array, Array]:
    eye = jnp.eye(H.shape[-1], dtype=H.dtype)
    mean, none = jnp.trace(H) / H.shape[-1], jnp.full_like(H, jnp.nan)

    def goes_on(carry: tuple[Array, ...]) -> Array:
        tries, _, _, U = carry
        return (tries < TRIES) & jnp.isnan(U[0, 0])

    def attempt(carry: tuple[Array, ...]) -> tuple[Array, ...]:
        tries, _, damping, _ = carry
        damped = H + damping * mean * eye
        L = one_by_one(lambda A: jax.lax.linalg.cholesky(A, symmetrize_input=False))(_reversed(damped))
        U = _reversed(_triangular_inverse(L))
        pivots = 1 / jnp.square(jnp.diagonal(U))
        known = jnp.all(pivots > ROUNDING * jnp.finfo(H.dtype).eps * jnp.diagonal(damped)) & jnp.all(jnp.isfinite(U))
        return tries + 1, damping, jnp.maximum(10 * damping, LEAST_RAISED), jnp.where(known, U, none)

    _, used, _, U = jax.lax.while_loop(goes_on, attempt, (jnp.zeros([], jnp.int32), damping, damping, none))
    return U, jnp.where(jnp.isnan(U[0, 0]), jnp.nan, used)


def _triangular_inverse(L: Array) -> Array:
    """In two blocks, most of the work is matrix products, and there is half of it."""
    h = len(L) // 2
    if h == 0:
        return 1 / L
    P, R = _solved(L[:h, :h]), _solved(L[h:, h:])
    Q = -times(R, times(L[h:, :h], P))
    return jnp.concatenate([jnp.pad(P, ((0, 0), (0, len(L) - h))), jnp.concatenate([Q, R], 1)])


def _solved(L: Array) -> Array:
    eye = jnp.eye(len(L), dtype=L.dtype)
    return one_by_one(lambda L, B: jax.lax.linalg.triangular_solve(L, B, left_side=True, lower=True))(L, eye)


def _reversed(A: Array) -> Array:
    return A[..., ::-1, ::-1]
