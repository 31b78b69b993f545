"""Bases of what a matrix is blind to: without an arbitrary part, and without rounding where there is nothing.

A symmetric matrix of floating-point numbers knows its eigenvalues to some units of rounding ``ε`` times the largest.
The eigenvectors of those below are whatever rounding makes of them, and differ from one compilation, batch or number
of devices to the next. Here they are what is left of given directions (the axes, or the basis so far) when those that
are known have been taken out, which is as well determined as the known ones are.
"""

import jax
import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array, Bool, Float, Int

# In units of ``finfo.eps``, two roundings: of the largest eigenvalue, below which another is unknown; a null space
# that was computed from a product of side 3072 has some 2.
UNKNOWN = 16
# Of a column of length one: entries below are the rounding of a factorisation, which leaves 2 and less.
DUST = 8
TIE = 0.01


def known(
    values: Float[Array, "*batch d"], largest: Float[Array, "..."], least: Float[Array, ""] | float = 0.0
) -> Bool[Array, "*batch d"]:
    """Which eigenvalues of a matrix with that largest one stand out from ``least``; all of those that are NaN.

    >>> print(known(jnp.array([2.0, 1e-3, 1e-9]), jnp.array(2.0)))
    [ True  True False]
    """
    return ~(values <= least + UNKNOWN * jnp.finfo(values.dtype).eps * largest)


def apart_last(A: Float[Array, "d d"]) -> Int[Array, " d"]:
    """An order of A's coordinates in which those that go with no other, and so are eigenvectors, come last.

    From there Householder's reflections of other columns leave them alone, to the bit.

    >>> print(apart_last(jnp.array([[0.0, 0.0, 0.0], [0.0, 1.0, 2.0], [0.0, 2.0, 1.0]])))
    [1 2 0]
    """
    return jnp.argsort(~jnp.any(jnp.where(jnp.eye(len(A), dtype=bool), 0, A) != 0, axis=1))


def completed(
    V: Float[Array, "d d"], known: Bool[Array, " d"], axes: Float[Array, "d d"] | None = None
) -> Float[Array, "d d"]:
    """V with its unknown columns replaced by axes, as far as these are orthogonal to the known columns.

    The r axes that are closest to the known columns, by the pivots of an LU factorisation, are left out; the others
    are orthogonalised in their order.

    Args:
      V: orthonormal in its known columns.
      known: which those are.
      axes: an orthonormal basis as columns; None: the coordinates'.

    >>> print(completed(jnp.array([[0.6, 7.0], [0.8, 7.0]]), jnp.array([True, False])).round(3))
    [[ 0.6 -0.8]
     [ 0.8  0.6]]
    """
    d, r = len(V), jnp.sum(known)
    first = jnp.argsort(~known)  # stable
    own = jnp.arange(d) < r
    V = jnp.where(own, V[:, first], 0)
    shares = V if axes is None else jnp.matmul(axes.T, V, precision=Precision.HIGHEST)
    # Of axes with the same share, as duplicated inputs have it, rounding would choose: the first are a little closer.
    pivots = jax.lax.linalg.lu(shares * (1 - TIE / d * jnp.arange(d, dtype=V.dtype))[:, None])[2]
    place = jnp.argsort(pivots)  # from r on chosen among zeros
    rest = jnp.argsort(jnp.where(place < r, place, d + jnp.arange(d)))
    Q = jnp.linalg.qr(jnp.where(own, V, (jnp.eye(d, dtype=V.dtype) if axes is None else axes)[:, rest])).Q
    return jnp.where(own, V, Q)[:, jnp.argsort(first)]


def without_dust(Q: Float[Array, "*batch d d"]) -> Float[Array, "*batch d d"]:
    """An orthonormal basis with zeros for what factorisations leave of them: a weight that never had a gradient has
    its own axis in the basis, and would move with all others by what it has of their columns.

    >>> print(without_dust(jnp.array([[1.0, 2e-7], [-3e-8, 1.0]])))
    [[1. 0.]
     [0. 1.]]
    """
    return jnp.where(jnp.abs(Q) < DUST * jnp.finfo(Q.dtype).eps, 0, Q)
