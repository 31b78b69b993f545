"""The layers of a model, as what they are pruned as: matrices, in the order in which the model uses them."""

import fnmatch
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, PyTree

from ...capture import InputGram
from ...capture.program.leaves import LeafPlan
from ...capture.program.order import in_order
from ...capture.roles import read_roles
from ...capture.traced import trace
from ...matrices.axes import LeafAxes, MatrixAxes
from ...matrices.blocks import canonical_shape, from_matrices, to_matrices
from .uses import no_layer, places

Layers = Sequence[str] | str | Callable[[str], bool] | None


class Layer(NamedTuple):
    """Matrices that are pruned together: a kernel, or those of a stack that one step of a loop uses."""

    name: str  # the path, with the places in a stack: "blocks/up/kernel[3]"
    path: str
    leaf: int  # its number among the parameters
    axes: MatrixAxes
    members: np.ndarray  # which matrices of the leaf
    shape: tuple[int, int]  # of one matrix
    note: str = ""  # uses beside those whose inputs are known

    def read(self, leaf: Array) -> Array:
        """Its matrices ``(members, inputs, outputs)``."""
        return to_matrices(leaf, self.axes)[0].reshape(-1, *self.shape)[self.members]

    def written(self, leaf: Array, new: Array) -> Array:
        """The leaf with other matrices here."""
        whole = to_matrices(leaf, self.axes)[0]
        stack = whole.reshape(-1, *self.shape).at[self.members].set(new.astype(leaf.dtype))
        return from_matrices((stack.reshape(whole.shape),), leaf.shape, self.axes)

    @property
    def size(self) -> int:
        """How many weights it has."""
        return len(self.members) * self.shape[0] * self.shape[1]


def find_layers(apply_fn: Callable[..., PyTree], params: PyTree, batch: PyTree, layers: Layers = None) -> list[Layer]:
    """The layers to prune, in the order in which the model uses them.

    Args:
      apply_fn, params, batch: as for `prune`; of a batch only shapes are read.
      layers: None, all kernels of dense and convolutional layers but heads and embeddings, as `read_roles` tells them;
        patterns of paths, where "*" stands for anything and a module for all below it; or a function of a path.

    Raises:
      ValueError: for a pattern without a layer, and where none is left.
    """
    traced = trace(apply_fn, InputGram(), params, (batch,), {})
    kinds = {role.path: role.kind for role in read_roles(apply_fn, params, batch)}
    met = [m for m in in_order(traced) if m.leaf.use != "embedding" and m.leaf.axes is not None]
    paths = list(dict.fromkeys(m.leaf.path for m in met))
    by_rank = sorted(traced.leaves, key=lambda leaf: -len(leaf.shape))
    chosen = _chosen(layers, paths, kinds, {leaf.path: no_layer(leaf) for leaf in by_rank})
    if not chosen:
        raise ValueError(f"no layer to prune: found {_listed(paths)}, and layers={layers!r} leaves none of them.")
    return [_layer(m.leaf, m.members) for m in met if m.leaf.path in chosen]


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
            found.append(Layer(leaf.path, leaf.path, i, axes, np.arange(math.prod(stack)), (m, n)))
    return found


def _layer(leaf: LeafPlan, members: np.ndarray) -> Layer:
    assert leaf.axes is not None
    *_, m, n = canonical_shape(leaf.shape, leaf.axes)
    stack = tuple(leaf.shape[a] for a in leaf.axes.batch)
    whole = len(members) == math.prod(stack)
    name = leaf.path + ("" if whole else places(members[:1], stack))
    note = "; ".join(part for part in leaf.reason.split("; ") if part.startswith("also"))
    return Layer(name, leaf.path, leaf.number, leaf.axes, members, (m, n), note)


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
