"""Statistics of several micro-batches, as if they had been one."""

import dataclasses
from typing import Any

import jax

from .curvature import is_statistics
from .matrix_axes import path_names
from .types import Logits, Rows, Samples


def accumulate_statistics(so_far: Any, new: Any) -> Any:
    """The statistics of both batches together: means weighted by the number of positions behind each.

    `optax.MultiSteps` hands on only the last micro-batch's extra arguments, so gather the others' here and pass the
    result with the last one. Rows and samples, which stand for the whole, are those of both, one after the other.

    Args:
      so_far: statistics of the earlier micro-batches; None: there were none, and the result is ``new`` itself.
      new: of the next, with equal structure. None: nothing is added, and the result is ``so_far`` itself.

    Raises:
      ValueError: where the two differ in structure.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> loss = lambda p, x: fo.losses.gaussian(x @ p["w"], jnp.zeros((len(x), 2)))
      >>> params, total = {"w": jnp.ones((3, 2))}, None
      >>> for x in (jnp.ones((4, 3)), 2 * jnp.ones((4, 3))):
      ...     value, grads, stats = fo.value_and_grad(loss)(params, x)
      ...     total = fo.accumulate_statistics(total, stats)
      >>> float(total["w"].left[0, 0]), float(total["w"].weight)
      (2.5, 8.0)
    """
    if so_far is None or new is None:
        return new if so_far is None else so_far
    structures = [jax.tree.structure(tree, is_leaf=is_statistics) for tree in (so_far, new)]
    if structures[0] != structures[1]:
        raise ValueError(
            f"accumulate_statistics: the two trees differ: {structures[0]} and {structures[1]}. Take both from "
            "the same fo.value_and_grad."
        )
    return jax.tree.map_with_path(_both, so_far, new, is_leaf=is_statistics)


def _both(path: Any, a: Any, b: Any) -> Any:
    kinds = [jax.tree.structure(x) for x in (a, b)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"accumulate_statistics: those of {'/'.join(path_names(path))!r} differ: {kinds[0]} and {kinds[1]}. Take "
            "both from the same fo.value_and_grad."
        )
    total = a.weight + b.weight
    share_b = b.weight / jax.numpy.where(total == 0, 1, total)
    share_a = 1 - share_b
    if isinstance(a, Samples):
        inputs, gradients = _joined(a.inputs, b.inputs, a), _joined(a.gradients, b.gradients, a)
        return dataclasses.replace(a, inputs=inputs, gradients=gradients, weight=total)

    def mean(x: Any, y: Any) -> Any:
        if x is None:
            return None
        if isinstance(x, Logits):
            x, y = (t._replace(weights=s * t.weights / t.weights.sum()) for t, s in ((x, share_a), (y, share_b)))
            return jax.tree.map(lambda *pair: jax.numpy.concatenate(pair), x, y)
        if isinstance(x, Rows):
            return Rows(jax.numpy.concatenate([x.rows * share_a**0.5, y.rows * share_b**0.5], -2))
        return share_a * x + share_b * y

    means = {side: mean(getattr(a, side), getattr(b, side)) for side in ("left", "right", "squares")}
    return dataclasses.replace(a, **means, weight=total)


def _joined(x: Any, y: Any, samples: Samples) -> Any:
    axis = -2 if samples.window is None else -2 - len(samples.window.shape)
    return jax.numpy.concatenate([x, y], axis)
