"""The layers of a model, as what they are pruned as: matrices, in the order in which the model uses them."""

import fnmatch
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from ...capture import InputGram
from ...capture.program.leaves import LeafPlan
from ...capture.program.order import in_order
from ...capture.roles import Role, read_roles
from ...capture.traced import Traced, trace
from ...matrices.axes import MatrixAxes
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


def outputs_of(apply_fn: Callable[..., PyTree]) -> Callable[..., Array]:
    """A scalar that depends on all that a model returns: what is traced to find its layers."""

    def total(params: PyTree, batch: PyTree) -> Array:
        leaves = [
            x for x in jax.tree.leaves(apply_fn(params, batch)) if jnp.issubdtype(jnp.result_type(x), jnp.inexact)
        ]
        if not leaves:
            raise TypeError("apply_fn(params, batch) returned no floating-point array: return the model's outputs.")
        return sum((jnp.sum(x.astype(jnp.promote_types(x.dtype, jnp.float32))) for x in leaves), jnp.zeros([]))

    return total


def find_layers(apply_fn: Callable[..., PyTree], params: PyTree, batch: PyTree, layers: Layers = None) -> list[Layer]:
    """The layers to prune, in the order in which the model uses them.

    Args:
      apply_fn, params, batch: as for `prune`.
      layers: None, all kernels of dense and convolutional layers but heads and embeddings, as `read_roles` tells them;
        patterns of paths, where "*" stands for anything and a module for all below it; or a function of a path.

    Raises:
      ValueError: for a pattern without a layer, and where none is left.
    """
    traced = trace(outputs_of(apply_fn), InputGram(), params, (batch,), {})
    roles = read_roles(apply_fn, params, batch)
    met = [m for m in in_order(traced) if m.leaf.use != "embedding" and m.leaf.axes is not None]
    paths = list(dict.fromkeys(m.leaf.path for m in met))
    chosen = _chosen(layers, paths, roles, traced)
    if not chosen:
        raise ValueError(f"no layer to prune: found {_listed(paths)}, and layers={layers!r} leaves none of them.")
    return [_layer(m.leaf, m.members) for m in met if m.leaf.path in chosen]


def _layer(leaf: LeafPlan, members: np.ndarray) -> Layer:
    assert leaf.axes is not None
    *_, m, n = canonical_shape(leaf.shape, leaf.axes)
    stack = tuple(leaf.shape[a] for a in leaf.axes.batch)
    whole = len(members) == math.prod(stack)
    name = leaf.path + ("" if whole else places(members[:1], stack))
    note = "; ".join(part for part in leaf.reason.split("; ") if part.startswith("also"))
    return Layer(name, leaf.path, leaf.number, leaf.axes, members, (m, n), note)


def _chosen(layers: Layers, paths: list[str], roles: list[Role], traced: Traced) -> set[str]:
    if layers is None:
        kinds = {role.path: role.kind for role in roles}
        return {path for path in paths if kinds[path] not in ("head", "embedding")}
    if callable(layers):
        return {path for path in paths if layers(path)}
    chosen: set[str] = set()
    for pattern in [layers] if isinstance(layers, str) else layers:
        fits = [leaf for leaf in traced.leaves if _fits(leaf.path, pattern)]
        matched = set(paths) & {leaf.path for leaf in fits}
        if not matched:
            first = sorted(fits, key=lambda leaf: -len(leaf.shape))[:1]
            why = "".join(f": {leaf.path!r} is {no_layer(leaf)}" for leaf in first)
            raise ValueError(f"layers={pattern!r} is no layer of this model{why}. It has {_listed(paths)}.")
        chosen |= matched
    return chosen


def _fits(path: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"{pattern}/*")


def _listed(paths: Sequence[str]) -> str:
    shown = ", ".join(map(repr, paths[:12]))
    return f"{shown} and {len(paths) - 12} more" if len(paths) > 12 else shown or "no layer at all"
