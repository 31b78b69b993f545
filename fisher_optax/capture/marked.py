"""The losses of `fo.losses` in a traced program: what they divide by, and how examples count."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var
from jaxtyping import Array, Bool

from .._xla import in_scope
from .devices import Call, counted_over
from .losses import total
from .program import jaxprs
from .program.jaxprs import Operand, Value
from .program.walk import Plan

# What leaves numbers as they are.
SAME_NUMBERS = ("broadcast_in_dim", "convert_element_type", "copy", "reshape", "squeeze", "transpose")


class Counted(NamedTuple):
    """What the losses of a program say of its examples; total and mask are None where there is not just one to ask."""

    total: Array | float | None = None
    number: Array | float | None = None  # of examples with a weight that is not 0
    mask: Bool[Array, "..."] | None = None
    calls: tuple[Call, ...] = ()  # of each loss that can be counted, by its number
    results: tuple[ShapedArray, ...] = ()  # types of what these return: a number, or one for each that vmap made of it
    alike: bool = True  # whether all examples are known to count alike, or not at all: their gradients have one factor
    hidden: str = ""  # the primitive with a loss inside that cannot


class _Scope:
    """The equations of one jaxpr, evaluated only as far as they are asked for."""

    def __init__(self, program: jaxprs.Program, operands: Sequence[Callable[[], Value]]):
        self.known: dict[Var, Callable[[], Value]] = dict(zip(program.jaxpr.invars, operands, strict=True))
        for v, x in zip(program.jaxpr.constvars, program.consts, strict=True):
            self.known[v] = lambda x=x: x
        self.made = {v: eqn for eqn in program.jaxpr.eqns for v in eqn.outvars}

    def value(self, v: Operand) -> Value:
        """Of a variable of this jaxpr."""
        if isinstance(v, Literal):
            return v.val
        if v not in self.known:
            eqn = self.made[v]
            if eqn.primitive.name in jaxprs.CALLS:
                inner, place = self.inside(eqn), eqn.outvars.index(v)
                out = inner.value(jaxprs.body(eqn).jaxpr.outvars[place])
            else:
                results = jaxprs.bind(eqn, [self.value(u) for u in eqn.invars])
                for u, x in zip(eqn.outvars, results, strict=True):
                    self.known[u] = lambda x=x: x
                out = self.known[v]()
            self.known[v] = lambda: out
        return self.known[v]()

    def inside(self, eqn: JaxprEqn) -> "_Scope":
        """The program of a call."""
        return _Scope(jaxprs.body(eqn), [lambda v=v: self.value(v) for v in eqn.invars])


def losses_in(program: jaxprs.Program, plan: Plan, operands: Sequence[Value]) -> Counted:
    """What the losses of a program count."""
    losses, hidden = _find(_Scope(program, [lambda x=x: x for x in operands]), program.jaxpr, plan)
    found = [losses[number] for number in sorted(losses)]
    calls = tuple(tuple(jaxprs.aval(v) for v in eqn.invars) for _, eqn, _ in found)
    results = tuple(jaxprs.aval(eqn.outvars[0]) for _, eqn, _ in found)
    if len(found) != 1 or hidden:
        return Counted(None, None, None, calls, results, not found, hidden)
    scope, eqn, jaxpr = found[0]
    z, _, *weights = calls[0]
    axes = counted_over(jaxprs.aval(program.jaxpr.outvars[0]), *calls[0])
    if not weights:
        count = float(math.prod(z.shape[:-1]) * jax.lax.axis_size(axes))
        return Counted(count, count, None, calls, results, _averaged(eqn, jaxpr))
    w = in_scope(jnp.asarray(scope.value(eqn.invars[2])))
    each, booleans = math.prod(z.shape[w.ndim : -1]), _of_booleans(eqn.invars[2], jaxpr)
    return Counted(total(w, axes) * each, total(w != 0, axes) * each, w != 0, calls, results, booleans)


def _averaged(eqn: JaxprEqn, jaxpr: Jaxpr) -> bool:
    """Whether the losses that vmap made of one are only added up, all alike."""
    result = eqn.outvars[0]
    uses = [e for e in jaxpr.eqns if result in [v for v in e.invars if isinstance(v, Var)]]
    added = all(e.primitive.name == "reduce_sum" and jaxprs.aval(e.outvars[0]).shape == () for e in uses)
    return jaxprs.aval(result).shape == () or (added and bool(uses) and result not in jaxpr.outvars)


def _of_booleans(weights: Operand, jaxpr: Jaxpr) -> bool:
    """Whether weights are booleans, up to shape and dtype, as far as this program shows."""
    made = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    while not jnp.issubdtype(jaxprs.aval(weights).dtype, jnp.bool_):
        if isinstance(weights, Literal) or weights not in made or made[weights].primitive.name not in SAME_NUMBERS:
            return False
        weights = made[weights].invars[0]
    return True


def _find(scope: _Scope, jaxpr: Jaxpr, plan: Plan) -> tuple[dict[int, tuple[_Scope, JaxprEqn, Jaxpr]], str]:
    """The losses by number, with their scopes, and the name of a loop or branch with one inside."""
    found = {number: (scope, jaxpr.eqns[i], jaxpr) for i, (_, number) in plan.losses.items()}
    hidden = ""
    if any(_turned(eqn) for _, eqn, _ in found.values()):
        hidden = "vmap"
    for i, plans in plan.inner.items():
        if not any(p.has_losses() for p in plans):
            continue
        eqn = jaxpr.eqns[i]
        if eqn.primitive.name not in jaxprs.CALLS | jaxprs.REMAT:
            hidden = eqn.primitive.name
            continue
        more, inside = _find(scope.inside(eqn), jaxprs.body(eqn).jaxpr, plans[0])
        found, hidden = found | more, hidden or inside
    return found, hidden


def _turned(eqn: JaxprEqn) -> bool:
    """Whether a loss was mapped over an axis that is not the first of all it takes, or over means with weights."""
    z, y, *weights = (jaxprs.aval(v).shape for v in eqn.invars)
    mapped = jaxprs.aval(eqn.outvars[0]).shape != ()
    return mapped and (bool(weights) or len(y) < len(z) - 1 or y[: len(z) - 1] != z[:-1])
