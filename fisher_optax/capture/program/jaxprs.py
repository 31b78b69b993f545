"""Jaxprs across releases of JAX: everything that differs between them, or is not spelled out in `jax.extend`."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar, cast

import jax
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var
from jax.ref import AbstractRef
from jax.typing import ArrayLike
from jaxtyping import Array

CALLS = frozenset({"jit", "pjit", "closed_call", "core_call"})
REMAT = frozenset({"remat2", "remat", "checkpoint"})
CUSTOM = frozenset({"custom_jvp_call", "custom_vjp_call"})

Operand = Var | Literal
Value = ArrayLike | np.generic | jax.Ref  # of an operand; a literal may be NumPy's
Typed = Value | ShapedArray  # an array, or the type of one
T = TypeVar("T", bound=Value)
O = TypeVar("O")


class Program(NamedTuple):
    """A jaxpr and the values of its constants."""

    jaxpr: Jaxpr
    consts: tuple[Value, ...]


def program(inner: ClosedJaxpr | Jaxpr) -> Program:
    """Of a closed or an open jaxpr."""
    if isinstance(inner, ClosedJaxpr):
        return Program(inner.jaxpr, tuple(inner.consts))
    return Program(inner, ())


def body(eqn: JaxprEqn) -> Program:
    """The one program inside a call, remat, scan, shard_map or a function with its own derivative."""
    return program(eqn.params["call_jaxpr" if "call_jaxpr" in eqn.params else "jaxpr"])


def bodies(eqn: JaxprEqn) -> list[Program]:
    """All programs inside an equation: the branches of a ``cond``; of a ``while``, its condition and a step."""
    if eqn.primitive.name == "cond":
        return [program(inner) for inner in eqn.params["branches"]]
    if eqn.primitive.name == "while":
        return [program(eqn.params[name]) for name in ("cond_jaxpr", "body_jaxpr")]
    return [body(eqn)]


def while_operands(eqn: JaxprEqn, operands: Sequence[O]) -> tuple[Sequence[O], Sequence[O], Sequence[O]]:
    """The operands of a ``while``: constants of its condition, of a step, and what is carried."""
    condition, end = eqn.params["cond_nconsts"], eqn.params["cond_nconsts"] + eqn.params["body_nconsts"]
    return operands[:condition], operands[condition:end], operands[end:]


def scan_counts(eqn: JaxprEqn) -> tuple[int, int]:
    """How many operands of a ``scan`` are constants, and how many are carried."""
    if "num_consts" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, _ = eqn.params["ft_in"].unpack()
    return len(consts), len(carry)


def bind(eqn: JaxprEqn, operands: Sequence[Value]) -> list[Any]:
    """The results of an equation on other operands, under the settings it was traced with."""
    settings = eqn.primitive.get_bind_params(eqn.params)
    functions, params = settings if isinstance(settings, tuple) else ((), settings)
    with eqn.ctx.manager:
        out = eqn.primitive.bind(*functions, *operands, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def aval(atom: Operand) -> ShapedArray:
    """The shape and dtype of a literal or a variable, both of which are arrays here."""
    return cast(ShapedArray, atom.aval)


def shape(atom: Operand) -> tuple[int, ...]:
    """Of an array, or of a reference to one."""
    return tuple(cast(ShapedArray | AbstractRef, atom.aval).shape)


def varying_as(x: T, *others: Typed | None) -> T | Array:
    """``x``, taken to differ between the devices of a shard_map wherever one of the others does."""
    axes = varying(*others) - varying(x)
    return jax.lax.pcast(x, tuple(sorted(axes)), to="varying") if axes else x


def varying(*xs: Typed | None) -> frozenset[str]:
    """The axes of a shard_map over whose devices one of these arrays, or types of arrays, differs."""
    return frozenset().union(*(_type(x).manual_axis_type.varying for x in xs if x is not None))


def split_over(*xs: Typed | None) -> tuple[tuple[str, int], ...]:
    """The same axes with their sizes, in the order of the mesh."""
    axes = {axis: None for x in xs if x is not None and varying(x) for axis in _type(x).sharding.mesh.shape.items()}
    return tuple(axis for axis in axes if axis[0] in varying(*xs))


def _type(x: Typed) -> ShapedArray:
    return x if isinstance(x, ShapedArray) else jax.typeof(x)


def environment(program: Program, operands: Sequence[Value]) -> dict[Var, Any]:
    """The values of a program's variables before its first equation."""
    names = (*program.jaxpr.constvars, *program.jaxpr.invars)
    return dict(zip(names, (*program.consts, *operands), strict=True))


def read(env: dict[Var, Value], atom: Operand) -> Any:
    """The value of a literal or a variable."""
    return atom.val if isinstance(atom, Literal) else env[atom]
