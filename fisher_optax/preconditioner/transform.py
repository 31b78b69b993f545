"""The machine behind every named optimizer: stacks of matrices, each with its factors, basis and application."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from .._xla import dynamic_indices, sequenced_after
from ..matrices.axes import LeafAxes, MatrixAxes
from ..matrices.blocks import by_shape, canonical_shape, from_stacks, matrix_shapes, sides_to_stacks, stack_key
from ..matrices.layout import Layout, matrix_layout, place, share_out, spread
from ..transforms.fallback import with_fallback
from ..transforms.first_step import skip_first_call
from ..transforms.freeze import Freezable, counted
from .contracts import Application, Decomposition, FactorRule, Kronecker, MatrixState
from .refresh import KEEP, Policy, renew
from .step import Step
from .storage import Store


class PreconditionState(NamedTuple):
    """State of a preconditioner."""

    count: Int[Array, ""]  # calls so far
    failures: Int[Array, ""]  # of decompositions: the last good one stayed
    matrices: dict[str, MatrixState]  # by shape, e.g. "384x1536"


@dataclasses.dataclass(frozen=True)
class Preconditioner:
    """One cell of factors x decomposition x application with its options."""

    factors: FactorRule | None
    decomposition: Decomposition | None
    application: Application
    storage: Store
    policy: Policy
    skip_first: bool
    max_stack: int
    mesh_axis: str | None

    def directions(
        self, method: str, fallback: optax.GradientTransformation, axes: Any, kinds: tuple[str, ...]
    ) -> optax.GradientTransformationExtraArgs:
        """The preconditioner on matrices and ``fallback`` on the rest, without learning rate and decay."""
        return with_fallback(
            method, self.on_matrices, self.with_first(fallback), axes=axes, kinds=kinds, describe=self.describe
        )

    def with_first(self, fallback: optax.GradientTransformation) -> optax.GradientTransformation:
        """``fallback``, which waits with the matrices where these make no step at the first call."""
        return skip_first_call(fallback) if self.skip_first and self.decomposition is not None else fallback

    def on_matrices(self, axes: list[MatrixAxes]) -> Freezable:
        """The bare transformation of a tree whose leaves are all matrices, with these axes."""
        return Freezable(
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
        self,
        axes: list[MatrixAxes],
        updates: Any,
        state: PreconditionState,
        params: Any = None,
        *,
        accept: Any = None,
        **extra: Any,
    ) -> tuple[Any, PreconditionState]:
        del params
        leaves, treedef = jax.tree.flatten(updates)
        if not leaves:
            return updates, state
        pieces = by_shape(leaves, axes, self.storage.block_size)
        given = self._given(extra, leaves, axes)
        step = Step(self.factors, self.application, self.storage, self.skip_first, self.max_stack, extra, accept)
        if self.decomposition is None:
            directions, matrices = self._applied(step, pieces, state)
            failures = jnp.zeros([], jnp.int32)
        else:
            stacks = {key: jnp.concatenate(Gs) for key, Gs in pieces.items()}
            of_all = functools.partial(self._renewed, step, state.count)
            operands = (stacks, state.matrices, given, self._actions(stacks, state.count, accept))
            done = of_all(*operands) if self.mesh_axis is None else spread(of_all, self.mesh_axis, *operands)
            directions, matrices, failed = done
            failures = jnp.sum(failed, dtype=jnp.int32)
        longest = max(len(U) for U in directions.values())
        places = dynamic_indices(longest, state.count >= 0 if accept is None else accept)
        out = from_stacks(directions, leaves, axes, self.storage.block_size, places)
        count = counted(accept, state.count)
        count = (
            count
            if accept is None or self.decomposition is not None
            else sequenced_after(list(directions.values())[-1], count, state.count)
        )
        return treedef.unflatten(out), PreconditionState(count, state.failures + failures, matrices)

    def _actions(self, stacks: dict[str, Array], count: Array, accept: Any) -> dict[str, Int[Array, " N"]]:
        """What is to be done with the bases of each matrix at the call after so many."""
        step = count + (0 if self.skip_first else 1)  # the parameter step this is: a skipped first call was none
        costs = {key: self._refresh_flops(*G.shape[-2:]) for key, G in stacks.items()}
        phases = self.policy.phases(costs, {key: len(G) for key, G in stacks.items()})
        actions = {
            key: self.policy.action(count == 0, step, jnp.asarray(phase, jnp.int32)) for key, phase in phases.items()
        }
        return actions if accept is None else {key: jnp.where(accept, action, KEEP) for key, action in actions.items()}

    def _applied(self, step: Step, pieces: dict[str, list[Array]], state: PreconditionState) -> tuple[Any, Any]:
        """Directions and state of an application alone, one stack after another, as they are what takes memory."""
        directions, matrices, last = {}, {}, None
        for key, Gs in pieces.items():
            Gs = Gs if step.accept is None else sequenced_after(last, Gs, state.count)
            operands = (jnp.concatenate(Gs), state.matrices[key], jnp.zeros(sum(map(len, Gs)), jnp.int32))
            of_stack = step.apply_stack
            done = of_stack(*operands) if self.mesh_axis is None else spread(of_stack, self.mesh_axis, *operands)
            directions[key], matrices[key] = done
            last = directions[key]
        return directions, matrices

    def _renewed(
        self, step: Step, count: Array, stacks: Any, states: Any, given: Any, actions: Any
    ) -> tuple[Any, Any, Any]:
        """Directions and states of all stacks, and how many sides failed on this device."""
        assert self.factors is not None
        assert self.decomposition is not None
        rule, itself = self.factors, self.application.sees_itself

        def read(key: str, factors: Any) -> Kronecker:
            _, m, n = stacks[key].shape
            return rule.read(self.storage.load(factors, m, n, stacks[key].dtype))

        directions = {}
        if itself:
            states = {key: step.observe_stack(G, states[key], given.get(key)) for key, G in stacks.items()}
        else:
            both = {key: step.stack(G, states[key], given.get(key), actions[key]) for key, G in stacks.items()}
            directions, states = ({key: x[i] for key, x in both.items()} for i in (0, 1))
        states, failed = renew(self.policy, self.decomposition, self.application, read, states, actions, count)
        if itself:
            both = {key: step.apply_stack(G, states[key], actions[key]) for key, G in stacks.items()}
            directions, states = ({key: x[i] for key, x in both.items()} for i in (0, 1))
        return directions, states, failed[None]

    def _given(self, extra: dict[str, Any], leaves: list[Array], axes: list[MatrixAxes]) -> dict[str, Any]:
        """The statistics of the leaves, taken out of ``extra`` and stacked like their matrices; nothing without any."""
        if self.factors is None or not self.factors.of_statistics:
            return {}
        statistics = extra.pop("statistics")
        return {} if statistics is None else sides_to_stacks(statistics, leaves, axes, self.storage.block_size)
