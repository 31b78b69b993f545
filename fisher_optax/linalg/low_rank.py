"""Second moments of low rank, kept as rows: ``A = Rᵀ R`` with R of r x d, r < d."""

import jax
import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array, Float

from .completion import diagonal
from .eigenbasis import eigenbasis
from .products import times
from .scaling import unit_frobenius

# Eigenvalues below this share of the largest are rounding: their eigenvectors are dropped.
NOISE = 1e-6
# Of a matrix whose dominant eigenvector is wanted.
SQUARINGS = 16


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


def dominant_eigenvector(A: Float[Array, "d d"]) -> Float[Array, "d 1"]:
    """A unit eigenvector of the largest eigenvalue of a positive semi-definite A, by products alone; zero for zero.

    A is squared 16 times, to its 65,536th power, in which another eigenvalue is rounding unless it is within 5e-4 of
    the largest. With those that are, the vector is one of their common space.

    >>> print(dominant_eigenvector(jnp.diag(jnp.array([1.0, 3.0, 2.0]))).ravel())
    [0. 1. 0.]
    """
    W, _ = jax.lax.scan(lambda W, _: (unit_frobenius(times(W, W)), None), unit_frobenius(A), length=SQUARINGS)
    largest = jnp.argmax(diagonal(W))
    return unit_frobenius(jax.lax.dynamic_slice_in_dim(W, largest, 1, 1))
