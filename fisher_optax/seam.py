"""The machine behind every named optimizer: stacks of matrices, each with its factors, basis and application."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from .branching import after, held, numbers
from .matrices import by_shape, canonical_shape, from_stacks, matrix_shapes, sides_to_stacks, stack_key
from .matrix_axes import LeafAxes, MatrixAxes
from .refresh import KEEP, START, Policy, renew
from .routing import by_axes, skip_first_call
from .sharding import Layout, matrix_layout, place, share_out, spread
from .stacks import over_stack
from .storage import Storage
from .types import Application, Decomposition, FactorRule, Moments


class MatrixState(NamedTuple):
    """What is kept of a matrix; in the state, of all matrices of one shape along a leading axis."""

    factors: Any  # Kronecker, or () without a decomposition
    basis: Any  # Eigenbasis or InverseRoot, or ()
    application: Any  # the application's own state


class PreconditionState(NamedTuple):
    """State of the seam."""

    HOLDS_ITSELF = True  # under the argument ``go``

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
        """What a report says of a leaf: its matrices, the flops of renewing their bases, and which sides have none."""
        assert leaf.axes is not None
        block_size = self.storage.block_size
        shapes = matrix_shapes(leaf.shape, leaf.axes, block_size)
        flops = sum(math.prod(s[:-2]) * self._refresh_flops(*s[-2:]) for s in shapes)
        reason = "; ".join([leaf.reason, *self._too_long(*shapes[0][-2:])])
        return {"matrices": tuple(shapes), "refresh_flops": flops, "block_size": block_size, "reason": reason}

    def _too_long(self, m: int, n: int) -> Iterator[str]:
        """What becomes of a side that is longer than a factor may be."""
        rule, longest = self.factors, self.storage.max_dim
        if rule is None:
            return
        kept = jax.eval_shape(lambda: rule.init(m, n, *self.storage.wanted(m, n), jnp.float32))
        for d, A in zip((m, n), kept[:2], strict=True):
            if d > longest:
                yield f"{d} > max_precond_dim={longest}: {f'{len(A.rows)} rows' if A else 'as it is'}"

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
        count, kept = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32)
        if not leaves:  # optax.tree.map_params asks with a placeholder where the parameters would be
            return PreconditionState(count, kept, treedef.unflatten([]))
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
        states = {key: share_out(place(state, layouts[key]), self.mesh_axis) for key, state in states.items()}
        return PreconditionState(count, kept, states)

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
        go = extra.pop("go", None)  # whether to change any state at all
        first = state.count == 0
        step = state.count + (0 if self.skip_first else 1)  # the parameter step this is: a skipped first call was none
        pieces = by_shape(leaves, axes, self.storage.block_size)
        given = self._given(extra, leaves, axes)
        counts = {key: sum(map(len, Gs)) for key, Gs in pieces.items()}
        phases = self.policy.phases({key: self._refresh_flops(*Gs[0].shape[-2:]) for key, Gs in pieces.items()}, counts)

        def one(
            G: Array, mine: MatrixState, action: Array, seen: Any, alone: bool = False
        ) -> tuple[Array, MatrixState, Array]:
            U, new, failed = self._one(G, mine, action, seen, extra, go, alone)
            # Nothing touches a basis but an action, and factors held themselves.
            return U, new._replace(application=held(go, new.application, mine.application)), failed

        uniform = self.policy.refresh == "every"

        def all_of(G: Array, mine: MatrixState, action: Array, seen: Any) -> Any:
            return over_stack(one, G, mine, action, seen, uniform=uniform, max_stack=self.max_stack)

        # Where no conditional keeps all results, and the stacks of directions are what takes memory.
        one_by_one = go is not None and self.factors is None
        directions, matrices, kept, last = {}, {}, state.kept, None
        for key, Gs in pieces.items():
            action = self.policy.action(first, step, jnp.asarray(phases[key], jnp.int32))
            action = action if go is None else jnp.where(go, action, KEEP)
            Gs = after(last, Gs, state.count) if one_by_one else Gs
            operands = (jnp.concatenate(Gs), state.matrices[key], action, given.get(key))
            done = all_of(*operands) if self.mesh_axis is None else spread(all_of, self.mesh_axis, *operands)
            directions[key], matrices[key] = done[:2]
            last = directions[key]
            if self.decomposition is not None:
                kept = kept + jnp.sum(done[2], dtype=jnp.int32)
        places = numbers(max(counts.values()), state.count >= 0 if go is None else go)
        out = from_stacks(directions, leaves, axes, self.storage.block_size, places)
        count = state.count + (1 if go is None else go.astype(jnp.int32))
        count = after(last, count, state.count) if one_by_one else count
        return treedef.unflatten(out), PreconditionState(count, kept, matrices)

    def _given(self, extra: dict[str, Any], leaves: list[Array], axes: list[MatrixAxes]) -> dict[str, Any]:
        """The statistics of the leaves, taken out of ``extra`` and stacked like their matrices; nothing without any."""
        if self.factors is None or not self.factors.of_statistics:
            return {}
        statistics = extra.pop("statistics")
        return {} if statistics is None else sides_to_stacks(statistics, leaves, axes, self.storage.block_size)

    def _one(
        self, G: Array, state: MatrixState, action: Array, seen: Any, extra: dict[str, Any], go: Any, alone: bool
    ) -> tuple[Array, MatrixState, Array]:
        """A step of one matrix, of whose layer these are the statistics; ``alone`` in its stack, or one of several."""
        if self.factors is None or self.decomposition is None:
            U, inner = self.application.update(G, state.application, state.basis, **extra)
            return U, state._replace(application=inner), jnp.zeros([], jnp.int32)
        rule, decomposition, application = self.factors, self.decomposition, self.application
        m, n = G.shape
        factors, basis = self._followed(rule, seen if rule.of_statistics else G, state, G, go, alone)
        before = state.application
        if application.observe is not None and seen is not None:
            before = application.observe(before, seen, state.basis)

        def renewed(moments: Moments) -> tuple[Any, Moments, Array]:
            loaded = lambda: rule.read(self.storage.load(factors, m, n, G.dtype))  # noqa: E731
            return renew(self.policy, decomposition, loaded, basis, moments, action)

        if application.sees_itself:
            basis, moments, failed = renewed(application.moments(before))
            U, inner = application.update(G, application.with_moments(before, moments), basis, **extra)
            return U, MatrixState(factors, basis, inner), failed
        U, inner = application.update(G, before, basis, **extra)
        if self.skip_first:
            first = action == START
            U = jnp.where(first, 0, U)
            inner = jax.tree.map(lambda new, old: jnp.where(first, old, new), inner, before)
        basis, moments, failed = renewed(application.moments(inner))
        return U, MatrixState(factors, basis, application.with_moments(inner, moments)), failed

    def _followed(
        self, rule: FactorRule, seen: Any, state: MatrixState, G: Array, go: Any, alone: bool
    ) -> tuple[Any, Any]:
        """Factors, and eigenvalues in the basis, after what was seen: the gradient, statistics, or None of these."""
        if seen is None:
            return state.factors, state.basis
        # One of several is a slice of its stack, and copied in any case.
        if alone and rule.overwrite is not None and self.storage.plain:
            return rule.overwrite(seen, state.factors, go), state.basis
        m, n = G.shape
        old = self.storage.load(state.factors, m, n, G.dtype)
        basis = state.basis if rule.track is None else rule.track(seen, old, state.basis)
        return held(go, self.storage.store(rule.update(seen, old, state.basis)), state.factors), basis
