"""Which operands of a program the gradient of its results reaches, by what its equations are, not by numbers."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax.extend.core import JaxprEqn, Literal, Var

from . import jaxprs

# The derivative of these is 0 everywhere, or none is asked for.
FLAT = frozenset({"stop_gradient", "floor", "ceil", "round", "sign", "nextafter"})

Operands = frozenset[int]


def reached(program: jaxprs.Program) -> Operands:
    """The numbers of the operands that the gradient of any result reaches, unless it is 0 by its numbers.

    A function with its own derivative is taken to hand on what its program does.
    """
    operands = [frozenset({i}) for i in range(len(program.jaxpr.invars))]
    return frozenset().union(*_results(program, operands))


def _results(program: jaxprs.Program, operands: Sequence[Operands]) -> list[Operands]:
    """Of each result, which operands it hands its gradient to."""
    env: dict[Var, Operands] = dict(zip(program.jaxpr.invars, operands, strict=True))

    def of(v: jaxprs.Operand) -> Operands:
        smooth = jnp.issubdtype(getattr(v.aval, "dtype", jnp.float32), jnp.inexact)
        return frozenset() if isinstance(v, Literal) or not smooth else env.get(v, frozenset())

    for eqn in program.jaxpr.eqns:
        env.update(zip(eqn.outvars, _of_equation(eqn, [of(v) for v in eqn.invars]), strict=True))
    return [of(v) for v in program.jaxpr.outvars]


def _of_equation(eqn: JaxprEqn, operands: Sequence[Operands]) -> list[Operands]:
    name = eqn.primitive.name
    if name in FLAT:
        return [frozenset()] * len(eqn.outvars)
    if name in jaxprs.CALLS | jaxprs.REMAT | jaxprs.CUSTOM or name == "shard_map":
        return _results(jaxprs.body(eqn), operands)
    if name == "cond":
        each = [_results(branch, operands[1:]) for branch in jaxprs.bodies(eqn)]
        return [frozenset().union(*some) for some in zip(*each, strict=True)]
    if name == "scan":
        consts, carry = jaxprs.scan_counts(eqn)
        return _repeated(
            jaxprs.body(eqn), operands[:consts], operands[consts : consts + carry], operands[consts + carry :]
        )
    if name == "while":
        _, fixed, carried = jaxprs.while_operands(eqn, operands)
        return _repeated(jaxprs.bodies(eqn)[1], fixed, carried, [])
    return [frozenset().union(*operands)] * len(eqn.outvars)


def _repeated(
    body: jaxprs.Program, fixed: Sequence[Operands], carried: Sequence[Operands], over: Sequence[Operands]
) -> list[Operands]:
    """Of a loop, until no step adds anything to what it carries."""
    carried = list(carried)
    while True:
        results = _results(body, [*fixed, *carried, *over])
        more = [a | b for a, b in zip(carried, results, strict=False)]
        if more == carried:
            return [*carried, *results[len(carried) :]]
        carried = more
