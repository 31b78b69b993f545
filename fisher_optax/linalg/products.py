"""The products of a Newton-Schulz iteration: of a wide or tall X, and of symmetric matrices that commute.

Everything an iteration multiplies on the small side is a polynomial of one matrix ``X Xᵀ``, so every product is
symmetric again. Cut into rows of blocks S_1 ... S_k, block i, j of ``S T`` is ``S_i T_jᵀ``, and those with i <= j are
enough: ``(k + 1) / 2k`` of the flops. Of complex matrices, ᵀ is the conjugate transpose, and symmetric is Hermitian.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Inexact

from .._xla import by_platform

# Rows of blocks, from `Platform.symmetric_blocks` on: products of smaller ones are too slow to gain anything.
BLOCKS = 4

# A symmetric matrix by its rows of blocks (one row: whole).
Symmetric = tuple[Inexact[Array, "..."], ...]


def times(
    X: Float[Array, "*batch m k"], Y: Float[Array, "*batch k n"], precision: Any = jax.lax.Precision.HIGHEST
) -> Float[Array, "*batch m n"]:
    """``X Y``, some rows at once where a compiler takes long for all of them.

    >>> print(times(jnp.eye(2), 2 * jnp.eye(2)))
    [[2. 0.]
     [0. 2.]]
    """

    def at_once(rows: int, X: Array, Y: Array) -> Array:
        if rows == X.shape[-2]:
            return jnp.matmul(X, Y, precision=precision)
        parts = X.reshape(*X.shape[:-2], -1, rows, X.shape[-1])
        results = jax.lax.map(lambda x: jnp.matmul(x, Y, precision=precision), jnp.moveaxis(parts, -3, 0))
        return jnp.moveaxis(results, 0, -3).reshape(*results.shape[1:-2], X.shape[-2], Y.shape[-1])

    return by_platform(at_once, lambda platform: _rows_at_once(X.shape[-2], platform.rows_at_once), X, Y)


def _rows_at_once(m: int, most: int | None) -> int:
    """As many as divide m, where that is not few."""
    if most is None or m <= most:
        return m
    rows = next(rows for rows in range(most, 0, -1) if m % rows == 0)
    return rows if 4 * rows >= most else m


def row_sizes(n: int, blocks_from: int | None) -> tuple[int, ...]:
    """The heights of the rows of blocks in which `Products` computes symmetric n x n matrices, if from that size on."""
    if blocks_from is None or n < blocks_from:
        return (n,)
    return tuple(len(rows) for rows in np.array_split(np.arange(n), BLOCKS) if len(rows))


def symmetric_flops(rows: tuple[int, ...], m: int | None = None) -> int:
    """Flops of a symmetric product of n x m by m x n, n the sum of ``rows`` and m = n by default.

    >>> symmetric_flops((2,)), symmetric_flops((1, 1))
    (16, 12)
    """
    n = sum(rows)
    return (n * n + sum(r * r for r in rows)) * (n if m is None else m)


@dataclasses.dataclass(frozen=True)
class Products:
    """Products with a wide X as the papers write them; a tall X stands for its transpose, without forming it."""

    tall: bool
    rows: tuple[int, ...]
    dtype: Any
    precision: Any

    def outer(self, X: Array) -> Symmetric:
        """``X Xᵀ``."""
        return self.outer_of(jnp.split(X, np.cumsum(self.rows)[:-1], axis=-1 if self.tall else -2))

    def outer_of(self, parts: list[Array]) -> Symmetric:
        """``X Xᵀ`` of an X cut into its rows of blocks."""
        return from_upper(len(parts), lambda i, j: self.between(parts[i], parts[j]))

    def between(self, X: Array, Y: Array) -> Array:
        """``X Yᵀ``."""
        summed = X.ndim - (2 if self.tall else 1)
        X, Y = (X.conj(), Y) if self.tall else (X, Y.conj())
        return self._dot(X, Y, summed, summed)

    def product(self, S: Symmetric, T: Symmetric) -> Symmetric:
        """``S T`` of two that commute."""
        last = S[0].ndim - 1
        if len(S) == 1:
            return (self._dot(S[0], T[0], last, last - 1),)
        return from_upper(len(S), lambda i, j: self._dot(S[i], T[j].conj(), last, last))

    def apply(self, S: Symmetric, X: Array) -> Array:
        """``S X``."""
        A, B = (X, whole(S)) if self.tall else (whole(S), X)
        return self._dot(A, B, X.ndim - 1, X.ndim - 2)

    def _dot(self, A: Array, B: Array, i: int, j: int) -> Array:
        """The sum over axis i of A and j of B; operands rounded to ``dtype``, sums in float32 at least."""
        batch = tuple(range(A.ndim - 2))
        out = jax.lax.dot_general(
            A.astype(self.dtype),
            B.astype(self.dtype),
            (((i,), (j,)), (batch, batch)),
            precision=self.precision,
            preferred_element_type=jnp.promote_types(self.dtype, jnp.float32),
        )
        return out.astype(jnp.promote_types(A.dtype, jnp.float32))


def second_moment(
    X: Float[Array, "*batch k d"], last: Float[Array, "*batch k 1"] | None = None
) -> Float[Array, "*batch n n"]:
    """``Xᵀ X``, or ``[X last]ᵀ [X last]``, in float32 at least, by rows of blocks where that is faster.

    >>> print(second_moment(jnp.array([[1.0, 2.0]])))
    [[1. 2.]
     [2. 4.]]
    """
    d = X.shape[-1] + (last is not None)
    operands = (X,) if last is None else (X, last)
    return by_platform(_second_moment, lambda platform: row_sizes(d, platform.symmetric_blocks), *operands)


def _second_moment(rows: tuple[int, ...], X: Array, last: Array | None = None) -> Array:
    products = Products(True, rows, X.dtype, jax.lax.Precision.HIGHEST)
    if last is None:
        return whole(products.outer(X))
    if len(rows) > 1:  # the last part is copied in any case
        *parts, end = jnp.split(X, np.cumsum(rows)[:-1], axis=-1)
        return whole(products.outer_of([*parts, jnp.concatenate([end, last], -1)]))
    s = products.between(X, last)
    return jnp.block([[products.between(X, X), s], [s.mT, products.between(last, last)]])


def from_upper(k: int, block: Callable[[int, int], Array]) -> Symmetric:
    """k rows of the blocks ``block(i, j)``, which is asked for those with i <= j."""
    upper = {(i, j): block(i, j) for i in range(k) for j in range(i, k)}
    return tuple(
        jnp.concatenate([upper[i, j] if j >= i else upper[j, i].mT.conj() for j in range(k)], -1) for i in range(k)
    )


def whole(S: Symmetric) -> Array:
    """All of it as one matrix."""
    return jnp.concatenate(S, -2)


def combine(a: Any, S: Symmetric, b: Any, T: Symmetric) -> Symmetric:
    """``a S + b T``."""
    return tuple(a * s + b * t for s, t in zip(S, T, strict=True))


def add_identity(a: Any, S: Symmetric) -> Symmetric:
    """``a I + S``."""
    return tuple(s + a * i for s, i in zip(S, _identity(S), strict=True))


def trace(S: Symmetric) -> Float[Array, "*batch"]:
    """The sum of the diagonal, which is real."""
    # On a CPU, XLA compiles three kernels for a slice of the diagonal and its sum; this it leaves to a library.
    parts = (jnp.sum(s * i, (-2, -1)) for s, i in zip(S, _identity(S), strict=True))
    return functools.reduce(jnp.add, parts).real


def _identity(S: Symmetric) -> Symmetric:
    """I, cut like S."""
    firsts = [0, *np.cumsum([s.shape[-2] for s in S[:-1]]).tolist()]
    return tuple(jnp.eye(s.shape[-2], s.shape[-1], first, s.dtype) for s, first in zip(S, firsts, strict=True))
