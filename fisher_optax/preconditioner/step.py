"""A step of one matrix, and of all matrices of one shape; how its factors and bases are kept between steps."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from .. import linalg
from .._xla import select
from ..linalg.eigenbasis import LowRank
from ..matrices.blocks import over_stack
from ..statistics import LayerFactors
from .contracts import Application, Eigenpairs, FactorRule, Kronecker, MatrixState
from .refresh import START


class Store(NamedTuple):
    """`fo.Storage`, as far as it is about factors and bases, and the longest side that has one."""

    dtype: DTypeLike | None = None
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

        def stored(A: Array | LowRank) -> Array | LowRank:
            if isinstance(A, LowRank):
                return A if self.dtype is None else LowRank(A.rows.astype(self.dtype))
            return self._pack(A if self.dtype is None else A.astype(self.dtype))

        return each_side(stored, factors)

    def load(self, factors: Kronecker, m: int, n: int, dtype: DTypeLike) -> Kronecker:
        """The kept factors of an ``m x n`` matrix, full and in ``dtype``."""

        def whole(A: Array | LowRank | None, d: int) -> Array | LowRank | None:
            if A is None:
                return None
            return LowRank(A.rows.astype(dtype)) if isinstance(A, LowRank) else self._unpack(A, d).astype(dtype)

        return factors._replace(left=whole(factors.left, m), right=whole(factors.right, n))

    def identity(self, factors: Kronecker, returns: type) -> PyTree:
        """The basis before there is any: the identity on each side that has a factor, as far as its rank goes."""
        sides = [A.rows if isinstance(A, LowRank) else A for A in (factors.left, factors.right)]
        eyes = [None if A is None else jnp.eye(A.shape[-1], len(A), dtype=self.dtype or A.dtype) for A in sides]
        ones = [None if A is None else jnp.ones(len(A), A.dtype) for A in sides]
        return returns(*eyes, *ones) if returns is Eigenpairs else returns(*eyes)

    def _pack(self, A: Array) -> Array:
        return linalg.pack(A) if self.packed else A

    def _unpack(self, A: Array, d: int) -> Array:
        return linalg.unpack(A, d) if self.packed else A


def each_side(f: Callable[[Any], Array | LowRank], factors: Kronecker) -> Kronecker:
    """``f`` of each factor that there is."""
    L, R = factors.left, factors.right
    return factors._replace(left=None if L is None else f(L), right=None if R is None else f(R))


@dataclasses.dataclass(frozen=True)
class Step:
    """What happens to a matrix at one call, but for the refresh of its bases.

    A gradient that acts on itself (Shampoo, K-FAC) is observed, then bases are refreshed, then it is applied; one that
    acts in bases of earlier ones (SOAP) is observed and applied at once, and bases are refreshed afterwards.
    """

    rule: FactorRule
    application: Application
    storage: Store
    skip_first: bool
    max_stack: int
    extra: dict[str, PyTree]  # more arguments of the application
    accept: Bool[Array, ""] | None  # whether to change any state at all; None: it is

    def observe(
        self, G: Float[Array, "m n"], state: MatrixState, statistics: LayerFactors | None, alone: bool
    ) -> MatrixState:
        """Factors, eigenvalues and what the application keeps of statistics, after the gradient, or its layer's
        statistics, if there are any. ``alone`` in its stack, or one of several.
        """
        rule, new = self.rule, state
        if self.application.observe is not None and statistics is not None:
            inner = self.application.observe(state.application, statistics, state.basis)
            new = new._replace(application=select(self.accept, inner, state.application))
        observed = statistics if rule.of_statistics else G
        if observed is None:
            return new
        # One of several is a slice of its stack, and copied in any case.
        if alone and rule.overwrite is not None and self.storage.plain:
            return new._replace(factors=rule.overwrite(observed, state.factors, self.accept))
        m, n = G.shape
        old = self.storage.load(state.factors, m, n, G.dtype)
        if rule.track is not None:
            new = new._replace(basis=select(self.accept, rule.track(observed, old, state.basis), state.basis))
        factors = self.storage.store(rule.update(observed, old, state.basis))
        return new._replace(factors=select(self.accept, factors, state.factors))

    def apply(
        self, G: Float[Array, "m n"], inner: PyTree, basis: PyTree, action: Int[Array, ""]
    ) -> tuple[Float[Array, "m n"], PyTree]:
        """The direction and the application's new state."""
        U, new = self.application.update(G, inner, basis, **self.extra)
        if self.skip_first:
            first = action == START
            U = jnp.where(first, 0, U)
            new = jax.tree.map(lambda x, old: jnp.where(first, old, x), new, inner)
        return U, select(self.accept, new, inner)

    def observe_stack(
        self, G: Float[Array, "N m n"], state: MatrixState, statistics: LayerFactors | None
    ) -> MatrixState:
        """`observe`, of all matrices of a stack."""
        if statistics is None and self.rule.of_statistics:
            return state

        def observe(factors: Any, copied: Any, read: Any) -> tuple[Any, Any]:
            (values, inner), (G, vectors, statistics) = copied, read
            old = MatrixState(factors, type(state.basis)(*vectors, *values), inner)
            new = self.observe(G, old, statistics, alone=len(stack) == 1)
            return new.factors, (tuple(new.basis[2:]), new.application)

        stack, vectors, values = G, tuple(state.basis[:2]), tuple(state.basis[2:])
        copied, read = (values, state.application), (G, vectors, statistics)
        factors, (values, inner) = over_stack(observe, state.factors, copied, read, max_stack=self.max_stack)
        return MatrixState(factors, type(state.basis)(*vectors, *values), inner)

    def apply_stack(
        self, G: Float[Array, "N m n"], state: MatrixState, action: Int[Array, " N"]
    ) -> tuple[Float[Array, "N m n"], MatrixState]:
        """`apply`, of all matrices of a stack."""

        def apply(overwritten: tuple[()], inner: Any, read: Any) -> tuple[tuple[()], Any]:
            return overwritten, self.apply(read[0], inner, *read[1:])

        # A gradient whose application keeps its squares would be copied whole, for each matrix, to be overwritten.
        read = (G, state.basis, action)
        _, (U, inner) = over_stack(apply, (), state.application, read, max_stack=self.max_stack)
        return U, state._replace(application=inner)

    def stack(
        self,
        G: Float[Array, "N m n"],
        state: MatrixState,
        statistics: LayerFactors | None,
        action: Int[Array, " N"],
    ) -> tuple[Float[Array, "N m n"], MatrixState]:
        """Both of them, of all matrices of a stack."""

        def both(overwritten: Any, copied: Any, read: Any) -> tuple[Any, Any]:
            (G, factors), (values, inner), (vectors, statistics, action) = overwritten, copied, read
            old = MatrixState(factors, type(state.basis)(*vectors, *values), inner)
            new = self.observe(G, old, statistics, alone=len(stack) == 1)
            U, inner = self.apply(G, new.application, new.basis, action)
            return (U, new.factors), (tuple(new.basis[2:]), inner)

        stack, vectors, values = G, tuple(state.basis[:2]), tuple(state.basis[2:])
        copied, read = (values, state.application), (vectors, statistics, action)
        (U, factors), (values, inner) = over_stack(both, (G, state.factors), copied, read, max_stack=self.max_stack)
        return U, MatrixState(factors, type(state.basis)(*vectors, *values), inner)
