"""The seam: factors x decomposition x application. Every named optimizer is one call of it and a chain around.

At call t, for each matrix G of the gradient tree:

    U    ← application(G)   in bases made of earlier gradients: a gradient never chooses its own basis
    L, R ← factors(G)
    Q    ← decomposition(L, R)   where the refresh policy says so; moments held in the old basis are carried into the new one
"""

import dataclasses
from types import NoneType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from .axes import LeafAxes, MatrixAxes
from .guard import guarded
from .matrices import from_matrices, matrix_shapes, to_matrices
from .refresh import Matrices, Policy, phases, renew
from .routing import by_axes, skip_first_call
from .sharding import matrix_shardings
from .storage import Storage, place
from .types import Application, Decomposition, FactorRule, Moments


def precondition(
    factors: FactorRule | None,
    decomposition: Decomposition | None,
    application: Application,
    *,
    axes: Any = None,
    fallback: optax.GradientTransformation | None = None,
    kinds: tuple[str, ...] = ("matrix", "head"),
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Precondition matrix gradients with any combination of factors, decomposition and application.

    Args:
      factors: how Kronecker factors follow the gradients, e.g. ``fo.factors.outer_product(0.95)``; None for an application that needs none.
      decomposition: what turns factors into bases, e.g. ``fo.decompositions.orthogonal_iteration()``; None likewise.
      application: what is done with them, e.g. ``fo.in_eigenbasis(optax.scale_by_lion())`` or ``fo.applications.orthogonal()``.
      axes: which axes of each leaf are inputs, outputs and batch. None: rules by Flax path and shape, see `fo.report`; else a tree of `fo.MatrixAxes`
        (None at a leaf: fallback), or a function of params that makes one.
      fallback: a direction for the leaves that are no matrices, default ``optax.scale_by_adam()``.
      kinds: what the method takes of "matrix", "head" and "embedding" (see `fo.label_params`).
      **options: those of `fo.soap` from ``precondition_frequency`` on: when bases are renewed, and what is kept.

    Raises:
      TypeError: where the application does not accept what the decomposition returns.
      ValueError: for an option out of range.

    Example (SOAP with Lion inside):
      >>> import optax, fisher_optax as fo
      >>> lion = fo.in_eigenbasis(optax.scale_by_lion())
      >>> tx = fo.precondition(fo.factors.outer_product(0.95), fo.decompositions.orthogonal_iteration(), lion)
    """
    return guarded(seam(factors, decomposition, application, **options).directions(fallback, axes, kinds))


def seam(
    factors: FactorRule | None,
    decomposition: Decomposition | None,
    application: Application,
    *,
    precondition_frequency: int = 10,
    refresh: str = "every",
    adaptive_tolerance: float = 0.01,
    transport: str = "permute",
    first_step: str = "skip",
    max_precond_dim: int = 10_000,
    block_size: int | None = None,
    sides: str = "both",
    factor_dtype: Any = None,
    factor_storage: str = "full",
    mesh_axis: str | None = None,
) -> "Seam":
    """A checked `Seam`."""
    check_cell(factors, decomposition, application)
    for name, value, known in (("first_step", first_step, ("skip", "adam")), ("factor_storage", factor_storage, ("full", "packed"))):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}; got {value!r}.")
    storage = Storage(factor_dtype, factor_storage == "packed", sides, max_precond_dim, block_size).check()
    policy = Policy(refresh, precondition_frequency, adaptive_tolerance, transport, mesh_axis).check()
    return Seam(factors, decomposition, application, storage, policy, first_step == "skip")


def check_cell(factors: FactorRule | None, decomposition: Decomposition | None, application: Application) -> None:
    """A TypeError unless the three fit together."""
    returned = NoneType if decomposition is None else decomposition.returns
    if returned not in application.accepts:
        wanted = " or ".join("no decomposition" if t is NoneType else f"a decomposition that returns {t.__name__}" for t in application.accepts)
        given = "none" if decomposition is None else f"{decomposition.name!r}, which returns {returned.__name__}"
        raise TypeError(f"application {application.name!r} needs {wanted}; the decomposition given is {given}.")
    if (factors is None) != (decomposition is None):
        given = f"factors={factors and factors.name!r}, decomposition={decomposition and decomposition.name!r}"
        raise TypeError(f"factors and decomposition go together: give both, or None for both; got {given}.")


class PreconditionState(NamedTuple):
    """State of the seam. The trees have the parameters' structure, with a tuple of matrices for each leaf."""

    count: Int[Array, ""]  # calls so far
    kept: Int[Array, ""]  # decompositions that failed, so that the last good one was kept
    factors: Any  # a Kronecker for each matrix
    bases: Any  # an Eigenbasis or InverseRoot for each matrix
    application: Any  # the application's own state


@dataclasses.dataclass(frozen=True)
class Seam:
    """One cell of factors x decomposition x application with its options."""

    factors: FactorRule | None
    decomposition: Decomposition | None
    application: Application
    storage: Storage
    policy: Policy
    skip_first: bool

    def directions(self, fallback: optax.GradientTransformation | None, axes: Any, kinds: tuple[str, ...]) -> optax.GradientTransformationExtraArgs:
        """The seam on matrices and ``fallback`` on the rest, without learning rate and decay."""
        return by_axes(self.application.name, self.on_matrices, self.with_first(optax.scale_by_adam() if fallback is None else fallback), axes=axes, kinds=kinds, describe=self.describe)

    def with_first(self, fallback: optax.GradientTransformation) -> optax.GradientTransformation:
        """``fallback``, which waits with the matrices where these make no step at the first call."""
        return skip_first_call(fallback) if self.skip_first and self.decomposition is not None else fallback

    def on_matrices(self, axes: list[MatrixAxes]) -> optax.GradientTransformationExtraArgs:
        """The bare transformation of a tree whose leaves are all matrices, with these axes."""
        return optax.GradientTransformationExtraArgs(lambda params: self._init(axes, params), lambda *args, **extra: self._update(axes, *args, **extra))

    def describe(self, leaf: LeafAxes) -> dict[str, Any]:
        """What a report says of a leaf: its matrices, and the flops of renewing their bases."""
        assert leaf.axes is not None
        shapes = matrix_shapes(leaf.shape, leaf.axes, self.storage.block_size)
        flops = sum(map(self._refresh_flops, shapes)) if self.decomposition else 0
        return {"matrices": tuple(shapes), "refresh_flops": flops, "block_size": self.storage.block_size}

    def _refresh_flops(self, shape: tuple[int, ...]) -> int:
        """``A Q`` (2 d³) and a Householder QR with its Q (8/3 d³) a side, 4 mn (m + n) for carrying a momentum."""
        *batch, m, n = shape
        sides = [d for d, wanted in zip((m, n), self.storage.wanted(m, n), strict=True) if wanted]
        return (batch[0] if batch else 1) * sum(14 * d**3 // 3 + 4 * m * n * d for d in sides)

    def _init(self, axes: list[MatrixAxes], params: Any) -> PreconditionState:
        leaves, treedef = jax.tree.flatten(params)
        zeros, factors, bases = [], [], []
        for x, a in zip(leaves, axes, strict=True):
            dtype = jnp.promote_types(x.dtype, jnp.float32)
            shapes = matrix_shapes(x.shape, a, self.storage.block_size)
            places = [matrix_shardings(x, a, len(s), len(shapes) == 1) for s in shapes]
            zeros.append(tuple(jnp.zeros(s, dtype, device=p[0]) for s, p in zip(shapes, places, strict=True)))
            if self.factors is not None and self.decomposition is not None:
                full = [self.factors.init(s, *self.storage.wanted(*s[-2:]), dtype) for s in shapes]
                factors.append(tuple(place(self.storage.store(f), p[1:]) for f, p in zip(full, places, strict=True)))
                bases.append(tuple(place(self.storage.identity(f, self.decomposition.returns), p[1:]) for f, p in zip(full, places, strict=True)))
        trees = ((), ()) if self.decomposition is None else (treedef.unflatten(factors), treedef.unflatten(bases))
        count = jnp.zeros([], jnp.int32)
        return PreconditionState(count, count, *trees, self.application.init(treedef.unflatten(zeros)))

    def _update(self, axes: list[MatrixAxes], updates: Any, state: PreconditionState, params: Any = None, **extra: Any) -> tuple[Any, PreconditionState]:
        del params
        leaves, treedef = jax.tree.flatten(updates)
        block = self.storage.block_size
        G = treedef.unflatten([to_matrices(x.astype(jnp.promote_types(x.dtype, jnp.float32)), a, block) for x, a in zip(leaves, axes, strict=True)])
        U, inner = self.application.update(G, state.application, state.bases, **extra)
        if self.decomposition is None:
            state = state._replace(application=inner)
        else:
            first = state.count == 0
            if self.skip_first:
                U = jax.tree.map(lambda u: jnp.where(first, 0, u), U)
                inner = jax.tree.map(lambda new, old: jnp.where(first, old, new), inner, state.application)
            state = self._follow(G, state._replace(application=inner), first)
        out = [from_matrices(p, x.shape, a, block) for p, x, a in zip(treedef.flatten_up_to(U), leaves, axes, strict=True)]
        return treedef.unflatten(out), state._replace(count=state.count + 1)

    def _follow(self, G: Any, state: PreconditionState, first: Array) -> PreconditionState:
        """Let the factors follow this gradient, and the bases the factors."""
        assert self.factors is not None and self.decomposition is not None
        matrices, treedef = jax.tree.flatten(G)
        kept, bases = treedef.flatten_up_to(state.factors), treedef.flatten_up_to(state.bases)
        full = [self.factors.update(g, self.storage.load(f, g.shape, g.dtype), b) for g, f, b in zip(matrices, kept, bases, strict=True)]
        factors = [self.storage.store(f) for f in full]
        moments = self.application.moments(state.application)
        linear, quadratic = (list(zip(*map(treedef.flatten_up_to, trees), strict=True)) or [()] * len(matrices) for trees in moments)
        due = phases([self._refresh_flops(g.shape[-2:]) for g in matrices], [g.shape[0] if g.ndim == 3 else None for g in matrices], self.policy)
        # The parameter step this is: a skipped first call was none.
        step = state.count + (0 if self.skip_first else 1)
        loaded = [self.storage.load(f, g.shape, g.dtype) for f, g in zip(factors, matrices, strict=True)]
        turned, failed = renew(self.policy, self.decomposition, due, first, step, Matrices(loaded, bases, linear, quadratic))
        carried = Moments(*(tuple(treedef.unflatten(part) for part in zip(*entries, strict=True)) for entries in (turned.linear, turned.quadratic)))
        return state._replace(
            kept=state.kept + failed,
            factors=treedef.unflatten(factors),
            bases=treedef.unflatten(turned.bases),
            application=self.application.with_moments(state.application, carried),
        )
