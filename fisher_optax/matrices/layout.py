"""Where stacks of matrices live: the sharding that parameters imply, and sharing them out over a mesh."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from .._xla import sharding_of
from .axes import LeafAxes, MatrixAxes, Typed, parts_of
from .blocks import Cut, block_of, canonical_shape, cuts, divide, from_matrices, matrix_shapes, stack_key, to_matrices

Entry = str | tuple[str, ...] | None  # of a `PartitionSpec`


class Layout(NamedTuple):
    """Where the matrices of a leaf live: how their rows and columns are spread over a mesh."""

    mesh: Mesh | AbstractMesh
    rows: Entry
    columns: Entry

    def of(self, kind: str, shape: tuple[int, ...]) -> NamedSharding:
        """For a stack of kind "matrix", "left" or "right"; a factor's rows are laid out like the side they belong to,
        its columns are whole, as is a side that zeros have made too long to be divided.
        """
        sides = {"matrix": (self.rows, self.columns), "left": (self.rows, None), "right": (self.columns, None)}[kind]
        if len(shape) != 3:
            return NamedSharding(self.mesh, PartitionSpec())
        parts = [math.prod(self.mesh.shape[a] for a in ((s,) if isinstance(s, str) else s or ())) for s in sides]
        fits = [side if d % k == 0 else None for d, side, k in zip(shape[1:], sides, parts, strict=True)]
        return NamedSharding(self.mesh, PartitionSpec(None, *fits))


def matrix_layout(x: Typed, axes: MatrixAxes, whole: bool) -> Layout | None:
    """The layout that leaf ``x`` implies for its matrices, None where nothing is known.

    A side that was cut into blocks (``whole=False``), or that merges axes of which another than the first is sharded,
    is not sharded.
    """
    sharding = sharding_of(x)
    if sharding is None:
        return None
    spec = tuple(sharding.spec) + (None,) * (len(x.shape) - len(sharding.spec))

    def merged(group: tuple[int, ...]) -> Entry:
        return spec[group[0]] if whole and all(spec[a] is None for a in group[1:]) else None

    return Layout(sharding.mesh, merged(axes.inputs), merged(axes.outputs))


class StackLayout(NamedTuple):
    """What a stack holds, and how the leaves that its matrices come from are laid out."""

    shape: tuple[int, int]
    dtype: jnp.dtype  # float32 at least
    count: int
    layouts: set[Layout | None]


def leaf_layouts(leaves: Sequence[Typed], axes: Sequence[MatrixAxes], block_size: int | None) -> dict[str, StackLayout]:
    """Of each stack that the matrices of these leaves make."""
    stacks: dict[str, StackLayout] = {}
    for x, a in zip(leaves, axes, strict=True):
        dtype, shapes = jnp.promote_types(x.dtype, jnp.float32), matrix_shapes(x.shape, a, block_size)
        layout = matrix_layout(x, a, shapes == [canonical_shape(x.shape, a)])
        for shape in shapes:
            key, (m, n) = stack_key(shape, dtype), shape[-2:]
            old = stacks.get(key, StackLayout((m, n), dtype, 0, set()))
            stacks[key] = old._replace(count=old.count + math.prod(shape[:-2]), layouts=old.layouts | {layout})
    return stacks


def place(state: PyTree, layouts: set[Layout | None]) -> PyTree:
    """The state of a stack, laid out over devices like the leaves it comes from, if these agree."""
    layout = next(iter(layouts)) if len(layouts) == 1 else None
    if layout is None:
        return state

    def put(x: PyTree, kind: str) -> PyTree:
        if isinstance(x, tuple):  # rows of a side that is too long for a matrix
            return jax.tree.map(lambda y: jax.device_put(y, layout.of(kind, ())), x)
        packed = kind != "matrix" and x.shape[-1] != x.shape[-2]
        return jax.device_put(x, layout.of(kind, () if packed else x.shape))

    def sides(pair: PyTree) -> PyTree:
        """A matrix of each side, and whatever else there is."""
        if not pair:
            return pair
        left, right = (None if A is None else put(A, kind) for A, kind in zip(pair[:2], ("left", "right"), strict=True))
        return type(pair)(left, right, *jax.tree.map(lambda x: put(x, "matrix"), tuple(pair[2:])))

    return state._replace(
        factors=sides(state.factors),
        basis=sides(state.basis),
        application=place_moments(state.application, layouts),
    )


def place_moments(state: PyTree, layouts: set[Layout | None]) -> PyTree:
    """Stacks of matrices, and of what goes with them, laid out like the leaves they come from, if these agree."""
    layout = next(iter(layouts)) if len(layouts) == 1 else None
    if layout is None:
        return state
    return jax.tree.map(lambda x: jax.device_put(x, layout.of("matrix", x.shape)), state)


def share_out(state: PyTree, mesh_axis: str | None) -> PyTree:
    """The state of a stack as `spread` leaves it: every device holds its part, of a stack that is filled up until all
    parts are equal. As it is where no mesh with that axis is in scope.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh_axis not in mesh.axis_names:
        return state
    filled = _filled(state, mesh.shape[mesh_axis])
    return jax.tree.map(lambda x: jax.device_put(x, PartitionSpec(mesh_axis)), filled)


def spread(f: Callable[..., PyTree], mesh_axis: str, matrices: PyTree, *stacks: PyTree) -> PyTree:
    """``f(matrices, *stacks)`` with the leading axis of all arrays shared out over a mesh axis: every device does its
    part. Results are as long as ``matrices``, an array or several by name; the second, the state, is as long as it was,
    and what else there is has a part of every device.

    Raises:
      ValueError: where no mesh with that axis is in scope.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh_axis not in mesh.axis_names:
        raise ValueError(
            f"mesh_axis={mesh_axis!r} is not an axis of the mesh in scope ({mesh.axis_names}); call inside `with "
            "jax.set_mesh(mesh):`."
        )
    share = PartitionSpec(mesh_axis)
    padded = _filled((jax.tree.map(_unshared, matrices), *stacks), mesh.shape[mesh_axis])
    U, state, *rest = jax.shard_map(f, in_specs=share, out_specs=share, check_vma=False)(*padded)
    cut = lambda x, old: x[: len(old)]  # noqa: E731
    U = jax.tree.map(lambda x, old: _unshared(cut(x, old)), U, matrices)
    return U, jax.tree.map(cut, state, stacks[0]), *rest


def _filled(stacks: PyTree, devices: int) -> PyTree:
    """With zeros at the end of the leading axes, whose lengths the number of devices then divides."""
    return jax.tree.map(lambda x: jnp.pad(x, ((0, -len(x) % devices), *[(0, 0)] * (x.ndim - 1))), stacks)


def _unshared(stack: Array) -> Array:
    """A stack of leaves, or one to be cut into leaves: whole along the leading axis, the others as the leaves are.

    Left to itself, the compiler cuts what is whole on every device, and sends the parts around.
    """
    free = [PartitionSpec.UNCONSTRAINED] * (stack.ndim - 1)
    return jax.lax.with_sharding_constraint(stack, PartitionSpec(None, *free))


# A kernel and its bias as one matrix: the bias is the weight of an input that is always 1, in the last row.


class Layer(NamedTuple):
    """One matrix leaf and, where it has one, its bias, by their places among the leaves of a tree."""

    path: str  # of the kernel
    kernel: int
    bias: int | None
    axes: MatrixAxes  # with the bias's path
    leaf_shape: tuple[int, ...]  # of the kernel

    @property
    def places(self) -> tuple[int, ...]:
        """Of its leaves."""
        return (self.kernel,) if self.bias is None else (self.kernel, self.bias)

    def among(self, places: list[int]) -> "Layer":
        """The same layer in a tree that has only the leaves at these places."""
        bias = None if self.bias is None else places.index(self.bias)
        return self._replace(kernel=places.index(self.kernel), bias=bias)

    def shape(self, leaves: Sequence[Typed]) -> tuple[int, ...]:
        """``(m, n)`` or ``(N, m, n)``, with the bias's row."""
        *batch, m, n = canonical_shape(leaves[self.kernel].shape, self.axes)
        return (*batch, m + (self.bias is not None), n)


def layers_of(leaves: list[LeafAxes], kinds: tuple[str, ...], with_bias: bool = True) -> list[Layer]:
    """The layers among ``leaves``: every matrix of these kinds, with the bias that no other of them has taken."""
    places = {leaf.path: i for i, leaf in enumerate(leaves)}
    matrices = [(i, leaf) for i, leaf in enumerate(leaves) if leaf.axes is not None and leaf.kind in kinds]
    used = {leaf.path for _, leaf in matrices}
    layers = []
    for i, leaf in matrices:
        bias = leaf.bias if with_bias and leaf.bias not in used else None
        used |= {bias} if bias else set()
        assert leaf.axes is not None
        axes = dataclasses.replace(leaf.axes, bias=bias)
        layers.append(Layer(leaf.path, i, None if bias is None else places[bias], axes, leaf.shape))
    return layers


def shapes(layers: list[Layer], leaves: Sequence[Typed]) -> list[jax.ShapeDtypeStruct]:
    """What `join` gives of such leaves. The row of a bias leaves the rows of its matrix whole on every device."""
    return [_shape(layer, leaves) for layer in layers]


def _shape(layer: Layer, leaves: Sequence[Typed]) -> jax.ShapeDtypeStruct:
    W, shape = leaves[layer.kernel], layer.shape(leaves)
    layout, sharding = matrix_layout(W, layer.axes, whole=True), None
    if layout is not None:
        rows = layout.rows if layer.bias is None else None
        sharding = NamedSharding(layout.mesh, PartitionSpec(*[None] * (len(shape) - 2), rows, layout.columns))
    return jax.ShapeDtypeStruct(shape, W.dtype, sharding=sharding)


def join(layers: list[Layer], leaves: Sequence[Array]) -> list[Array]:
    """One matrix ``(m, n)`` or stack of them ``(N, m, n)`` a layer, in the kernel's dtype."""
    return [_joined(layer, leaves) for layer in layers]


def _joined(layer: Layer, leaves: Sequence[Array]) -> Array:
    (W,) = to_matrices(leaves[layer.kernel], layer.axes.whole)
    if layer.bias is None:
        return W
    b = leaves[layer.bias]
    return jnp.concatenate([W, b.astype(W.dtype).reshape(*W.shape[:-2], 1, W.shape[-1])], axis=-2)


def split(layers: list[Layer], matrices: Sequence[Array], like: Sequence[Array]) -> list[Array]:
    """The leaves again, shaped like ``like``: the inverse of `join`, for leaves that all belong to layers."""
    leaves = list(like)
    for layer, X in zip(layers, matrices, strict=True):
        kernel = like[layer.kernel]
        rows = canonical_shape(kernel.shape, layer.axes)[-2]
        leaves[layer.kernel] = from_matrices((X[..., :rows, :],), kernel.shape, layer.axes.whole).astype(kernel.dtype)
        if layer.bias is not None:
            b = like[layer.bias]
            leaves[layer.bias] = X[..., rows, :].reshape(b.shape).astype(b.dtype)
    return leaves


# Statistics of layers, stacked as their matrices are.


def sides_to_stacks(
    statistics: Sequence[PyTree], leaves: list[Array], axes: list[MatrixAxes], block_size: int | None
) -> dict[str, PyTree]:
    """Statistics of the leaves, one entry a matrix, stacked as by `to_stacks`; of a block, its part of the sides."""
    members: dict[str, list[PyTree]] = {}
    for x, a, whole in zip(leaves, axes, statistics, strict=True):
        for part, s in zip(parts_of(x.shape, a), _of_parts(whole, x.shape, a), strict=True):
            *batch, m, n = canonical_shape(part.shape, part.axes)
            N = math.prod(batch)
            for r, c in itertools.product(cuts(m, block_size), cuts(n, block_size)):
                squares = None if s.squares is None else block_of(s.squares[:, r.span, c.span], r, c)
                key = stack_key((r.size, c.size), jnp.promote_types(x.dtype, jnp.float32))
                members.setdefault(key, []).append(_of_blocks(s, r, c, N, squares))
    return {key: jax.tree.map(lambda *xs: jnp.concatenate(xs), *pieces) for key, pieces in members.items()}


def _of_parts(s: PyTree, shape: tuple[int, ...], axes: MatrixAxes) -> Iterator[PyTree]:
    """Of each part of a matrix ``(m, n)`` or ``(N, m, n)``, its statistics, with one leading axis."""
    *batch, m, n = canonical_shape(shape, axes)
    N, matrix = math.prod(batch), MatrixAxes(1, 2, 0, parts={a - len(shape) + 3: sizes for a, sizes in axes.parts})
    left, right = (jax.tree.map(lambda A: A.reshape(N, *A.shape[-2:]), side) for side in (s.left, s.right))
    squares = [None] if s.squares is None else divide(s.squares.reshape(N, m, n), matrix)
    for part, square in itertools.zip_longest(parts_of((N, m, n), matrix), squares):
        own, (i, j) = canonical_shape(part.shape, part.axes), (part.span[1].start, part.span[2].start)
        rows, columns = ((span.stop - span.start) // d for span, d in zip(part.span[1:], own[1:], strict=True))
        square = None if square is None else to_matrices(square, part.axes)[0].reshape(own)
        yield _of_blocks(type(s)(left, right, None, s.weight), Cut(i, rows, own[1]), Cut(j, columns, own[2]), N, square)


def _of_blocks(s: PyTree, r: Cut, c: Cut, N: int, squares: Array | None) -> PyTree:
    """The statistics of a grid of blocks of each of N matrices."""
    grid = (N, r.count, c.count)
    weight = jnp.broadcast_to(jnp.reshape(s.weight, (-1, 1, 1)), grid).reshape(-1)
    return type(s)(_diagonal_blocks(s.left, r, grid, 1), _diagonal_blocks(s.right, c, grid, 2), squares, weight)


def _diagonal_blocks(A: PyTree, cut: Cut, grid: tuple[int, int, int], along: int) -> PyTree:
    """The blocks of a cut on the diagonal of each ``A: (N, d, d)``, for every matrix of a grid of blocks."""
    whole = A is None or jax.tree.leaves(A)[0].shape[-1] == cut.size
    if A is None or (grid[1:] == (1, 1) and whole):
        return A

    def every(blocks: Array) -> Array:
        shape = (grid[0], grid[1] if along == 1 else 1, grid[2] if along == 2 else 1, *blocks.shape[-2:])
        return jnp.broadcast_to(blocks.reshape(shape), (*grid, *shape[3:])).reshape(-1, *shape[3:])

    if whole:
        return jax.tree.map(every, A)
    starts = range(cut.start, cut.span.stop, cut.size)
    return every(jnp.stack([A[:, i : i + cut.size, i : i + cut.size] for i in starts], 1))
