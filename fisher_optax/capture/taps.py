"""Run a program again with a tap on every product that is to be watched.

A tap is the identity on the product's result with one more argument, zeros that nothing reads. On the way back it hands
the gradient on as it is, and returns as the "gradient" of that argument what the statistics need. So one backward pass
yields both, and loops, remat and data-parallel sums treat a statistic as the gradient that it looks like.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import JaxprEqn
from jax.sharding import PartitionSpec
from jaxtyping import Array, PRNGKeyArray

from .._xla import automatic, explicit_mesh, in_scope
from . import losses
from .devices import Split, counted_over, devices_along
from .kinds.protocol import Bases, StatisticsKind, Sums, Tapped
from .program import jaxprs
from .program.jaxprs import Value
from .program.leaves import LeafPlan
from .program.sites import Site, in_parts
from .program.views import View
from .program.walk import Plan

Steps = tuple[tuple[Any, ...], ...]  # what loops and indices took of a parameter, as in `View`
# What a parameter's taps need, by the parameter and what loops and indices have taken of it: (slots, bases).
Scope = dict[tuple[int, Steps], tuple[list[Sums], Bases | None]]

Pseudo = dict[int, Array]  # pseudo-losses, by the numbers of the losses
Results = tuple[list[Value], Pseudo]  # of a program
Operands = tuple[Value, Array | None, Bases | None, Array | None]  # of a tap: a product's input, mask, bases, groups
Plans = Sequence[Plan]
Entries = dict[int, View]
E = TypeVar("E")


class Watch(NamedTuple):
    """What all of one evaluation shares."""

    kind: StatisticsKind
    leaves: dict[int, LeafPlan]  # by number of the site
    slots: dict[int, int]
    mask: Array | None
    fisher: str | None = None  # whose labels pseudo-losses are of; None: there are none
    samples: int = 1
    key: PRNGKeyArray | None = None
    shifts: dict[int, Array] | None = None  # zeros added to losses, by their numbers: their gradients are factors
    at_losses: list[tuple[int, list[Value]]] | None = None  # operands of losses, by their numbers
    value: Any = None  # the loss, or its type


def watching(kind: StatisticsKind, watched: Sequence[LeafPlan], mask: Array | None) -> Watch:
    """All products with these parameters."""
    by_site = {site.number: leaf for leaf in watched for site in leaf.sites}
    slots = {number: min(k, kind.slots(leaf) - 1) for leaf in watched for number, k in leaf.turns.items()}
    return Watch(kind, by_site, slots, mask)


def run(program: jaxprs.Program, plan: Plan, operands: Sequence[Value], scope: Scope, watch: Watch) -> Results:
    """The results of a program, and its pseudo-losses."""
    env = jaxprs.environment(program, operands)
    pseudo: Pseudo = {}
    for i, eqn in enumerate(program.jaxpr.eqns):
        values = [jaxprs.read(env, v) for v in eqn.invars]
        if i in plan.inner:
            enter = ENTER[eqn.primitive.name]
            with eqn.ctx.manager:
                inner = watch._replace(mask=in_scope(watch.mask))
                out, extra = enter(eqn, plan.inner[i], plan.entries[i], values, in_scope(scope), inner)
            pseudo |= in_scope(extra)
        else:
            out = jaxprs.bind(eqn, values)
        if i in plan.sites and plan.sites[i].number in watch.leaves:
            site = plan.sites[i]
            with eqn.ctx.manager:
                out[site.y] = _tapped(site, out[site.y], values, scope, watch)
        if i in plan.losses and watch.fisher is not None:
            name, number = plan.losses[i]
            with eqn.ctx.manager:
                extra = _drawn(name, number, jaxprs.aval(eqn.outvars[0]), values, watch)
            pseudo[number] = in_scope(extra)
        if i in plan.losses and watch.shifts is not None:
            out = [jnp.add(x, jaxprs.varying_as(watch.shifts[plan.losses[i][1]], x)) for x in out]
        if i in plan.losses and watch.at_losses is not None:
            watch.at_losses.append((plan.losses[i][1], values))
        env.update(zip(eqn.outvars, out, strict=True))
    return [jaxprs.read(env, v) for v in program.jaxpr.outvars], pseudo


def _drawn(name: str, number: int, result: ShapedArray, values: list[Value], watch: Watch) -> Array:
    """The pseudo-losses of a loss."""
    axes = counted_over(watch.value, *values)

    def pseudo(key: PRNGKeyArray | None, *values: Any) -> Array:
        assert watch.fisher is not None
        key = None if key is None else jax.random.fold_in(key, number)
        return losses.pseudo_loss(name, watch.fisher, watch.samples, key, axes, result, *values)

    return automatic(pseudo, in_scope(watch.key), *values)


def operands_of(site: Site, values: Sequence[Any]) -> tuple[Value, Array | None]:
    """A product's input, and how many rows of it each expert has."""
    return values[site.x], None if site.groups is None else jnp.asarray(values[site.groups.operand])


def _tapped(site: Site, y: Value, values: Sequence[Value], scope: Scope, watch: Watch) -> Value:
    plan, (x, groups) = watch.leaves[site.number], operands_of(site, values)
    slots, bases = entry(scope, site.leaf, site.steps)
    probe, mask, bases = in_scope((slots[watch.slots[site.number]], watch.mask, bases))
    own = jaxprs.varying(*jax.tree.leaves(probe))
    split = tuple(axis for axis in jaxprs.split_over(y, x, mask) if axis[0] not in own)
    collect = functools.partial(collected, watch.kind, plan, site, split)
    probe = jax.tree.map(lambda p: jaxprs.varying_as(p, y, x, mask), probe)
    return _tap(collect, y, jax.lax.stop_gradient((x, mask, bases, groups)), probe)


def collected(kind: StatisticsKind, plan: LeafPlan, site: Site, split: Split, tapped: Tapped) -> Sums:
    """The statistics of one tap, to be added up over the devices along these axes of a shard_map."""
    device = jax.lax.axis_index(tuple(name for name, _ in split)) if split else 0
    return kind.collect(plan, site, tapped._replace(devices=devices_along(split), device=device))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tap(collect: Callable[[Tapped], Sums], y: Value, operands: Operands, probe: Sums) -> Value:
    del collect, operands, probe
    return y


def _forwards(
    collect: Callable[[Tapped], Sums], y: Value, operands: Operands, probe: Sums
) -> tuple[Value, tuple[Operands, Sums]]:
    del collect
    return y, (operands, probe)


def _backwards(
    collect: Callable[[Tapped], Sums], residuals: tuple[Operands, Sums], delta: Array
) -> tuple[Array, None, Sums]:
    (x, mask, bases, groups), probe = residuals

    def collected(x: Array, delta: Array, mask: Array | None, bases: Bases | None, groups: Array | None) -> Sums:
        # Of a complex output, a cotangent is the real part's gradient less i times the imaginary part's.
        return collect(Tapped(in_parts(x), in_parts(delta.conj()), mask, bases, groups=groups))

    statistics = automatic(collected, x, delta, mask, bases, groups)
    like = lambda s, p: jaxprs.varying_as(s.astype(p.dtype).reshape(p.shape), p)  # noqa: E731
    return delta, None, jax.tree.map(like, statistics, probe)


_tap.defvjp(_forwards, _backwards)


def entry(scope: Mapping[tuple[int, Steps], E], leaf: int, steps: Steps) -> E:
    """What the scope holds of a parameter, at the places that indices have taken since it was entered."""
    for k in range(len(steps), -1, -1):
        if (leaf, steps[:k]) in scope:
            found = scope[leaf, steps[:k]]
            for item in steps[k:]:
                found = jax.tree.map(lambda x, i=item[2]: x[i], found)
            return found
    raise AssertionError(f"parameter {leaf} is not in scope after {steps}")


def _call(eqn: JaxprEqn, plans: Plans, entries: Entries, values: list[Value], scope: Scope, watch: Watch) -> Results:
    del entries
    return run(jaxprs.body(eqn), plans[0], values, scope, watch)


def _remat(eqn: JaxprEqn, plans: Plans, entries: Entries, values: list[Value], scope: Scope, watch: Watch) -> Results:
    del entries
    keys = list(scope)

    def again(values: list[Value], entries: list[Any]) -> Results:
        inner = watch._replace(at_losses=None)
        return run(jaxprs.body(eqn), plans[0], values, dict(zip(keys, entries, strict=True)), inner)

    p = eqn.params
    return jax.checkpoint(again, policy=p["policy"], prevent_cse=p["prevent_cse"])(values, list(scope.values()))


def _scan(eqn: JaxprEqn, plans: Plans, entries: Entries, values: list[Value], scope: Scope, watch: Watch) -> Results:
    consts, carry = jaxprs.scan_counts(eqn)
    fixed, first, over = values[:consts], values[consts : consts + carry], values[consts + carry :]
    stacked = stacked_entries(entries, consts + carry, scope)

    def body(carried: list[Value], step: tuple[list[Value], list[Any]]) -> tuple[list[Value], list[Value]]:
        xs, slices = step
        inner = scope | dict(zip(stacked, slices, strict=True))
        out, pseudo = run(jaxprs.body(eqn), plans[0], [*fixed, *carried, *xs], inner, watch)
        assert not pseudo
        return out[:carry], out[carry:]

    p = eqn.params
    carried, ys = jax.lax.scan(
        body, first, (over, list(stacked.values())), length=p["length"], reverse=p["reverse"], unroll=p["unroll"]
    )
    return [*carried, *ys], {}


def stacked_entries(entries: Entries, first: int, scope: Mapping[tuple[int, Steps], E]) -> dict[tuple[int, Steps], E]:
    """What the scope holds of the parameters that a loop runs over; its operands from ``first`` on are what it does."""
    stacked = {}
    for k, view in entries.items():
        leaf, is_stack = view.root[1], bool(view.steps) and view.steps[-1][0] == "scan"
        if k >= first and is_stack and any(key[0] == leaf for key in scope):
            stacked[leaf, view.steps] = entry(scope, leaf, view.steps[:-1])
    return stacked


def _cond(eqn: JaxprEqn, plans: Plans, entries: Entries, values: list[Value], scope: Scope, watch: Watch) -> Results:
    del entries
    choice, *rest = values

    def branch(program: jaxprs.Program, plan: Plan) -> Callable[..., list[Value]]:
        return lambda *rest: run(program, plan, rest, scope, watch)[0]

    made = [branch(program, plan) for program, plan in zip(jaxprs.bodies(eqn), plans, strict=True)]
    return jax.lax.switch(choice, made, *rest), {}


def _shard_map(
    eqn: JaxprEqn, plans: Plans, entries: Entries, values: list[Value], scope: Scope, watch: Watch
) -> Results:
    del entries
    p, keys = eqn.params, list(scope)

    def again(values: list[Value], entries: list[Any], mask: Array | None) -> list[Value]:
        inner = watch._replace(mask=mask, at_losses=None)
        return run(jaxprs.body(eqn), plans[0], values, dict(zip(keys, entries, strict=True)), inner)[0]

    whole = jax.tree.map(lambda _: PartitionSpec(), list(scope.values()))
    mask, split = split_mask(watch.mask, values, p["in_specs"])
    shared = jax.shard_map(
        again,
        mesh=p["mesh"],
        in_specs=(list(p["in_specs"]), whole, split),
        out_specs=list(p["out_specs"]),
        axis_names=set(p["newly_manual_axes"]),
        check_vma=p["check_vma"],
    )
    return shared(list(values), list(scope.values()), mask), {}


def split_mask(
    mask: Array | None, values: Sequence[Any], specs: Sequence[PartitionSpec]
) -> tuple[Array | None, PartitionSpec | None]:
    """A mask split over devices as the first operand that begins with its axes, and how."""
    if mask is None:
        return None, None
    for x, spec in zip(values, specs, strict=True):
        if jnp.shape(x)[: mask.ndim] == mask.shape:
            like = PartitionSpec(*spec[: mask.ndim])
            return (jax.sharding.reshard(mask, like) if explicit_mesh(x) else mask), like
    raise ValueError(
        f"no operand of the shard_map in loss_fn begins with the axes {mask.shape} of mask, so that it cannot be split "
        "like one: give mask the leading axes of the inputs."
    )


ENTER: dict[str, Callable[..., Results]] = {
    **dict.fromkeys(jaxprs.CALLS, _call),
    **dict.fromkeys(jaxprs.REMAT, _remat),
    "scan": _scan,
    "cond": _cond,
    "shard_map": _shard_map,
}


def zeros(
    kind: StatisticsKind, plan: LeafPlan, parameter: Value, mask: Array | None, bases: Bases | None
) -> list[Sums]:
    """The probes of a parameter, one a slot: zeros of the shapes that its taps return.

    They differ between devices where the parameter does: as its gradient is, statistics then are each device's own, and
    otherwise sums over devices.
    """
    stack = plan.stack_shape
    some = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[len(stack) :], x.dtype), bases)
    marks = None if mask is None else jax.ShapeDtypeStruct(mask.shape, mask.dtype)

    own = jaxprs.varying(parameter)

    def shapes(site: Site) -> dict[str, jax.ShapeDtypeStruct]:
        split = dict(site.split) | dict(() if mask is None else jaxprs.split_over(mask))
        devices = devices_along(tuple(axis for axis in split.items() if axis[0] not in own))
        groups = None if site.groups is None else site.groups.aval
        collect = lambda x, d, m, b, g: kind.collect(plan, site, Tapped(x, d, m, b, devices, groups=g))  # noqa: E731
        return jax.eval_shape(collect, *site.avals, marks, some, groups)

    first = [next(site for site in plan.sites if plan.turns[site.number] == k) for k in range(kind.slots(plan))]
    zero = lambda x: jaxprs.varying_as(jnp.zeros((*stack, *x.shape), x.dtype), parameter)  # noqa: E731
    return [jax.tree.map(zero, shapes(site)) for site in first]
