"""Statistics of several micro-batches, or devices, as if they had been one."""

import dataclasses
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import KeyPath
from jaxtyping import Array, PyTree

from ..linalg.eigenbasis import LowRank
from ..matrices.axes import path_names
from ..statistics import LayerFactors, LayerStatistics, Logits, Samples, Side, is_statistics
from .kinds.sums import times

AxisNames = Hashable | tuple[Hashable, ...]  # of a mapped axis, or several


def accumulate_statistics(so_far: PyTree, new: PyTree) -> PyTree:
    """The statistics of both batches together, as if they had been one: ``left`` a mean weighted by the number of
    positions behind each (of experts, by each one's), ``right`` and ``squares`` by what each loss was divided by, the
    sum of its weights. With a ``normalizer`` that does not grow with the batch, as 1 for sums, or a loss that is
    divided by the number of batches already, multiply them by the number of batches besides. An expert that a batch
    has no rows for keeps its ``left`` and its ``weight``; in ``right`` that batch counts, as it would in the whole.

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


def all_reduce_statistics(statistics: PyTree, axis: AxisNames) -> PyTree:
    """The statistics of all devices along a mapped axis together, from each device's own.

    Means weighted as by `accumulate_statistics`; rows, samples and logits of all devices, one after the other,
    which an average would mix. It is for statistics that differ between devices: from `jax.pmap`, a `jax.shard_map`
    with ``check_vma=False``, or parameters that vary. Where the loss is averaged inside a `jax.shard_map`,
    `value_and_grad` has done it.

    Args:
      statistics: from `value_and_grad`, on each device. None and other leaves stay as they are.
      axis: its name, or several; of a `jax.pmap`, `jax.vmap` or `jax.shard_map` around the call.

    Raises:
      NameError: from JAX, outside of any such axis.

    Example:
      >>> import jax, jax.numpy as jnp, fisher_optax as fo
      >>> grad_fn = fo.value_and_grad(lambda W, x: fo.losses.gaussian(x @ W, jnp.zeros((len(x), 2))))
      >>> def of_device(x):
      ...     return fo.all_reduce_statistics(grad_fn(jnp.ones((3, 2)), x)[2], "data")
      >>> all_of_them = jax.vmap(of_device, axis_name="data")(jnp.stack([jnp.ones((4, 3)), 2 * jnp.ones((4, 3))]))
      >>> all_of_them.left[:, 0, 0].tolist(), all_of_them.weight.tolist()
      ([2.5, 2.5], [8.0, 8.0])
    """

    def of_all(x: LayerStatistics) -> LayerStatistics:
        total = jax.lax.psum(x.weight, axis)
        gather = lambda rows, place: _gathered(rows, axis, place)  # noqa: E731
        if isinstance(x, Samples):
            place = _sample_axis(x)
            inputs, gradients = gather(x.inputs, place), gather(x.gradients, place)
            return dataclasses.replace(x, inputs=inputs, gradients=gradients, weight=total)
        divisor = jax.lax.psum(_divisor(x), axis)
        of_inputs, of_gradients = x.weight / _or_one(total), _divisor(x) / _or_one(divisor)

        def mean(side: Side, share: Array) -> Side:
            if isinstance(side, Logits):
                return jax.tree.map(lambda y: gather(y, 0), _shared(side, share))
            if isinstance(side, LowRank):
                return LowRank(gather(times(side.rows, share**0.5), -2))
            return None if side is None else jax.lax.psum(times(side, share), axis)

        left, right = mean(x.left, of_inputs), mean(x.right, of_gradients)
        squares = mean(x.squares, of_gradients)
        return LayerFactors(left, right, squares, total, x.bias, x.axes, None if x.divisor is None else divisor)

    return jax.tree.map(lambda x: of_all(x) if is_statistics(x) else x, statistics, is_leaf=is_statistics)


def _gathered(x: Array, axis: AxisNames, place: int) -> Array:
    """All devices' arrays one after the other along axis ``place``: as a sum, which is known to be the same on all."""
    x = jnp.moveaxis(x, place, 0)
    room = jnp.zeros((jax.lax.axis_size(axis), *x.shape), x.dtype)
    x = jax.lax.psum(room.at[jax.lax.axis_index(axis)].set(x), axis)
    return jnp.moveaxis(x.reshape(-1, *x.shape[2:]), 0, place)


def _both(path: KeyPath, a: Any, b: Any) -> Any:
    kinds = [jax.tree.structure(x) for x in (a, b)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"accumulate_statistics: those of {'/'.join(path_names(path))!r} differ: {kinds[0]} and {kinds[1]}. Take "
            "both from the same fo.value_and_grad."
        )
    total = a.weight + b.weight
    if isinstance(a, Samples):
        inputs, gradients = _joined(a.inputs, b.inputs, a), _joined(a.gradients, b.gradients, a)
        return dataclasses.replace(a, inputs=inputs, gradients=gradients, weight=total)

    divisor = _divisor(a) + _divisor(b)

    def mean(x: Any, y: Any, share_b: Array) -> Side:
        share_a = 1 - share_b
        if x is None:
            return None
        if isinstance(x, Logits):
            return jax.tree.map(lambda *pair: jnp.concatenate(pair), _shared(x, share_a), _shared(y, share_b))
        if isinstance(x, LowRank):
            return LowRank(jnp.concatenate([times(x.rows, share_a**0.5), times(y.rows, share_b**0.5)], -2))
        return times(x, share_a) + times(y, share_b)

    of_inputs, of_gradients = b.weight / _or_one(total), _divisor(b) / _or_one(divisor)
    left, right = mean(a.left, b.left, of_inputs), mean(a.right, b.right, of_gradients)
    squares, divisor = mean(a.squares, b.squares, of_gradients), None if a.divisor is None else divisor
    return LayerFactors(left, right, squares, total, a.bias, a.axes, divisor)


def _divisor(statistics: LayerFactors) -> Array:
    return statistics.weight if statistics.divisor is None else statistics.divisor


def _or_one(total: Array) -> Array:
    return jnp.where(total == 0, 1, total)


def _shared(tokens: Logits, share: Array) -> Logits:
    """Tokens whose weights add up to their share of all."""
    return tokens._replace(weights=share * tokens.weights / _or_one(tokens.weights.sum()))


def _joined(x: Array, y: Array, samples: Samples) -> Array:
    return jnp.concatenate([x, y], _sample_axis(samples))


def _sample_axis(samples: Samples) -> int:
    """Which axis counts examples."""
    return -2 if samples.window is None else -2 - len(samples.window.shape)
