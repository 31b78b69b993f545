"""What capture makes of each parameter: a table for people, and axes for optimizers."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .._tables import table
from ..matrices.axes import ROUTER as BY_NAME
from ..matrices.axes import MatrixAxes, path_names
from ..matrices.floats import is_floating, with_rest_apart
from ..matrices.rules import resolve_axes
from ..statistics import LayerFactors
from .forward import input_sums
from .gradients import value_and_grad
from .kinds.kronecker import KroneckerFactors
from .kinds.protocol import StatisticsKind
from .program.experts import Experts, expert_axes
from .program.flow import Flow, follow
from .program.leaves import LeafPlan
from .program.reach import reached
from .traced import checked_kind, trace

FROZEN, REST = "no gradient reaches it", "no floating point"
ROUTER = "it chooses or weighs experts: fo.infer_axes leaves it to the fallback"


class CaptureRow(NamedTuple):
    """One leaf in a `CaptureReport`."""

    path: str
    shape: tuple[int, ...]
    use: str  # "dense", "convolution", "embedding", "bias of ...", or what else is done with it
    statistics: tuple[tuple[int, ...], ...]  # shapes of the left and the right side
    axes: MatrixAxes | None
    sites: int  # products that share the leaf
    reason: str  # why it gets no more
    is_frozen: bool = False  # no gradient reaches it: what is shown of it is 0


class CaptureReport(NamedTuple):
    """The rows of `fo.report` of a loss function; printed, a table."""

    rows: tuple[CaptureRow, ...]

    @property
    def share(self) -> float:
        """Of all floating-point parameters, those that have statistics; biases with their kernels, frozen ones not."""
        owners = {row.path for row in self.rows if row.statistics and not row.is_frozen}
        size = lambda rows: sum(math.prod(row.shape) for row in rows)  # noqa: E731
        captured = [r for r in self.rows if r.path in owners or r.use.removeprefix("bias of ") in owners]
        return size(captured) / max(size([row for row in self.rows if row.reason != REST]), 1)

    def __str__(self) -> str:
        lines = [
            (
                row.path,
                "x".join(map(str, row.shape)) or "scalar",
                row.use + (f", {row.sites} times" if row.sites > 1 else ""),
                ", ".join("x".join(map(str, shape)) for shape in row.statistics),
                row.reason,
            )
            for row in self.rows
        ]
        total = ("all", "", "", f"for {self.share:.0%}", "")
        return table(("leaf", "shape", "used as", "statistics", "why not more"), lines, total)


def capture_report(
    loss_fn: Callable[..., PyTree], params: PyTree, *args: PyTree, statistics: object = None, **kwargs: PyTree
) -> CaptureReport:
    """`fo.report` of a loss function."""
    kind = checked_kind(KroneckerFactors() if statistics is None else statistics)
    own, floats, rest = with_rest_apart(loss_fn, params)
    args = (*rest, *args)
    traced = trace(own, kind, floats, args, kwargs)
    leaves, live = traced.leaves, reached(traced.program)
    flow = follow(traced.program, traced.plan, len(leaves))
    routers = _routers(leaves, floats, flow, expert_axes(traced.program.jaxpr, traced.plan, leaves))
    shapes = _shapes(own, kind, floats, args, kwargs) if any(leaf.sites for leaf in leaves) else [()] * len(leaves)
    rows = []
    for leaf, has in zip(leaves, shapes, strict=True):
        frozen = leaf.number not in live and not kind.inputs_alone()
        is_router = leaf.number in routers and (frozen or not leaf.reason)
        why = ROUTER if is_router else FROZEN if frozen else leaf.reason or _sampled(kind, has)
        rows.append(CaptureRow(leaf.path, leaf.shape, leaf.use, has, leaf.axes, len(leaf.sites), why, frozen))
    return CaptureReport(_with_rest(rows, params))


def _with_rest(rows: Sequence[CaptureRow], params: PyTree) -> tuple[CaptureRow, ...]:
    """Also what is no floating point, in the order of the parameters."""
    own, found = iter(rows), []
    for path, x in jax.tree_util.tree_flatten_with_path(params)[0]:
        name, kind = "/".join(path_names(path)), jnp.result_type(x)
        rest = CaptureRow(name, jnp.shape(x), str(kind), (), None, 0, REST)
        found.append(next(own) if is_floating(x) else rest)
    return tuple(found)


def _sampled(kind: StatisticsKind, shapes: tuple[tuple[int, ...], ...]) -> str:
    """Why a side is no matrix."""
    longest = kind.longest_side()
    sides = [shape[-2:] for shape in shapes if len(shape) > 1 and shape[-1] > longest]
    return "; ".join(f"{d} > max_dim={longest}: {r} sampled rows" for r, d in sides)


def _shapes(
    loss_fn: Callable[..., PyTree],
    kind: StatisticsKind,
    params: PyTree,
    args: tuple[PyTree, ...],
    kwargs: dict[str, PyTree],
) -> list[tuple[tuple[int, ...], ...]]:
    """Of each leaf's statistics."""
    kind = kind.without_bases()
    values, treedef = jax.tree.flatten((params, args, kwargs))
    arrays = [i for i, x in enumerate(values) if hasattr(x, "shape") and hasattr(x, "dtype")]

    def statistics(*operands: Array) -> PyTree:
        filled = list(values)
        for i, x in zip(arrays, operands, strict=True):
            filled[i] = x
        params, args, kwargs = treedef.unflatten(filled)
        if kind.inputs_alone():
            sums = input_sums(functools.partial(loss_fn, **kwargs), kind, params, args)
            found = {leaf.number: kind.finish(leaf, slots, None) for leaf, slots in sums}
            return [found.get(i) for i in range(structure.num_leaves)]
        first = lambda *args, **kwargs: jax.tree.leaves(loss_fn(*args, **kwargs))[0]  # noqa: E731  a pair has aux
        return structure.flatten_up_to(value_and_grad(first, kind)(params, *args, **kwargs)[2])

    structure = jax.tree.structure(params)
    each = jax.eval_shape(statistics, *(values[i] for i in arrays))
    each = [dataclasses.replace(s, weight=None) if isinstance(s, LayerFactors) else s for s in each]
    return [tuple(x.shape for x in jax.tree.leaves(s) if x.ndim) for s in each]


def infer_axes(
    loss_fn: Callable[..., PyTree], params: PyTree, *args: PyTree, statistics: object = None, **kwargs: PyTree
) -> PyTree:
    """Which axes of each parameter are inputs, outputs and batch, read off the traced program: made for ``axes=``.

    A leaf gets `fo.MatrixAxes`, with the path of its bias, where `fo.value_and_grad` captures it, and None (fallback)
    elsewhere: what is no matrix, what is looked up as an embedding, what is used in a way that is not understood, and
    routers: a product with one number for each expert, the best of which choose experts or which weighs what these
    make, or one that is called so, since models choose in more ways than are followed. No other name plays a part.

    An output layer, whose input other layers have made and whose result only the loss takes, is marked as a ``head``, a
    tied embedding included: `fo.muon` and `fo.frog` leave it to their fallback.

    Args:
      loss_fn, params, *args, **kwargs: as for `fo.value_and_grad`; arrays may be `jax.ShapeDtypeStruct`. Integers,
        booleans and random states among the parameters get None.
      statistics: the kind the optimizer will be given: a leaf that has none of that kind (a loop's weights have no
        samples) is left to the fallback. None: an optimizer that is given none; what `fo.KroneckerFactors` would have
        matrices of, of any length, and of experts that share their input, which have one joint statistic, each.

    Raises:
      TypeError: for statistics of no kind.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> loss = lambda p, x: jnp.einsum("bi,hio->bho", x, p["w"]).sum()
      >>> fo.infer_axes(loss, {"w": jnp.ones((4, 3, 2))}, jnp.ones((5, 3)))
      {'w': MatrixAxes(inputs=(1,), outputs=(0, 2), batch=())}
    """
    kind = checked_kind(KroneckerFactors(max_dim=2**31) if statistics is None else statistics)
    loss_fn, params, rest = with_rest_apart(loss_fn, params)
    args = (*rest, *args)
    traced = trace(loss_fn, kind, params, args, kwargs)
    flow = follow(traced.program, traced.plan, len(traced.leaves))
    experts = expert_axes(traced.program.jaxpr, traced.plan, traced.leaves)
    routers = _routers(traced.leaves, params, flow, experts)

    def axes_of(leaf: LeafPlan, of_experts: Experts) -> MatrixAxes | None:
        if leaf.use == "embedding" or not leaf.sites or leaf.axes is None or leaf.number in routers:
            return None
        axes = leaf.axes if statistics is not None else _by_expert(leaf.axes, of_experts.axes)
        head = not axes.batch and flow.last.issuperset(site.number for site in leaf.sites)
        return dataclasses.replace(axes, head=head)

    return jax.tree.unflatten(traced.treedef, map(axes_of, traced.leaves, experts))


def _routers(leaves: list[LeafPlan], params: PyTree, flow: Flow, experts: list[Experts]) -> set[int]:
    """Leaves that choose or weigh experts, as the program shows, or else by their names."""
    return {
        leaf.number
        for leaf, named, found in zip(leaves, resolve_axes(params), experts, strict=True)
        if leaf.sites
        and (
            found.is_router
            or named.reason.startswith(BY_NAME)
            or flow.choosing.issuperset(site.number for site in leaf.sites)
        )
    }


def _by_expert(axes: MatrixAxes, experts: tuple[int, ...]) -> MatrixAxes:
    """The same with a matrix for each expert. A bias stays where no stack would come to stand behind its outputs."""
    if not experts:
        return axes
    outputs = tuple(a for a in axes.outputs if a not in experts)
    bias = None if axes.batch else axes.bias
    return MatrixAxes(axes.inputs, outputs, sorted((*axes.batch, *experts)), bias)
