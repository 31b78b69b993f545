"""A step of one matrix, and of all matrices of one shape."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from .._xla import select
from ..matrices.blocks import over_stack
from .contracts import Application, FactorRule, MatrixState
from .refresh import START
from .storage import Store


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
    extra: dict[str, Any]  # more arguments of the application
    accept: Any  # whether to change any state at all; None: it is

    def observe(self, G: Any, state: MatrixState, seen: Any, alone: bool) -> MatrixState:
        """Factors, eigenvalues and what the application keeps of statistics, after what was seen: the gradient, or its
        layer's statistics, if there are any. ``alone`` in its stack, or one of several.
        """
        rule, new = self.rule, state
        if self.application.observe is not None and seen is not None:
            inner = self.application.observe(state.application, seen, state.basis)
            new = new._replace(application=select(self.accept, inner, state.application))
        seen = seen if rule.of_statistics else G
        if seen is None:
            return new
        # One of several is a slice of its stack, and copied in any case.
        if alone and rule.overwrite is not None and self.storage.plain:
            return new._replace(factors=rule.overwrite(seen, state.factors, self.accept))
        m, n = G.shape
        old = self.storage.load(state.factors, m, n, G.dtype)
        if rule.track is not None:
            new = new._replace(basis=select(self.accept, rule.track(seen, old, state.basis), state.basis))
        factors = self.storage.store(rule.update(seen, old, state.basis))
        return new._replace(factors=select(self.accept, factors, state.factors))

    def apply(self, G: Array, inner: Any, basis: Any, action: Int[Array, ""]) -> tuple[Array, Any]:
        """The direction and the application's new state."""
        U, new = self.application.update(G, inner, basis, **self.extra)
        if self.skip_first:
            first = action == START
            U = jnp.where(first, 0, U)
            new = jax.tree.map(lambda x, old: jnp.where(first, old, x), new, inner)
        return U, select(self.accept, new, inner)

    def observe_stack(self, G: Array, state: MatrixState, seen: Any) -> MatrixState:
        """`observe`, of all matrices of a stack."""
        if seen is None and self.rule.of_statistics:
            return state

        def one(factors: Any, copied: Any, read: Any) -> tuple[Any, Any]:
            (values, inner), (G, vectors, seen) = copied, read
            old = MatrixState(factors, type(state.basis)(*vectors, *values), inner)
            new = self.observe(G, old, seen, alone=len(stack) == 1)
            return new.factors, (tuple(new.basis[2:]), new.application)

        stack, vectors, values = G, tuple(state.basis[:2]), tuple(state.basis[2:])
        copied, read = (values, state.application), (G, vectors, seen)
        factors, (values, inner) = over_stack(one, state.factors, copied, read, max_stack=self.max_stack)
        return MatrixState(factors, type(state.basis)(*vectors, *values), inner)

    def apply_stack(self, G: Array, state: MatrixState, action: Array) -> tuple[Array, MatrixState]:
        """`apply`, of all matrices of a stack."""

        def one(overwritten: tuple[()], inner: Any, read: Any) -> tuple[tuple[()], Any]:
            return overwritten, self.apply(read[0], inner, *read[1:])

        # A gradient whose application keeps its squares would be copied whole, for each matrix, to be overwritten.
        read = (G, state.basis, action)
        _, (U, inner) = over_stack(one, (), state.application, read, max_stack=self.max_stack)
        return U, state._replace(application=inner)

    def stack(self, G: Array, state: MatrixState, seen: Any, action: Array) -> tuple[Array, MatrixState]:
        """Both of them, of all matrices of a stack."""

        def one(overwritten: Any, copied: Any, read: Any) -> tuple[Any, Any]:
            (G, factors), (values, inner), (vectors, seen, action) = overwritten, copied, read
            old = MatrixState(factors, type(state.basis)(*vectors, *values), inner)
            new = self.observe(G, old, seen, alone=len(stack) == 1)
            U, inner = self.apply(G, new.application, new.basis, action)
            return (U, new.factors), (tuple(new.basis[2:]), inner)

        stack, vectors, values = G, tuple(state.basis[:2]), tuple(state.basis[2:])
        copied, read = (values, state.application), (vectors, seen, action)
        (U, factors), (values, inner) = over_stack(one, (G, state.factors), copied, read, max_stack=self.max_stack)
        return U, MatrixState(factors, type(state.basis)(*vectors, *values), inner)
