"""Second moments of low rank, kept as rows: ``A = Rᵀ R`` with R of r x d, r < d."""

import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array, Float

from .eigenbasis import eigenbasis

# Eigenvalues below this share of the largest are rounding: their eigenvectors are dropped.
NOISE = 1e-6


def strongest_rows(S: Float[Array, "*batch k d"], r: int) -> Float[Array, "*batch r d"]:
    """``r`` rows whose second moment is the best approximation of that rank to ``Sᵀ S``.

    >>> S = jnp.array([[3.0, 0.0], [0.0, 1.0]])
    >>> print(abs(strongest_rows(S, 1)))
    [[3. 0.]]
    """
    V = eigenbasis(jnp.matmul(S, S.mT, precision=Precision.HIGHEST))[..., :r]
    return jnp.matmul(V.mT.astype(S.dtype), S, precision=Precision.HIGHEST)


def range_of_rows(R: Float[Array, "*batch r d"]) -> Float[Array, "*batch d r"]:
    """Eigenvectors of ``Rᵀ R`` as columns, by descending eigenvalue; zero columns where that is 0.

    From the eigenvectors of the small ``R Rᵀ``: ``2 d r²`` operations and an r x r eigendecomposition.

    >>> print(abs(range_of_rows(jnp.array([[0.0, 2.0]]))))
    [[0.]
     [1.]]
    """
    scaled = R / jnp.maximum(jnp.max(jnp.abs(R), (-2, -1), keepdims=True), jnp.finfo(R.dtype).tiny)
    P = jnp.matmul(
        scaled.mT, eigenbasis(jnp.matmul(scaled, scaled.mT, precision=Precision.HIGHEST)), precision=Precision.HIGHEST
    )
    λ = jnp.sum(jnp.square(P), -2, keepdims=True)
    known = λ > NOISE * jnp.max(λ, -1, keepdims=True)
    return jnp.where(known, P / jnp.sqrt(jnp.where(known, λ, 1)), 0)
