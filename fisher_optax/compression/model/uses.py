"""What a program does with a parameter, in words."""

from collections.abc import Sequence

import numpy as np

from ...capture.program.leaves import LeafPlan

# What the program does with a kernel that is no product of inputs with it, in words.
USES = {
    "nothing": "not used by the program",
    "conv_general_dilated": "used in a convolution in groups, or not as it is",
    "dot_general": "multiplied with another parameter, or not as it is",
}


def no_layer(leaf: LeafPlan) -> str:
    """Why a parameter is no layer: what else the program does with it."""
    if leaf.use.startswith("bias") or leaf.use == "embedding":
        return f"used as {leaf.use}"
    if leaf.sites or leaf.use in ("dense", "convolution"):
        return f"used as {leaf.use}" + (f": {leaf.reason}" if leaf.reason else "")
    return USES.get(leaf.use, f"not multiplied as it is, but used in {leaf.use}")


def places(members: np.ndarray, stack: Sequence[int]) -> str:
    """Where in a stack some matrices are, as "[3]", or "[0, 1], [0, 2]" in a stack of stacks."""
    shown = [f"[{', '.join(map(str, at))}]" for at in np.transpose(np.unravel_index(members, tuple(stack)))]
    return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "")
