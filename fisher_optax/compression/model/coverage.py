"""What `prune` leaves dense, and why: nothing that may be a matrix is passed over without a word."""

import math
import warnings
from collections.abc import Mapping, Sequence

import numpy as np

from ...capture.program.leaves import LeafPlan
from ...capture.roles import Role
from .reports import LeftDense, PrunedLayer

# What the program does with a kernel that is no product of inputs with it, in words.
USES = {
    "nothing": "not used by the program",
    "conv_general_dilated": "used in a convolution in groups, or not as it is",
    "dot_general": "multiplied with another parameter, or not as it is",
}

UNREACHED = "left dense, since no input reached"


def no_layer(leaf: LeafPlan) -> str:
    """Why a parameter is no layer: what else the program does with it."""
    if leaf.use.startswith("bias") or leaf.use == "embedding":
        return f"used as {leaf.use}"
    if leaf.sites or leaf.use in ("dense", "convolution"):
        return f"used as {leaf.use}" + (f": {leaf.reason}" if leaf.reason else "")
    return USES.get(leaf.use, f"not multiplied as it is, but used in {leaf.use}")


def left_dense(
    leaves: Sequence[LeafPlan], roles: Sequence[Role], pruned: Mapping[int, Sequence[np.ndarray]]
) -> list[LeftDense]:
    """All matrices but those that are pruned, given by leaf and place in its stack; vectors, biases and normalisations
    are none.
    """
    return [
        left for leaf, role in zip(leaves, roles, strict=True) for left in _of_leaf(leaf, role, pruned[leaf.number])
    ]


def _of_leaf(leaf: LeafPlan, role: Role, pruned: Sequence[np.ndarray]) -> list[LeftDense]:
    size = math.prod(leaf.shape)
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
        return [LeftDense(leaf.path, leaf.shape, size, "left out by layers=", True)]
    if role.named.kind == "matrix" or role.named.is_ambiguous:
        return [LeftDense(leaf.path, leaf.shape, size, no_layer(leaf), False)]
    return []


def places(members: np.ndarray, stack: Sequence[int]) -> str:
    """Where in a stack some matrices are, as "[3]", or "[0, 1], [0, 2]" in a stack of stacks."""
    shown = [f"[{', '.join(map(str, at))}]" for at in np.transpose(np.unravel_index(members, tuple(stack)))]
    return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "")


def warn_of(name: str, layers: Sequence[PrunedLayer], left: Sequence[LeftDense], asked: bool) -> None:
    """Warns of what stays dense though nobody asked for that; where layers were ``asked`` for, of those alone."""
    silent = [] if asked else [leaf for leaf in left if not leaf.is_meant]
    if silent:
        total = sum(x.size for x in (*layers, *left))
        share = sum(leaf.size for leaf in silent) / total
        listed = "; ".join(f"{leaf.name!r}, {leaf.reason}" for leaf in silent[:4])
        more = f"; and {len(silent) - 4} more" if len(silent) > 4 else ""
        warnings.warn(
            f"{name}: {share:.0%} of the weights of all matrices stay dense, as the program shows no layer there: "
            f"{listed}{more}. The report has them as left; layers= that names the layers to prune says that this is "
            "meant.",
            stacklevel=3,
        )
    if partly := [layer for layer in layers if layer.note]:
        listed = "; ".join(f"{layer.name!r}: {layer.note}" for layer in partly[:4])
        more = f"; and {len(partly) - 4} more" if len(partly) > 4 else ""
        warnings.warn(f"{name}: data says nothing of some weights. {listed}{more}.", stacklevel=3)
