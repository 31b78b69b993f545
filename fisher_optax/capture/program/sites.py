"""Products with a parameter: which axes of either operand are inputs, outputs, batch and positions."""

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn
from jaxtyping import Array

from ...statistics import Window
from . import jaxprs
from .views import REPEATED, Atom, Dims, Step, View

Axes = tuple[int, ...]
A = TypeVar("A", bound=Array | np.ndarray)


class Groups(NamedTuple):
    """How many rows each expert of a ragged product has: an operand of the equation."""

    operand: int
    number: int  # of experts
    aval: jax.ShapeDtypeStruct


class Site(NamedTuple):
    """One product with one parameter. Its input is operand ``x`` of the equation, its output result ``y``.

    ``x_axes``, ``y_axes`` are their axes as (batch, positions, inputs) and (batch, positions, outputs), in the order of
    ``batch``, ``inputs`` and ``outputs``, which say what these are of the parameter. A dense product of complex
    numbers is one of their real and imaginary parts, which a last axis of positions counts.
    """

    leaf: int
    how: str  # "dense", "convolution", "embedding" or "experts"
    x: int
    y: int
    x_axes: tuple[Axes, Axes, Axes]
    y_axes: tuple[Axes, Axes, Axes]
    batch: tuple[Atom, ...]
    inputs: tuple[Atom, ...]
    outputs: tuple[Atom, ...]
    positions: tuple[int, ...]  # their shape
    steps: tuple[Step, ...]  # loops and indices on its parameter
    avals: tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]  # of its input and its output
    window: Window | None = None
    repeated: bool = False  # in a loop that does not run over a stack of this parameter
    number: int = -1  # among all sites of the program
    parts: int = 1  # of a number: 2 where they are complex
    split: tuple[tuple[str, int], ...] = ()  # axes of a shard_map over whose devices they differ, with sizes
    groups: Groups | None = None  # of experts, which the last axes of ``batch`` count, and their input's do not

    @property
    def batch_axes(self) -> list[int]:
        """Axes of the parameter that count matrices, in the order in which loops, indices and the product take them."""
        return [item[1] for item in self.steps] + sources(self.batch)

    @property
    def m(self) -> int:
        """Inputs of one matrix."""
        return math.prod(a.size for a in self.inputs)

    @property
    def n(self) -> int:
        """Outputs of one matrix."""
        return math.prod(a.size for a in self.outputs)


def sources(atoms: Sequence[Atom]) -> list[int]:
    """The parameter's axes, in order of first appearance."""
    return list(dict.fromkeys(a.source for a in atoms if a.source is not None))


def _dense(eqn: JaxprEqn, views: Sequence[View | None]) -> tuple[Site, Dims] | None:
    (contracting, batch), w = eqn.params["dimension_numbers"], 1 if is_leaf(views[1]) else 0
    x = 1 - w
    free = [
        tuple(a for a in range(len(jaxprs.aval(v).shape)) if a not in (*contracting[i], *batch[i]))
        for i, v in enumerate(eqn.invars)
    ]
    nb, before = len(batch[0]), len(free[0])
    y_free = tuple(range(nb, nb + before)), tuple(range(nb + before, nb + before + len(free[1])))
    x_axes = (tuple(batch[x]), free[x], tuple(contracting[x]))
    y_axes = (tuple(range(nb)), y_free[x], y_free[w])
    return _site(eqn, views, "dense", (x, w), x_axes, y_axes, (tuple(batch[w]), tuple(contracting[w]), free[w]))


def _convolution(eqn: JaxprEqn, views: Sequence[View | None]) -> tuple[Site, Dims] | None:
    p = eqn.params
    if not is_leaf(views[1]) or p["feature_group_count"] != 1 or p["batch_group_count"] != 1:
        return None
    lhs, rhs, out = p["dimension_numbers"]
    shape = tuple(jaxprs.aval(eqn.invars[1]).shape[a] for a in rhs[2:])
    window = Window(shape, p["window_strides"], tuple(map(tuple, p["padding"])), p["lhs_dilation"], p["rhs_dilation"])
    x_axes, y_axes = ((), (lhs[0], *lhs[2:]), (lhs[1],)), ((), (out[0], *out[2:]), (out[1],))
    w_axes = ((), (*rhs[2:], rhs[1]), (rhs[0],))
    return _site(eqn, views, "convolution", (0, 1), x_axes, y_axes, w_axes, window)


def _embedding(eqn: JaxprEqn, views: Sequence[View | None]) -> tuple[Site, Dims] | None:
    d, shape = eqn.params["dimension_numbers"], jaxprs.aval(eqn.invars[0]).shape
    rank = len(jaxprs.aval(eqn.outvars[0]).shape)
    rows = d.collapsed_slice_dims == (0,) and d.start_index_map == (0,) and not d.operand_batching_dims
    if not is_leaf(views[0]) or not rows or tuple(eqn.params["slice_sizes"]) != (1, *shape[1:]):
        return None
    positions = tuple(a for a in range(rank) if a not in d.offset_dims)
    x_axes, y_axes = ((), tuple(range(len(positions))), (len(positions),)), ((), positions, tuple(d.offset_dims))
    return _site(eqn, views, "embedding", (1, 0), x_axes, y_axes, ((), (0,), tuple(range(1, len(shape)))))


def _experts(eqn: JaxprEqn, views: Sequence[View | None]) -> tuple[Site, Dims] | None:
    """A ragged product of rows, sorted by expert, with the experts' matrices."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    contracting, batch = jax.tree.map(int, numbers.dot_dimension_numbers)  # NumPy's, of a vmap
    ragged, *experts = map(int, (*numbers.lhs_ragged_dimensions, *numbers.rhs_group_dimensions))
    X, W, sizes = (jaxprs.aval(v) for v in eqn.invars[:3])
    free = [a for a in range(X.ndim) if a not in (*contracting[0], *batch[0])]
    one_size = sizes.ndim == 1 or (sizes.ndim == 1 + len(batch[0]) and len(free) == 1)
    if not is_leaf(views[1]) or ragged not in free or not one_size or eqn.params["group_offset"] is not None:
        return None
    outputs = tuple(a for a in range(W.ndim) if a not in (*contracting[1], *batch[1], *experts))
    nb, before = len(batch[0]), len(free)
    # The ragged axis first, so that rows of an expert are neighbours.
    order = sorted(range(before), key=lambda i: free[i] != ragged)
    x_axes = (batch[0], tuple(free[i] for i in order), contracting[0])
    y_axes = (tuple(range(nb)), tuple(nb + i for i in order), tuple(range(nb + before, nb + before + len(outputs))))
    w_axes = (batch[1], contracting[1], outputs)
    site, dims = _site(eqn, views, "experts", (0, 1), x_axes, y_axes, w_axes)
    view = views[1]
    assert view is not None
    groups = Groups(2, W.shape[experts[0]], jax.ShapeDtypeStruct(sizes.shape, sizes.dtype))
    return site._replace(batch=(*site.batch, *view.dims[experts[0]]), groups=groups), dims


FINDERS = {
    "dot_general": _dense,
    "conv_general_dilated": _convolution,
    "gather": _embedding,
    "ragged_dot_general": _experts,
}
NOT_EXPERTS = (
    "of ragged products, jax.lax.ragged_dot(rows, parameter, group_sizes) is captured, with the parameter as (experts, "
    "inputs, outputs) in any order, one size for each expert and no group_offset"
)


def _site(
    eqn: JaxprEqn,
    views: Sequence[View | None],
    how: str,
    operands: tuple[int, int],
    x_axes: tuple[Axes, Axes, Axes],
    y_axes: tuple[Axes, Axes, Axes],
    w_axes: tuple[Axes, Axes, Axes],
    window: Window | None = None,
) -> tuple[Site, Dims]:
    """The site, and the axes of its result: the parameter's on batch and outputs, positions (below 0) on the rest."""
    x, w = operands
    W, X, Y = views[w], jaxprs.aval(eqn.invars[x]), jaxprs.aval(eqn.outvars[0])
    assert W is not None
    dims: list[tuple[Atom, ...]] = [(Atom(-1 - a, size),) if size != 1 else () for a, size in enumerate(Y.shape)]
    for i in (0, 2):
        for of_y, of_w in zip(y_axes[i], w_axes[i], strict=True):
            dims[of_y] = W.dims[of_w]
    batch, inputs, outputs = (tuple(a for axis in axes for a in W.dims[axis]) for axes in w_axes)
    positions = tuple(Y.shape[a] for a in y_axes[1])
    avals = jax.ShapeDtypeStruct(X.shape, X.dtype), jax.ShapeDtypeStruct(Y.shape, Y.dtype)
    site = Site(W.root[1], how, x, 0, x_axes, y_axes, batch, inputs, outputs, positions, W.steps, avals, window)
    site = site._replace(split=jaxprs.split_over(X, Y))
    complex_ = how == "dense" and jnp.issubdtype(Y.dtype, jnp.complexfloating)
    return _by_parts(site) if complex_ else site, tuple(dims)


def _by_parts(site: Site) -> Site:
    """The product of two real matrices that a complex one and a real parameter have."""
    axes, avals = [], []
    for (batch, positions, others), aval in zip((site.x_axes, site.y_axes), site.avals, strict=True):
        axes.append((batch, (*positions, len(aval.shape)), others))
        avals.append(jax.eval_shape(in_parts, aval))
    (x_axes, y_axes), positions = axes, (*site.positions, 2)
    return site._replace(x_axes=x_axes, y_axes=y_axes, positions=positions, avals=tuple(avals), parts=2)


def in_parts(x: A) -> A | Array:
    """Real and imaginary part along a last axis; what is real as it is."""
    return jnp.stack([jnp.real(x), jnp.imag(x)], -1) if jnp.iscomplexobj(x) else x


def completed(site: Site, shape: tuple[int, ...]) -> Site | None:
    """The site, if each axis of its parameter (of that shape) plays one part; an axis of length 1 that was squeezed out
    plays the one that is vacant.
    """
    groups = {"batch": site.batch, "inputs": site.inputs, "outputs": site.outputs}
    parts: dict[int | None, str] = {item[1]: "steps" for item in site.steps}
    for part, atoms in groups.items():
        if any(a.source is REPEATED or parts.setdefault(a.source, part) != part for a in atoms):
            return None
    for axis, length in enumerate(shape):
        if axis not in parts and length == 1:
            first = min(sources(groups["inputs"]), default=0)
            vacant = [part for part in ("inputs", "outputs") if not groups[part]]
            part = vacant[0] if vacant else "batch" if axis < first else "outputs"
            groups[part] = (*groups[part], Atom(axis, 1))
        elif axis not in parts or (
            parts[axis] != "steps" and math.prod(a.size for a in groups[parts[axis]] if a.source == axis) != length
        ):
            return None
    return site._replace(**groups) if groups["inputs"] and groups["outputs"] else None


def is_leaf(view: View | None) -> bool:
    """Whether a view is of a parameter."""
    return view is not None and view.root[0] == "leaf"
