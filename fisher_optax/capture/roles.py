"""What each parameter is to a program: a table that it looks tokens up in, the head that gives a number for each of
them, a matrix, or something else.

The program is asked first, names (`fisher_optax.matrices.rules`) where it does not say. A table is what is indexed by
row, be its product taken too, as of a tied head. A head is what names call so, and a matrix whose product, and no
other, the program returns with as many outputs as a table has rows: a bias, a scale or a cap may come after it.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn, Literal, Var
from jaxtyping import Array, PyTree

from ..matrices.axes import LeafAxes, MatrixAxes
from ..matrices.rules import resolve_axes
from .kinds.kronecker import InputGram
from .program import jaxprs
from .program.leaves import LeafPlan
from .program.sites import Site, sources
from .program.walk import Plan
from .traced import trace

# Among the numbers of products that a value depends on; below LEAF are the parameters themselves.
DATA, MIXED, ONE_HOT, LEAF = -1, -2, -3, -4
PRODUCTS = frozenset({"dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general"})
VIEWS = frozenset({"convert_element_type", "reshape", "transpose", "squeeze", "broadcast_in_dim"})
LOOPS = frozenset({"scan", "while", "cond", "shard_map"})


Sources: TypeAlias = frozenset[int]


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
        if axes is None or self.kind != "embedding" or axes.outputs == (self.tokens,):
            return axes
        return MatrixAxes(axes.outputs, axes.inputs, axes.batch)


class _Lookups(NamedTuple):
    """What is looked up by row, and whether data says which one."""

    sites: dict[int, bool]  # by number of the product
    leaves: dict[int, bool]  # by parameter, of single rows, which are no sites

    def is_one(self, site: Site) -> bool:
        """Whether rows are taken, by an index or by a product with ones and zeros."""
        return site.how == "embedding" or site.number in self.sites

    def by_data(self, leaf: int, sites: Sequence[Site]) -> bool | None:
        """None for what is not looked up; True where a loop hides the index."""
        found = [self.sites.get(site.number, True) for site in sites if self.is_one(site)]
        found += [self.leaves[leaf]] if leaf in self.leaves else []
        return any(found) if found else None


def read_roles(f: Callable[..., PyTree], params: PyTree, *args: PyTree) -> list[Role]:
    """Of each leaf of ``params``, all floating point, in ``f(params, *args)``."""

    def outputs(params: PyTree, *args: PyTree) -> list[Array]:
        return [x for x in jax.tree.leaves(f(params, *args)) if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]

    traced = trace(outputs, InputGram(), params, args, {})
    count, lookups = len(traced.leaves), _Lookups({}, {})
    operands = [frozenset({LEAF - i}) for i in range(count)]
    operands += [frozenset({DATA})] * (len(traced.operands) - count)
    results = _flow(traced.program, traced.plan, operands, lookups)
    returned = {n for found in results if len(own := found - {DATA}) == 1 for n in own if n >= 0}
    sites: list[list[Site]] = [[] for _ in range(count)]
    for site in _sites(traced.plan):
        sites[site.leaf].append(site)
    by_data = [lookups.by_data(i, some) for i, some in enumerate(sites)]
    tokens = [_looked_up_axis(some, lookups) for some in sites]
    rows = {leaf.shape[a] for leaf, a, is_data in zip(traced.leaves, tokens, by_data, strict=True) if is_data}
    roles = []
    for leaf, named in zip(traced.leaves, resolve_axes(params), strict=True):
        i, bias = leaf.number, None if leaf.bias is None else traced.leaves[leaf.bias].path
        role = Role(leaf.path, leaf.shape, "matrix" if leaf.sites else "other", leaf.axes, named, leaf, bias=bias)
        if (is_data := by_data[i]) is not None:
            roles.append(role._replace(kind="embedding", tokens=tokens[i], by_data=is_data))
        else:
            roles.append(_without_lookup(role, [site for site in sites[i] if site.number in returned], rows))
    return roles


def _looked_up_axis(sites: Sequence[Site], lookups: _Lookups) -> int:
    """The axis of a table that its rows are along, where it is one."""
    return next((sources(site.inputs)[0] for site in sites if lookups.is_one(site)), 0)


def _without_lookup(role: Role, last: Sequence[Site], rows: set[int]) -> Role:
    """What a parameter is that is looked up nowhere; ``last`` are its products that the program returns."""
    named = role.named.kind
    role = role._replace(is_returned=bool(last))
    if last and (last[0].n in rows or named == "head"):
        outputs = sources(last[0].outputs)
        return role._replace(kind="head", tokens=outputs[0] if len(outputs) == 1 else None)
    is_named = named == "head" or (named == "embedding" and role.plan.use != "convolution")
    return role._replace(kind=named) if is_named else role


def _sites(plan: Plan) -> Iterator[Site]:
    yield from plan.sites.values()
    for plans in plan.inner.values():
        for inner in plans:
            yield from _sites(inner)


def _flow(program: jaxprs.Program, plan: Plan, operands: Sequence[Sources], lookups: _Lookups) -> list[Sources]:
    """On which products each result depends with no other product in between: their numbers, `DATA` for the arguments,
    `MIXED` for what is not followed, `ONE_HOT` for whether two integers are equal, and numbers from `LEAF` on down for
    parameters as they are. ``lookups`` gets what is looked up.
    """
    env: dict[Var, Sources] = dict(zip(program.jaxpr.invars, operands, strict=True))

    def of(v: jaxprs.Operand) -> Sources:
        return frozenset() if isinstance(v, Literal) else env.get(v, frozenset())

    for i, eqn in enumerate(program.jaxpr.eqns):
        name, views = eqn.primitive.name, [of(v) for v in eqn.invars]
        every = frozenset(n for n in frozenset().union(*views) if n > ONE_HOT or (n == ONE_HOT and name in VIEWS))
        results = [every] * len(eqn.outvars)
        if i in plan.sites:
            site = plan.sites[i]
            index = views[1] if site.how == "embedding" else views[site.x]
            if site.how == "embedding" or ONE_HOT in index:
                lookups.sites[site.number] = bool(index - {ONE_HOT})
            results = [frozenset({site.number})]
        elif name in jaxprs.CALLS | jaxprs.REMAT:
            results = _flow(jaxprs.body(eqn), plan.inner.get(i, [Plan()])[0], views, lookups)
        elif name == "convert_element_type":
            results = views
        elif name == "eq" and jnp.issubdtype(jaxprs.aval(eqn.invars[0]).dtype, jnp.integer):
            results = [every | {ONE_HOT}]
        elif name in ("gather", "dynamic_slice"):
            _note_row(eqn, views, lookups)
        elif name in PRODUCTS | LOOPS and every:
            results = [every | {MIXED}] * len(eqn.outvars)
        env.update(zip(eqn.outvars, results, strict=True))
    return [of(v) for v in program.jaxpr.outvars]


def _note_row(eqn: JaxprEqn, views: Sequence[Sources], lookups: _Lookups) -> None:
    """A row of a matrix that is taken by itself."""
    shape = jaxprs.shape(eqn.invars[0])
    if len(shape) == 2 and tuple(eqn.params["slice_sizes"]) == (1, shape[1]) and shape[0] > 1:
        for n in views[0]:
            if n <= LEAF:
                lookups.leaves[LEAF - n] = lookups.leaves.get(LEAF - n, False) or any(views[1:])
