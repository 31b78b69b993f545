"""How factors and bases are kept between steps, and which sides get one."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from .. import linalg
from ..linalg.eigenbasis import LowRank
from .contracts import Eigenpairs, Kronecker


class Store(NamedTuple):
    """`fo.Storage`, as far as it is about factors and bases, and the longest side that has one."""

    dtype: Any = None
    packed: bool = False
    sides: str = "both"
    max_dim: int = 10_000
    block_size: int | None = None

    @property
    def plain(self) -> bool:
        """Whether factors are kept as they come."""
        return self.dtype is None and not self.packed

    def wanted(self, m: int, n: int) -> tuple[bool, bool]:
        """Which sides of an ``m x n`` matrix get a factor."""
        both = self.sides == "both"
        return m <= self.max_dim and (both or m <= n), n <= self.max_dim and (both or n < m)

    def store(self, factors: Kronecker) -> Kronecker:
        """Full symmetric factors as they are kept."""

        def kept(A: Any) -> Any:
            if isinstance(A, LowRank):
                return A if self.dtype is None else LowRank(A.rows.astype(self.dtype))
            return self._pack(A if self.dtype is None else A.astype(self.dtype))

        return each_side(kept, factors)

    def load(self, factors: Kronecker, m: int, n: int, dtype: Any) -> Kronecker:
        """The kept factors of an ``m x n`` matrix, full and in ``dtype``."""

        def whole(A: Any, d: int) -> Any:
            if A is None:
                return None
            return LowRank(A.rows.astype(dtype)) if isinstance(A, LowRank) else self._unpack(A, d).astype(dtype)

        return factors._replace(left=whole(factors.left, m), right=whole(factors.right, n))

    def identity(self, factors: Kronecker, returns: type) -> Any:
        """The basis before there is any: the identity on each side that has a factor, as far as its rank goes."""
        sides = [A.rows if isinstance(A, LowRank) else A for A in (factors.left, factors.right)]
        eyes = [None if A is None else jnp.eye(A.shape[-1], len(A), dtype=self.dtype or A.dtype) for A in sides]
        ones = [None if A is None else jnp.ones(len(A), A.dtype) for A in sides]
        return returns(*eyes, *ones) if returns is Eigenpairs else returns(*eyes)

    def _pack(self, A: Array) -> Array:
        return linalg.pack(A) if self.packed else A

    def _unpack(self, A: Array, d: int) -> Array:
        return linalg.unpack(A, d) if self.packed else A


def each_side(f: Any, factors: Kronecker) -> Kronecker:
    """``f`` of each factor that there is."""
    L, R = factors.left, factors.right
    return factors._replace(left=None if L is None else f(L), right=None if R is None else f(R))
