"""What each leaf is to a pruner: by the rules, or as ``axes=`` has it."""

from jaxtyping import PyTree

from ..matrices.axes import LeafAxes
from ..matrices.rules import resolve_axes

SPECIAL = ("head", "embedding")


def leaf_axes(params: PyTree, axes: PyTree = None) -> list[LeafAxes]:
    """By the rules, or by ``axes=``, under which only names make heads and embeddings."""
    named = resolve_axes(params)
    if axes is None:
        return named
    return [
        leaf if leaf.axes is None else leaf._replace(kind=name.kind if name.kind in SPECIAL else "matrix")
        for leaf, name in zip(resolve_axes(params, axes), named, strict=True)
    ]
