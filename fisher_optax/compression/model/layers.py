"""The layers of a model, as what they are pruned as: matrices, in the order in which the model uses them."""

import dataclasses
import fnmatch
import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import PyTree

from ...capture import InputGram
from ...capture.program.leaves import LeafPlan
from ...capture.program.order import in_order
from ...capture.roles import read_roles
from ...capture.traced import trace
from ...matrices.axes import LeafAxes, MatrixAxes
from ...matrices.blocks import canonical_shape
from ..leaf_axes import leaf_axes
from .pieces import Layer
from .uses import no_layer, places

LEFT_BY_AXES = "left out by axes="
Layers = Sequence[str] | str | Callable[[str], bool] | None


def find_layers(
    apply_fn: Callable[..., PyTree], params: PyTree, batch: PyTree, layers: Layers = None, axes: PyTree = None
) -> list[Layer]:
    """The layers to prune, in the order in which the model uses them.

    Args:
      apply_fn, params, batch: as for `prune`; of a batch only shapes are read.
      layers: None, all kernels of dense and convolutional layers but heads and embeddings, as `read_roles` tells them;
        patterns of paths, where "*" stands for anything and a module for all below it; or a function of a path.
      axes: None, those of the program; or a tree that divides them: `MatrixAxes` for each leaf, None for what is left.

    Raises:
      ValueError: for a pattern without a layer, where none is left, and for axes that are not the program's.
    """
    traced = trace(apply_fn, InputGram(), params, (batch,), {})
    kinds = {role.path: role.kind for role in read_roles(apply_fn, params, batch)}
    left = left_by_axes(params, axes)
    met = [m for m in in_order(traced) if m.leaf.use != "embedding" and m.leaf.axes and m.leaf.path not in left]
    paths = list(dict.fromkeys(m.leaf.path for m in met))
    by_rank = sorted(traced.leaves, key=lambda leaf: -len(leaf.shape))
    uses = {leaf.path: LEFT_BY_AXES if leaf.path in left else no_layer(leaf) for leaf in by_rank}
    chosen = _chosen(layers, paths, kinds, uses)
    if not chosen:
        raise ValueError(f"no layer to prune: found {_listed(paths)}, and layers={layers!r} leaves none of them.")
    own = {} if axes is None else {leaf.path: leaf.axes for leaf in leaf_axes(params, axes) if leaf.axes}
    return [_layer(m.leaf, m.members, own.get(m.leaf.path)) for m in met if m.leaf.path in chosen]


def left_by_axes(params: PyTree, axes: PyTree) -> set[str]:
    """The paths of what a user's axes say is no matrix.

    Raises:
      ValueError: for a word, which is about names.
    """
    if axes is None:
        return set()
    if isinstance(axes, str):
        raise ValueError(
            f"axes={axes!r} is about names, and with a batch the program shows the axes: leave it out, or pass a tree "
            "of fo.MatrixAxes."
        )
    return {leaf.path for leaf in leaf_axes(params, axes) if leaf.axes is None}


def layers_by_rule(leaves: list[LeafAxes], layers: Layers = None) -> list[Layer]:
    """The layers to prune by the names and shapes of the parameters, in their order, where there is no batch to trace
    the model with; stacks as a whole. Arguments and errors are those of `find_layers`.
    """
    matrices = [(i, leaf, leaf.axes) for i, leaf in enumerate(leaves) if leaf.axes is not None]
    paths = [leaf.path for _, leaf, _ in matrices if leaf.kind != "embedding"]
    uses = {leaf.path: leaf.reason for leaf in leaves}
    chosen = _chosen(layers, paths, {leaf.path: leaf.kind for leaf in leaves}, uses)
    if not chosen:
        raise ValueError(f"no layer to prune: found {_listed(paths)}, and layers={layers!r} leaves none of them.")
    found = []
    for i, leaf, axes in matrices:
        if leaf.path in chosen:
            *stack, m, n = canonical_shape(leaf.shape, axes)
            found.append(Layer(leaf.path, leaf.path, i, axes, leaf.shape, np.arange(math.prod(stack)), (m, n)))
    return found


def _layer(leaf: LeafPlan, members: np.ndarray, own: MatrixAxes | None) -> Layer:
    assert leaf.axes is not None
    *_, m, n = canonical_shape(leaf.shape, leaf.axes)
    stack = tuple(leaf.shape[a] for a in leaf.axes.batch)
    whole = len(members) == math.prod(stack)
    name = leaf.path + ("" if whole else places(members[:1], stack))
    note = "; ".join(part for part in leaf.reason.split("; ") if part.startswith("also"))
    axes, together = (leaf.axes, ()) if own is None else _divided(leaf, leaf.axes, own)
    return Layer(name, leaf.path, leaf.number, axes, leaf.shape, members, (m, n), note, together)


def _divided(leaf: LeafPlan, axes: MatrixAxes, own: MatrixAxes) -> tuple[MatrixAxes, tuple[int, ...]]:
    """The program's axes with a user's parts. An axis that the program has among inputs or outputs, and the user as one
    of batch, as that of experts that share their input, is divided into parts of 1, which stay together.
    """
    batched = tuple(a for a in own.batch if a not in axes.batch)
    inputs, outputs = ([a for a in group if a not in batched] for group in (axes.inputs, axes.outputs))
    batch = sorted((*axes.batch, *batched))
    in_order = dataclasses.replace(own.whole, batch=tuple(sorted(own.batch)))
    if not inputs or not outputs or not in_order.same_matrix(MatrixAxes(inputs, outputs, batch), leaf.shape):
        raise ValueError(
            f"axes= has {own} at {leaf.path!r} of shape {leaf.shape}, and the program multiplies by it as {axes}: give "
            "those axes, with parts= of them where it is divided."
        )
    parts = dict(own.parts) | {a: (1,) * leaf.shape[a] for a in batched}
    return dataclasses.replace(axes, parts=tuple(sorted(parts.items()))), batched


def _chosen(layers: Layers, paths: list[str], kinds: dict[str, str], uses: dict[str, str]) -> set[str]:
    if layers is None:
        return {path for path in paths if kinds[path] not in ("head", "embedding")}
    if callable(layers):
        return {path for path in paths if layers(path)}
    chosen: set[str] = set()
    for pattern in [layers] if isinstance(layers, str) else layers:
        fits = {path: use for path, use in uses.items() if _fits(path, pattern)}
        matched = set(paths) & set(fits)
        if not matched:
            why = "".join(f": {path!r} is {use}" for path, use in list(fits.items())[:1])
            raise ValueError(f"layers={pattern!r} is no layer of this model{why}. It has {_listed(paths)}.")
        chosen |= matched
    return chosen


def _fits(path: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"{pattern}/*")


def _listed(paths: Sequence[str]) -> str:
    shown = ", ".join(map(repr, paths[:12]))
    return f"{shown} and {len(paths) - 12} more" if len(paths) > 12 else shown or "no layer at all"
