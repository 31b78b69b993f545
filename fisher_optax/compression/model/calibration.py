"""What a layer sees: second moments of its inputs and summaries of its gradients, streamed over batches.

Inputs are summed up on the way forward: what lies between a layer and the outputs changes nothing.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from ..._arguments import hashable
from ..._xla import of_each
from ...capture import InputGram
from ...capture.forward import input_sums
from ...capture.kinds.protocol import Sums
from ...capture.kinds.sums import joined
from ...capture.program.leaves import LeafPlan, matrix_counts
from ...capture.program.sites import Site
from .pieces import Layer, Piece, Place

Mask: TypeAlias = Callable[[PyTree], ArrayLike] | None  # of a batch: True for the positions that count


@dataclasses.dataclass(frozen=True)
class OneGram(InputGram):
    """Of one parameter alone, so that no other layer is looked at."""

    leaf: int = 0

    def unavailable(self, sites: tuple[Site, ...]) -> str:
        return super().unavailable(sites) if sites[0].leaf == self.leaf else "another layer"

    def of_matrices(self, plan: LeafPlan, slots: list[Sums]) -> tuple[Array, Array]:
        """``Σ a aᵀ`` over the inputs of each matrix, and their number, which loops and branches need not give alike."""
        counts = matrix_counts(plan, joined([slot["count"] for slot in slots], None))
        means = self.finish(plan, slots, None).left.reshape(-1, *[plan.sites[0].m + (plan.bias is not None)] * 2)
        return means * counts[:, None, None], counts


def input_gram(
    apply_fn: Callable[..., PyTree], params: PyTree, batches: Iterable[PyTree], layer: Layer, mask: Mask = None
) -> Float[Array, "members m m"]:
    """The mean of x xᵀ over all inputs x of each of a layer's matrices, 0 where it has none: one pass over the batches,
    one layer's sums in memory.

    Raises:
      ValueError: for no batches, and where ``mask`` leaves no position.
    """
    apply_fn, members = hashable(apply_fn), jnp.asarray(layer.members)
    sums = None
    for batch in batches:
        new = _input_sum(apply_fn, layer.leaf, layer.shape[0], mask, params, batch, members)
        sums = new if sums is None else jax.tree.map(jnp.add, sums, new)
    if sums is None:
        raise ValueError("batches is empty: an iterator that was read before has nothing left. Pass a list.")
    total, count = sums
    if mask is not None and not bool(jnp.any(count > 0)):
        raise ValueError(f"mask= leaves no input of {layer.name!r}.")
    return total / jnp.where(count == 0, 1, count)[:, None, None]


def finite(H: Float[Array, "members m m"], layer: Layer) -> Float[Array, "members m m"]:
    """The second moments of a layer's inputs, or a ValueError where they are not finite."""
    if not bool(jnp.isfinite(H).all()):
        raise ValueError(
            f"inputs of {layer.name!r} are not finite on the calibration data: look for NaN or infinity in the "
            "batches, or in what an earlier layer makes of them."
        )
    return H


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _input_sum(
    apply_fn: Callable[..., PyTree],
    leaf: int,
    inputs: int,
    mask: Mask,
    params: PyTree,
    batch: PyTree,
    members: Array,
) -> tuple[Array, Array]:
    kind, positions = OneGram(leaf=leaf), None if mask is None else jnp.asarray(mask(batch))
    ((plan, slots),) = input_sums(apply_fn, kind, params, (batch,), positions)
    sums, counts = kind.of_matrices(plan, slots)
    return sums[members, :inputs, :inputs], counts[members]  # without the bias's input, 1


def gradient_summary(
    loss_fn: Callable[..., Array],
    params: PyTree,
    batches: Iterable[PyTree],
    piece: Piece,
    summary: Callable[[Array], PyTree],
) -> tuple[list[PyTree], np.ndarray]:
    """Of each of these matrices, the mean over all examples of ``summary(g)``, g the gradients ``(examples, inputs,
    outputs)`` of a batch's single examples, which exist at once for one piece; and for which of them all are 0.

    Raises:
      ValueError: for no batches, gradients that are not finite.
    """
    loss_fn, members = hashable(loss_fn), jnp.asarray(piece.members)
    total, count = None, 0
    for batch in batches:
        size = len(jax.tree.leaves(batch)[0])
        part = _gradient_sum(loss_fn, piece.layer.leaf, piece.place, hashable(summary), params, batch, members)
        total = part if total is None else jax.tree.map(jnp.add, total, part)
        count += size
    if total is None:
        raise ValueError("batches is empty: an iterator that was read before has nothing left. Pass a list.")
    if not all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(total)):
        raise ValueError(f"gradients of {piece.name!r} are not finite on the calibration data.")
    means, live = total
    return [jax.tree.map(lambda x, i=i: x[i] / count, means) for i in range(len(piece.members))], np.asarray(live == 0)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _gradient_sum(
    loss_fn: Callable[..., Array],
    leaf: int,
    place: Place,
    summary: Callable[[Array], PyTree],
    params: PyTree,
    batch: PyTree,
    members: Array,
) -> tuple[PyTree, Array]:
    leaves, structure = jax.tree.flatten(params)

    def loss(x: Array, example: PyTree) -> Array:
        return loss_fn(structure.unflatten([*leaves[:leaf], x, *leaves[leaf + 1 :]]), example)

    g = of_each(lambda example: jax.grad(loss)(leaves[leaf], example), batch)
    g = jax.vmap(lambda x: place.read(x)[members])(g)
    live = jnp.any(g != 0, (0, 2, 3))
    return jax.tree.map(lambda x: x * len(g), jax.vmap(summary, 1)(g)), live.astype(jnp.int32)


def rereadable(batches: object) -> Iterable[PyTree]:
    """Batches that can be gone through more than once.

    Raises:
      TypeError: for an iterator.
    """
    if not isinstance(batches, Iterable) or isinstance(batches, Iterator):
        raise TypeError(
            f"batches is read once a layer: pass a list, or an object whose iter() starts anew; got "
            f"{type(batches).__name__}."
        )
    return batches


def first_of(batches: Iterable[PyTree]) -> PyTree:
    """The first batch.

    Raises:
      ValueError: where there is none.
    """
    for batch in batches:
        return batch
    raise ValueError("batches is empty: pass calibration data, one batch at least; methods of weights alone need none.")
