"""When bases are renewed, and how: one loop for all sides of a length, over those that are due.

A loop's length is a number that the program finds out, and each pass of it overwrites one side's basis: there is no
conditional over a state, of which a compiler keeps two copies, and one decomposition in the program for each length.
"""

from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from .. import linalg
from .._xla import branch, sequenced_after
from ..linalg.eigenbasis import LowRank
from ..matrices.blocks import member_of, put, repeat
from .contracts import Application, Decomposition, Due, Eigenpairs, Kronecker, MatrixState, Moments, Refresh, Refreshed

KEEP, REFRESH, START = 0, 1, 2


class Policy(NamedTuple):
    """`fo.Refresh` and the number of steps between refreshes."""

    options: Refresh
    frequency: int

    def phases(self, costs: Mapping[str, float], counts: Mapping[str, int]) -> dict[str, list[int]]:
        """For each stack the step of the period at which each of its matrices is due: 0, or, staggered, whatever evens
        the load out.

        ``costs`` is for one matrix of a stack, ``counts`` how many it holds. The costliest are dealt out first, each
        to the phase with the least so far.
        """
        if self.options.when != "staggered":
            return {key: [0] * count for key, count in counts.items()}
        load = [0.0] * self.frequency
        due: dict[str, list[int]] = {key: [] for key in counts}
        for key in sorted(counts, key=lambda key: -costs[key]):
            for _ in range(counts[key]):
                phase = load.index(min(load))
                load[phase] += costs[key]
                due[key].append(phase)
        return due

    def action(self, first: Bool[Array, ""], step: Int[Array, ""], phase: Int[Array, "*stack"]) -> Int[Array, "*stack"]:
        """What is to be done at this step with a matrix of this phase."""
        return jnp.where(first, START, jnp.where(step % self.frequency == phase, REFRESH, KEEP))


Place = tuple[str, int]  # a stack, and its matrices' left (0) or right (1) side
Read = Callable[[str, Kronecker], Kronecker]  # what is decomposed, of a matrix of that stack with those factors
Side = tuple[Float[Array, "*stack d k"], Float[Array, "*stack k"] | None]  # a basis and, of `Eigenpairs`, its values
# One side's factor, old basis and values to the new ones, the order of the columns and whether it failed.
RenewSide = Callable[[PyTree, Array, Array | None], tuple[Side, Array, Array]]


def renew(
    policy: Policy,
    decomposition: Decomposition,
    application: Application,
    read: Read,
    states: Mapping[str, MatrixState],
    actions: Mapping[str, Int[Array, " N"]],
    count: Int[Array, ""],
) -> tuple[dict[str, MatrixState], Int[Array, ""]]:
    """The states of all stacks after ``actions``, and how many sides failed; ``count`` is any counter from 0 on."""
    due = who_is_due(actions)
    first = jnp.any(jnp.concatenate([action == START for action in actions.values()]))
    moments = {key: application.moments(state.application) for key, state in states.items()}
    rotations = application.precision
    # Linear moments leave the old bases before these are overwritten.
    straight = {key: out_of_bases(moments[key].linear, states[key].basis, due[key], rotations) for key in states}
    step = _step_of(decomposition, first, policy.options.tolerance if policy.options.when == "adaptive" else None)
    follow = policy.options.transport == "permute" and any(any(m[1:]) for m in moments.values())
    turned: dict[Place, Turned] = {}
    failed = jnp.zeros([], jnp.int32)
    for group in by_length(states, read):
        # Not before the moments are out.
        total = sequenced_after(straight, sum((due[key].count for key, _ in group), jnp.zeros([], jnp.int32)), count)
        sides, bad = _renewed(group, total, step, read, states, due, follow)
        turned, failed = turned | sides, failed + bad
    new = {}
    for key, state in states.items():
        both = [turned.get((key, i)) for i in (0, 1)]
        basis = type(state.basis)(
            *(None if side is None else side.Q for side in both),
            *(None if side is None else side.values for side in both if isinstance(state.basis, Eigenpairs)),
        )
        old = state.basis if policy.options.transport == "squared" else None
        orders = [None if side is None else side.orders for side in both]
        carried = into_bases(moments[key]._replace(linear=straight[key]), orders, basis, old, due[key], rotations)
        carried = jax.tree.map(lambda x, y: x.astype(y.dtype), carried, moments[key])
        new[key] = state._replace(basis=basis, application=application.with_moments(state.application, carried))
    return new, failed


def who_is_due(actions: Mapping[str, Int[Array, " N"]]) -> dict[str, Due]:
    """Of each stack, with one sort for all."""
    lengths = [len(action) for action in actions.values()]
    starts = np.cumsum([0, *lengths])
    keep = jnp.concatenate([action == KEEP for action in actions.values()])
    order = jnp.argsort(2 * np.repeat(np.arange(len(lengths)), lengths) + keep)
    return {
        key: Due(order[start : start + len(action)] - start, jnp.sum(action != KEEP, dtype=jnp.int32))
        for (key, action), start in zip(actions.items(), starts, strict=False)
    }


class Turned(NamedTuple):
    """One side of all matrices of a stack, after a refresh."""

    Q: Float[Array, "N d k"]
    values: Float[Array, "N k"] | None
    orders: Callable[[Array], Int[Array, " k"]]  # of the r-th matrix that was due: as in `Refreshed`


def by_length(states: Mapping[str, MatrixState], read: Read) -> list[list[Place]]:
    """The sides whose factors and bases look the same, which one loop can renew."""
    groups: dict[Hashable, list[Place]] = {}
    for key, state in states.items():
        member = jax.eval_shape(lambda key=key, state=state: (read(key, member_of(state.factors, 0)), state.basis))
        factors, basis = member
        for i, Q in enumerate(basis[:2]):
            if Q is not None:
                leaves = [(x.shape, x.dtype) for x in jax.tree.leaves(factors[i])]
                kind = (jax.tree.structure(factors[i]), *leaves, Q.shape[1:], Q.dtype, isinstance(basis, Eigenpairs))
                groups.setdefault(kind, []).append((key, i))
    return list(groups.values())


def _renewed(
    group: list[Place],
    total: Int[Array, ""],
    step: RenewSide,
    read: Read,
    states: Mapping[str, MatrixState],
    due: Mapping[str, Due],
    follow: bool,
) -> tuple[dict[Place, Turned], Int[Array, ""]]:
    """All sides of one length, one after another; and how many failed."""
    starts = [sum((due[key].count for key, _ in group[:k]), jnp.zeros([], jnp.int32)) for k in range(len(group))]
    sides = [_side(states[key].basis, i) for key, i in group]

    def body(t: Array, carry: PyTree) -> PyTree:
        stacks, orders, failed = carry
        now = sum(((t >= start).astype(jnp.int32) for start in starts[1:]), jnp.zeros([], jnp.int32))
        js = [
            due[key].places[jnp.clip(t - start, 0, len(due[key].places) - 1)]
            for (key, _), start in zip(group, starts, strict=True)
        ]
        factors = [read(key, member_of(states[key].factors, j))[i] for (key, i), j in zip(group, js, strict=True)]
        olds = [member_of(stack, j) for stack, j in zip(stacks, js, strict=True)]
        new, order, bad = step(_selected(now, factors), *_selected(now, olds))
        written = [new if len(group) == 1 else _selected(now == k, [old, new]) for k, old in enumerate(olds)]
        stacks = [put(stack, j, x) for stack, j, x in zip(stacks, js, written, strict=True)]
        return stacks, put(orders, t, order) if follow else orders, failed + bad

    places = sum(len(Q) for Q, _ in sides) if follow else 0
    orders, none = jnp.zeros((places, sides[0][0].shape[-1]), jnp.int32), jnp.zeros([], jnp.int32)
    stacks, orders, failed = repeat(total, sum(len(Q) for Q, _ in sides), body, (sides, orders, none))
    turned = {
        place: Turned(Q, values, lambda r, start=start: orders[start + r])
        for place, (Q, values), start in zip(group, stacks, starts, strict=True)
    }
    return turned, failed


def _side(basis: PyTree, i: int) -> Side:
    return basis[i], basis[i + 2] if isinstance(basis, Eigenpairs) else None


def _selected(k: Array, cases: list[PyTree]) -> PyTree:
    return cases[0] if len(cases) == 1 else jax.tree.map(lambda *xs: jax.lax.select_n(k, *xs), *cases)


def _step_of(decomposition: Decomposition, first: Bool[Array, ""], tolerance: float | None) -> RenewSide:
    """What is done to one side."""

    def step(A: PyTree, Q: Array, values: Array | None) -> tuple[Side, Array, Array]:
        same = jnp.arange(Q.shape[-1])
        if isinstance(A, LowRank):
            result = Refreshed(linalg.range_of_rows(A.rows), same)
        else:
            result = decomposition.renew(A, Q.astype(A.dtype), first, tolerance)
        value = result.value.astype(Q.dtype)
        bad = linalg.keep_last_good(value, Q)[1]
        # As a conditional's result it is made before stacks are written: one fused with the other reads them all.
        new = branch(bad, lambda: Q, lambda: value)
        order = jnp.where(bad, same, result.order)
        return (new, None if values is None else _measured(A, new, values)), order, bad.astype(jnp.int32)

    return step


def _measured(A: Array | LowRank, Q: Array, old: Array) -> Array:
    """The values ``diag(Qᵀ A Q)``; the old ones where these are not finite."""
    if isinstance(A, LowRank):
        new = jnp.sum(jnp.square(linalg.times(A.rows, Q)), 0, keepdims=True)
    else:
        new = jnp.sum(Q.astype(A.dtype) * linalg.project(A, Q), 0, keepdims=True).astype(old.dtype)
    return linalg.keep_last_good(new, old[None])[0][0]


# What is carried along when bases turn: moments that were kept in them.


def out_of_bases(
    linear: tuple[Float[Array, "N m n"], ...], bases: PyTree, due: Due, precision: str
) -> tuple[Float[Array, "N m n"], ...]:
    """``Q_L m Q_Rᵀ`` of the matrices that are due, in float32 at least."""

    def body(r: Array, stacks: list[Array]) -> list[Array]:
        j = due.places[r]
        Q_L, Q_R = member_of(tuple(bases[:2]), j)
        return put(stacks, j, [linalg.out_of_basis(Q_L, x, Q_R, precision) for x in member_of(stacks, j)])

    return tuple(repeat(due.count, len(due.places), body, [_wide(m) for m in linear])) if linear else ()


def into_bases(
    moments: Moments,
    orders: list[Callable[[Array], Array] | None],
    bases: PyTree,
    old: PyTree,
    due: Due,
    precision: str,
) -> Moments:
    """The moments of the matrices that are due, in new bases.

    Args:
      moments: linear ones outside any basis, the others in the old bases.
      orders: of the r-th matrix that is due, which column of the old basis each new one continues. Squares follow
        these, and ignore that the columns turn besides (the SOAP authors' way).
      bases: the new ones.
      old: the old ones, with which squares become ``(C∘C) v (C∘C)ᵀ``, ``C = Q_newᵀ Q_old``: exact if the entries of the
        gradient in the old basis are uncorrelated. None: they follow the orders.
      due: which matrices.
      precision: of the products.
    """

    def body(r: Array, stacks: Moments) -> Moments:
        j = due.places[r]
        now = member_of(stacks, j)
        Q_L, Q_R = member_of(tuple(bases[:2]), j)
        linear = tuple(linalg.into_basis(Q_L, _wide(x), Q_R, precision) for x in now.linear)
        if not any(now[1:]):
            return put(stacks, j, now._replace(linear=linear))
        if old is None:
            left, right = (None if order is None else order(r) for order in orders)
            return put(stacks, j, _permuted(now, left, right)._replace(linear=linear))
        P_L, P_R = member_of(tuple(old[:2]), j)
        C_L, C_R = _squares(Q_L, P_L, precision), _squares(Q_R, P_R, precision)
        return put(stacks, j, _squared(now, C_L, C_R, precision)._replace(linear=linear))

    return repeat(due.count, len(due.places), body, moments) if any(moments) else moments


def _permuted(now: Moments, left: Int[Array, " j"] | None, right: Int[Array, " k"] | None) -> Moments:
    def entries(v: Array, *orders: Array | None) -> Array:
        index = [slice(None) if order is None else order for order in orders]
        if len(index) == 2 and left is not None and right is not None:
            index[0] = left[:, None]
        return v.at[tuple(index)].get(mode="promise_in_bounds")

    return Moments(
        now.linear,
        tuple(entries(v, left, right) for v in now.quadratic),
        tuple(entries(v, left) for v in now.left),
        tuple(entries(v, right) for v in now.right),
    )


def _squared(
    now: Moments, left: Float[Array, "j j"] | None, right: Float[Array, "k k"] | None, precision: str
) -> Moments:
    """With the squares of ``Q_newᵀ Q_old``."""
    return Moments(
        now.linear,
        tuple(linalg.out_of_basis(left, _wide(v), right, precision) for v in now.quadratic),
        *(
            tuple(v if C is None else linalg.times(C, v, precision) for v in vs)
            for C, vs in ((left, now.left), (right, now.right))
        ),
    )


def _squares(
    Q: Float[Array, "d j"] | None, P: Float[Array, "d k"] | None, precision: str
) -> Float[Array, "j k"] | None:
    if Q is None or P is None:
        return None
    return jnp.square(linalg.times(_wide(Q).mT, _wide(P), precision))


def _wide(x: Array) -> Array:
    """In float32 at least."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
