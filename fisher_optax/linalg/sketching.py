"""Sums that do not lose digits with their length, and matrices ``Rᵀ R`` kept with fewer rows."""

import functools

import jax
import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array, Float

from .lapack import one_by_one


def exact_sum(x: Array, axis: int) -> Array:
    """The sum with what each addition rounds off carried along (Knuth's TwoSum), for terms that are all alike:
    a plain sum of 1,000 equal float32 numbers may err by 1e-5.

    >>> print(exact_sum(jnp.array([1e8, 1.0, -1e8]), 0))
    1.0
    """
    zero = jnp.zeros([], x.dtype)
    total, rest = jax.lax.reduce((x, jnp.zeros_like(x)), (zero, zero), _two_sum, (axis % x.ndim,))
    return total + rest


def _two_sum(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    total = a[0] + b[0]
    of_b = total - a[0]
    return total, a[1] + b[1] + ((a[0] - (total - of_b)) + (b[0] - of_b))


def eigenpairs(A: Float[Array, "n n"]) -> tuple[Float[Array, " n"], Float[Array, "n n"]]:
    """Eigenvalues in ascending order, and eigenvectors as columns."""

    def stacked(A: Array) -> Array:
        λ, Q = jnp.linalg.eigh(A, symmetrize_input=False)
        return jnp.concatenate([λ[None], Q])

    both = one_by_one(stacked)(A)
    return both[0], both[1:]


@functools.partial(jax.jit, static_argnums=1)
def frequent_directions(R: Float[Array, "n d"], r: int) -> Float[Array, "r d"]:
    """``r < n`` rows with ``0 <= RᵀR - R'ᵀR' <= σ²``, σ the singular value r + 1 of R, by which all are shrunk.

    Source: Liberty 2013 (arXiv 1206.0594), Algorithm 2, shrinking by the first singular value that is left out.

    >>> R = jnp.array([[3.0, 0.0], [0.0, 1.0]])
    >>> print(abs(frequent_directions(R, 1)).round(3))
    [[2.828 0.   ]]
    """
    μ, Q = eigenpairs(jnp.matmul(R, R.T, precision=Precision.HIGHEST))
    kept, left_out = μ[-r:], jnp.maximum(μ[-r - 1], 0)
    shrunk = jnp.sqrt(jnp.maximum(1 - left_out / jnp.where(kept > 0, kept, 1), 0))
    return shrunk[:, None] * jnp.matmul(Q[:, -r:].T, R, precision=Precision.HIGHEST)
