"""Symmetric matrices read and written in the blocks in which `second_moment` computes them.

XLA takes a slice of a concatenation from its parts, so a matrix that was put together from blocks, and is read through
these functions alone, is never put together at all: the statistics of a K-FAC step, which all have to be there before
any is used, then take five eighths of the memory. Where a matrix is not computed in blocks, these are plain functions.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from .._xla import by_platform
from .products import from_upper, row_sizes, whole


def blockwise(f: Callable[[Array], Array], S: Float[Array, "*batch d d"]) -> Float[Array, "*batch d d"]:
    """``f(S)`` for an f of each entry alone."""

    def by_blocks(rows: tuple[int, ...], S: Array) -> Array:
        if len(rows) == 1:
            return f(S)
        cuts = _cuts(rows)
        return whole(from_upper(len(cuts), lambda i, j: f(S[slice(*cuts[i]), slice(*cuts[j])])))

    return _by_platform(by_blocks, S)


def overwritten(
    f: Callable[[Array, Array], Array], A: Float[Array, "d d"], S: Float[Array, "d d"]
) -> Float[Array, "d d"]:
    """``f(A, S)`` for an f of each pair of entries alone, written over A block by block."""

    def by_blocks(rows: tuple[int, ...], S: Array, A: Array) -> Array:
        if len(rows) == 1:
            return f(A, S)
        cuts = _cuts(rows)
        for a, b in cuts:
            for c, d in cuts:
                A = jax.lax.dynamic_update_slice(A, f(A[a:b, c:d], S[a:b, c:d]), (a, c))
        return A

    return _by_platform(by_blocks, S, A)


def diagonal(S: Float[Array, "*batch d d"]) -> Float[Array, "*batch d"]:
    """The diagonal, by strided slices.

    >>> print(diagonal(jnp.array([[1.0, 2.0], [2.0, 4.0]])))
    [1. 4.]
    """

    def by_blocks(rows: tuple[int, ...], S: Array) -> Array:
        parts = [S[..., a:b, a:b] for a, b in _cuts(rows)]
        flat = (x.reshape(*x.shape[:-2], x.shape[-1] ** 2)[..., :: x.shape[-1] + 1] for x in parts)
        return jnp.concatenate(list(flat), -1)

    return _by_platform(by_blocks, S)


def _by_platform(f: Callable[..., Array], S: Array, *others: Array) -> Array:
    """``f(rows, S, *others)``, in blocks of one matrix under `jit`; elsewhere a copy would be made for each."""
    d, single = S.shape[-1], S.ndim == 2 and isinstance(S, Tracer)
    return by_platform(f, lambda platform: row_sizes(d, platform.symmetric_blocks if single else None), S, *others)


def _cuts(rows: tuple[int, ...]) -> list[tuple[int, int]]:
    """Where each row of blocks begins and ends."""
    ends = np.cumsum(rows).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))
