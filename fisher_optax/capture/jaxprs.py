"""Jaxprs across releases of JAX: everything that differs between them, or is not spelled out in `jax.extend`."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import JaxprEqn, Literal

CALLS = frozenset({"jit", "pjit", "closed_call", "core_call"})
REMAT = frozenset({"remat2", "remat", "checkpoint"})
CUSTOM = frozenset({"custom_jvp_call", "custom_vjp_call"})


class Program(NamedTuple):
    """A jaxpr and the values of its constants."""

    jaxpr: Any
    consts: tuple[Any, ...]


def program(inner: Any) -> Program:
    """Of a closed or an open jaxpr."""
    jaxpr = getattr(inner, "jaxpr", inner)
    return Program(jaxpr, tuple(getattr(inner, "consts", ())))


def body(eqn: JaxprEqn) -> Program:
    """The one program inside a call, remat, scan, shard_map or a function with its own derivative."""
    return program(eqn.params["call_jaxpr" if "call_jaxpr" in eqn.params else "jaxpr"])


def branches(eqn: JaxprEqn) -> list[Program]:
    """The programs of a ``cond``."""
    return [program(inner) for inner in eqn.params["branches"]]


def scan_counts(eqn: JaxprEqn) -> tuple[int, int]:
    """How many operands of a ``scan`` are constants, and how many are carried."""
    if "num_consts" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, _ = eqn.params["ft_in"].unpack()
    return len(consts), len(carry)


def bind(eqn: JaxprEqn, operands: Sequence[Any]) -> list[Any]:
    """The results of an equation on other operands, under the settings it was traced with."""
    given = eqn.primitive.get_bind_params(eqn.params)
    functions, params = given if isinstance(given, tuple) else ((), given)
    with eqn.ctx.manager:
        out = eqn.primitive.bind(*functions, *operands, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def aval(atom: Any) -> Any:
    """The shape and dtype of a literal or a variable, both of which are arrays here."""
    return atom.aval


def varying_as(x: Any, *others: Any) -> Any:
    """``x``, taken to differ between the devices of a shard_map wherever one of the others does."""
    axes = frozenset().union(*(_varying(other) for other in others if other is not None)) - _varying(x)
    return jax.lax.pcast(x, tuple(sorted(axes)), to="varying") if axes else x


def _varying(x: Any) -> frozenset[Any]:
    return jax.typeof(x).manual_axis_type.varying


def read(env: dict[Any, Any], atom: Any) -> Any:
    """The value of a literal or a variable."""
    return atom.val if isinstance(atom, Literal) else env[atom]
