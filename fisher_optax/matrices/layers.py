"""A kernel and its bias as one matrix: the bias is the weight of an input that is always 1, in the last row."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from .axes import LeafAxes, MatrixAxes
from .blocks import canonical_shape, from_matrices, to_matrices
from .layout import matrix_layout


class Layer(NamedTuple):
    """One matrix leaf and, where it has one, its bias, by their places among the leaves of a tree."""

    path: str  # of the kernel
    kernel: int
    bias: int | None
    axes: MatrixAxes  # with the bias's path

    @property
    def places(self) -> tuple[int, ...]:
        """Of its leaves."""
        return (self.kernel,) if self.bias is None else (self.kernel, self.bias)

    def among(self, places: list[int]) -> "Layer":
        """The same layer in a tree that has only the leaves at these places."""
        bias = None if self.bias is None else places.index(self.bias)
        return self._replace(kernel=places.index(self.kernel), bias=bias)

    def shape(self, leaves: Sequence[Any]) -> tuple[int, ...]:
        """``(m, n)`` or ``(N, m, n)``, with the bias's row."""
        *batch, m, n = canonical_shape(leaves[self.kernel].shape, self.axes)
        return (*batch, m + (self.bias is not None), n)


def layers_of(leaves: list[LeafAxes], kinds: tuple[str, ...], with_bias: bool = True) -> list[Layer]:
    """The layers among ``leaves``: every matrix of these kinds, with the bias that no other of them has taken."""
    places = {leaf.path: i for i, leaf in enumerate(leaves)}
    matrices = [(i, leaf) for i, leaf in enumerate(leaves) if leaf.axes is not None and leaf.kind in kinds]
    taken = {leaf.path for _, leaf in matrices}
    layers = []
    for i, leaf in matrices:
        bias = leaf.bias if with_bias and leaf.bias not in taken else None
        taken |= {bias} if bias else set()
        assert leaf.axes is not None
        axes = dataclasses.replace(leaf.axes, bias=bias)
        layers.append(Layer(leaf.path, i, None if bias is None else places[bias], axes))
    return layers


def matrix_axes(shape: tuple[int, ...]) -> MatrixAxes:
    """The axes of a joined matrix of that shape."""
    return MatrixAxes(-2, -1, 0 if len(shape) == 3 else ()).resolve("layer", shape)


def shapes(layers: list[Layer], leaves: Sequence[Any]) -> list[jax.ShapeDtypeStruct]:
    """What `join` gives of such leaves. The row of a bias leaves the rows of its matrix whole on every device."""
    return [_shape(layer, leaves) for layer in layers]


def _shape(layer: Layer, leaves: Sequence[Any]) -> jax.ShapeDtypeStruct:
    W, shape = leaves[layer.kernel], layer.shape(leaves)
    layout, sharding = matrix_layout(W, layer.axes, whole=True), None
    if layout is not None:
        rows = layout.rows if layer.bias is None else None
        sharding = NamedSharding(layout.mesh, PartitionSpec(*[None] * (len(shape) - 2), rows, layout.columns))
    return jax.ShapeDtypeStruct(shape, W.dtype, sharding=sharding)


def join(layers: list[Layer], leaves: Sequence[Any]) -> list[Any]:
    """One matrix ``(m, n)`` or stack of them ``(N, m, n)`` a layer, in the kernel's dtype."""
    return [_joined(layer, leaves) for layer in layers]


def _joined(layer: Layer, leaves: Sequence[Any]) -> Any:
    (W,) = to_matrices(leaves[layer.kernel], layer.axes)
    if layer.bias is None:
        return W
    b = leaves[layer.bias]
    return jnp.concatenate([W, b.astype(W.dtype).reshape(*W.shape[:-2], 1, W.shape[-1])], axis=-2)


def split(layers: list[Layer], matrices: Sequence[Any], like: Sequence[Any]) -> list[Any]:
    """The leaves again, shaped like ``like``: the inverse of `join`, for leaves that all belong to layers."""
    leaves = list(like)
    for layer, X in zip(layers, matrices, strict=True):
        kernel = like[layer.kernel]
        rows = canonical_shape(kernel.shape, layer.axes)[-2]
        leaves[layer.kernel] = from_matrices((X[..., :rows, :],), kernel.shape, layer.axes).astype(kernel.dtype)
        if layer.bias is not None:
            b = like[layer.bias]
            leaves[layer.bias] = X[..., rows, :].reshape(b.shape).astype(b.dtype)
    return leaves
