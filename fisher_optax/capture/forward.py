"""Run a program again and sum up what its products with parameters take in, on the way forward.

What needs inputs alone asks for no gradient: a product counts whatever lies between it and the outputs (rounding,
`stop_gradient`, an index), be it in a branch or in a `while_loop`. Sums go through the program as a state: loops carry
them, or stack those of a stack that they run over; branches return them; devices of a `shard_map` add them up.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn
from jax.sharding import PartitionSpec
from jaxtyping import Array, PyTree

from .._xla import automatic, in_scope, on_mesh
from .kinds.protocol import StatisticsKind, Sums, Tapped
from .program import jaxprs
from .program.jaxprs import Value
from .program.leaves import LeafPlan
from .program.sites import Site, in_parts
from .program.walk import Plan
from .taps import (
    Entries,
    Plans,
    Steps,
    Watch,
    collected,
    entry,
    operands_of,
    split_mask,
    stacked_entries,
    watching,
    zeros,
)
from .traced import trace, warn_of_experts

# The sums of a parameter's slots, by the parameter and what loops and indices have taken of it.
State = dict[tuple[int, Steps], list[Sums]]
Results = tuple[list[Value], State]


def input_sums(
    apply_fn: Callable[..., PyTree], kind: StatisticsKind, params: PyTree, args: PyTree, mask: Array | None = None
) -> list[tuple[LeafPlan, list[Sums]]]:
    """What each captured parameter's products sum up in one evaluation of ``apply_fn(params, *args)``, which may return
    anything; ``kind`` takes inputs alone.
    """
    traced = trace(apply_fn, kind, params, args, {})
    watched = [leaf for leaf in traced.leaves if leaf.sites]
    if mask is not None:
        warn_of_experts(watched)
    parameters = [(leaf, traced.operands[leaf.number]) for leaf in watched]
    empty = on_mesh(lambda _: [zeros(kind, leaf, x, mask, None) for leaf, x in parameters], traced.operands)
    start = {(leaf.number, ()): sums for leaf, sums in zip(watched, empty, strict=True)}
    _, state = run(traced.program, traced.plan, traced.operands, start, watching(kind, watched, mask))
    return [(leaf, state[leaf.number, ()]) for leaf in watched]


def run(program: jaxprs.Program, plan: Plan, operands: Sequence[Value], state: State, watch: Watch) -> Results:
    """The results of a program, and the sums with those of its products added."""
    env = jaxprs.environment(program, operands)
    for i, eqn in enumerate(program.jaxpr.eqns):
        values = [jaxprs.read(env, v) for v in eqn.invars]
        if i in plan.inner:
            enter = ENTER[eqn.primitive.name]
            with eqn.ctx.manager:
                inner = watch._replace(mask=in_scope(watch.mask))
                out, state = enter(eqn, plan.inner[i], plan.entries[i], values, in_scope(state), inner)
            state = in_scope(state)
        else:
            out = jaxprs.bind(eqn, values)
        if i in plan.sites and plan.sites[i].number in watch.leaves:
            site = plan.sites[i]
            with eqn.ctx.manager:
                state = _with_product(site, out[site.y], values, in_scope(state), watch)
            state = in_scope(state)
        if i in plan.losses and watch.at_losses is not None:
            watch.at_losses.append((plan.losses[i][1], values))
        env.update(zip(eqn.outvars, out, strict=True))
    return [jaxprs.read(env, v) for v in program.jaxpr.outvars], state


def _with_product(site: Site, y: Value, values: list[Value], state: State, watch: Watch) -> State:
    """The state with the sums of one product."""
    slot, mask, (x, groups) = watch.slots[site.number], in_scope(watch.mask), operands_of(site, values)
    own = jaxprs.varying(*jax.tree.leaves(entry(state, site.leaf, site.steps)[slot]))
    split = tuple(axis for axis in jaxprs.split_over(y, x, mask) if axis[0] not in own)
    collect = functools.partial(collected, watch.kind, watch.leaves[site.number], site, split)

    def of_inputs(x: Array, y: Array, mask: Array | None, groups: Array | None) -> Sums:
        return collect(Tapped(in_parts(x), jnp.zeros_like(in_parts(y)), mask, None, groups=groups))

    operands = jax.tree.map(jnp.asarray, (x, y, mask, groups))  # what a loss closes over may be NumPy's
    sums = automatic(of_inputs, *jax.lax.stop_gradient(operands))
    if split:
        sums = jax.tree.map(lambda s: jaxprs.varying_as(s, y, x, mask), sums)
        sums = jax.lax.psum(sums, tuple(name for name, _ in split))
    return _plus(state, site.leaf, site.steps, {slot: sums})


def _plus(state: State, leaf: int, steps: Steps, sums: dict[int, Sums]) -> State:
    """The state with sums added to slots of a parameter, at the places that indices have taken of it."""
    known = next(k for k in range(len(steps), -1, -1) if (leaf, steps[:k]) in state)
    place = tuple(item[2] for item in steps[known:])

    def added(x: Array, s: Array) -> Array:
        s = s.astype(x.dtype)
        return x.at[place].add(s.reshape(x.shape[len(place) :])) if place else x + s.reshape(x.shape)

    slots = list(state[leaf, steps[:known]])
    for number, some in sums.items():
        slots[number] = jax.tree.map(added, slots[number], some)
    return state | {(leaf, steps[:known]): slots}


def _call(eqn: JaxprEqn, plans: Plans, entries: Entries, values: list[Value], state: State, watch: Watch) -> Results:
    del entries
    return run(jaxprs.body(eqn), plans[0], values, state, watch)


def _custom(eqn: JaxprEqn, plans: Plans, entries: Entries, values: list[Value], state: State, watch: Watch) -> Results:
    """Results with the function's own derivative; sums from what it does."""
    del entries
    _, state = run(jaxprs.body(eqn), plans[0], jax.lax.stop_gradient(values), state, watch)
    return jaxprs.bind(eqn, values), state


def _remat(eqn: JaxprEqn, plans: Plans, entries: Entries, values: list[Value], state: State, watch: Watch) -> Results:
    del entries

    def again(values: list[Value], sums: list[list[Sums]]) -> tuple[list[Value], list[list[Sums]]]:
        inner = watch._replace(at_losses=None)
        return _in_lists(run(jaxprs.body(eqn), plans[0], values, _named(sums, state), inner))

    p = eqn.params
    saved = jax.checkpoint(again, policy=p["policy"], prevent_cse=p["prevent_cse"])
    out, sums = saved(values, list(state.values()))
    return out, _named(sums, state)


def _scan(eqn: JaxprEqn, plans: Plans, entries: Entries, values: list[Value], state: State, watch: Watch) -> Results:
    consts, carry = jaxprs.scan_counts(eqn)
    fixed, first, over = values[:consts], values[consts : consts + carry], values[consts + carry :]
    # What a loop runs over is summed up from nothing and stacked, then added to what there was.
    stacked = stacked_entries(entries, consts + carry, state)
    empty = jax.tree.map(jnp.zeros_like, list(stacked.values()))

    def body(carried: tuple[list[Value], list[Any]], step: tuple[list[Value], list[Any]]) -> PyTree:
        (values, sums), (xs, slices) = carried, step
        inner = _named(sums, state) | dict(zip(stacked, slices, strict=True))
        out, inner = run(jaxprs.body(eqn), plans[0], [*fixed, *values, *xs], inner, watch)
        return (out[:carry], [inner[key] for key in state]), (out[carry:], [inner[key] for key in stacked])

    p = eqn.params
    (carried, sums), (ys, found) = jax.lax.scan(
        body,
        (first, list(state.values())),
        (over, empty),
        length=p["length"],
        reverse=p["reverse"],
        unroll=p["unroll"],
    )
    state = _named(sums, state)
    for (leaf, steps), slots in zip(stacked, found, strict=True):
        state = _plus(state, leaf, steps[:-1], dict(enumerate(slots)))
    return [*carried, *ys], state


def _cond(eqn: JaxprEqn, plans: Plans, entries: Entries, values: list[Value], state: State, watch: Watch) -> Results:
    del entries
    choice, *rest = values

    def branch(program: jaxprs.Program, plan: Plan) -> Callable[..., PyTree]:
        return lambda sums, *rest: _in_lists(run(program, plan, rest, _named(sums, state), watch))

    made = [branch(program, plan) for program, plan in zip(jaxprs.bodies(eqn), plans, strict=True)]
    out, sums = jax.lax.switch(choice, made, list(state.values()), *rest)
    return out, _named(sums, state)


def _while(eqn: JaxprEqn, plans: Plans, entries: Entries, values: list[Value], state: State, watch: Watch) -> Results:
    """The condition is asked before the first step and after each. Under a `jax.vmap` it has an answer for each
    example: steps go on as long as any does, and leave those that have finished as they are, without counting them.
    """
    del entries
    condition, body = jaxprs.bodies(eqn)
    of_condition, fixed, first = jaxprs.while_operands(eqn, values)

    def asked(values: list[Value], sums: list[list[Sums]], mask: Array | None) -> tuple[Array, list[list[Sums]]]:
        operands, inner = [*of_condition, *values], watch._replace(mask=mask)
        (goes_on,), sums = _in_lists(run(condition, plans[0], operands, _named(sums, state), inner))
        return jnp.asarray(goes_on), sums

    def step(carried: tuple[list[Value], list[list[Sums]], Array]) -> PyTree:
        values, sums, goes_on = carried
        inner = watch._replace(mask=_among(goes_on, watch.mask))
        out, sums = _in_lists(run(body, plans[1], [*fixed, *values], _named(sums, state), inner))
        if goes_on.ndim:
            out = [_where(goes_on, new, old) for new, old in zip(out, values, strict=True)]
        goes_on, sums = asked(out, sums, inner.mask)
        return out, sums, goes_on

    goes_on, sums = asked(list(first), list(state.values()), watch.mask)
    out, sums, _ = jax.lax.while_loop(lambda carried: jnp.any(carried[2]), step, (list(first), sums, goes_on))
    return out, _named(sums, state)


def _among(goes_on: Array, mask: Array | None) -> Array | None:
    """The positions that count among the examples that go on."""
    if not goes_on.ndim or mask is None:
        return goes_on if goes_on.ndim else mask
    if mask.shape[: goes_on.ndim] != goes_on.shape:
        return mask
    return mask.astype(bool) & goes_on.reshape(*goes_on.shape, *[1] * (mask.ndim - goes_on.ndim))


def _where(goes_on: Array, new: Any, old: Any) -> Value:
    return jnp.where(goes_on.reshape(*goes_on.shape, *[1] * (jnp.ndim(new) - goes_on.ndim)), new, old)


def _shard_map(
    eqn: JaxprEqn, plans: Plans, entries: Entries, values: list[Value], state: State, watch: Watch
) -> Results:
    del entries
    p = eqn.params
    axes = tuple(p["newly_manual_axes"])
    empty = jax.tree.map(jnp.zeros_like, list(state.values()))

    def again(values: list[Value], empty: list[list[Sums]], mask: Array | None) -> PyTree:
        inner = watch._replace(mask=mask, at_losses=None)
        out, sums = _in_lists(run(jaxprs.body(eqn), plans[0], values, _named(empty, state), inner))
        # With types, products have added up what differs between devices.
        return out, sums if p["check_vma"] else jax.lax.psum(sums, axes)

    whole = jax.tree.map(lambda _: PartitionSpec(), empty)
    mask, split = split_mask(watch.mask, values, p["in_specs"])
    shared = jax.shard_map(
        again,
        mesh=p["mesh"],
        in_specs=(list(p["in_specs"]), whole, split),
        out_specs=(list(p["out_specs"]), whole),
        axis_names=set(axes),
        check_vma=p["check_vma"],
    )
    out, sums = shared(list(values), empty, mask)
    return out, _named(jax.tree.map(jnp.add, list(state.values()), sums), state)


def _in_lists(results: Results) -> tuple[list[Value], list[list[Sums]]]:
    """What JAX takes as arguments and results: the sums without their names."""
    out, state = results
    return out, list(state.values())


def _named(sums: list[list[Sums]], like: State) -> State:
    return dict(zip(like, sums, strict=True))


ENTER: dict[str, Callable[..., Results]] = {
    **dict.fromkeys(jaxprs.CALLS, _call),
    **dict.fromkeys(jaxprs.REMAT, _remat),
    **dict.fromkeys(jaxprs.CUSTOM, _custom),
    "scan": _scan,
    "cond": _cond,
    "while": _while,
    "shard_map": _shard_map,
}
