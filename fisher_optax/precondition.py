"""The seam: factors x decomposition x application. Every named optimizer is one call of it and a chain around.

At call t, for each matrix G of the gradient tree:

    U    ← application(G)   in bases made of earlier gradients: a gradient never chooses its own basis
    L, R ← factors(G)
    Q    ← decomposition(L, R)   where the refresh policy says so; moments held in the old basis are carried into the
    new one
"""

import dataclasses
import math
from types import NoneType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from .axes import LeafAxes, MatrixAxes
from .branching import numbers
from .guard import guarded
from .matrices import canonical_shape, from_stacks, matrix_shapes, stack_key, to_stacks
from .refresh import START, Policy, renew
from .routing import by_axes, skip_first_call
from .sharding import Layout, matrix_layout, place, spread
from .stacks import over_stack
from .storage import Storage
from .types import Application, Decomposition, Eigenpairs, FactorRule, Moments


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
      factors: how Kronecker factors follow the gradients, e.g. ``fo.factors.outer_product(0.95)``; None for an
        application that needs none.
      decomposition: what turns factors into bases, e.g. ``fo.decompositions.orthogonal_iteration()``; None likewise.
      application: what is done with them, e.g. ``fo.in_eigenbasis(optax.scale_by_lion())`` or
        ``fo.applications.orthogonal()``.
      axes: which axes of each leaf are inputs, outputs and batch. None: rules by Flax path and shape, see `fo.report`;
        else a tree of `fo.MatrixAxes`
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
    fallback = optax.scale_by_adam() if fallback is None else fallback
    return guarded(
        seam(factors, decomposition, application, **options).directions(application.name, fallback, axes, kinds)
    )


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
    max_stack: int = 256,
    mesh_axis: str | None = None,
) -> "Seam":
    """A checked `Seam`."""
    check_cell(factors, decomposition, application)
    for name, value, known in (
        ("first_step", first_step, ("skip", "adam")),
        ("factor_storage", factor_storage, ("full", "packed")),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}; got {value!r}.")
    storage = Storage(factor_dtype, factor_storage == "packed", sides, max_precond_dim, block_size).check()
    policy = Policy(refresh, precondition_frequency, adaptive_tolerance, transport).check()
    skip_first = first_step == "skip" and not application.sees_itself
    return Seam(factors, decomposition, application, storage, policy, skip_first, max_stack, mesh_axis)


def check_cell(factors: FactorRule | None, decomposition: Decomposition | None, application: Application) -> None:
    """A TypeError unless the three fit together."""
    returned = NoneType if decomposition is None else decomposition.returns
    if returned not in application.accepts:
        wanted = " or ".join(
            "no decomposition" if t is NoneType else f"a decomposition that returns {t.__name__}"
            for t in application.accepts
        )
        given = "none" if decomposition is None else f"{decomposition.name!r}, which returns {returned.__name__}"
        raise TypeError(f"application {application.name!r} needs {wanted}; the decomposition given is {given}.")
    if (factors is None) != (decomposition is None):
        given = f"factors={factors and factors.name!r}, decomposition={decomposition and decomposition.name!r}"
        raise TypeError(f"factors and decomposition go together: give both, or None for both; got {given}.")
    if factors is not None and factors.track is not None and returned is not Eigenpairs:
        raise TypeError(
            f"factors {factors.name!r} need a decomposition that returns Eigenpairs: "
            "wrap it in fo.decompositions.with_eigenvalues."
        )


class MatrixState(NamedTuple):
    """What is kept of a matrix; in the state, of all matrices of one shape along a leading axis."""

    factors: Any  # Kronecker, or () without a decomposition
    basis: Any  # Eigenbasis or InverseRoot, or ()
    application: Any  # the application's own state


class PreconditionState(NamedTuple):
    """State of the seam."""

    count: Int[Array, ""]  # calls so far
    kept: Int[Array, ""]  # decompositions that failed, so that the last good one was kept
    matrices: dict[str, MatrixState]  # by shape, e.g. "384x1536"


@dataclasses.dataclass(frozen=True)
class Seam:
    """One cell of factors x decomposition x application with its options."""

    factors: FactorRule | None
    decomposition: Decomposition | None
    application: Application
    storage: Storage
    policy: Policy
    skip_first: bool
    max_stack: int
    mesh_axis: str | None

    def directions(
        self, method: str, fallback: optax.GradientTransformation, axes: Any, kinds: tuple[str, ...]
    ) -> optax.GradientTransformationExtraArgs:
        """The seam on matrices and ``fallback`` on the rest, without learning rate and decay."""
        return by_axes(
            method, self.on_matrices, self.with_first(fallback), axes=axes, kinds=kinds, describe=self.describe
        )

    def with_first(self, fallback: optax.GradientTransformation) -> optax.GradientTransformation:
        """``fallback``, which waits with the matrices where these make no step at the first call."""
        return skip_first_call(fallback) if self.skip_first and self.decomposition is not None else fallback

    def on_matrices(self, axes: list[MatrixAxes]) -> optax.GradientTransformationExtraArgs:
        """The bare transformation of a tree whose leaves are all matrices, with these axes."""
        return optax.GradientTransformationExtraArgs(
            lambda params: self._init(axes, params), lambda *args, **extra: self._update(axes, *args, **extra)
        )

    def describe(self, leaf: LeafAxes) -> dict[str, Any]:
        """What a report says of a leaf: its matrices, and the flops of renewing their bases."""
        assert leaf.axes is not None
        shapes = matrix_shapes(leaf.shape, leaf.axes, self.storage.block_size)
        flops = sum(math.prod(s[:-2]) * self._refresh_flops(*s[-2:]) for s in shapes)
        return {"matrices": tuple(shapes), "refresh_flops": flops, "block_size": self.storage.block_size}

    def _refresh_flops(self, m: int, n: int) -> int:
        """``A Q`` (2 d³) and a Householder QR with its Q (8/3 d³) a side, 4 mn (m + n) for carrying a momentum."""
        if self.decomposition is None:
            return 0
        return sum(
            14 * d**3 // 3 + 4 * m * n * d
            for d, wanted in zip((m, n), self.storage.wanted(m, n), strict=True)
            if wanted
        )

    def _init(self, axes: list[MatrixAxes], params: Any) -> PreconditionState:
        leaves, treedef = jax.tree.flatten(params)
        count = jnp.zeros([], jnp.int32)
        if not leaves:  # optax.tree.map_params asks with a placeholder where the parameters would be
            return PreconditionState(count, count, treedef.unflatten([]))
        counts: dict[str, int] = {}
        layouts: dict[str, set[Layout | None]] = {}
        for x, a in zip(leaves, axes, strict=True):
            shapes = matrix_shapes(x.shape, a, self.storage.block_size)
            for s in shapes:
                key = stack_key(s, jnp.promote_types(x.dtype, jnp.float32))
                counts[key] = counts.get(key, 0) + math.prod(s[:-2])
                layouts.setdefault(key, set()).add(matrix_layout(x, a, shapes == [canonical_shape(x.shape, a)]))
        states = {
            key: jax.tree.map(lambda x, n=n: jnp.broadcast_to(x, (n, *x.shape)), self._start(key))
            for key, n in counts.items()
        }
        return PreconditionState(count, count, {key: place(state, layouts[key]) for key, state in states.items()})

    def _start(self, key: str) -> MatrixState:
        """The state of one matrix of a stack."""
        shape, _, dtype = key.partition(" ")
        m, n = map(int, shape.split("x"))
        zeros = jnp.zeros((m, n), dtype or jnp.float32)
        if self.factors is None or self.decomposition is None:
            return MatrixState((), (), self.application.init(zeros))
        full = self.factors.init(m, n, *self.storage.wanted(m, n), zeros.dtype)
        return MatrixState(
            self.storage.store(full),
            self.storage.identity(full, self.decomposition.returns),
            self.application.init(zeros),
        )

    def _update(
        self, axes: list[MatrixAxes], updates: Any, state: PreconditionState, params: Any = None, **extra: Any
    ) -> tuple[Any, PreconditionState]:
        del params
        leaves, treedef = jax.tree.flatten(updates)
        if not leaves:
            return updates, state
        first = state.count == 0
        step = state.count + (0 if self.skip_first else 1)  # the parameter step this is: a skipped first call was none
        stacks = to_stacks(leaves, axes, self.storage.block_size)
        counts = {key: len(G) for key, G in stacks.items()}
        phases = self.policy.phases({key: self._refresh_flops(*G.shape[-2:]) for key, G in stacks.items()}, counts)

        def one(G: Array, mine: MatrixState, action: Array) -> tuple[Array, MatrixState, Array]:
            return self._one(G, mine, action, extra)

        def all_of(G: Array, mine: MatrixState, action: Array) -> Any:
            return over_stack(one, G, mine, action, uniform=self.policy.refresh == "every", max_stack=self.max_stack)

        directions, matrices, kept = {}, {}, state.kept
        for key, G in stacks.items():
            operands = (G, state.matrices[key], self.policy.action(first, step, jnp.asarray(phases[key], jnp.int32)))
            done = all_of(*operands) if self.mesh_axis is None else spread(all_of, self.mesh_axis, *operands)
            directions[key], matrices[key] = done[:2]
            if self.decomposition is not None:
                kept = kept + jnp.sum(done[2], dtype=jnp.int32)
        places = numbers(max(counts.values()), state.count)
        out = from_stacks(directions, leaves, axes, self.storage.block_size, places)
        return treedef.unflatten(out), PreconditionState(state.count + 1, kept, matrices)

    def _one(
        self, G: Array, state: MatrixState, action: Array, extra: dict[str, Any]
    ) -> tuple[Array, MatrixState, Array]:
        """A step of one matrix."""
        if self.factors is None or self.decomposition is None:
            U, inner = self.application.update(G, state.application, state.basis, **extra)
            return U, state._replace(application=inner), jnp.zeros([], jnp.int32)
        rule, decomposition = self.factors, self.decomposition
        m, n = G.shape
        old = self.storage.load(state.factors, m, n, G.dtype)
        factors = self.storage.store(rule.update(G, old, state.basis))
        basis = state.basis if rule.track is None else rule.track(G, old, state.basis)

        def renewed(moments: Moments) -> tuple[Any, Moments, Array]:
            loaded = lambda: rule.read(self.storage.load(factors, m, n, G.dtype))  # noqa: E731
            return renew(self.policy, decomposition, loaded, basis, moments, action)

        if self.application.sees_itself:
            basis, _, failed = renewed(Moments((), ()))
            U, inner = self.application.update(G, state.application, basis, **extra)
            return U, MatrixState(factors, basis, inner), failed
        U, inner = self.application.update(G, state.application, basis, **extra)
        if self.skip_first:
            first = action == START
            U = jnp.where(first, 0, U)
            inner = jax.tree.map(lambda new, old: jnp.where(first, old, new), inner, state.application)
        basis, moments, failed = renewed(self.application.moments(inner))
        return U, MatrixState(factors, basis, self.application.with_moments(inner, moments)), failed
