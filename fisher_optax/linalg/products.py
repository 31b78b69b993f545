"""Products of matrices: general, and of symmetric matrices that commute; how these are packed, and scaled.

What a Newton-Schulz iteration multiplies on the small side is a polynomial of one matrix ``X Xᵀ``, so every product is
symmetric again. Cut into rows of blocks S_1 ... S_k, block i, j of ``S T`` is ``S_i T_jᵀ``, and those with i <= j are
enough: ``(k + 1) / 2k`` of the flops. Of complex matrices, ᵀ is the conjugate transpose, and symmetric is Hermitian.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import PrecisionLike
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Complex, Float, Inexact

from .._xla import by_platform

# Rows of blocks, from `Platform.symmetric_blocks` on: products of smaller ones are too slow to gain anything.
BLOCKS = 4

# A symmetric matrix by its rows of blocks (one row: whole).
Symmetric = tuple[Inexact[Array, "..."], ...]


def times(
    X: Float[Array, "*batch m k"], Y: Float[Array, "*batch k n"], precision: PrecisionLike = jax.lax.Precision.HIGHEST
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


def into_basis(Q_L: Array | None, X: Array, Q_R: Array | None, precision: PrecisionLike = "highest") -> Array:
    """``Q_Lᵀ X Q_R``; a side that is None leaves X as it is."""
    X = X if Q_L is None else times(Q_L.astype(X.dtype).mT, X, precision)
    return X if Q_R is None else times(X, Q_R.astype(X.dtype), precision)


def out_of_basis(Q_L: Array | None, X: Array, Q_R: Array | None, precision: PrecisionLike = "highest") -> Array:
    """``Q_L X Q_Rᵀ``; a side that is None leaves X as it is."""
    X = X if Q_L is None else times(Q_L.astype(X.dtype), X, precision)
    return X if Q_R is None else times(X, Q_R.astype(X.dtype).mT, precision)


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


@dataclasses.dataclass(frozen=True)
class Products:
    """Products with a wide X as the papers write them; a tall X stands for its transpose, without forming it."""

    tall: bool
    rows: tuple[int, ...]
    dtype: DTypeLike
    precision: PrecisionLike

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


# Symmetric matrices in half the memory: the rectangular full packed format.
#
# With ``A = [[S, B], [Bᵀ, T]]``, S of size ``d // 2``, the triangles of S and T fold into one rectangle (even d; for
# odd d, S moves one to the right instead of T one down), which goes below B:
#
#     S00 S01
#     T00 S11      S's upper triangle, T's lower one
#     T10 T11
#
# Only slices, pads and comparisons of indices: it compiles to one copy and holds no table of indices.


def pack(A: Float[Array, "*batch d d"]) -> Float[Array, "*batch rows columns"]:
    """A symmetric matrix as ``d (d + 1) / 2`` numbers.

    Args:
      A: symmetric; only half of it is read.

    Returns:
      Shape ``(d + 1, d / 2)`` for even d, ``(d, (d + 1) / 2)`` for odd d; the dtype of A.

    Raises:
      ValueError: if A is not square.

    Source: Gustavson et al. 2010, "Rectangular full packed format for Cholesky's algorithm".

    >>> pack(jnp.eye(4)).shape, pack(jnp.eye(5)).shape
    ((5, 2), (5, 3))
    """
    if A.ndim < 2 or A.shape[-1] != A.shape[-2]:
        raise ValueError(f"pack: A must be square in its last two axes; got shape {A.shape}.")
    half, odd = divmod(A.shape[-1], 2)
    S, B, T = A[..., :half, :half], A[..., :half, half:], A[..., half:, half:]
    batch = [(0, 0)] * (A.ndim - 2)
    S = jnp.pad(S, [*batch, (0, 1), (odd, 0)])
    T = jnp.pad(T, [*batch, (1 - odd, 0), (0, 0)])
    return jnp.concatenate([B, jnp.where(_upper(half + 1, half + odd, odd), S, T)], axis=-2)


def unpack(packed: Float[Array, "*batch rows columns"], d: int) -> Float[Array, "*batch d d"]:
    """The symmetric ``d x d`` matrix that `pack` stored, bit for bit.

    Raises:
      ValueError: if ``packed`` is not of the shape that `pack` gives for d.

    >>> A = jnp.array([[1.0, 2.0, 3.0], [2.0, 4.0, 5.0], [3.0, 5.0, 6.0]])
    >>> bool((unpack(pack(A), 3) == A).all())
    True
    """
    half, odd = divmod(d, 2)
    wanted = (2 * half + 1, half + odd)
    if packed.shape[-2:] != wanted:
        raise ValueError(
            f"unpack: a symmetric matrix of size {d} is packed into shape {wanted}; got {packed.shape}. "
            "Pass the size that was packed."
        )
    B, folded = packed[..., :half, :], packed[..., half:, :]
    S, T = folded[..., :half, odd:], folded[..., 1 - odd :, :]
    S = jnp.where(_upper(half, half), S, S.mT)
    T = jnp.where(_upper(half + odd, half + odd), T.mT, T)
    top, bottom = jnp.concatenate([S, B], axis=-1), jnp.concatenate([B.mT, T], axis=-1)
    return jnp.concatenate([top, bottom], axis=-2)


def _upper(rows: int, columns: int, shift: int = 0) -> Bool[Array, "rows columns"]:
    """True where ``column - shift >= row``."""
    return jnp.arange(columns)[None] - shift >= jnp.arange(rows)[:, None]


# Scaling that is safe over the whole range of a floating-point type.


def unit_scale(X: Inexact[Array, "*batch m n"]) -> Inexact[Array, "*batch m n"]:
    """Each matrix times the power of two that brings its largest entry into [2, 4): exact, for every scale. Real and
    imaginary parts count as entries.

    Subnormal numbers are scaled as the smallest normal one would be: where there are no others, the largest entry
    comes to lie in [2e-7, 2).

    Dividing by the largest entry is not: compilers multiply by its reciprocal, which underflows for entries near the
    top of the range, and processors read entries at the bottom (subnormal numbers) as zero. So the exponent is read
    from the bits, and a subnormal entry converted from its digits.

    Args:
      X: of 32 or 64 bits a part. Zero stays zero; a matrix with an infinity or a NaN gets a NaN.

    >>> print(unit_scale(jnp.array([[0.75, -0.125]])))
    [[ 3.  -0.5]]
    """
    if jnp.iscomplexobj(X):
        return _by_parts(unit_scale, X)
    info = jnp.finfo(X.dtype)
    integer = jnp.int32 if info.bits == 32 else jnp.int64
    bias, digits = info.maxexp - 1, info.nmant

    def power(biased: Array) -> Array:
        """``2**(biased - bias)``, zero for ``biased = 0``."""
        return jax.lax.bitcast_convert_type(biased << digits, X.dtype)

    bits = jax.lax.bitcast_convert_type(X, integer)
    magnitude = bits & jnp.iinfo(integer).max
    # A maximum may read subnormal numbers as zero and pass over a NaN, which stays one in its place.
    largest = jnp.max(jnp.abs(X), axis=(-2, -1), keepdims=True, initial=0)
    exponent = jnp.maximum(jax.lax.bitcast_convert_type(largest, integer) >> digits, 1)
    subnormal = jnp.where(bits < 0, -magnitude, magnitude).astype(X.dtype)
    return jnp.where(
        magnitude < 1 << digits,
        subnormal * power(jnp.maximum(bias + 2 - digits - exponent, 0)),
        X * power(2 * bias + 1 - exponent),
    )


def unit_frobenius(X: Inexact[Array, "*batch m n"]) -> Inexact[Array, "*batch m n"]:
    """Each matrix divided by its Frobenius norm; zero stays zero, no epsilon, any scale.

    Args:
      X: of 32 or 64 bits a part.

    >>> print(unit_frobenius(jnp.array([[3e38, 0.0], [0.0, 0.0]])).round(3))
    [[1. 0.]
     [0. 0.]]
    """
    if jnp.iscomplexobj(X):
        return _by_parts(unit_frobenius, X)
    X = unit_scale(X)
    return X * inverse_root(jnp.sum(X * X, axis=(-2, -1), keepdims=True))


def inverse_root(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """``x^(-1/2)``, zero for zero.

    >>> print(inverse_root(jnp.array([4.0, 0.0])))
    [0.5 0. ]
    """
    return jnp.where(x == 0, 0, jax.lax.rsqrt(x))


def _by_parts(f: Callable[[Array], Array], X: Complex[Array, "*batch m n"]) -> Complex[Array, "*batch m n"]:
    """``f`` of the real ``[Re X, Im X]``, put together again."""
    return jax.lax.complex(*jnp.split(f(jnp.concatenate([X.real, X.imag], -1)), 2, -1))
