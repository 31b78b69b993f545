"""What each parameter is to a program: a table that it looks tokens up in, the head that gives a number for each of
them, a matrix, or something else.

The program is asked first, names (`fisher_optax.matrices.rules`) where it does not say. A table is what is indexed by
row, be its product taken too, as of a tied head. A head is what names call so, and a matrix whose product, and no
other, the program returns with as many outputs as a table has rows: a bias, a scale or a cap may come after it.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal, Var
from jaxtyping import Array, PyTree

from ..matrices.axes import LeafAxes, MatrixAxes
from ..matrices.flat import read_by_names
from .kinds.kronecker import InputGram
from .program import jaxprs
from .program.leaves import LeafPlan
from .program.sites import Site, sources
from .program.walk import Plan
from .traced import Traced, trace

DATA, MIXED = -1, -2  # among the numbers of products that a value depends on
PRODUCTS = frozenset({"dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general"})
LOOPS = frozenset({"scan", "while", "cond", "shard_map"})


class Role(NamedTuple):
    """One parameter."""

    path: str
    shape: tuple[int, ...]
    kind: str  # "embedding", "head", "matrix" or "other"
    axes: MatrixAxes | None  # of the matrix that the program multiplies by; None: it does not, or names alone know
    named: LeafAxes  # what the rules say of it
    plan: LeafPlan  # what else the program does with it
    tokens: int | None = None  # the axis along which a table, or a head, has one entry a token
    by_data: bool = False  # a table whose rows depend on the data, unlike one of positions
    is_returned: bool = False  # whether the program returns its product, and no other
    bias: str | None = None  # what is added to the outputs of its product, and to nothing else

    @property
    def units(self) -> MatrixAxes | None:
        """Its axes with tokens as outputs, by the program or else by the rules."""
        axes = self.axes or self.named.axes
        if self.tokens is not None:
            rest = tuple(a for a in range(len(self.shape)) if a != self.tokens)
            return MatrixAxes(rest, self.tokens)
        if axes is not None and self.kind == "embedding":
            return MatrixAxes(axes.outputs, axes.inputs, axes.batch)
        return axes


def read_roles(f: Callable[..., PyTree], params: PyTree, *args: PyTree) -> list[Role]:
    """Of each leaf of ``params``, all floating point, in ``f(params, *args)``."""

    def outputs(params: PyTree, *args: PyTree) -> list[Array]:
        return [x for x in jax.tree.leaves(f(params, *args)) if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]

    traced = trace(outputs, InputGram(), params, args, {})
    count, lookups = len(traced.leaves), {}
    operands = [frozenset[int]()] * count + [frozenset({DATA})] * (len(traced.operands) - count)
    results = _flow(traced.program, traced.plan, operands, lookups)
    returned = {n for found in results if len(own := found - {DATA}) == 1 for n in own if n >= 0}
    sites: dict[int, list[Site]] = {}
    for site in _sites(traced.plan):
        sites.setdefault(site.leaf, []).append(site)
    tables = {i: s for i, found in sites.items() for s in found if s.how == "embedding"}
    rows = {site.m for site in tables.values() if lookups.get(site.number, True)}
    named = read_by_names(params)
    return [
        _role(leaf, named[leaf.number], sites.get(leaf.number, []), lookups, returned, rows, traced)
        for leaf in traced.leaves
    ]


def _role(
    leaf: LeafPlan,
    named: LeafAxes,
    sites: Sequence[Site],
    lookups: dict[int, bool],
    returned: set[int],
    rows: set[int],
    traced: Traced,
) -> Role:
    bias = None if leaf.bias is None else traced.leaves[leaf.bias].path
    role = Role(leaf.path, leaf.shape, "matrix" if leaf.sites else "other", leaf.axes, named, leaf, bias=bias)
    looked_up = [site for site in sites if site.how == "embedding"]
    if looked_up:
        tokens = sources(looked_up[0].inputs)[0]
        by_data = any(lookups.get(site.number, True) for site in looked_up)
        return role._replace(kind="embedding", tokens=tokens, by_data=by_data)
    last = [site for site in sites if site.number in returned]
    role = role._replace(is_returned=bool(last))
    if last and (last[0].n in rows or named.kind == "head"):
        outputs = sources(last[0].outputs)
        return role._replace(kind="head", tokens=outputs[0] if len(outputs) == 1 else None)
    is_named = named.kind == "head" or (named.kind == "embedding" and leaf.use != "convolution")
    return role._replace(kind=named.kind) if is_named else role


def _sites(plan: Plan) -> Iterator[Site]:
    yield from plan.sites.values()
    for plans in plan.inner.values():
        for inner in plans:
            yield from _sites(inner)


def _flow(
    program: jaxprs.Program, plan: Plan, operands: Sequence[frozenset[int]], lookups: dict[int, bool]
) -> list[frozenset[int]]:
    """On which products each result depends with no other product in between: their numbers, `DATA` for the arguments,
    `MIXED` for what is not followed. ``lookups`` gets the numbers of tables' sites: whether data says which row.
    """
    env: dict[Var, frozenset[int]] = dict(zip(program.jaxpr.invars, operands, strict=True))

    def of(v: jaxprs.Operand) -> frozenset[int]:
        return frozenset() if isinstance(v, Literal) else env.get(v, frozenset())

    for i, eqn in enumerate(program.jaxpr.eqns):
        name, views = eqn.primitive.name, [of(v) for v in eqn.invars]
        every = frozenset().union(*views)
        results = [every] * len(eqn.outvars)
        if i in plan.sites:
            site = plan.sites[i]
            if site.how == "embedding":
                lookups[site.number] = bool(views[1])
            results = [frozenset({site.number})]
        elif i in plan.inner and name not in LOOPS:
            results = _flow(jaxprs.body(eqn), plan.inner[i][0], views, lookups)
        elif (name in PRODUCTS or name in LOOPS) and every:
            results = [every | {MIXED}] * len(eqn.outvars)
        env.update(zip(eqn.outvars, results, strict=True))
    return [of(v) for v in program.jaxpr.outvars]
