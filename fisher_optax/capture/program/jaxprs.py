"""Jaxprs across releases of JAX: everything that differs between them, or is not spelled out in `jax.extend`."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.core import ShapedArray
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
    axes = varying(*others) - varying(x)
    return jax.lax.pcast(x, tuple(sorted(axes)), to="varying") if axes else x


def varying(*xs: Any) -> frozenset[str]:
    """The axes of a shard_map over whose devices one of these arrays, or types of arrays, differs."""
    return frozenset().union(*(_type(x).manual_axis_type.varying for x in xs if x is not None))


def split_over(*xs: Any) -> tuple[tuple[str, int], ...]:
    """The same axes with their sizes, in the order of the mesh."""
    axes = {axis: None for x in xs if varying(x) for axis in _type(x).sharding.mesh.shape.items()}
    return tuple(axis for axis in axes if axis[0] in varying(*xs))


def _type(x: Any) -> Any:
    return x if isinstance(x, ShapedArray) else jax.typeof(x)


def read(env: dict[Any, Any], atom: Any) -> Any:
    """The value of a literal or a variable."""
    return atom.val if isinstance(atom, Literal) else env[atom]
