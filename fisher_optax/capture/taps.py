"""Run a program again with a tap on every product that is to be watched.

A tap is the identity on the product's result with one more argument, zeros that nothing reads. On the way back it hands
the gradient on as it is, and returns as the "gradient" of that argument what the statistics need. So one backward pass
yields both, and loops, remat and data-parallel sums treat a statistic as the gradient that it looks like.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn
from jax.sharding import PartitionSpec

from .._xla import automatic, in_scope
from . import losses
from .devices import Split, counted_over, devices_along
from .kinds.sums import Seen
from .program import jaxprs
from .program.leaves import LeafPlan
from .program.sites import Site, in_parts
from .program.views import View
from .program.walk import Plan

# What a parameter's taps need, by the parameter and what loops and indices have taken of it: (slots, bases).
Scope = dict[tuple[int, tuple[Any, ...]], Any]


class Watch(NamedTuple):
    """What all of one evaluation shares."""

    kind: Any
    leaves: dict[int, LeafPlan]  # by number of the site
    slots: dict[int, int]
    mask: Any
    fisher: str
    samples: int
    key: Any
    seen: list[Any] | None = None  # what losses were given, by their numbers
    value: Any = None  # the loss, or its type


def run(
    program: jaxprs.Program, plan: Plan, operands: Sequence[Any], scope: Scope, watch: Watch
) -> tuple[list[Any], Any]:
    """The results of a program, and the sum of its pseudo-losses (None without any)."""
    env = dict(zip(program.jaxpr.constvars, program.consts, strict=True))
    env.update(zip(program.jaxpr.invars, operands, strict=True))
    pseudo = None
    for i, eqn in enumerate(program.jaxpr.eqns):
        values = [jaxprs.read(env, v) for v in eqn.invars]
        if i in plan.inner:
            enter = ENTER[eqn.primitive.name]
            with eqn.ctx.manager:
                inner = watch._replace(mask=in_scope(watch.mask))
                out, extra = enter(eqn, plan.inner[i], plan.entries[i], values, in_scope(scope), inner)
            pseudo = _plus(pseudo, in_scope(extra))
        else:
            out = jaxprs.bind(eqn, values)
        if i in plan.sites and plan.sites[i].number in watch.leaves:
            site = plan.sites[i]
            with eqn.ctx.manager:
                out[site.y] = _tapped(site, out[site.y], values[site.x], scope, watch)
        if i in plan.losses and watch.fisher != "empirical":
            with eqn.ctx.manager:
                extra = _drawn(*plan.losses[i], values, watch)
            pseudo = _plus(pseudo, in_scope(extra))
        if i in plan.losses and watch.seen is not None:
            watch.seen.append((plan.losses[i][1], values))
        env.update(zip(eqn.outvars, out, strict=True))
    return [jaxprs.read(env, v) for v in program.jaxpr.outvars], pseudo


def _plus(x: Any, y: Any) -> Any:
    return x if y is None else y if x is None else x + y


def _drawn(name: str, number: int, values: list[Any], watch: Watch) -> Any:
    """The pseudo-losses of a loss."""
    axes = counted_over(watch.value, *values)

    def pseudo(key: Any, *values: Any) -> Any:
        key = None if key is None else jax.random.fold_in(key, number)
        return losses.pseudo_loss(name, watch.fisher, watch.samples, key, axes, *values)

    return automatic(pseudo, in_scope(watch.key), *values)


def _tapped(site: Site, y: Any, x: Any, scope: Scope, watch: Watch) -> Any:
    plan = watch.leaves[site.number]
    slots, bases = _entry(scope, site.leaf, site.taken)
    probe, mask, bases = in_scope((slots[watch.slots[site.number]], watch.mask, bases))
    own = jaxprs.varying(*jax.tree.leaves(probe))
    split = tuple(axis for axis in jaxprs.split_over(y, x, mask) if axis[0] not in own)
    collect = functools.partial(_collected, watch.kind, plan, site, split)
    probe = jax.tree.map(lambda p: jaxprs.varying_as(p, y, x, mask), probe)
    return _tap(collect, y, jax.lax.stop_gradient((x, mask, bases)), probe)


def _collected(kind: Any, plan: LeafPlan, site: Site, split: Split, seen: Seen) -> Any:
    """The statistics of one tap, to be added up over the devices along these axes of a shard_map."""
    device = jax.lax.axis_index(tuple(name for name, _ in split)) if split else 0
    return kind.collect(plan, site, seen._replace(devices=devices_along(split), device=device))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tap(collect: Callable[[Seen], Any], y: Any, seen: Any, probe: Any) -> Any:
    del collect, seen, probe
    return y


def _forwards(collect: Any, y: Any, seen: Any, probe: Any) -> tuple[Any, Any]:
    del collect
    return y, (seen, probe)


def _backwards(collect: Any, kept: Any, delta: Any) -> tuple[Any, None, Any]:
    (x, mask, bases), probe = kept

    def collected(x: Any, delta: Any, *given: Any) -> Any:
        # Of a complex output, a cotangent is the real part's gradient less i times the imaginary part's.
        return collect(Seen(in_parts(x), in_parts(delta.conj()), *given))

    statistics = automatic(collected, x, delta, mask, bases)
    like = lambda s, p: jaxprs.varying_as(s.astype(p.dtype).reshape(p.shape), p)  # noqa: E731
    return delta, None, jax.tree.map(like, statistics, probe)


_tap.defvjp(_forwards, _backwards)


def _entry(scope: Scope, leaf: int, taken: tuple[Any, ...]) -> Any:
    """What the scope holds of a parameter, at the places that indices have taken since it was entered."""
    for k in range(len(taken), -1, -1):
        if (leaf, taken[:k]) in scope:
            entry = scope[leaf, taken[:k]]
            for item in taken[k:]:
                entry = jax.tree.map(lambda x, i=item[2]: x[i], entry)
            return entry
    raise AssertionError(f"parameter {leaf} is not in scope after {taken}")


def _call(eqn: JaxprEqn, plans: Any, entries: Any, values: Any, scope: Scope, watch: Watch) -> tuple[list[Any], Any]:
    del entries
    return run(jaxprs.body(eqn), plans[0], values, scope, watch)


def _remat(eqn: JaxprEqn, plans: Any, entries: Any, values: Any, scope: Scope, watch: Watch) -> tuple[list[Any], Any]:
    del entries
    keys = list(scope)

    def again(values: Any, kept: Any) -> Any:
        inner = watch._replace(seen=None)
        return run(jaxprs.body(eqn), plans[0], values, dict(zip(keys, kept, strict=True)), inner)

    p = eqn.params
    return jax.checkpoint(again, policy=p["policy"], prevent_cse=p["prevent_cse"])(values, list(scope.values()))


def _scan(
    eqn: JaxprEqn, plans: Any, entries: dict[int, View], values: Any, scope: Scope, watch: Watch
) -> tuple[list[Any], Any]:
    consts, carry = jaxprs.scan_counts(eqn)
    fixed, first, over = values[:consts], values[consts : consts + carry], values[consts + carry :]
    stacked = {}
    for k, view in entries.items():
        before = _before(view)
        if k >= consts + carry and before is not None and _has(scope, view.root[1]):
            stacked[view.root[1], view.taken] = _entry(scope, view.root[1], before)

    def body(carried: Any, step: Any) -> Any:
        xs, kept = step
        inner = scope | dict(zip(stacked, kept, strict=True))
        out, pseudo = run(jaxprs.body(eqn), plans[0], [*fixed, *carried, *xs], inner, watch)
        assert pseudo is None
        return out[:carry], out[carry:]

    p = eqn.params
    carried, ys = jax.lax.scan(
        body, first, (over, list(stacked.values())), length=p["length"], reverse=p["reverse"], unroll=p["unroll"]
    )
    return [*carried, *ys], None


def _before(view: View) -> tuple[Any, ...] | None:
    """What was taken of a parameter before a loop ran over it; None where the loop took nothing."""
    return view.taken[:-1] if view.taken and view.taken[-1][0] == "scan" else None


def _has(scope: Scope, leaf: int) -> bool:
    return any(key[0] == leaf for key in scope)


def _cond(eqn: JaxprEqn, plans: Any, entries: Any, values: Any, scope: Scope, watch: Watch) -> tuple[list[Any], Any]:
    del entries
    choice, *rest = values

    def taken(program: jaxprs.Program, plan: Plan) -> Callable[..., Any]:
        return lambda *rest: run(program, plan, rest, scope, watch)[0]

    made = [taken(program, plan) for program, plan in zip(jaxprs.branches(eqn), plans, strict=True)]
    return jax.lax.switch(choice, made, *rest), None


def _shard_map(
    eqn: JaxprEqn, plans: Any, entries: Any, values: Any, scope: Scope, watch: Watch
) -> tuple[list[Any], Any]:
    del entries
    p, keys = eqn.params, list(scope)

    def again(values: Any, kept: Any, mask: Any) -> Any:
        inner = watch._replace(mask=mask, seen=None)
        return run(jaxprs.body(eqn), plans[0], values, dict(zip(keys, kept, strict=True)), inner)[0]

    whole = jax.tree.map(lambda _: PartitionSpec(), list(scope.values()))
    split = None if watch.mask is None else _like(watch.mask, values, p["in_specs"])
    shared = jax.shard_map(
        again,
        mesh=p["mesh"],
        in_specs=(list(p["in_specs"]), whole, split),
        out_specs=list(p["out_specs"]),
        axis_names=set(p["newly_manual_axes"]),
        check_vma=p["check_vma"],
    )
    return shared(list(values), list(scope.values()), watch.mask), None


def _like(mask: Any, values: Sequence[Any], specs: Sequence[Any]) -> PartitionSpec:
    """How a mask is split over devices: as the first operand that begins with its axes."""
    for x, spec in zip(values, specs, strict=True):
        if jnp.shape(x)[: mask.ndim] == mask.shape:
            return PartitionSpec(*spec[: mask.ndim])
    raise ValueError(
        f"no operand of the shard_map in loss_fn begins with the axes {mask.shape} of mask, so that it cannot be split "
        "like one: give mask the leading axes of the inputs."
    )


ENTER: dict[str, Callable[..., tuple[list[Any], Any]]] = {
    **dict.fromkeys(jaxprs.CALLS, _call),
    **dict.fromkeys(jaxprs.REMAT, _remat),
    "scan": _scan,
    "cond": _cond,
    "shard_map": _shard_map,
}


def zeros(kind: Any, plan: LeafPlan, parameter: Any, mask: Any, bases: Any) -> list[Any]:
    """The probes of a parameter, one a slot: zeros of the shapes that its taps return.

    They differ between devices where the parameter does: as its gradient is, statistics then are each device's own, and
    otherwise sums over devices.
    """
    taken = plan.taken_shape
    some = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[len(taken) :], x.dtype), bases)
    marks = None if mask is None else jax.ShapeDtypeStruct(mask.shape, mask.dtype)

    mine = jaxprs.varying(parameter)

    def shapes(site: Site) -> Any:
        split = dict(site.split) | dict(() if mask is None else jaxprs.split_over(mask))
        devices = devices_along(tuple(axis for axis in split.items() if axis[0] not in mine))
        collect = lambda x, d, m, b: kind.collect(plan, site, Seen(x, d, m, b, devices))  # noqa: E731
        return jax.eval_shape(collect, *site.avals, marks, some)

    first = [next(site for site in plan.sites if plan.turns[site.number] == k) for k in range(kind.slots(plan))]
    zero = lambda x: jaxprs.varying_as(jnp.zeros((*taken, *x.shape), x.dtype), parameter)  # noqa: E731
    return [jax.tree.map(zero, shapes(site)) for site in first]
