"""Which leaf goes where: matrices to the method, everything else to a fallback."""

import contextlib
import contextvars
import dataclasses
import functools
import sys
import types
import warnings
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import PyTree

from .._arguments import require_transformation
from ..matrices.axes import INFERRED, LeafAxes, MatrixAxes, how_many, listed
from ..matrices.layout import Layer, layers_of
from ..matrices.rules import ambiguous_among, resolve_axes
from .skip_nonfinite import Freezable, freezable, in_float32

Build = Callable[[list[MatrixAxes]], optax.GradientTransformation]
BuildLayers = Callable[[list[Layer]], optax.GradientTransformation]
Unused = Callable[[str, list[LeafAxes], PyTree], str | None]
LIBRARIES = {"fisher_optax", "optax", "jax", "jaxtyping", "beartype", "contextlib"}
MATRIX, FALLBACK = "matrix", "fallback"
OTHERWISE, UNCHANGED = "AdamW unless you pass one", "which changes nothing"
_marking: contextvars.ContextVar[bool] = contextvars.ContextVar("marking", default=False)


class AxesWarning(UserWarning):
    """A method leaves to its fallback what may be a matrix, or does not prune it.

    Embeddings, heads, normalisations and biases go there without a word, and so does what ``axes=`` sends there.

    Example:
      >>> import warnings, jax.numpy as jnp, fisher_optax as fo
      >>> with warnings.catch_warnings(record=True) as found:
      ...     warnings.simplefilter("always")
      ...     state = fo.soap(3e-3).init({"mixed": jnp.ones((2, 3, 4))})
      >>> print(str(found[0].message)[:70])
      soap: the fallback (AdamW unless you pass one) takes 1 leaf (100% of t
    """


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("state",), meta_fields=("paths", "layers", "block_size")
)
@dataclasses.dataclass(frozen=True)
class Routed:
    """A state with what it is of: made by inits under `marked` alone."""

    state: PyTree
    paths: tuple[str, ...]  # of all leaves that were seen
    layers: tuple[Layer, ...]  # those that are matrices
    block_size: int | None


@contextlib.contextmanager
def marked() -> Iterator[None]:
    """Inits inside give `Routed` states."""
    token = _marking.set(True)
    try:
        yield
    finally:
        _marking.reset(token)


def with_fallback(
    method: str,
    build: Build,
    fallback: optax.GradientTransformation,
    *,
    axes: PyTree = None,
    kinds: tuple[str, ...] = ("matrix", "head"),
    describe: Callable[[LeafAxes], dict[str, Any]] = lambda leaf: {},
    dtypes: DTypeLike = jnp.floating,
    otherwise: str = OTHERWISE,
) -> Freezable:
    """``build(axes of the matrix leaves, in order)`` for leaves of the given kinds, ``fallback`` for the others.

    Axes come from the whole tree at every call, so both sides see `optax.MaskedNode` where a leaf is not theirs, as
    under `optax.partition`. ``dtypes`` are those of the matrices that ``axes`` may name;
    ``otherwise`` says in a warning what the fallback is.
    """

    def of_layers(layers: list[Layer]) -> optax.GradientTransformation:
        return build([layer.axes for layer in layers])

    among = functools.partial(layers_of, kinds=kinds, with_bias=False)
    return _routed(method, of_layers, fallback, axes, among, describe, kinds, dtypes, otherwise=otherwise)


def layers_with_fallback(
    method: str,
    build: BuildLayers,
    fallback: optax.GradientTransformation,
    *,
    axes: PyTree = None,
    kinds: tuple[str, ...] = ("matrix", "head"),
    describe: Callable[[LeafAxes], dict[str, Any]] = lambda leaf: {},
    unused: Unused = lambda method, leaves, statistics: None,
    with_bias: bool = True,
) -> Freezable:
    """`with_fallback`, where ``build`` gets the layers among its own leaves, and a matrix takes its bias along, or not.
    ``unused(method, leaves, statistics)`` says what to warn of, if there is something, at a call.
    """
    among = functools.partial(layers_of, kinds=kinds, with_bias=with_bias)
    return _routed(method, build, fallback, axes, among, describe, kinds, unused=unused)


def _routed(
    method: str,
    build: BuildLayers,
    fallback: optax.GradientTransformation,
    axes: PyTree,
    layers_among: Callable[[list[LeafAxes]], list[Layer]],
    describe: Callable[[LeafAxes], dict[str, Any]],
    kinds: tuple[str, ...],
    dtypes: DTypeLike = jnp.floating,
    unused: Unused = lambda method, leaves, statistics: None,
    otherwise: str = OTHERWISE,
) -> Freezable:
    require_transformation("fallback", fallback)
    rest = freezable(in_float32(fallback))

    def routes(tree: PyTree) -> tuple[list[LeafAxes], list[Layer], optax.GradientTransformationExtraArgs]:
        leaves = resolve_axes(tree, axes, dtypes, kinds)
        layers = layers_among(leaves)
        own_places = sorted(place for layer in layers for place in layer.places)
        labels = [MATRIX if i in set(own_places) else FALLBACK for i in range(len(leaves))]
        tx: dict[Hashable, optax.GradientTransformation] = {
            MATRIX: freezable(build([layer.among(own_places) for layer in layers])),
            FALLBACK: rest,
        }
        labelled = jax.tree.structure(tree).unflatten(labels)
        return leaves, layers, optax.partition(tx, lambda _: labelled)  # a tree that could be called, it would call

    warn = warned_once()

    def init(params: PyTree) -> PyTree:
        leaves, layers, tx = routes(params)
        warn(_unread(method, leaves, kinds, otherwise))
        if is_recording():
            owners = {layer.kernel: layer for layer in layers}
            kernels = {layer.bias: layer.path for layer in layers if layer.bias is not None}
            for i, leaf in enumerate(leaves):
                if i in kernels:
                    record(leaf, state_bytes=0, method=method, axes=None, reason=f"with {kernels[i]}")
                elif i in owners:
                    layer = owners[i]
                    size = state_bytes(build([layer.among(sorted(layer.places))]), params, layer.places)
                    record(leaf, state_bytes=size, **describe(leaf), method=method, axes=leaf.axes)
                else:
                    record(leaf, state_bytes=state_bytes(rest, params, (i,)), method=FALLBACK, axes=None)
        state = tx.init(params)
        if not _marking.get():
            return state
        block_size = describe(leaves[layers[0].kernel]).get("block_size") if layers else None
        return Routed(state, tuple(leaf.path for leaf in leaves), tuple(layers), block_size)

    def update(updates: PyTree, state: PyTree, params: PyTree = None, **extra: PyTree) -> PyTree:
        # By the parameters' dtypes, as in `init`.
        leaves, _, tx = routes(updates if params is None else params)
        warn(unused(method, leaves, extra.get("statistics")))
        return tx.update(updates, state, params, **extra)

    return Freezable(init, update)


_warned: set[tuple[str, str, int]] = set()  # messages, and from where


def warned_once() -> Callable[[str | None], None]:
    """Warns of each message once, and once for a line of the user's: `optax.inject_hyperparams` makes a method anew at
    every step. What a filter makes an error of stays one.
    """
    own: set[str] = set()

    def warn(message: str | None) -> None:
        if message is None or message in own:
            return
        own.add(message)
        level = level_outside(sys._getframe())
        caller = sys._getframe(level - 1)
        place = (message, caller.f_code.co_filename, caller.f_lineno)
        if place not in _warned:
            warnings.warn(message, AxesWarning, stacklevel=level)
            _warned.add(place)

    return warn


def level_outside(frame: types.FrameType) -> int:
    """How far up from ``frame`` the first one is that is of no library here: a warning's place is the user's line."""
    level = 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in LIBRARIES:
        frame, level = frame.f_back, level + 1
    return level


def _unread(method: str, leaves: list[LeafAxes], kinds: tuple[str, ...], otherwise: str) -> str | None:
    """What to say of leaves that may be matrices of these kinds, and go to the fallback."""
    ambiguous = ambiguous_among(leaves, kinds)
    if not ambiguous:
        return None
    return (
        f"{method}: the fallback ({otherwise}) takes {how_many(ambiguous, leaves)} that may be matrices, "
        f"as names and shapes do not tell which axes are inputs: {listed(ambiguous)}. {INFERRED}. axes='strict' makes "
        "an error of this."
    )


def is_matrix(leaf: LeafAxes, kinds: tuple[str, ...]) -> bool:
    """Whether a method that takes these kinds takes this leaf."""
    return leaf.axes is not None and leaf.kind in kinds


def state_bytes(tx: optax.GradientTransformation, params: PyTree, places: tuple[int, ...]) -> int:
    """Bytes of the arrays, scalars apart, that ``tx`` keeps for these leaves of ``params``."""
    leaves, treedef = jax.tree.flatten(params)
    alone = treedef.unflatten(
        [jax.ShapeDtypeStruct(x.shape, x.dtype) if i in places else optax.MaskedNode() for i, x in enumerate(leaves)]
    )
    with paused():
        state = jax.eval_shape(tx.init, alone)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state) if x.ndim)


# What an init says of each leaf while somebody asks: the rows of a report.


class Row(NamedTuple):
    """One leaf in a report."""

    path: str
    shape: tuple[int, ...]
    method: str  # the method, "fallback", or "-" where no transformation of this package sees the leaf
    kind: str  # "matrix", "head", "embedding", "other"
    axes: MatrixAxes | None
    matrices: tuple[tuple[int, ...], ...]  # what the leaf is cut into
    state_bytes: int
    refresh_flops: int  # to renew all bases of the leaf once
    reason: str
    block_size: int | None = None
    rule: int | None = None  # of `groups`: its number, its pattern, the factor of the rate and the decay
    pattern: str = ""
    rate: float | None = None
    decay: str = ""


Rows = TypeVar("Rows", list[Row], None)
_rows: contextvars.ContextVar[list[Row] | None] = contextvars.ContextVar("rows", default=None)


@contextlib.contextmanager
def _writing(to: Rows) -> Iterator[Rows]:
    token = _rows.set(to)
    try:
        yield to
    finally:
        _rows.reset(token)


def recorded() -> contextlib.AbstractContextManager[list[Row]]:
    """The rows that inits inside write."""
    return _writing([])


def is_recording() -> bool:
    """Whether an init should write its rows."""
    return _rows.get() is not None


def record(leaf: LeafAxes, **cells: Any) -> None:
    """Write a row for ``leaf``."""
    if (rows := _rows.get()) is not None:
        defaults = {"matrices": (), "refresh_flops": 0, "reason": leaf.reason}
        rows.append(Row(path=leaf.path, shape=leaf.shape, kind=leaf.kind, **(defaults | cells)))


def record_all(rows: list[Row]) -> None:
    """Write these rows."""
    if (written := _rows.get()) is not None:
        written.extend(rows)


def record_zeros(state_bytes: int, refresh_flops: int) -> None:
    """Write a row for what there is of no leaf."""
    if (rows := _rows.get()) is not None and state_bytes:
        why = "near shapes share a program, by rows and columns of zeros"
        rows.append(Row("(zeros)", (0,), "-", "other", None, (), state_bytes, refresh_flops, why))


def paused() -> contextlib.AbstractContextManager[None]:
    """No rows from inits inside."""
    return _writing(None)
