"""Symmetric matrices read and written in the blocks in which `second_moment` computes them.

XLA takes a slice of a concatenation from its parts, so a matrix that was put together from blocks, and is read through
these functions alone, is never put together at all: the statistics of a K-FAC step, which all have to be there before
any is used, then take five eighths of the memory. Where a matrix is not computed in blocks, these are plain functions.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from .products import from_upper, row_sizes, whole


def blockwise(f: Callable[[Array], Array], S: Float[Array, "*batch d d"]) -> Float[Array, "*batch d d"]:
    """``f(S)`` for an f of each entry alone."""
    cuts = _cuts(S)
    if len(cuts) == 1:
        return f(S)
    return whole(from_upper(len(cuts), lambda i, j: f(S[slice(*cuts[i]), slice(*cuts[j])])))


def overwritten(
    f: Callable[[Array, Array], Array], A: Float[Array, "d d"], S: Float[Array, "d d"]
) -> Float[Array, "d d"]:
    """``f(A, S)`` for an f of each pair of entries alone, written over A block by block."""
    cuts = _cuts(S)
    if len(cuts) == 1:
        return f(A, S)
    for a, b in cuts:
        for c, d in cuts:
            A = jax.lax.dynamic_update_slice(A, f(A[a:b, c:d], S[a:b, c:d]), (a, c))
    return A


def diagonal(S: Float[Array, "*batch d d"]) -> Float[Array, "*batch d"]:
    """The diagonal, by strided slices.

    >>> print(diagonal(jnp.array([[1.0, 2.0], [2.0, 4.0]])))
    [1. 4.]
    """
    parts = [S[..., a:b, a:b] for a, b in _cuts(S)]
    flat = (x.reshape(*x.shape[:-2], x.shape[-1] ** 2)[..., :: x.shape[-1] + 1] for x in parts)
    return jnp.concatenate(list(flat), -1)


def _cuts(S: Any) -> list[tuple[int, int]]:
    """Where each row of blocks begins and ends: of one matrix under `jit`; elsewhere a copy would be made for each."""
    rows = row_sizes(S.shape[-1]) if S.ndim == 2 and isinstance(S, Tracer) else (S.shape[-1],)
    ends = np.cumsum(rows).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))
