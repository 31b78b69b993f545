"""What each parameter is to a program: a table that it looks tokens up in, the head that gives a number for each of
them, a matrix, or something else.

The program is asked first, names (`fisher_optax.matrices.rules`) where it does not say. A table is what is indexed by
row, be its product taken too, as of a tied head. A head is what names call so, and a matrix whose product, and no
other, the program returns with as many outputs as a table has rows: a bias, a scale or a cap may come after it.

Tools that prune leave dense what gives a number for each token, and prune the last layer of any other model; for an
optimizer any layer that only the loss comes after is a head (`infer_axes`). Both read the one `program.flow`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ..matrices.axes import LeafAxes, MatrixAxes
from ..matrices.rules import resolve_axes
from .kinds.kronecker import InputGram
from .program.flow import Flow, follow, sites_of
from .program.leaves import LeafPlan
from .program.sites import Site, sources
from .traced import trace


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


def read_roles(f: Callable[..., PyTree], params: PyTree, *args: PyTree) -> list[Role]:
    """Of each leaf of ``params``, all floating point, in ``f(params, *args)``."""

    def outputs(params: PyTree, *args: PyTree) -> list[Array]:
        return [x for x in jax.tree.leaves(f(params, *args)) if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]

    traced = trace(outputs, InputGram(), params, args, {})
    flow = follow(traced.program, traced.plan, len(traced.leaves))
    sites: list[list[Site]] = [[] for _ in traced.leaves]
    for site in sites_of(traced.plan):
        sites[site.leaf].append(site)
    by_data = [_is_by_data(i, some, flow) for i, some in enumerate(sites)]
    tokens = [_looked_up_axis(some, flow) for some in sites]
    rows = {leaf.shape[a] for leaf, a, is_data in zip(traced.leaves, tokens, by_data, strict=True) if is_data}
    roles = []
    for leaf, named in zip(traced.leaves, resolve_axes(params), strict=True):
        i, bias = leaf.number, None if leaf.bias is None else traced.leaves[leaf.bias].path
        role = Role(leaf.path, leaf.shape, "matrix" if leaf.sites else "other", leaf.axes, named, leaf, bias=bias)
        if (is_data := by_data[i]) is not None:
            roles.append(role._replace(kind="embedding", tokens=tokens[i], by_data=is_data))
        else:
            roles.append(_without_lookup(role, [site for site in sites[i] if site.number in flow.returned], rows))
    return roles


def _is_lookup(site: Site, flow: Flow) -> bool:
    """Whether rows are taken, by an index or by a product with ones and zeros."""
    return site.how == "embedding" or site.number in flow.lookups


def _is_by_data(leaf: int, sites: Sequence[Site], flow: Flow) -> bool | None:
    """Whether data says which rows are looked up; None for what is not looked up, True where a loop hides the index."""
    found = [flow.lookups.get(site.number, True) for site in sites if _is_lookup(site, flow)]
    found += [flow.rows[leaf]] if leaf in flow.rows else []
    return any(found) if found else None


def _looked_up_axis(sites: Sequence[Site], flow: Flow) -> int:
    """The axis of a table that its rows are along, where it is one."""
    return next((sources(site.inputs)[0] for site in sites if _is_lookup(site, flow)), 0)


def _without_lookup(role: Role, last: Sequence[Site], rows: set[int]) -> Role:
    """What a parameter is that is looked up nowhere; ``last`` are its products that the program returns."""
    named = role.named.kind
    role = role._replace(is_returned=bool(last))
    if last and (last[0].n in rows or named == "head"):
        outputs = sources(last[0].outputs)
        return role._replace(kind="head", tokens=outputs[0] if len(outputs) == 1 else None)
    is_named = named == "head" or (named == "embedding" and role.plan.use != "convolution")
    return role._replace(kind=named) if is_named else role
