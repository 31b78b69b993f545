"""What capture knows of layers: factors, samples, low-rank rows, logits, as the argument ``statistics`` takes them."""

import dataclasses
import functools
from typing import NamedTuple

import jax
from jaxtyping import Array, Float, PyTree

from . import linalg
from .linalg.eigenbasis import LowRank
from .matrices.axes import MatrixAxes, path_names


class Logits(NamedTuple):
    """Some tokens of a softmax cross-entropy, in the place of the right side of the layer that gave their logits."""

    logits: Float[Array, "r V"]
    labels: Array  # (r,) numbers of classes, or (r, V) probabilities
    weights: Float[Array, " r"]


Side = Array | LowRank | Logits | None  # of a layer's statistics; None: not asked for


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("left", "right", "squares", "weight", "divisor"),
    meta_fields=("bias", "axes"),
)
@dataclasses.dataclass(frozen=True)
class LayerFactors:
    """Second moments of one layer's inputs ``a`` and output gradients ``δ``: its Fisher is about ``left ⊗ right``.

    Where the layer's bias is folded in (``bias`` is its path), inputs end with a 1, which gives ``left`` one more row
    and column. What was not asked for is None. ``axes`` says which axes of the parameter the sides belong to, and None
    that nobody knows.
    """

    # Arrays, and whatever `jax.tree.map` makes of them: shapes, shardings, None.
    left: PyTree  # (*batch, m, m); of an embedding, its diagonal (V,); or `LowRank`
    right: PyTree  # (*batch, n, n), `LowRank` or `Logits`
    squares: PyTree  # (*batch, m, n): mean of ((a Q_A)ᵀ (δ Q_B))², the Fisher's diagonal in given bases
    weight: PyTree  # (): how many inputs ``left`` is the mean of; of experts each one's, (*batch,)
    bias: str | None = None
    axes: MatrixAxes | None = None
    # (): what the loss was divided by, which ``right`` and ``squares`` are means over; None: as many as ``weight``
    divisor: PyTree = None

    def finite_probes(self) -> list[PyTree]:
        """Of a second moment its diagonal, which bounds all of it."""
        sides = [_diagonal(side) if hasattr(side, "ndim") else side for side in (self.left, self.right)]
        return [self.squares, self.weight, self.divisor, *sides]


def _diagonal(side: Array) -> Array:
    """Of each square matrix of a stack; all of the diagonal that an embedding's side is."""
    square = side.ndim > 1 and side.shape[-2] == side.shape[-1]
    return linalg.diagonal(side) if square else side


class Window(NamedTuple):
    """The geometry of a convolution over inputs ``(examples, *spatial, channels)``."""

    shape: tuple[int, ...]  # spatial extent of the kernel
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("inputs", "gradients", "weight"),
    meta_fields=("bias", "window", "axes"),
)
@dataclasses.dataclass(frozen=True)
class Samples:
    """``r`` sampled examples of one layer: its inputs, and the gradients of each example's own loss at its outputs.

    Of a dense layer an example is one position. Of a convolution (``window``) it is a whole input, and axes are
    ``(r, *spatial, channels)``. A bias that belongs to the layer (``bias`` is its path) has no column in ``inputs``.
    ``axes`` as in `LayerFactors`.
    """

    inputs: PyTree  # (*batch, r, m)
    gradients: PyTree  # (*batch, r, n)
    weight: PyTree  # (): how many examples they stand for
    bias: str | None = None
    window: Window | None = None
    axes: MatrixAxes | None = None


LayerStatistics = LayerFactors | Samples


def is_statistics(x: object) -> bool:
    """Whether ``x`` is the statistics of one layer."""
    return isinstance(x, LayerFactors | Samples)


def statistics_by_path(statistics: PyTree) -> dict[str, LayerStatistics]:
    """The statistics in a tree, by the path of the leaf they belong to."""
    flat = jax.tree_util.tree_flatten_with_path(statistics, is_leaf=is_statistics)[0]
    return {"/".join(path_names(path)): x for path, x in flat if is_statistics(x)}
