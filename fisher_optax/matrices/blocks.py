"""Leaves and stacks of matrices: merge the axes, cut the long sides, stack what has one shape, and back.

A leaf becomes one array ``(m, n)`` or ``(N, m, n)``; with ``block_size`` a side of length d is cut into ``ceil(d /
block_size)`` blocks whose lengths differ by at most one, so that
nothing is ever padded and a leaf has at most four block shapes. All matrices of one shape, of all leaves, then form
one stack.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, Inexact, Int, PyTree, Shaped

from .._xla import Platform, by_platform
from .axes import MatrixAxes


class Cut(NamedTuple):
    """``count`` blocks of ``size``, from ``start`` on, along one side."""

    start: int
    count: int
    size: int

    @property
    def span(self) -> slice:
        return slice(self.start, self.start + self.count * self.size)


def cuts(length: int, block_size: int | None) -> list[Cut]:
    """Balanced blocks of a side: at most two different sizes, which differ by one."""
    if block_size is None or length <= block_size:
        return [Cut(0, 1, length)]
    count = -(-length // block_size)
    size, longer = divmod(length, count)
    split = longer * (size + 1)
    return [Cut(start, k, s) for start, k, s in ((0, longer, size + 1), (split, count - longer, size)) if k]


def canonical_shape(shape: tuple[int, ...], axes: MatrixAxes) -> tuple[int, ...]:
    """``(m, n)`` or ``(N, m, n)``: the leaf with its axes merged."""
    batch, m, n = (math.prod(shape[a] for a in group) for group in (axes.batch, axes.inputs, axes.outputs))
    return (batch, m, n) if axes.batch else (m, n)


def matrix_shapes(shape: tuple[int, ...], axes: MatrixAxes, block_size: int | None = None) -> list[tuple[int, ...]]:
    """The shapes of what `to_matrices` makes of a leaf of ``shape``."""
    *batch, m, n = canonical_shape(shape, axes)
    grid = [(r, c) for r in cuts(m, block_size) for c in cuts(n, block_size)]
    return [
        (*batch, r.size, c.size) if r.count == c.count == 1 else (math.prod(batch) * r.count * c.count, r.size, c.size)
        for r, c in grid
    ]


def to_matrices(x: Shaped[Array, "..."], axes: MatrixAxes, block_size: int | None = None) -> tuple[Array, ...]:
    """The matrices of a leaf, each ``(m, n)`` or ``(N, m, n)``."""
    x = jnp.transpose(x, axes.batch + axes.inputs + axes.outputs).reshape(canonical_shape(x.shape, axes))
    m, n = x.shape[-2:]
    return tuple(_block(x[..., r.span, c.span], r, c) for r in cuts(m, block_size) for c in cuts(n, block_size))


def from_matrices(
    pieces: tuple[Array, ...], shape: tuple[int, ...], axes: MatrixAxes, block_size: int | None = None
) -> Array:
    """The leaf again: the inverse of `to_matrices`."""
    *batch, m, n = canonical_shape(shape, axes)
    rows, columns = cuts(m, block_size), cuts(n, block_size)
    grid = iter(pieces)
    blocks = [[_unblock(next(grid), tuple(batch), r, c) for c in columns] for r in rows]
    merged = [jnp.concatenate(row, axis=-1) if len(row) > 1 else row[0] for row in blocks]
    x = jnp.concatenate(merged, axis=-2) if len(merged) > 1 else merged[0]
    order = axes.batch + axes.inputs + axes.outputs
    return jnp.transpose(x.reshape([shape[a] for a in order]), [order.index(a) for a in range(len(shape))])


def _block(x: Shaped[Array, "*batch r c"], rows: Cut, columns: Cut) -> Array:
    if rows.count == columns.count == 1:
        return x
    x = x.reshape(*x.shape[:-2], rows.count, rows.size, columns.count, columns.size)
    return jnp.moveaxis(x, -3, -2).reshape(-1, rows.size, columns.size)


def _unblock(x: Array, batch: tuple[int, ...], rows: Cut, columns: Cut) -> Array:
    if rows.count == columns.count == 1:
        return x
    x = x.reshape(*batch, rows.count, columns.count, rows.size, columns.size)
    return jnp.moveaxis(x, -2, -3).reshape(*batch, rows.count * rows.size, columns.count * columns.size)


def stack_key(shape: tuple[int, ...], dtype: DTypeLike) -> str:
    """The name of the stack that a matrix belongs to, e.g. "384x1536"."""
    return f"{shape[-2]}x{shape[-1]}" + ("" if dtype == jnp.float32 else f" {jnp.dtype(dtype)}")


def by_shape(
    leaves: list[Array], axes: list[MatrixAxes], block_size: int | None = None
) -> dict[str, list[Inexact[Array, "_ m n"]]]:
    """All matrices of the leaves by their shapes, in float32 at least: the parts of the stacks."""
    members: dict[str, list[Array]] = {}
    for x, a in zip(leaves, axes, strict=True):
        for piece in to_matrices(x.astype(jnp.promote_types(x.dtype, jnp.float32)), a, block_size):
            members.setdefault(stack_key(piece.shape, piece.dtype), []).append(piece.reshape(-1, *piece.shape[-2:]))
    return members


def to_stacks(
    leaves: list[Array], axes: list[MatrixAxes], block_size: int | None = None
) -> dict[str, Inexact[Array, "N m n"]]:
    """All matrices of the leaves, stacked by shape, in float32 at least."""
    return {key: jnp.concatenate(parts) for key, parts in by_shape(leaves, axes, block_size).items()}


def sides_to_stacks(
    statistics: Sequence[PyTree], leaves: list[Array], axes: list[MatrixAxes], block_size: int | None = None
) -> dict[str, PyTree]:
    """Statistics of the leaves (with ``left``, ``right``, ``squares``), one entry a matrix, stacked as by `to_stacks`.

    A matrix that is a block gets the blocks on the diagonals that belong to its rows and columns.
    """
    members: dict[str, list[PyTree]] = {}
    for x, a, s in zip(leaves, axes, statistics, strict=True):
        *batch, m, n = canonical_shape(x.shape, a)
        N = math.prod(batch)
        left, right = (
            jax.tree.map(lambda A: A.reshape(N, *A.shape[-2:]), side)  # noqa: B023
            for side in (s.left, s.right)
        )
        squares = None if s.squares is None else s.squares.reshape(N, m, n)
        for r in cuts(m, block_size):
            for c in cuts(n, block_size):
                grid = (N, r.count, c.count)
                piece = (
                    _diagonal_blocks(left, r, grid, 1),
                    _diagonal_blocks(right, c, grid, 2),
                    None if squares is None else _block(squares[:, r.span, c.span], r, c),
                )
                key = stack_key((r.size, c.size), jnp.promote_types(x.dtype, jnp.float32))
                weight = jnp.broadcast_to(jnp.reshape(s.weight, (-1, 1, 1)), grid).reshape(-1)
                members.setdefault(key, []).append(type(s)(*piece, weight))
    return {key: jax.tree.map(lambda *xs: jnp.concatenate(xs), *pieces) for key, pieces in members.items()}


def _diagonal_blocks(A: PyTree, cut: Cut, grid: tuple[int, int, int], along: int) -> PyTree:
    """The blocks of a cut on the diagonal of each ``A: (N, d, d)``, for every matrix of a grid of blocks; a side of low
    rank is whole.
    """
    if A is None or (grid[1:] == (1, 1) and jax.tree.leaves(A)[0].shape[-1] == cut.size):
        return A
    blocks = [A[:, i : i + cut.size, i : i + cut.size] for i in range(cut.start, cut.span.stop, cut.size)]
    shape = (grid[0], grid[1] if along == 1 else 1, grid[2] if along == 2 else 1, cut.size, cut.size)
    every = jnp.broadcast_to(jnp.stack(blocks, 1).reshape(shape), (*grid, cut.size, cut.size))
    return every.reshape(-1, cut.size, cut.size)


def from_stacks(
    stacks: dict[str, Array],
    like: list[Array],
    axes: list[MatrixAxes],
    block_size: int | None = None,
    places: Sequence[int | Int[Array, ""]] | None = None,
) -> list[Array]:
    """The leaves again, shaped like ``like``: the inverse of `to_stacks`.

    ``places`` holds the numbers of the places in a stack, where the compiler is not to see them as constants.
    """
    places = range(max(map(len, stacks.values()), default=0)) if places is None else places
    used = dict.fromkeys(stacks, 0)
    leaves = []
    for x, a in zip(like, axes, strict=True):
        pieces = []
        for shape in matrix_shapes(x.shape, a, block_size):
            key, count = stack_key(shape, jnp.promote_types(x.dtype, jnp.float32)), math.prod(shape[:-2])
            place = places[used[key]]
            own = jax.lax.dynamic_slice_in_dim(stacks[key], place, count, allow_negative_indices=False)
            pieces.append(own.reshape(shape))
            used[key] += count
        leaves.append(from_matrices(tuple(pieces), x.shape, a, block_size))
    return leaves


# One function of one matrix, over a stack of them: as a loop in place, or as a batch.


# (overwritten, copied, read) -> (overwritten, copied), of one matrix.
MatrixStep = Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]


def over_stack(
    step_one: MatrixStep,
    overwritten: PyTree,
    copied: PyTree,
    read: PyTree,
    *,
    max_stack: int,
    grouped: bool = False,
) -> tuple[PyTree, PyTree]:
    """``step_one`` of every matrix of the stack: trees of arrays, each with the stack along its leading axis.

    Args:
      step_one: of a matrix: what is overwritten and what is copied, and what else it reads; gives the new ones of the
        two, with the latter whatever else it makes.
      overwritten: large arrays, which a loop writes in place.
      copied: the rest that changes. It goes from one stack to another: XLA fuses reading and writing it, and would copy
        a stack that is both, once for each of its members.
      read: what does not change.
      max_stack: how many go in one batch, at most.
      grouped: whether a CPU may take several at once, too.
    """
    everything = (overwritten, copied, read)
    largest = max(jax.tree.leaves(everything), key=lambda x: x.size)
    N = len(largest)
    if not isinstance(largest, Tracer) or N == 1:
        results = [step_one(*jax.tree.map(lambda x: x[i], everything)) for i in range(N)]  # noqa: B023
        return jax.tree.map(lambda *xs: jnp.stack(xs), *results)

    def loop(at_once: int, *stacks: PyTree) -> tuple[PyTree, PyTree]:
        if at_once == 1:
            return _in_place(step_one, *stacks)
        groups = jax.tree.map(lambda x: x.reshape(-1, at_once, *x.shape[1:]), stacks)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), _in_place(jax.vmap(step_one), *groups))

    def at_once(platform: Platform) -> int:
        if platform.numbers_at_once is None:
            return next((k for k in platform.matrices_at_once if grouped and N % k == 0), 1)
        most = min(max_stack, platform.numbers_at_once * N // max(largest.size, 1), N)
        return next((k for k in range(most, 0, -1) if N % k == 0), 1)

    return by_platform(loop, at_once, *everything)


def _in_place(step_one: MatrixStep, overwritten: PyTree, copied: PyTree, read: PyTree) -> tuple[PyTree, PyTree]:
    def body(carry: PyTree, member: PyTree) -> PyTree:
        i, stacks = carry
        new, results = step_one(member_of(stacks, i), member, member_of(read, i))
        return (i + 1, put(stacks, i, new)), results

    length = len(jax.tree.leaves((overwritten, copied, read))[0])
    (_, overwritten), copied = jax.lax.scan(body, (jnp.zeros([], jnp.int32), overwritten), copied, length)
    return overwritten, copied


def member_of(stacks: PyTree, i: Int[Array, ""] | int) -> PyTree:
    """Entry i of every array."""
    return jax.tree.map(
        lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False, allow_negative_indices=False), stacks
    )


def put(stacks: PyTree, i: Int[Array, ""], new: PyTree) -> PyTree:
    """The stacks with entry i of every array replaced."""
    return jax.tree.map(
        lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y.astype(x.dtype), i, 0, allow_negative_indices=False),
        stacks,
        new,
    )


def repeat(count: Int[Array, ""], most: int, body: Callable[[Int[Array, ""], PyTree], PyTree], carry: PyTree) -> PyTree:
    """``body(i, carry)`` for i from 0 to ``count - 1``, a number that the program finds out, and ``most`` is the
    largest of: so that what it can cost is written there.
    """
    if isinstance(count, Tracer):
        start = (jnp.zeros([], jnp.int32), carry)
        return jax.lax.while_loop(
            lambda i_carry: (i_carry[0] < count) & (i_carry[0] < most),
            lambda i_carry: (i_carry[0] + 1, body(*i_carry)),
            start,
        )[1]
    for i in range(int(count)):
        carry = body(jnp.asarray(i, jnp.int32), carry)
    return carry
