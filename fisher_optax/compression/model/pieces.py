"""A layer's matrices as they are pruned: all of them, or one part of a fused kernel at a time.

Parts of queries, keys and values share their layer's inputs: one H serves them all. Where inputs are divided, a part
has the rows and columns of H that are its own.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from ...matrices.axes import MatrixAxes, Part, parts_of
from ...matrices.blocks import from_matrices, to_matrices
from .uses import places


class Layer(NamedTuple):
    """Matrices with inputs of their own: a kernel, or those of a stack that one step of a loop uses."""

    name: str  # the path, with the places in a stack: "blocks/up/kernel[3]"
    path: str
    leaf: int  # its number among the parameters
    axes: MatrixAxes  # with its parts
    stored: tuple[int, ...]  # the shape of the leaf
    members: np.ndarray  # which matrices of the leaf, undivided
    shape: tuple[int, int]  # of one of them
    note: str = ""  # uses beside those whose inputs are known
    together: tuple[int, ...] = ()  # divided axes whose parts are pruned as one stack

    @property
    def stack(self) -> tuple[int, ...]:
        """The axes that count undivided matrices."""
        return tuple(self.stored[a] for a in self.axes.batch)

    @property
    def pieces(self) -> list["Piece"]:
        """What of it is pruned by itself, in the order of its parts."""
        return [piece for part in parts_of(self.stored, self.axes) for piece in _pieces(self, part)]


class Place(NamedTuple):
    """Where in a leaf some matrices are."""

    span: tuple[tuple[int, int], ...]  # of the leaf, from and to
    cut: tuple[int, ...]  # the shape of that, with an axis for equal parts
    axes: MatrixAxes  # of the cut
    shape: tuple[int, int]  # of one matrix

    def read(self, leaf: Array) -> Shaped[Array, "matrices m n"]:
        """All matrices here."""
        cut = leaf[tuple(slice(*ends) for ends in self.span)].reshape(self.cut)
        return to_matrices(cut, self.axes)[0].reshape(-1, *self.shape)

    def written(self, leaf: Array, matrices: Array) -> Array:
        """The leaf with other matrices here."""
        cut = from_matrices((matrices,), self.cut, self.axes)
        span = tuple(slice(*ends) for ends in self.span)
        return leaf.at[span].set(cut.reshape([end - start for start, end in self.span]))


class Piece(NamedTuple):
    """Matrices that are pruned together: a layer's, or one part of each."""

    name: str  # the layer's, with what it has of its axes: "qkv/kernel[:, 64:80]"
    layer: Layer
    place: Place
    members: np.ndarray  # which matrices of the place
    sources: np.ndarray  # of which matrix of the layer each is a part
    inputs: Int[np.ndarray, "matrices m"] | None  # their inputs among the layer's; None: all

    @property
    def shape(self) -> tuple[int, int]:
        """Of one matrix."""
        return self.place.shape

    @property
    def size(self) -> int:
        """How many weights it has."""
        return len(self.members) * math.prod(self.shape)

    def read(self, leaf: Array) -> Array:
        """Its matrices ``(members, inputs, outputs)``."""
        return self.place.read(leaf)[self.members]

    def written(self, leaf: Array, new: Array) -> Array:
        """The leaf with other matrices here."""
        stack = self.place.read(leaf).at[self.members].set(new.astype(leaf.dtype))
        return self.place.written(leaf, stack)

    def moment(self, H: Float[Array, "layer M M"], i: int) -> Float[Array, "m m"]:
        """Of the inputs of matrix i, from those of the layer's matrices."""
        whole = H[self.sources[i]]
        return whole if self.inputs is None else whole[jnp.ix_(self.inputs[i], self.inputs[i])]

    def input_sizes(self, H: Float[Array, "layer M M"]) -> Float[Array, "matrices m"]:
        """The mean square of each input of each matrix."""
        each = jnp.diagonal(H, axis1=-2, axis2=-1)[self.sources]
        return each if self.inputs is None else jnp.take_along_axis(each, jnp.asarray(self.inputs), 1)

    def where(self, some: np.ndarray) -> str:
        """The places of these of its matrices in the layer's stack."""
        members = np.unique(self.layer.members[self.sources[some]])
        return places(members, self.layer.stack) if self.layer.stack and not some.all() else "it"


def _pieces(layer: Layer, part: Part) -> list[Piece]:
    axes, batch = layer.axes, part.axes.batch[len(layer.axes.batch) :]
    divided = [a for a in axes.inputs + axes.outputs if a in dict(axes.parts)]
    counts = [part.shape[b] for b in batch]
    m, n = (math.prod(part.shape[a] for a in group) for group in (part.axes.inputs, part.axes.outputs))
    place = Place(tuple((s.start, s.stop) for s in part.span), part.shape, part.axes, (m, n))
    inputs, numbers = _inputs(layer, part, counts), np.arange(math.prod(counts)).reshape(counts)
    apart = [i for i, a in enumerate(divided) if a not in layer.together]
    found = []
    for where in np.ndindex(*(counts[i] for i in apart)):
        at = dict(zip(apart, where, strict=True))
        parts = np.ravel(numbers[tuple(at.get(i, slice(None)) for i in range(len(divided)))])
        steps = {divided[i]: (j, part.shape[batch[i] + 1]) for i, j in at.items()}
        found.append(
            Piece(
                layer.name if not at else _name(layer, part, steps),
                layer,
                place,
                (layer.members[:, None] * numbers.size + parts).ravel(),
                np.repeat(np.arange(len(layer.members)), len(parts)),
                None if inputs is None else np.tile(inputs[parts], (len(layer.members), 1)),
            )
        )
    return found


def _inputs(layer: Layer, part: Part, counts: Sequence[int]) -> np.ndarray | None:
    """Of each part, which inputs of the whole matrix it has; None where inputs are not divided."""
    axes, parts = layer.axes, dict(layer.axes.parts)
    divided = [a for a in axes.inputs if a in parts]
    if not divided:
        return None
    whole = np.arange(layer.shape[0]).reshape([layer.stored[a] for a in axes.inputs])
    own, shape, moved = whole[tuple(part.span[a] for a in axes.inputs)], [], []
    for a, length in zip(axes.inputs, own.shape, strict=True):
        if a in parts:
            moved.append(len(shape))
            count = counts[divided.index(a)]
            shape += [count, length // count]
        else:
            shape.append(length)
    order = moved + [i for i in range(len(shape)) if i not in moved]
    rows = np.transpose(own.reshape(shape), order).reshape(math.prod(counts[: len(divided)]), -1)
    return np.repeat(rows, math.prod(counts[len(divided) :]), 0)


def _name(layer: Layer, part: Part, steps: dict[int, tuple[int, int]]) -> str:
    """A layer's name with the part's place in the leaf."""
    lone = dict(zip(layer.axes.batch, np.unravel_index(layer.members[0], layer.stack), strict=True))
    at = []
    for a, span in enumerate(part.span):
        if a in steps:
            j, size = steps[a]
            at.append(f"{span.start + j * size}:{span.start + (j + 1) * size}")
        else:
            at.append(str(lone[a]) if a in lone and len(layer.members) == 1 and layer.stored[a] > 1 else ":")
    return f"{layer.path}[{', '.join(at)}]"
