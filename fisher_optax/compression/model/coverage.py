"""What `prune` leaves dense, and why: nothing that may be a matrix is passed over without a word."""

import math
import warnings
from collections.abc import Callable, Container, Sequence

import numpy as np
from jaxtyping import PyTree

from ...capture.roles import Role, read_roles
from ...matrices.axes import LeafAxes
from .layers import LEFT_BY_AXES
from .pieces import Layer
from .reports import LeftDense, PrunedLayer
from .uses import no_layer, places


def left_dense(
    apply_fn: Callable[..., PyTree], params: PyTree, batch: PyTree, layers: Sequence[Layer], by_axes: Container[str]
) -> list[LeftDense]:
    """All matrices of a model but those of these layers; vectors, biases and normalisations are none. ``by_axes``: the
    paths of those that a user's axes leave out.
    """
    pruned = {layer.leaf: [x.members for x in layers if x.leaf == layer.leaf] for layer in layers}
    roles = enumerate(read_roles(apply_fn, params, batch))
    return [left for i, role in roles for left in _of_leaf(role, pruned.get(i, []), role.path in by_axes)]


def _of_leaf(role: Role, pruned: Sequence[np.ndarray], by_axes: bool) -> list[LeftDense]:
    leaf, size = role.plan, math.prod(role.shape)
    if sum(d > 1 for d in leaf.shape) < 2:
        return []
    if pruned:
        assert leaf.axes is not None
        stack = tuple(leaf.shape[a] for a in leaf.axes.batch)
        rest = np.setdiff1d(np.arange(math.prod(stack)), np.concatenate(pruned))
        if not len(rest):
            return []
        part = size // math.prod(stack) * len(rest)
        return [LeftDense(leaf.path + places(rest, stack), leaf.shape, part, "not used by the program", False)]
    if role.kind in ("embedding", "head"):
        return [LeftDense(leaf.path, leaf.shape, size, role.kind, True)]
    if leaf.sites:
        return [LeftDense(leaf.path, leaf.shape, size, LEFT_BY_AXES if by_axes else "left out by layers=", True)]
    if role.named.kind == "matrix" or role.named.is_ambiguous:
        return [LeftDense(leaf.path, leaf.shape, size, no_layer(leaf), False)]
    return []


def left_by_rule(leaves: Sequence[LeafAxes], layers: Sequence[Layer]) -> list[LeftDense]:
    """The same by names and shapes, where no program is known."""
    pruned = {layer.path for layer in layers}
    rest = [leaf for leaf in leaves if leaf.path not in pruned and sum(d > 1 for d in leaf.shape) >= 2]
    return [
        LeftDense(leaf.path, leaf.shape, math.prod(leaf.shape), _by_rule(leaf), leaf.kind != "other" or leaf.is_given)
        for leaf in rest
        if leaf.axes is not None or leaf.is_ambiguous or leaf.is_given or leaf.kind in ("embedding", "head")
    ]


def _by_rule(leaf: LeafAxes) -> str:
    if leaf.is_given and leaf.axes is None:
        return LEFT_BY_AXES
    return {"matrix": "left out by layers=", "other": leaf.reason}.get(leaf.kind, leaf.kind)


def warn_of_left(layers: Sequence[PrunedLayer], left: Sequence[LeftDense], by_program: bool) -> None:
    """Warns of what stays dense though nobody asked for that: the program shows no layer there, or names and shapes
    leave open what it is.
    """
    silent = [leaf for leaf in left if not leaf.is_meant]
    if not silent:
        return
    share = sum(leaf.size for leaf in silent) / sum(x.size for x in (*layers, *left))
    listed = _listed([f"{leaf.name!r}, {leaf.reason}" for leaf in silent])
    why = (
        f"as the program shows no layer there: {listed}. The report lists them. To prune the others and "
        "hear no more of it, name those by layers=."
        if by_program
        else f"as without a batch only names and shapes are known, which may be read in more ways than one: {listed}. "
        "Pass one batch, with which the model is traced; arrays may be jax.ShapeDtypeStruct."
    )
    warnings.warn(f"prune: {share:.0%} of the weights of all matrices stay dense, {why}", stacklevel=3)


def warn_of_unknown(layers: Sequence[PrunedLayer]) -> None:
    """Warns of weights that a method has pruned by data in which they have no part."""
    if partly := [f"{layer.name!r}: {layer.note}" for layer in layers if layer.note]:
        warnings.warn(
            f"prune: the data does not show all that weights of {len(partly)} layers do: {_listed(partly)}. Pass "
            "more batches, which may reach them, or name the other layers by layers=.",
            stacklevel=3,
        )


def _listed(texts: Sequence[str]) -> str:
    return "; ".join(texts[:4]) + (f"; and {len(texts) - 4} more" if len(texts) > 4 else "")
