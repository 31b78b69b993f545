"""Parameters whose importance is 0 because no gradient reaches them."""

import math
import warnings
from collections.abc import Callable

import jax
from jaxtyping import Array, PyTree

from ...capture.kinds.kronecker import InputGram
from ...capture.program.reach import reached
from ...capture.traced import trace


def warn_of_frozen(loss_fn: Callable[..., PyTree], params: PyTree, batch: PyTree) -> None:
    """Warns of leaves that the gradient of ``loss_fn(params, example)`` does not reach, with their share of all."""

    def losses(params: PyTree, example: PyTree) -> Array:
        return jax.tree.leaves(loss_fn(params, example))[0]  # of a pair, the second are weights

    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)
    traced = trace(losses, InputGram(), params, (example,), {})
    live = reached(traced.program)
    frozen = [leaf for leaf in traced.leaves if leaf.number not in live]
    if not frozen:
        return
    size = lambda leaves: sum(math.prod(leaf.shape) for leaf in leaves)  # noqa: E731
    more = f" and {len(frozen) - 4} more" if len(frozen) > 4 else ""
    noun = "leaf" if len(frozen) == 1 else "leaves"
    warnings.warn(
        f"diagonal: no gradient reaches {len(frozen)} {noun} ({size(frozen) / max(size(traced.leaves), 1):.0%} of the "
        f"parameters): {', '.join(repr(leaf.path) for leaf in frozen[:4])}{more}. Their Fisher is 0, which does "
        "not say what they matter: leave them out of what ranks parameters by it.",
        stacklevel=3,
    )
