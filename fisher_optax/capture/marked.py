"""The losses of `fo.losses` in a traced program: what they divide by, and which examples they leave out."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var
from jaxtyping import Array, Bool

from .._xla import in_scope
from .devices import Call, counted_over
from .losses import total
from .program import jaxprs
from .program.jaxprs import Operand, Value
from .program.walk import Plan


class Counted(NamedTuple):
    """What the losses of a program say of its examples; total and mask are None where there is not just one to ask."""

    total: Array | float | None = None
    mask: Bool[Array, "..."] | None = None
    calls: tuple[Call, ...] = ()  # of each loss that can be counted
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
    found, hidden = _find(_Scope(program, [lambda x=x: x for x in operands]), program.jaxpr, plan)
    calls = tuple(tuple(jaxprs.aval(v) for v in eqn.invars) for _, eqn in found)
    if len(found) != 1 or hidden:
        return Counted(calls=calls, hidden=hidden)
    scope, eqn = found[0]
    z, _, *weights = calls[0]
    axes = counted_over(jaxprs.aval(program.jaxpr.outvars[0]), *calls[0])
    if not weights:
        return Counted(float(math.prod(z.shape[:-1]) * jax.lax.axis_size(axes)), None, calls)
    w = in_scope(jnp.asarray(scope.value(eqn.invars[2])))
    return Counted(total(w, axes) * math.prod(z.shape[w.ndim : -1]), w != 0, calls)


def _find(scope: _Scope, jaxpr: Jaxpr, plan: Plan) -> tuple[list[tuple[_Scope, JaxprEqn]], str]:
    """The losses and their scopes, and the name of a loop or branch with one inside."""
    found, hidden = [(scope, jaxpr.eqns[i]) for i in plan.losses], ""
    if any(_turned(eqn) for _, eqn in found):
        hidden = "vmap"
    for i, plans in plan.inner.items():
        if not any(p.has_losses() for p in plans):
            continue
        eqn = jaxpr.eqns[i]
        if eqn.primitive.name not in jaxprs.CALLS | jaxprs.REMAT:
            hidden = eqn.primitive.name
            continue
        more, inside = _find(scope.inside(eqn), jaxprs.body(eqn).jaxpr, plans[0])
        found, hidden = found + more, hidden or inside
    return found, hidden


def _turned(eqn: JaxprEqn) -> bool:
    """Whether a loss was mapped over an axis that is not the first of all it takes, or over means with weights."""
    z, y, *weights = (jaxprs.aval(v).shape for v in eqn.invars)
    mapped = jaxprs.aval(eqn.outvars[0]).shape != ()
    return mapped and (bool(weights) or y not in (z, z[:-1]))
