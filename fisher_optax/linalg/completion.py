"""Bases of what a matrix is blind to: without an arbitrary part, and without rounding where there is nothing.

A symmetric matrix of floating-point numbers knows its eigenvalues to some units of rounding ``ε`` times its norm.
The eigenvectors of those below are whatever rounding makes of them, and differ from one compilation, batch or number
of devices to the next. Here they are what is left of given directions (the axes, or the basis so far) when those that
are known have been taken out, which is as well determined as the known ones are.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# In units of ``finfo.eps``, two roundings: of a matrix's norm, below which an eigenvalue is unknown; a null space that
# was computed from a product of side 3072 has some 2 of the largest.
UNKNOWN = 16
# Of a column of length one: entries below are the rounding of a factorisation, which leaves 2 and less.
DUST = 8


def known(
    values: Float[Array, "*batch d"], size: Float[Array, "..."], least: Float[Array, ""] | float = 0.0
) -> Bool[Array, "*batch d"]:
    """Which eigenvalues of a matrix of that norm stand out from ``least``; all of those that are NaN.

    >>> print(known(jnp.array([2.0, 1e-3, 1e-9]), jnp.array(2.0)))
    [ True  True False]
    """
    return ~(values <= least + UNKNOWN * jnp.finfo(values.dtype).eps * size)


def diagonal(A: Float[Array, "d d"]) -> Float[Array, " d"]:
    """A's diagonal, as the slice that it is: `jnp.diagonal` gathers it, in three kernels of a CPU.

    >>> print(diagonal(jnp.array([[1.0, 2.0], [3.0, 4.0]])))
    [1. 4.]
    """
    return A.reshape(-1)[:: len(A) + 1]


def apart(A: Float[Array, "d d"]) -> Bool[Array, " d"]:
    """Which of A's coordinates go with no other, and so are eigenvectors.

    Exact zeros alone tell: a large coordinate may go with one of a ten-thousandth, and is most of what that one is.

    >>> print(apart(jnp.array([[0.0, 0.0, 0.0], [0.0, 1.0, 2.0], [0.0, 2.0, 1.0]])))
    [ True False False]
    """
    entries = jnp.sum(jnp.where(A == 0, 0.0, 1.0), axis=0)
    return entries == jnp.where(diagonal(A) == 0, 0.0, 1.0)


def apart_last(A: Float[Array, "d d"]) -> Int[Array, " d"]:
    """An order of A's coordinates in which those that go with no other, and so are eigenvectors, come last.

    From there Householder's reflections of other columns leave them alone, to the bit.

    >>> print(apart_last(jnp.array([[0.0, 0.0, 0.0], [0.0, 1.0, 2.0], [0.0, 2.0, 1.0]])))
    [1 2 0]
    """
    return jnp.argsort(apart(A))


def without_dust(V: Float[Array, "d d"], apart: Bool[Array, " d"]) -> Float[Array, "d d"]:
    """An orthonormal basis with zeros for what factorisations leave of them: a weight that never had a gradient has
    its own axis in the basis, and would move with all others by what it has of their columns.

    Coordinates that are `apart` are exact axes, where they are columns but for rounding.

    >>> print(without_dust(jnp.array([[1.0, 2e-7], [-3e-8, 1.0]]), jnp.array([False, False])))
    [[1. 0.]
     [0. 1.]]
    """
    ε, size, rows = float(jnp.finfo(V.dtype).eps), jnp.abs(V), apart[:, None]
    V = jnp.where(rows & (size > 1 - ε**0.5), jnp.sign(V), V)
    return jnp.where(size < jnp.where(rows, ε**0.5, DUST * ε), 0, V)
