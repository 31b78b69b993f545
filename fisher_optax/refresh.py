"""When bases are renewed, and what must be carried along when they turn."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array, Float, Int

from .sharding import spread
from .types import Decomposition, Moments, Refreshed


class Unit(NamedTuple):
    """Matrices that are renewed together: all of matrix array ``index``, or members ``start:stop`` of a stack."""

    index: int
    start: int = 0
    stop: int | None = None

    def take(self, x: Any) -> Any:
        return x if self.stop is None else jax.tree.map(lambda a: a[self.start : self.stop], x)

    def put(self, x: Any, new: Any) -> Any:
        return new if self.stop is None else jax.tree.map(lambda a, b: a.at[self.start : self.stop].set(b), x, new)


class Matrices(NamedTuple):
    """One entry a unit: what a refresh reads (factors) and turns (bases, moments)."""

    factors: list[Any]
    bases: list[Any]
    linear: list[tuple[Array, ...]]
    quadratic: list[tuple[Array, ...]]


class Policy(NamedTuple):
    """When and how bases are renewed: see `precondition` for the words."""

    refresh: str = "every"
    frequency: int = 10
    tolerance: float = 0.01
    transport: str = "permute"
    mesh_axis: str | None = None

    def check(self) -> "Policy":
        """Itself, or a ValueError that names what is wrong."""
        for name, value, known in (("refresh", self.refresh, ("every", "adaptive", "staggered")), ("transport", self.transport, ("permute", "squared"))):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}; got {value!r}.")
        if isinstance(self.frequency, bool) or not isinstance(self.frequency, int) or self.frequency < 1:
            raise ValueError(f"precondition_frequency must be a positive integer number of steps; got {self.frequency!r}.")
        return self


def phases(costs: list[float], counts: list[int | None], policy: Policy) -> list[list[Unit]]:
    """The units due at each phase of the refresh period.

    ``costs`` is for one matrix, ``counts`` how many a stack holds (None: no stack). All are due at phase 0, unless staggered: then each phase
    gets its share by cost, the costliest first, to the phase with the least so far, and a stack's members are dealt out in runs.
    """
    if policy.refresh != "staggered":
        return [[Unit(i) for i in range(len(costs))]]
    load = [0.0] * policy.frequency
    due: list[list[Unit]] = [[] for _ in load]
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        count = counts[i]
        share = [0] * len(load)
        for _ in range(count or 1):
            phase = load.index(min(load))
            load[phase] += costs[i]
            share[phase] += 1
        start = 0
        for phase, members in enumerate(share):
            if members:
                due[phase].append(Unit(i) if count is None else Unit(i, start, start + members))
            start += members
    return due


def renew(
    policy: Policy, decomposition: Decomposition, due: list[list[Unit]], first: Array, step: Int[Array, ""], whole: Matrices
) -> tuple[Matrices, Int[Array, ""]]:
    """Renew the bases that are due at ``step`` (all of them, exactly, on the first call); also how many kept their old value."""
    kept = jnp.zeros([], jnp.int32)
    for phase, units in enumerate(due):
        if not units:
            continue
        part = Matrices(*([unit.take(entries[unit.index]) for unit in units] for entries in whole))
        action = jnp.where(first, 2, jnp.where(step % policy.frequency == phase, 1, 0))
        branches = [_keep, _turn(policy, decomposition, start=False), _turn(policy, decomposition, start=True)]
        turned, failed = _switch(action, branches, part)
        for unit, *new in zip(units, *turned, strict=True):
            for entries, value in zip(whole[1:], new, strict=True):
                entries[unit.index] = unit.put(entries[unit.index], value)
        kept = kept + failed
    return whole, kept


def _switch(index: Array, branches: list[Callable[[Matrices], Any]], operand: Matrices) -> Any:
    if isinstance(index, jax.core.Tracer):
        return jax.lax.switch(index, branches, operand)
    return branches[int(index)](operand)


def _keep(part: Matrices) -> Any:
    return part[1:], jnp.zeros([], jnp.int32)


def _turn(policy: Policy, decomposition: Decomposition, start: bool) -> Callable[[Matrices], Any]:
    """The branch that decomposes the factors of its units and carries their moments over, all units of one shape as one stack."""

    def decompose(A: Array, Q: Array) -> Refreshed:
        if start:
            return decomposition.start(A, Q)
        if policy.refresh == "adaptive":
            return decomposition.refresh_where(A, Q, policy.tolerance)
        return decomposition.refresh(A, Q)

    def side(A: Array | None, Q: Array | None) -> Refreshed:
        if A is None or Q is None:
            return Refreshed(None, None, jnp.zeros([], bool))
        Q = Q.astype(A.dtype)
        return decompose(A, Q) if policy.mesh_axis is None else spread(decompose, policy.mesh_axis, A, Q)

    def one_shape(stack: Matrices) -> tuple[Any, Array]:
        left, right = (side(A, Q) for A, Q in zip(stack.factors, stack.bases, strict=True))
        new = type(stack.bases)(left.value, right.value)
        linear = tuple(_rotate(m, stack.bases, new) for m in stack.linear)
        if start or policy.transport == "squared":
            quadratic = tuple(_rotate_squares(v, stack.bases, new) for v in stack.quadratic)
        else:
            quadratic = tuple(_permute(v, left.order, right.order) for v in stack.quadratic)
        new = jax.tree.map(lambda q, old: q.astype(old.dtype), new, stack.bases)
        return (new, linear, quadratic), jnp.sum(left.failed, dtype=jnp.int32) + jnp.sum(right.failed, dtype=jnp.int32)

    def turn(part: Matrices) -> Any:
        units = [Matrices(*entries) for entries in zip(*part, strict=True)]
        shapes: dict[Any, list[int]] = {}
        for i, unit in enumerate(units):
            shapes.setdefault(tuple(str(x.shape[-2:]) for x in jax.tree.leaves(unit)), []).append(i)
        out: list[Any] = [None] * len(units)
        failed = jnp.zeros([], jnp.int32)
        for members in shapes.values():
            done, bad = one_shape(_stack([units[i] for i in members]))
            failed = failed + bad
            for i, turned in zip(members, _unstack(done, [units[i][1:] for i in members]), strict=True):
                out[i] = turned
        return tuple(list(entries) for entries in zip(*out, strict=True)), failed

    return turn


def _stack(units: list[Any]) -> Any:
    """All matrices of the units, which have one shape, along one leading axis."""
    return jax.tree.map(lambda *xs: jnp.concatenate([x.reshape(-1, *x.shape[-2:]) for x in xs]), *units)


def _unstack(stack: Any, like: list[Any]) -> list[Any]:
    """The inverse of `_stack`."""
    counts = [1 if x.ndim == 2 else len(x) for x in (jax.tree.leaves(unit)[0] for unit in like)]
    starts = [sum(counts[:i]) for i in range(len(counts))]
    return [jax.tree.map(lambda s, x, a=a, n=n: s[a : a + n].reshape(x.shape), stack, unit) for unit, a, n in zip(like, starts, counts, strict=True)]


def _rotate(m: Float[Array, "*batch m n"], old: Any, new: Any) -> Array:
    """``Q_newᵀ Q_old m``, and the same on the right: exact, out of the old basis and into the new one."""
    x = m.astype(jnp.promote_types(m.dtype, jnp.float32))
    for side, (P, Q) in enumerate(zip(old, new, strict=True)):
        if P is not None:
            x = _apply(Q.mT, _apply(P, x, side), side)
    return x.astype(m.dtype)


def _rotate_squares(v: Float[Array, "*batch m n"], old: Any, new: Any) -> Array:
    """``(C∘C) v (C∘C)ᵀ`` with ``C = Q_newᵀ Q_old``: exact if the entries of the gradient in the old basis are uncorrelated."""
    x = v.astype(jnp.promote_types(v.dtype, jnp.float32))
    for side, (P, Q) in enumerate(zip(old, new, strict=True)):
        if P is not None:
            x = _apply(jnp.square(jnp.matmul(Q.mT.astype(x.dtype), P.astype(x.dtype), precision=Precision.HIGHEST)), x, side)
    return x.astype(v.dtype)


def _permute(v: Float[Array, "*batch m n"], left: Array | None, right: Array | None) -> Array:
    """The SOAP authors' transport: entries follow the columns of the basis as they are reordered, and ignore that these turn."""
    v = v if left is None else jnp.take_along_axis(v, left[..., :, None], axis=-2)
    return v if right is None else jnp.take_along_axis(v, right[..., None, :], axis=-1)


def _apply(Q: Array, x: Array, side: int) -> Array:
    """``Q x`` on the left side (0), ``x Qᵀ`` on the right."""
    Q = Q.astype(x.dtype)
    return jnp.matmul(Q, x, precision=Precision.HIGHEST) if side == 0 else jnp.matmul(x, Q.mT, precision=Precision.HIGHEST)
