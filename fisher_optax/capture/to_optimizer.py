"""How statistics of layers reach an optimizer: the extra argument ``statistics`` of `update`, matched by path."""

import math
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from ..linalg.eigenbasis import LowRank
from ..matrices.axes import INFERRED, ROUTER, LeafAxes, MatrixAxes, how_many, listed
from ..matrices.layout import Layer, join, shapes, split
from ..statistics import LayerFactors, LayerStatistics, Logits, Samples, statistics_by_path

HOW = (
    "get them from `value, grads, stats = fo.value_and_grad(loss_fn, statistics=fo.{kind}(...))(params, batch)` "
    "and pass `tx.update(grads, state, params, statistics=stats)`"
)
KINDS = {LayerFactors: "KroneckerFactors", Samples: "LayerSamples"}
REMEDY = (
    "make the optimizer follow the program: give it (and fo.eigenbases, for fo.ekfac) axes=fo.infer_axes(loss_fn, "
    "params, batch, statistics=fo.{kind}(...)), and start its state anew; what has no such statistics is then left to "
    "the fallback, and so is, by fo.frog, an output layer; fo.report with the same arguments says why"
)

MISSING = object()  # where `update` is called without ``statistics=``
T = TypeVar("T", bound=optax.GradientTransformationExtraArgs)


def on_layers(
    inner: T,
    layers: list[Layer],
    *,
    method: str,
    wants: type[LayerStatistics],
    check: Callable[[Layer, Any, tuple[int, ...]], object] = lambda layer, statistics, shape: None,
    check_shape: Callable[[Layer, tuple[int, ...]], object] = lambda layer, shape: None,
    kind: str | None = None,
) -> T:
    """``inner`` on the joined matrices of a tree of layers, with each one's statistics in the same order.

    ``inner.update(matrices, state, params, statistics=[...])`` gets lists, or None for statistics: from here on they
    are an argument of their own. The result is of inner's type. ``kind`` names the statistics that errors ask for.
    """
    kind = kind or KINDS[wants]
    for layer in layers:
        _require_order(layer, method)

    def init(params: PyTree) -> PyTree:
        # Without layers, `optax.tree.map_params` asks with a placeholder where the parameters would be.
        if not layers:
            return inner.init(params)
        described: Any = shapes(layers, jax.tree.leaves(params))
        for layer, x in zip(layers, described, strict=True):
            check_shape(layer, x.shape)
        return inner.init(described)

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, *, statistics: PyTree = MISSING, **extra: PyTree
    ) -> tuple[PyTree, PyTree]:
        leaves, treedef = jax.tree.flatten(updates)
        if not layers:
            return updates, state
        of_layers = _aligned(statistics, layers, method, wants, kind)
        if of_layers is not None:
            for layer, found in zip(layers, of_layers, strict=True):
                _require_axes(layer, found, leaves[layer.kernel].shape, method, kind)
            of_layers = [_with_bias(found, layer) for found, layer in zip(of_layers, layers, strict=True)]
            for layer, found in zip(layers, of_layers, strict=True):
                check(layer, found, layer.shape(leaves))
        weights = None if params is None else join(layers, treedef.flatten_up_to(params))
        result: Any = inner.update(join(layers, leaves), state, weights, statistics=of_layers, **extra)
        moved, state = result
        return treedef.unflatten(split(layers, moved, leaves)), state

    return type(inner)(init, update)


def _aligned(
    statistics: PyTree, layers: list[Layer], method: str, wants: type, kind: str
) -> list[LayerStatistics] | None:
    """The statistics of each layer, in order; None where the caller gave None.

    Raises:
      TypeError: for none at all, or of another kind.
      ValueError: where a layer has none.
    """
    how = HOW.format(kind=kind)
    if statistics is MISSING:
        none = "; statistics=None means no new curvature" if wants is LayerFactors else ""
        raise TypeError(
            f"fo.{method}: update needs statistics=: {how}{none}. A wrapper has to hand them on, "
            "as optax.chain, MultiSteps and most others do; optax.contrib.sam and optax.lookahead do not."
        )
    if statistics is None:
        return None
    found = statistics_by_path(statistics)
    if missing := [layer.path for layer in layers if found.get(layer.path) is None]:
        have = ", ".join(map(repr, found)) or "nothing"
        raise ValueError(
            f"fo.{method}: no statistics for {missing[0]!r} ({len(missing)} of {len(layers)} layers lack them; there "
            f"are some for {have}). If the tree is right, {REMEDY.format(kind=kind)}."
        )
    for layer in layers:
        if not isinstance(found[layer.path], wants):
            got = type(found[layer.path]).__name__
            raise TypeError(f"fo.{method}: statistics of {layer.path!r} are {got}, wanted {wants.__name__}: {how}.")
    return [found[layer.path] for layer in layers]


def _require_order(layer: Layer, method: str) -> None:
    """A ValueError unless the axes of each group are in the leaf's order, as those of statistics are."""
    for group in (layer.axes.batch, layer.axes.inputs, layer.axes.outputs):
        if list(group) != sorted(group):
            raise ValueError(
                f"fo.{method}: axes of {layer.path!r} are {layer.axes}; statistics come with the axes of each group in "
                "ascending order, so write them in that order."
            )


def _require_axes(layer: Layer, statistics: LayerStatistics, shape: tuple[int, ...], method: str, kind: str) -> None:
    """A ValueError unless the statistics are of the matrix that the layer is; of statistics without axes nothing is
    known but shapes.

    One of the two may have no bias, see `_with_bias`.
    """
    if statistics.axes is None:
        return
    ours, theirs = layer.axes, statistics.axes.resolve(f"{layer.path} in its statistics", shape)
    other_bias = None not in (ours.bias, theirs.bias) and ours.bias != theirs.bias
    if other_bias or not ours.same_matrix(theirs, shape):
        read, used = (f"{a}" + (f" with bias {a.bias!r}" if other_bias else "") for a in (ours, theirs))
        raise ValueError(
            f"fo.{method} reads {layer.path!r} of shape {shape} as {read}, but its statistics are of {used}, as the "
            f"program uses it: {REMEDY.format(kind=kind)}."
        )


def _with_bias(statistics: LayerStatistics, layer: Layer) -> LayerStatistics:
    """The statistics with a bias's row and column exactly if the layer has one."""
    if not isinstance(statistics, LayerFactors) or statistics.left is None:
        return statistics
    if (statistics.bias is not None) == (layer.bias is not None):
        return statistics
    drop = layer.bias is None

    def side(A: Any) -> Any:
        if isinstance(A, LowRank):
            return LowRank(A.rows[..., :-1] if drop else jnp.pad(A.rows, [(0, 0)] * (A.rows.ndim - 1) + [(0, 1)]))
        if drop:
            return A[..., :-1, :-1]
        # A bias that was added elsewhere too: as if its input, always 1, were uncorrelated with the others.
        return jnp.pad(A, [(0, 0)] * (A.ndim - 2) + [(0, 1)] * 2).at[..., -1, -1].set(1)

    squares = statistics.squares
    squares = squares[..., :-1, :] if drop and squares is not None else squares
    return LayerFactors(side(statistics.left), statistics.right, squares, statistics.weight)


def unused_statistics(method: str, leaves: list[LeafAxes], statistics: PyTree) -> str | None:
    """What to say of leaves that have statistics, and go to the fallback by their names."""
    captured = {} if statistics is None else statistics_by_path(statistics)
    real = [x for x in leaves if x.kind == "other" and jnp.issubdtype(x.dtype, jnp.floating)]
    meant = lambda x: x.is_given or x.is_ambiguous or x.reason.startswith(ROUTER)  # noqa: E731
    left = [x for x in real if x.axes is None and x.path in captured and not meant(x)]
    if not left:
        return None
    return (
        f"{method}: the fallback (AdamW unless you pass one) takes {how_many(left, leaves)} that the program "
        f"multiplies inputs by, as statistics= shows, since names or shapes say otherwise: {listed(left)}. {INFERRED}."
    )


def layer_axes(layers: list[Layer]) -> list[MatrixAxes]:
    """The axes of the joined matrices.

    Raises ``ValueError`` for parts that are not one after another along a side.
    """
    return [_joined_axes(layer) for layer in layers]


def _joined_axes(layer: Layer) -> MatrixAxes:
    first = 1 if layer.axes.batch else 0
    parts = {}
    for side, group in enumerate((layer.axes.inputs, layer.axes.outputs)):
        sizes: Any = [(a, own) for a, own in layer.axes.parts if a in group]
        if len(sizes) > 1 or any(a != group[0] for a, _ in sizes):
            raise ValueError(
                f"axes of {layer.path!r}: {layer.axes} divides another axis of a side than its first, or two; with "
                "statistics of layers, parts have to follow one another along the side."
            )
        if sizes:
            inner = math.prod(layer.leaf_shape[a] for a in group[1:])
            parts[first + side] = [inner * size for size in sizes[0][1]]
            parts[first + side][-1] += side == 0 and layer.bias is not None  # its row goes with the last
    return MatrixAxes(first, first + 1, tuple(range(first)), parts=parts)


# Which sides of a layer's statistics a preconditioner must have whole.


@runtime_checkable
class Sides(Protocol):
    """Which sides of a matrix an optimizer keeps whole."""

    @property
    def max_dim(self) -> int:
        """The longest of them."""
        ...

    def wanted(self, m: int, n: int) -> tuple[bool, bool]:
        """Of an ``m x n`` matrix."""
        ...


def require_whole(method: str, layer: Layer) -> None:
    """A ValueError for a layer that is divided."""
    if layer.axes.parts:
        raise ValueError(
            f"fo.{method}: axes of {layer.path!r} are {layer.axes}, but a softmax's Fisher is of whole heads: leave "
            "parts= out, or take fo.kfac without head=."
        )


def whole_sides(method: str, storage: Sides, layer: Layer, shape: tuple[int, ...]) -> None:
    """A ValueError unless both sides of a matrix of that shape have a basis."""
    *_, m, n = shape
    if not all(storage.wanted(m, n)):
        raise ValueError(
            f"fo.{method}: {layer.path!r} is {m} x {n}, longer than max_precond_dim={storage.max_dim}, and a side of "
            "low rank has no whole basis: raise max_precond_dim, or leave the layer to the fallback by axes=."
        )


def same_shapes(
    method: str, storage: Sides, squares: bool, layer: Layer, statistics: LayerFactors, shape: tuple[int, ...]
) -> None:
    """A ValueError unless the statistics are of a matrix of that shape, each side kept as the optimizer keeps it."""
    *batch, m, n = shape
    if squares and statistics.squares is None:
        raise ValueError(
            f"fo.{method}: statistics of {layer.path!r} have no squares: use fo.KroneckerFactors(squares=True) and "
            "grad_fn(..., bases=fo.eigenbases(opt_state, params))."
        )
    if isinstance(statistics.right, Logits):
        raise ValueError(
            f"fo.{method}: the right statistics of {layer.path!r} are logits, which fo.kfac(head=...) takes of a layer "
            "called head, lm_head or logits: call it so and pass head=, or leave head_rows= out of fo.KroneckerFactors."
        )
    for name, side, d, whole in zip(
        ("left", "right"), (statistics.left, statistics.right), (m, n), storage.wanted(m, n), strict=True
    ):
        size = getattr(side, "shape", ())
        divided = dict(layer_axes([layer])[0].parts).keys()
        if not whole and len(batch) + (name == "right") in divided:
            raise ValueError(
                f"fo.{method}: {layer.path!r} is {m} x {n}, longer than max_precond_dim={storage.max_dim}; a side of "
                "low rank has no parts: raise max_precond_dim, or leave parts= of its axes out."
            )
        have = "nothing" if side is None else f"{side.rows.shape} rows" if isinstance(side, LowRank) else f"{size}"
        fits = isinstance(side, LowRank) if not whole else size[-2:] == (d, d)
        if not fits:
            wanted = f"a {d} x {d} matrix" if whole else f"rows of a side longer than {storage.max_dim}"
            raise ValueError(
                f"fo.{method}: the {name} statistics of {layer.path!r} are {have}; wanted {wanted}. Give the optimizer "
                "and fo.KroneckerFactors the same max_precond_dim=max_dim and rank; axes=fo.infer_axes(loss_fn, "
                "params, batch) leaves to the fallback what is only looked up."
            )


def whole_left(method: str, storage: Sides, layer: Layer, statistics: LayerFactors, shape: tuple[int, ...]) -> None:
    """A ValueError unless the left statistics are of a matrix of that shape, where the optimizer has such a side."""
    *batch, m, n = shape
    wanted, size = storage.wanted(m, n)[0], getattr(statistics.left, "shape", ())
    if not wanted and len(batch) in dict(layer_axes([layer])[0].parts):
        raise ValueError(
            f"fo.{method}: {layer.path!r} has {m} inputs, more than max_precond_dim={storage.max_dim}, in parts: raise "
            "max_precond_dim, or leave parts= of its axes out."
        )
    if wanted and size[-2:] != (m, m):
        left = statistics.left
        have = "nothing" if left is None else f"{left.rows.shape} rows" if isinstance(left, LowRank) else f"{size}"
        raise ValueError(
            f"fo.{method}: the left statistics of {layer.path!r} are {have}; wanted a {m} x {m} matrix: take "
            "fo.value_and_grad(loss_fn, statistics=fo.InputGram()); axes=fo.infer_axes(loss_fn, params, batch, "
            "statistics=fo.InputGram()) leaves to the fallback what is only looked up."
        )
