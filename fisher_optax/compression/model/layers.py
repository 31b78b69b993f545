"""The layers of a model, as what they are pruned as: matrices, in the order in which the model uses them."""

import fnmatch
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, PyTree

from ...capture import InputGram
from ...capture.program.order import in_order
from ...capture.traced import trace
from ...matrices.axes import MatrixAxes, how_many, listed
from ...matrices.blocks import canonical_shape, from_matrices, to_matrices
from ...matrices.rules import resolve_axes

Layers = Sequence[str] | str | Callable[[str], bool] | None


class Layer(NamedTuple):
    """Matrices that are pruned together: a kernel, or those of a stack that one step of a loop uses."""

    name: str  # the path, with the places in a stack: "blocks/up/kernel[3]"
    path: str
    leaf: int  # its number among the parameters
    axes: MatrixAxes
    members: np.ndarray  # which matrices of the leaf
    shape: tuple[int, int]  # of one matrix

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
      layers: None, all kernels of dense and convolutional layers but heads (whose path names them so) and embeddings;
        patterns of paths, where "*" stands for anything and a module for all below it; or a function of a path.

    Raises:
      ValueError: for a pattern without a layer, and where none is left.
    """
    traced = trace(apply_fn, InputGram(), params, (batch,), {})
    met = [m for m in in_order(traced) if m.leaf.use != "embedding"]
    paths = list(dict.fromkeys(m.leaf.path for m in met))
    kinds = {leaf.path: leaf.kind for leaf in resolve_axes(params)}
    chosen = _chosen(layers, paths, kinds, {leaf.path: leaf.use for leaf in traced.leaves})
    if not chosen:
        raise ValueError(f"no layer to prune: found {_listed(paths)}, and layers={layers!r} leaves none of them.")
    found = []
    for leaf, members in met:
        if leaf.path in chosen and leaf.axes is not None:
            *_, m, n = canonical_shape(leaf.shape, leaf.axes)
            stack = tuple(leaf.shape[a] for a in leaf.axes.batch)
            whole = len(members) == int(np.prod(stack))
            places = "" if whole else f"[{', '.join(map(str, np.ravel(np.unravel_index(members[0], stack))))}]"
            found.append(Layer(leaf.path + places, leaf.path, leaf.number, leaf.axes, members, (m, n)))
    return found


def layers_by_rule(params: PyTree, layers: Layers = None) -> list[Layer]:
    """The layers to prune by the names and shapes of the parameters, in their order, where there is no batch to trace
    the model with; stacks as a whole. Arguments and errors are those of `find_layers`.

    Warns:
      UserWarning: for leaves that may be matrices in more ways than one, which are left out.
    """
    leaves = resolve_axes(params)
    matrices = [(i, leaf, leaf.axes) for i, leaf in enumerate(leaves) if leaf.axes is not None]
    paths = [leaf.path for _, leaf, _ in matrices if leaf.kind != "embedding"]
    uses = {leaf.path: leaf.reason for leaf in leaves}
    chosen = _chosen(layers, paths, {leaf.path: leaf.kind for leaf in leaves}, uses)
    if not chosen:
        raise ValueError(f"no layer to prune: found {_listed(paths)}, and layers={layers!r} leaves none of them.")
    if layers is None and (unclear := [leaf for leaf in leaves if leaf.is_ambiguous]):
        warnings.warn(
            f"without a batch layers are found by names and shapes, and {how_many(unclear, leaves)} may be read in "
            f"more ways than one and stay dense: {listed(unclear)}. Pass one batch, with which the model is traced; "
            "arrays may be jax.ShapeDtypeStruct.",
            stacklevel=3,
        )
    found = []
    for i, leaf, axes in matrices:
        if leaf.path in chosen:
            *stack, m, n = canonical_shape(leaf.shape, axes)
            found.append(Layer(leaf.path, leaf.path, i, axes, np.arange(int(np.prod(stack))), (m, n)))
    return found


def _chosen(layers: Layers, paths: list[str], kinds: dict[str, str], uses: dict[str, str]) -> set[str]:
    if layers is None:
        return {path for path in paths if kinds.get(path) not in ("head", "embedding")}
    if callable(layers):
        return {path for path in paths if layers(path)}
    chosen: set[str] = set()
    for pattern in [layers] if isinstance(layers, str) else layers:
        fits = {path: use for path, use in uses.items() if _fits(path, pattern)}
        matched = set(paths) & set(fits)
        if not matched:
            why = "".join(f": {path!r} is used as {use}" for path, use in list(fits.items())[:1])
            raise ValueError(f"layers={pattern!r} is no layer of this model{why}. It has {_listed(paths)}.")
        chosen |= matched
    return chosen


def _fits(path: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"{pattern}/*")


def _listed(paths: Sequence[str]) -> str:
    shown = ", ".join(map(repr, paths[:12]))
    return f"{shown} and {len(paths) - 12} more" if len(paths) > 12 else shown or "no layer at all"
