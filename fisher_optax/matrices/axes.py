"""Which axes of a leaf are a matrix's inputs, outputs and batch: what everything else reads."""

import dataclasses
import itertools
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import KeyPath
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree

# A leaf of which only the shape and the dtype are read.
Typed = Array | np.ndarray | jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True, init=False)
class MatrixAxes:
    """Which axes of a leaf are a matrix's inputs (rows), outputs (columns) and batch.

    Together the three name every axis of the leaf once; negative axes count from the end. The axes of one group are
    merged in the order given. An integer or a list becomes a tuple. Not a pytree: it is a leaf of a tree. ``bias`` is
    the path of the leaf that is added to the outputs, for methods that treat both as one matrix (K-FAC); None: the one
    of that shape beside it, if any. ``head`` marks an output layer: Muon and FROG leave it to their fallback. ``parts``
    divides axes of inputs or outputs, into so many equal parts or parts of these sizes, with a matrix for each:
    queries, keys and values in one kernel, or the heads of each.

    Defaults are a Flax Dense kernel. Raises ``TypeError`` for axes or sizes that are not integers, ``ValueError`` for
    an axis named twice and for no inputs or outputs.

    >>> MatrixAxes(inputs=(0, 1, 2), outputs=3)                  # a 2-D convolution: window x window x in | out
    MatrixAxes(inputs=(0, 1, 2), outputs=(3,), batch=())
    >>> MatrixAxes(inputs=-2, outputs=-1, batch=0).resolve("experts/kernel", (8, 64, 256))
    MatrixAxes(inputs=(1,), outputs=(2,), batch=(0,))
    >>> MatrixAxes(0, 1, parts={1: (2048, 512, 512)})            # 32 heads of queries, 8 of keys and of values
    MatrixAxes(inputs=(0,), outputs=(1,), batch=(), parts={1: (2048, 512, 512)})
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    batch: tuple[int, ...]
    bias: str | None = None
    head: bool = False
    parts: tuple[tuple[int, int | tuple[int, ...]], ...] = ()  # axis and number, or axis and sizes once it is resolved

    def __init__(
        self,
        inputs: Any = (0,),
        outputs: Any = (1,),
        batch: Any = (),
        bias: str | None = None,
        head: bool = False,
        parts: Any = (),
    ) -> None:
        for field, value in (("inputs", inputs), ("outputs", outputs), ("batch", batch)):
            try:
                axes = tuple(map(operator.index, value if hasattr(value, "__iter__") else (value,)))
            except TypeError:
                raise TypeError(f"MatrixAxes({field}={value!r}): wanted an integer or integers, as (0, 1).") from None
            object.__setattr__(self, field, axes)
        object.__setattr__(self, "bias", bias)
        object.__setattr__(self, "head", head)
        object.__setattr__(self, "parts", _as_parts(parts))
        if not self.inputs or not self.outputs:
            raise ValueError(f"{self} has no inputs or no outputs; a matrix needs at least one axis of each.")
        if len({*self.inputs, *self.outputs, *self.batch}) < len(self.inputs + self.outputs + self.batch):
            raise ValueError(f"{self} names an axis twice; each axis is input, output or batch.")

    def __repr__(self) -> str:
        parts = f", parts={dict(self.parts)}" if self.parts else ""
        return f"MatrixAxes(inputs={self.inputs}, outputs={self.outputs}, batch={self.batch}{parts})"

    @property
    def whole(self) -> "MatrixAxes":
        """The same axes, not divided."""
        return dataclasses.replace(self, parts=())

    def resolve(self, path: str, shape: tuple[int, ...]) -> "MatrixAxes":
        """The same axes counted from the front, for the leaf of that shape.

        Raises ``ValueError`` when they do not name every axis of ``shape`` exactly once; ``path`` is for the message.
        """
        ndim = len(shape)
        groups = [tuple(a + ndim if a < 0 else a for a in group) for group in (self.inputs, self.outputs, self.batch)]
        if sorted(sum(groups, ())) != list(range(ndim)):
            raise ValueError(
                f"axes of {path!r}: {self} does not fit shape {tuple(shape)}. Inputs, outputs and batch together must "
                f"name each of its {ndim} axes exactly once; negative axes count from the end."
            )
        name, divided = f"axes of {path!r}: {self}", {a + ndim if a < 0 else a: parts for a, parts in self.parts}
        if unfit := divided.keys() - {*groups[0], *groups[1]}:
            raise ValueError(f"{name} divides axis {min(unfit)}, which is neither among inputs nor outputs.")
        parts = {a: _sizes(name, a, shape[a], divided[a]) for a in sorted(divided)}
        return MatrixAxes(*groups, bias=self.bias, head=self.head, parts=parts)

    def same_matrix(self, other: "MatrixAxes", shape: tuple[int, ...]) -> bool:
        """Whether both, divided or not, make one matrix of a leaf of that shape, axes of length 1 being nowhere in it.

        >>> MatrixAxes(0, 1).same_matrix(MatrixAxes(1, 0), (4, 4))
        False
        """
        own, others = (
            [[a for a in group if shape[a] != 1] for group in (axes.inputs, axes.outputs, axes.batch)]
            for axes in (self, other)
        )
        return own == others


def _as_parts(given: Any) -> tuple[tuple[int, int | tuple[int, ...]], ...]:
    try:
        return tuple(
            (operator.index(a), tuple(map(operator.index, s)) if hasattr(s, "__iter__") else operator.index(s))
            for a, s in (given.items() if isinstance(given, Mapping) else given)
        )
    except (TypeError, ValueError):
        raise TypeError(
            f"MatrixAxes(parts={given!r}): wanted numbers or sizes of parts by axis, as {{1: 3}}."
        ) from None


def _sizes(name: str, axis: int, length: int, parts: int | tuple[int, ...]) -> tuple[int, ...]:
    """The sizes of the parts of an axis, which add up to its length."""
    sizes = (length // max(parts, 1),) * parts if isinstance(parts, int) else parts
    if sum(sizes) != length or min(sizes, default=0) < 1:
        raise ValueError(f"{name} divides axis {axis}, whose length is {length}: parts={parts} do not make that up.")
    return sizes


class Part(NamedTuple):
    """Equal parts of a divided leaf, as a leaf of their own: a cut, in which the parts are one more axis of batch."""

    span: tuple[slice, ...]  # of the leaf
    shape: tuple[int, ...]
    axes: MatrixAxes


def parts_of(shape: tuple[int, ...], axes: MatrixAxes) -> list[Part]:
    """What a leaf of that shape is divided into: one part where its (resolved) axes are whole.

    >>> [part.shape for part in parts_of((8, 64), MatrixAxes(parts=((1, (32, 16, 16)),)))]
    [(8, 1, 32), (8, 2, 16)]
    """
    if not axes.parts:
        return [Part(tuple(slice(0, d) for d in shape), shape, axes)]
    divided = [a for a in axes.inputs + axes.outputs if a in dict(axes.parts)]
    place = [a + sum(b <= a for b in divided) for a in range(len(shape))]  # of what is left of each axis
    inputs, outputs, batch = (tuple(place[a] for a in group) for group in (axes.inputs, axes.outputs, axes.batch))
    own = MatrixAxes(inputs, outputs, batch + tuple(place[a] - 1 for a in divided), bias=axes.bias)
    return [
        Part(
            tuple(slice(start, start + count * size) for start, count, size in cut),
            sum(((count, size) if a in divided else (size,) for a, (_, count, size) in enumerate(cut)), ()),
            own,
        )
        for cut in itertools.product(*runs_of(shape, axes))
    ]


def runs_of(shape: tuple[int, ...], axes: MatrixAxes) -> list[list[tuple[int, int, int]]]:
    """Of each axis, equal parts that follow one another: where they start, how many they are, and of which size."""
    parts: dict[int, Any] = dict(axes.parts)
    sizes = [parts.get(a, (length,)) for a, length in enumerate(shape)]
    equal = [[(size, len(list(same))) for size, same in itertools.groupby(of_axis)] for of_axis in sizes]
    starts = [itertools.accumulate((size * count for size, count in runs), initial=0) for runs in equal]
    return [[(x, n, d) for x, (d, n) in zip(s, runs, strict=False)] for s, runs in zip(starts, equal, strict=True)]


# How the reason of a leaf begins that has two readings, of one that a user names, and of one that chooses experts.
AMBIGUOUS, GIVEN, ROUTER = "ambiguous", "user", "router"

INFERRED = (
    "Pass axes=fo.infer_axes(loss_fn, params, batch), which reads inputs and outputs off the program, or a tree like "
    "the parameters with a fo.MatrixAxes for each matrix and None for what the fallback is to take"
)


class LeafAxes(NamedTuple):
    """What one leaf of the parameters is, and why."""

    path: str  # "Block_0/attention/query/kernel"
    shape: tuple[int, ...]
    dtype: Any
    axes: MatrixAxes | None  # None: no matrix, or nobody knows which. For kind "matrix" there always are some
    kind: str  # "matrix" | "embedding" | "head" | "other"
    reason: str  # for the report: "Dense kernel", "ambiguous 3-D kernel: pass axes=", "vector", ...
    bias: str | None = None  # the leaf that is added to a matrix's outputs

    @property
    def is_given(self) -> bool:
        """Whether the user has said what it is."""
        return self.reason.startswith(GIVEN)

    @property
    def is_ambiguous(self) -> bool:
        """Whether it may be a matrix, in more ways than one: two of its axes are longer than 1."""
        long = sum(d > 1 for d in self.shape) > 1
        return long and self.kind in ("other", "head") and self.reason.startswith(AMBIGUOUS)


def how_many(some: list[LeafAxes], leaves: list[LeafAxes]) -> str:
    """Some of the leaves, by their number and by their share of all entries."""
    size = lambda leaves: sum(math.prod(leaf.shape) for leaf in leaves)  # noqa: E731
    noun = "leaf" if len(some) == 1 else "leaves"
    return f"{len(some)} {noun} ({size(some) / max(size(leaves), 1):.0%} of the parameters)"


def listed(some: list[LeafAxes], most: int = 4) -> str:
    """The first of these leaves, each with its shape and what the rules say of it."""
    more = f", and {len(some) - most} more" if len(some) > most else ""
    return "; ".join(f"{leaf.path!r} of shape {leaf.shape}, {leaf.reason}" for leaf in some[:most]) + more


def path_names(path: KeyPath) -> tuple[str, ...]:
    """A leaf's path in words: ``("Block_0", "attention", "kernel")``."""
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):  # the box of nn.Partitioned and nnx.Param
        path = path[:-1]
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path) or ("",)


# Trees that come from outside: told from functions, and read leaf by leaf as arrays.


def is_function(x: object) -> bool:
    """Whether ``x`` is to be called, and is not a tree: an Equinox or nnx module, or any node with a ``__call__``, is a
    tree though it could be called. As in `optax.masked`, a tree is a function where all of its leaves are.
    """
    leaves = jax.tree.leaves(x)
    return isinstance(x, jax.tree_util.Partial) or (callable(x) and len(leaves) > 0 and all(map(callable, leaves)))


def made(tree: PyTree | Callable[[PyTree], PyTree], params: PyTree) -> PyTree:
    """``tree``, or what it makes of ``params`` where it is a function."""
    return tree(params) if is_function(tree) else tree


def arrays(tree: PyTree) -> PyTree:
    """``tree`` with an array for each leaf: numbers become arrays, and float8 and float4, which JAX promotes to no
    other type, are cast to float32. Every `jax.ShapeDtypeStruct` stays one.

    Raises ``TypeError`` for a leaf that is neither an array nor a number, and for the gradient of an integer.
    """
    return jax.tree_util.tree_map_with_path(_array, tree)


def shapes(tree: PyTree) -> PyTree:
    """The shape and the dtype of each leaf, numbers included. Raises as `arrays`."""

    def of_leaf(path: KeyPath, x: PyTree) -> jax.ShapeDtypeStruct:
        x = x if hasattr(x, "dtype") else _array(path, x)
        return jax.ShapeDtypeStruct(x.shape, x.dtype)

    return jax.tree_util.tree_map_with_path(of_leaf, tree)


def step_dtype(dtype: Any) -> Any:
    """The dtype of the update for a gradient of this dtype: its own, or for whole numbers that of a Python float."""
    return dtype if jnp.issubdtype(dtype, jnp.inexact) else jnp.result_type(float)


def floating(x: ArrayLike) -> Array:
    """An array or a number as an array in its `step_dtype`."""
    return jnp.asarray(x, step_dtype(jnp.result_type(x)))


def wide_dtype(dtype: Any) -> Any:
    """float32 for a type that JAX promotes to no other, float8 and float4; any other as it is."""
    return jnp.float32 if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits <= 8 else dtype


def _array(path: KeyPath, x: object) -> Array | jax.ShapeDtypeStruct:
    if not isinstance(x, jax.Array | jax.ShapeDtypeStruct):
        if getattr(x, "dtype", None) == jax.dtypes.float0:
            raise TypeError(
                f"the gradient of {_named(path)} is float0, which jax.grad(allow_int=True) gives for an integer: give "
                "the optimizer the floating-point parameters alone, as by optax.masked or eqx.partition."
            )
        try:
            x = jnp.asarray(x, jnp.result_type(x))  # a Python number's own dtype, but not weak
        except TypeError:
            raise TypeError(
                f"{_named(path)} is {type(x).__name__}, no array and no number: pass arrays alone, as "
                "eqx.filter(model, eqx.is_array) gives them."
            ) from None
    wide = wide_dtype(x.dtype)
    if wide == x.dtype:
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, wide, sharding=x.sharding)
    return x.astype(wide)


def _named(path: KeyPath) -> str:
    return repr("/".join(path_names(path)))
