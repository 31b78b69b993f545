"""The machine behind every named optimizer: stacks of matrices, each with its factors, basis and application."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._xla import dynamic_indices
from ..matrices.axes import LeafAxes, MatrixAxes, Typed
from ..matrices.blocks import from_stacks, matrix_shapes, to_stacks
from ..matrices.layout import StackLayout, leaf_layouts, place, share_out, sides_to_stacks, spread
from ..statistics import LayerFactors
from ..transforms.fallback import record_zeros, with_fallback
from ..transforms.skip_nonfinite import Freezable, counted, skip_first_call
from .contracts import Application, Decomposition, FactorRule, Kronecker, MatrixState
from .refresh import KEEP, START, Policy, renew
from .step import Shape, Step, Store, gather, members, near_shapes, scatter


class PreconditionState(NamedTuple):
    """State of a preconditioner."""

    count: Int[Array, ""]  # calls so far
    failures: Int[Array, ""]  # of decompositions: the last good one stayed
    matrices: dict[str, MatrixState]  # by shape, e.g. "384x1536", or by those that share a stack: "1*9x18+4*10x20"


@dataclasses.dataclass(frozen=True)
class Preconditioner:
    """One cell of factors x decomposition x application with its options."""

    factors: FactorRule
    decomposition: Decomposition
    application: Application
    storage: Store
    policy: Policy
    skip_first: bool
    max_stack: int
    mesh_axis: str | None

    def directions(
        self, method: str, fallback: optax.GradientTransformation, axes: PyTree, kinds: tuple[str, ...]
    ) -> optax.GradientTransformationExtraArgs:
        """The preconditioner on matrices and ``fallback`` on the rest, without learning rate and decay."""
        return with_fallback(
            method, self.on_matrices, self.with_first(fallback), axes=axes, kinds=kinds, describe=self.describe
        )

    def with_first(self, fallback: optax.GradientTransformation) -> optax.GradientTransformation:
        """``fallback``, which waits with the matrices where these make no step at the first call."""
        return skip_first_call(fallback) if self.skip_first else fallback

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
        factors = jax.eval_shape(lambda: rule.init(m, n, *self.storage.wanted(m, n), jnp.float32))
        for d, A in zip((m, n), factors[:2], strict=True):
            if d > longest:
                yield f"{d} > max_precond_dim={longest}: {f'{len(A.rows)} rows' if A else 'as it is'}"

    def _refresh_flops(self, m: int, n: int) -> int:
        """``A Q`` (2 d³) and a Householder QR with its Q (8/3 d³) a side, 4 mn (m + n) for carrying a momentum."""
        return sum(
            14 * d**3 // 3 + 4 * m * n * d
            for d, wanted in zip((m, n), self.storage.wanted(m, n), strict=True)
            if wanted
        )

    def _init(self, axes: list[MatrixAxes], params: PyTree) -> PreconditionState:
        leaves, treedef = jax.tree.flatten(params)
        zero = lambda: jnp.zeros([], jnp.int32)  # noqa: E731
        if not leaves:  # optax.tree.map_params asks with a placeholder where the parameters would be
            return PreconditionState(zero(), zero(), treedef.unflatten([]))
        states, own = {}, leaf_layouts(leaves, axes, self.storage.block_size)
        stacks = self._together(own)
        record_zeros(*(self._total(f, stacks) - self._total(f, own) for f in (self._bytes, self._flops)))
        for key, stack in stacks.items():
            of_matrix = self._start(*stack.shape, stack.dtype)
            state = jax.tree.map(lambda x, n=stack.count: jnp.broadcast_to(x, (n, *x.shape)), of_matrix)
            states[key] = share_out(place(state, stack.layouts), self.mesh_axis)
        return PreconditionState(zero(), zero(), states)

    def _names(self, own: Mapping[str, Typed]) -> tuple[str, ...]:
        """Of the stacks that the matrices of these ``(N, m, n)`` are in: one a shape, or a few of near ones."""
        if not (self.factors.ignores_zeros and self.application.ignores_zeros):
            return tuple(own)
        wanted = self.storage.wanted
        return near_shapes(tuple(Shape(k, G.shape, str(G.dtype), all(wanted(*G.shape[1:]))) for k, G in own.items()))

    def _together(self, own: dict[str, StackLayout]) -> dict[str, StackLayout]:
        """What the state's stacks hold, from what there is of each shape."""
        stacks = {}
        for key in self._names({k: jax.ShapeDtypeStruct((s.count, *s.shape), s.dtype) for k, s in own.items()}):
            parts = [own[name] for name in members(key)]
            m, n = (max(part.shape[i] for part in parts) for i in (0, 1))
            layouts = set().union(*(part.layouts for part in parts))
            stacks[key] = StackLayout((m, n), parts[0].dtype, sum(part.count for part in parts), layouts)
        return stacks

    def _total(self, of_matrix: Callable[[StackLayout], int], stacks: dict[str, StackLayout]) -> int:
        return sum(stack.count * of_matrix(stack) for stack in stacks.values())

    def _bytes(self, stack: StackLayout) -> int:
        """Of the state of a matrix, counters apart."""
        state = jax.eval_shape(lambda: self._start(*stack.shape, stack.dtype))
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state) if x.ndim)

    def _flops(self, stack: StackLayout) -> int:
        return self._refresh_flops(*stack.shape)

    def _start(self, m: int, n: int, dtype: DTypeLike) -> MatrixState:
        """The state of one matrix."""
        zeros = jnp.zeros((m, n), dtype)
        full = self.factors.init(m, n, *self.storage.wanted(m, n), zeros.dtype)
        return MatrixState(
            self.storage.store(full),
            self.storage.identity(full, self.decomposition.returns),
            self.application.init(zeros),
        )

    def _update(
        self,
        axes: list[MatrixAxes],
        updates: PyTree,
        state: PreconditionState,
        params: PyTree = None,
        *,
        accept: Bool[Array, ""] | None = None,
        statistics: PyTree = None,  # a list of `LayerFactors` where factors are of these
        **extra: PyTree,
    ) -> tuple[PyTree, PreconditionState]:
        del params
        leaves, treedef = jax.tree.flatten(updates)
        if not leaves:
            return updates, state
        own = to_stacks(leaves, axes, self.storage.block_size)
        stacks = gather(own, self._names(own))
        sides: dict[str, LayerFactors] = {}
        if self.factors.of_statistics and statistics is not None:
            sides = sides_to_stacks(statistics, leaves, axes, self.storage.block_size)
        elif statistics is not None:
            extra["statistics"] = statistics  # whatever they are to what runs inside
        step = Step(self.factors, self.application, self.storage, self.skip_first, self.max_stack, extra, accept)
        of_all = functools.partial(self._renewed, step, state.count)
        operands = (stacks, state.matrices, sides, self._actions(stacks, state.count, accept))
        result = of_all(*operands) if self.mesh_axis is None else spread(of_all, self.mesh_axis, *operands)
        directions, matrices, failed = result
        directions = scatter(directions, own)
        longest = max(len(U) for U in directions.values())
        places = dynamic_indices(longest, state.count >= 0 if accept is None else accept)
        out = from_stacks(directions, leaves, axes, self.storage.block_size, places)
        failures = state.failures + jnp.sum(failed, dtype=jnp.int32)
        return treedef.unflatten(out), PreconditionState(counted(accept, state.count), failures, matrices)

    def _actions(
        self, stacks: dict[str, Array], count: Array, accept: Bool[Array, ""] | None
    ) -> dict[str, Int[Array, " N"]]:
        """What is to be done with the bases of each matrix at the call after so many."""
        step = count + (0 if self.skip_first else 1)  # the parameter step this is: a skipped first call was none
        costs = {key: self._refresh_flops(*G.shape[-2:]) for key, G in stacks.items()}
        phases = self.policy.phases(costs, {key: len(G) for key, G in stacks.items()})
        actions = {
            key: self.policy.action(count == 0, step, jnp.asarray(phase, jnp.int32)) for key, phase in phases.items()
        }
        return actions if accept is None else {key: jnp.where(accept, action, KEEP) for key, action in actions.items()}

    def _renewed(
        self,
        step: Step,
        count: Int[Array, ""],
        stacks: dict[str, Float[Array, "N m n"]],
        states: dict[str, MatrixState],
        sides: dict[str, LayerFactors],
        actions: dict[str, Int[Array, " N"]],
    ) -> tuple[dict[str, Float[Array, "N m n"]], dict[str, MatrixState], Int[Array, " 1"]]:
        """Directions and states of all stacks, and how many sides failed on this device."""
        rule, itself = self.factors, self.application.sees_itself

        def read(key: str, factors: Kronecker) -> Kronecker:
            _, m, n = stacks[key].shape
            return rule.read(self.storage.load(factors, m, n, stacks[key].dtype))

        if rule.begins is not None:
            actions = {key: self._begun(step, states[key], sides.get(key), action) for key, action in actions.items()}
        directions = {}
        if itself:
            states = {key: step.observe_stack(G, states[key], sides.get(key)) for key, G in stacks.items()}
        else:
            both = {key: step.stack(G, states[key], sides.get(key), actions[key]) for key, G in stacks.items()}
            directions, states = _unzipped(both)
        states, failed = renew(self.policy, self.decomposition, self.application, read, states, actions, count)
        if itself:
            both = {key: step.apply_stack(G, states[key], actions[key]) for key, G in stacks.items()}
            directions, states = _unzipped(both)
        return directions, states, failed[None]

    def _begun(
        self, step: Step, state: MatrixState, statistics: LayerFactors | None, action: Int[Array, " N"]
    ) -> Int[Array, " N"]:
        """``action``, but to start with the matrices that get their first statistics."""
        if statistics is None or self.factors.begins is None:
            return action
        begins = self.factors.begins(statistics, state.factors)
        return jnp.where(begins if step.accept is None else begins & step.accept, START, action)


def _unzipped(
    both: dict[str, tuple[Float[Array, "N m n"], MatrixState]],
) -> tuple[dict[str, Float[Array, "N m n"]], dict[str, MatrixState]]:
    return {key: U for key, (U, _) in both.items()}, {key: state for key, (_, state) in both.items()}
