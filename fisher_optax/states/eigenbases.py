"""The bases inside an optimizer's state, by parameter: what capture needs to take squares in them."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .._xla import automatic
from ..capture.to_optimizer import layer_axes
from ..matrices.axes import MatrixAxes, Typed, parts_of, wide_dtype
from ..matrices.blocks import canonical_shape, matrix_shapes, stack_key
from ..matrices.layout import Layer, layers_of
from ..matrices.rules import resolve_axes
from ..preconditioner.contracts import Eigenbasis
from ..preconditioner.step import members, own_columns
from ..preconditioner.transform import PreconditionState


def eigenbases(state: PyTree, params: PyTree, axes: PyTree = None) -> PyTree:
    """A tree like ``params`` with the `Eigenbasis` of each layer that the optimizer has one for, None elsewhere.

    Args:
      state: of `fo.ekfac` or another optimizer of layers, however deep in chains.
      params: what it optimizes.
      axes: the optimizer's ``axes``.

    Raises:
      ValueError: where ``state`` has no bases of these layers, or of some of their parts, or those of blocks or of
        other layers.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> params = {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}
      >>> fo.eigenbases(fo.ekfac(0.1).init(params), params)["kernel"].left.shape
      (5, 5)
    """
    is_state = lambda x: isinstance(x, PreconditionState)  # noqa: E731
    found = [x for x in jax.tree.leaves(state, is_leaf=is_state) if is_state(x)]
    leaves, treedef = jax.tree.flatten(params)
    layers = layers_of(resolve_axes(params, axes), ("matrix", "head"))
    read = _Reader(found)
    each = [
        [read.next_of(layer, leaves, piece) for piece in matrix_shapes(layer.shape(leaves), own)]
        for layer, own in zip(layers, layer_axes(layers), strict=True)
    ]
    for optimizer_state in found:
        _require_all(read.used, optimizer_state)
    bases: list[Eigenbasis | None] = [None] * len(leaves)
    for layer, own, pieces in zip(layers, layer_axes(layers), each, strict=True):
        of_pieces = [read.basis(piece) for piece in pieces]
        whole = _whole(of_pieces, layer.shape(leaves), own) if own.parts else of_pieces[0]
        stack = tuple(leaves[layer.kernel].shape[a] for a in layer.axes.batch)
        bases[layer.kernel] = Eigenbasis(*(None if Q is None else Q.reshape(*stack, *Q.shape[-2:]) for Q in whole))
    return treedef.unflatten(bases)


class _Piece(NamedTuple):
    """Matrices of one shape, one after another."""

    key: str  # as `stack_key` names their shape
    start: int
    count: int
    sides: tuple[int, int]


class _Reader:
    """What the stacks of a state hold, layer by layer."""

    def __init__(self, found: list[PreconditionState]) -> None:
        # Of a tree without matrices there is a placeholder.
        self.matrices = found[0].matrices if len(found) == 1 and isinstance(found[0].matrices, dict) else {}
        self.stacks = {own: key for key in self.matrices for own in members(key)}
        self.used: dict[str, int] = {}

    def next_of(self, layer: Layer, leaves: Sequence[Typed], shape: tuple[int, ...]) -> _Piece:
        """The next matrices ``(*stack, m, n)`` of that shape."""
        *stack, m, n = shape
        key = stack_key((m, n), jnp.promote_types(wide_dtype(leaves[layer.kernel].dtype), jnp.float32))
        if key not in self.stacks:
            raise ValueError(
                f"eigenbases: the state has no bases of {m} x {n} matrices, as {layer.path!r} is. Pass the state of "
                "fo.ekfac (without block_size) with the params and the axes it was made for."
            )
        piece = _Piece(key, self.used.get(key, 0), math.prod(stack), (m, n))
        self.used[key] = piece.start + piece.count
        return piece

    def basis(self, piece: _Piece) -> Eigenbasis:
        """Its bases, once all layers are counted."""
        key, start, count, sides = piece
        shared = list(members(self.stacks[key]))
        start += sum(self.used[own] for own in shared[: shared.index(key)])
        read = lambda Q, d: own_columns(jnp.asarray(Q)[start : start + count], d)  # noqa: E731
        both = zip(self.matrices[self.stacks[key]].basis[:2], sides, strict=True)
        return Eigenbasis(*(None if Q is None else automatic(functools.partial(read, d=d), Q) for Q, d in both))


def _whole(pieces: list[Eigenbasis], shape: tuple[int, ...], axes: MatrixAxes) -> Eigenbasis:
    """The basis of a divided layer: those of its parts, one after another on the diagonal."""
    N, parts = math.prod(shape[:-2]), parts_of(shape, axes)
    left: dict[int, list[Array]] = {}
    right: dict[int, list[Array]] = {}
    for (Q_L, Q_R), part in zip(pieces, parts, strict=True):
        rows, columns = part.span[-2:]
        m, n = canonical_shape(part.shape, part.axes)[-2:]
        grid = (N, (rows.stop - rows.start) // m, (columns.stop - columns.start) // n)
        # Parts that share a side have the same factor there, and so the same basis.
        left[rows.start] = list(jnp.moveaxis(_square(Q_L, m, axes).reshape(*grid, m, m)[:, :, 0], 1, 0))
        right[columns.start] = list(jnp.moveaxis(_square(Q_R, n, axes).reshape(*grid, n, n)[:, 0], 1, 0))
    diagonal = jax.vmap(jax.scipy.linalg.block_diag)
    return Eigenbasis(*(diagonal(*(Q for start in sorted(side) for Q in side[start])) for side in (left, right)))


def _square(Q: Array | None, d: int, axes: MatrixAxes) -> Array:
    if Q is None or Q.shape[-1] != d:
        raise ValueError(
            f"eigenbases: a side of length {d}, of a part of {axes}, has no whole basis, as max_precond_dim is less: "
            "raise it, or leave parts= out."
        )
    return Q


def _require_all(used: dict[str, int], state: PreconditionState) -> None:
    """A ValueError unless as many matrices of each shape were used as the state has: else some are another layer's."""
    stacks = state.matrices if isinstance(state.matrices, dict) else {}
    for key, leaves in ((key, jax.tree.leaves(stack)) for key, stack in stacks.items()):
        for own, count in members(key).items() if leaves else ():
            want, have = used.get(own, 0), len(leaves[0]) if count is None else count
            # A stack that is shared out over a mesh is filled up by fewer matrices than there are devices.
            if want != have and not (count is None and 0 < want < have < want + jax.device_count()):
                raise ValueError(
                    f"eigenbases: the state has bases of {have} matrices of shape {own}, and these params and axes "
                    f"have {want}. Pass the params and the axes= that the optimizer was made for."
                )
