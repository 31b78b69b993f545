"""Which axes of a leaf are a matrix's inputs, outputs and batch: what everything else reads."""

import dataclasses
import operator
from typing import Any, NamedTuple

import jax


@dataclasses.dataclass(frozen=True, init=False)
class MatrixAxes:
    """Which axes of a leaf are a matrix's inputs (rows), outputs (columns) and batch.

    Together the three name every axis of the leaf once; negative axes count from the end. The axes of one group are
    merged in the order given. An integer or a list becomes a tuple. Not a pytree: it is a leaf of a tree. ``bias`` is
    the path of the leaf that is added to the matrix's outputs, for methods that treat both as one matrix (K-FAC); None:
    the one of that shape beside it, if any.

    Defaults are a Flax Dense kernel. Raises ``TypeError`` for axes that are not integers, ``ValueError`` for an axis
    named twice and for no inputs or outputs.

    >>> MatrixAxes(inputs=(0, 1, 2), outputs=3)                  # a 2-D convolution: window x window x in | out
    MatrixAxes(inputs=(0, 1, 2), outputs=(3,), batch=())
    >>> MatrixAxes(inputs=-2, outputs=-1, batch=0).resolve("experts/kernel", (8, 64, 256))
    MatrixAxes(inputs=(1,), outputs=(2,), batch=(0,))
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    batch: tuple[int, ...]
    bias: str | None = dataclasses.field(default=None, repr=False)

    def __init__(self, inputs: Any = (0,), outputs: Any = (1,), batch: Any = (), bias: str | None = None) -> None:
        for field, value in (("inputs", inputs), ("outputs", outputs), ("batch", batch)):
            try:
                axes = tuple(map(operator.index, value if hasattr(value, "__iter__") else (value,)))
            except TypeError:
                raise TypeError(f"MatrixAxes({field}={value!r}): wanted an integer or integers, as (0, 1).") from None
            object.__setattr__(self, field, axes)
        object.__setattr__(self, "bias", bias)
        if not self.inputs or not self.outputs:
            raise ValueError(f"{self} has no inputs or no outputs; a matrix needs at least one axis of each.")
        if len({*self.inputs, *self.outputs, *self.batch}) < len(self.inputs + self.outputs + self.batch):
            raise ValueError(f"{self} names an axis twice; each axis is input, output or batch.")

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
        return MatrixAxes(*groups, bias=self.bias)

    def same_matrix(self, other: "MatrixAxes", shape: tuple[int, ...]) -> bool:
        """Whether both, counted from the front, make one matrix of a leaf of that shape, an axis of length 1 being
        nowhere in it.

        >>> MatrixAxes(0, 1).same_matrix(MatrixAxes(1, 0), (4, 4))
        False
        """
        mine, theirs = (
            [[a for a in group if shape[a] != 1] for group in (axes.inputs, axes.outputs, axes.batch)]
            for axes in (self, other)
        )
        return mine == theirs


class LeafAxes(NamedTuple):
    """What one leaf of the parameters is, and why."""

    path: str  # "Block_0/attention/query/kernel"
    shape: tuple[int, ...]
    dtype: Any
    axes: MatrixAxes | None  # None: no matrix. Always given for kinds "matrix" and "head"
    kind: str  # "matrix" | "embedding" | "head" | "other"
    reason: str  # for the report: "Dense kernel", "ambiguous 3-D kernel: pass axes=", "vector", ...
    bias: str | None = None  # the leaf that is added to a matrix's outputs


def path_names(path: tuple) -> tuple[str, ...]:
    """A leaf's path in words: ``("Block_0", "attention", "kernel")``."""
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):  # the box of nn.Partitioned and nnx.Param
        path = path[:-1]
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path) or ("",)
