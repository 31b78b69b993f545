"""Symmetric matrices in half the memory: the rectangular full packed format.

With ``A = [[S, B], [Bᵀ, T]]``, S of size ``d // 2``, the triangles of S and T fold into one rectangle (even d; for odd
d, S moves one to the right instead of T one down), which goes below B:

    S00 S01
    T00 S11      S's upper triangle, T's lower one
    T10 T11

Only slices, pads and comparisons of indices: it compiles to one copy and holds no table of indices.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


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
