"""Floating-point operations of a program's matrix products and convolutions, counted from its jaxpr.

XLA's own cost analysis counts a loop's body once and both branches of a ``cond``; here a body counts as often as it
runs, and each branch apart. Factorisations (QR, eigh, Cholesky, triangular solves, ...) are no products: they are
listed by name and shape.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

FACTORISATIONS = frozenset(
    {
        *("cholesky", "eig", "eigh", "geqrf", "householder_product", "lu", "qr", "schur", "svd"),
        *("triangular_solve", "tridiagonal"),
    }
)


class Branches(NamedTuple):
    """The alternatives of one ``cond``, and how often it is decided; or a loop that runs not at all, or in full."""

    alternatives: "tuple[FlopCount, ...]"
    times: int
    loop: bool = False


@dataclass(frozen=True)
class FlopCount:
    """What one run of a program costs: ``products`` always, plus one alternative of each entry of ``branches``.

    ``factorisations`` counts calls by ``"name (shape)"``, batches included in the shape. ``unread_loops`` names the
    ``while`` loops whose trip count is not written in the program: their bodies are counted once.
    """

    products: int = 0
    branches: tuple[Branches, ...] = ()
    factorisations: Counter[str] = field(default_factory=Counter)
    unread_loops: tuple[str, ...] = ()

    @property
    def most(self) -> int:
        """Flops on the costliest path."""
        return self.products + sum(b.times * max(a.most for a in b.alternatives) for b in self.branches)

    @property
    def least(self) -> int:
        """Flops on the cheapest path."""
        return self.products + sum(b.times * min(a.least for a in b.alternatives) for b in self.branches)

    @property
    def most_without_factorisations(self) -> int | None:
        """Flops on the costliest path that factorises nothing: an optimizer's step between refreshes.

        Where there is nothing to refresh, loops over it do not run. None where every path factorises.
        """
        path = self.costliest(without=FACTORISATIONS, loops=False)
        return None if path is None else path.products

    def costliest(self, without: Collection[str] = (), loops: bool = True) -> "FlopCount | None":
        """The path with the most flops, without branches, of those that call none of these factorisations; None where
        every path does. Of two with the same flops it is the one that factorises less. ``loops`` says whether those
        run that may not.
        """
        if any(call.split()[0] in without for call in self.factorisations):
            return None
        path = replace(self, branches=())
        for branches in self.branches:
            alternatives = branches.alternatives[:1] if branches.loop and not loops else branches.alternatives
            possible = [p for p in (a.costliest(without, loops) for a in alternatives) if p is not None]
            if not possible:
                return None
            path += max(possible, key=lambda p: (p.products, -p.factorisations.total())).repeated(branches.times)
        return path

    def __add__(self, other: "FlopCount") -> "FlopCount":
        return FlopCount(
            self.products + other.products,
            self.branches + other.branches,
            self.factorisations + other.factorisations,
            self.unread_loops + other.unread_loops,
        )

    def repeated(self, times: int) -> "FlopCount":
        """The same program run ``times`` times in a row."""
        branches = tuple(b._replace(times=b.times * times) for b in self.branches)
        factorisations = Counter({name: calls * times for name, calls in self.factorisations.items()})
        return FlopCount(self.products * times, branches, factorisations, self.unread_loops) if times else FlopCount()


def count_matmul_flops(fn: Callable[..., Any], *args: Any) -> FlopCount:
    """Count the products in ``fn(*args)``; arrays may be ``jax.ShapeDtypeStruct``, nothing is run.

    A product of ``(m, k)`` and ``(k, n)`` is ``2 m k n`` flops, complex or not. The body of a ``shard_map`` counts once
    for each device that runs it.

    Example:
        >>> x = jax.ShapeDtypeStruct((8, 16), "float32")
        >>> count_matmul_flops(lambda x: x @ x.T, x).most
        2048
    """
    return _count(jax.make_jaxpr(fn)(*args).jaxpr)


def _count(jaxpr: Jaxpr) -> FlopCount:
    return sum((_count_equation(eqn) for eqn in jaxpr.eqns), FlopCount())


def _count_equation(eqn: JaxprEqn) -> FlopCount:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        return FlopCount(_dot_general(eqn))
    if name == "conv_general_dilated":
        return FlopCount(_convolution(eqn))
    if name in FACTORISATIONS:
        shapes = ", ".join(str(_shape(v)) for v in eqn.invars)
        return FlopCount(factorisations=Counter({f"{name} {shapes}": 1}))
    if name == "scan":
        return _count(params["jaxpr"].jaxpr).repeated(params["length"])
    if name == "while":
        return _while(eqn)
    if name == "cond" and params.get("branches_platforms"):
        return _count(params["branches"][_of_platform(params["branches_platforms"])].jaxpr)
    if name == "cond":
        return FlopCount(branches=(Branches(tuple(_count(branch.jaxpr) for branch in params["branches"]), 1),))
    if name == "custom_linear_solve":
        return _count(params["jaxprs"].solve.jaxpr)  # its other programs are for derivatives
    bodies = sum(map(_count, _jaxprs(params)), FlopCount())
    return bodies.repeated(_devices(params)) if name == "shard_map" else bodies


def _of_platform(named: tuple[tuple[str, ...] | None, ...]) -> int:
    """Which branch of a choice by platform is taken here; None stands for all other platforms."""
    here = jax.default_backend()
    others = named.index(None) if None in named else 0
    return next((i for i, names in enumerate(named) if names and here in names), others)


def _jaxprs(params: dict[str, Any]) -> Iterator[Jaxpr]:
    """The programs inside a call: jit, remat, shard_map, custom_jvp and custom_vjp (whose rules are no programs)."""
    for value in params.values():
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value


def _devices(params: dict[str, Any]) -> int:
    """Devices that each run the body of a ``shard_map``: those along its manual axes."""
    return math.prod(size for axis, size in params["mesh"].shape.items() if axis in params["newly_manual_axes"])


def _dot_general(eqn: JaxprEqn) -> int:
    (contracting, _), _ = eqn.params["dimension_numbers"]
    return 2 * math.prod(_shape(eqn.outvars[0])) * math.prod(_shape(eqn.invars[0])[axis] for axis in contracting)


def _convolution(eqn: JaxprEqn) -> int:
    """Each output sums over the kernel's positions and its own group's input channels; padding counts like data."""
    _, inputs, *positions = eqn.params["dimension_numbers"].rhs_spec
    kernel = _shape(eqn.invars[1])
    return 2 * math.prod(_shape(eqn.outvars[0])) * math.prod(kernel[axis] for axis in (inputs, *positions))


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _while(eqn: JaxprEqn) -> FlopCount:
    body, test = _count(eqn.params["body_jaxpr"].jaxpr), eqn.params["cond_jaxpr"].jaxpr
    names = [e.primitive.name for e in test.eqns]
    if names == ["lt"] and (times := _trip_count(eqn, test)) is not None:
        return body.repeated(times)
    if names == ["lt", "lt", "and"] and (most := _number(test.eqns[1].invars[1])) is not None:  # i < count and i < most
        return FlopCount(branches=(Branches((FlopCount(), body.repeated(most)), 1, loop=True),))
    return replace(body, unread_loops=(*body.unread_loops, str(eqn.source_info.name_stack) or "while"))


def _trip_count(eqn: JaxprEqn, test: Jaxpr) -> int | None:
    """Iterations of ``i = start; while i < stop: ...; i += step``, if all three are written in the program."""
    body = eqn.params["body_jaxpr"].jaxpr
    test_consts, body_consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    starts = eqn.invars[test_consts + body_consts :]
    before, after = body.invars[body_consts:], body.outvars

    def constant(value: Any) -> int | None:
        """An operand of the test that is a number, one handed in, or one that the body carries round unchanged."""
        if isinstance(value, Literal):
            return int(value.val)
        index = test.invars.index(value) - test_consts
        if index < 0:
            return _number(eqn.invars[index + test_consts])
        return _number(starts[index]) if after[index] is before[index] else None

    counter, bound = test.eqns[0].invars
    if isinstance(counter, Literal) or (index := test.invars.index(counter) - test_consts) < 0:
        return None
    adds = [e for e in body.eqns if e.outvars[0] is after[index] and e.primitive.name == "add"]
    step = next((_number(e.invars[1]) for e in adds if e.invars[0] is before[index]), None)
    start, stop = _number(starts[index]), constant(bound)
    if start is None or stop is None or step is None or step <= 0:
        return None
    return max(0, math.ceil((stop - start) / step))


def _number(value: Any) -> int | None:
    return int(value.val) if isinstance(value, Literal) else None
