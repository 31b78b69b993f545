"""One layer, or a part, pruned by one method: what it is told, what it returns, and what that did to the outputs."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree

from ..matrix.checking import kernel
from ..matrix.masks import ReadSparsity
from ..matrix.pruned import output_error
from .calibration import Mask, finite, gradient_summary, input_gram
from .methods import Method
from .pieces import Layer, Piece
from .reports import PrunedLayer


class Calibration(NamedTuple):
    """Where a method's knowledge comes from."""

    apply_fn: Callable[..., PyTree]
    loss_fn: Callable[..., Array] | None
    batches: Iterable[PyTree] | None  # None: no data, of which no method is told and no error is measured
    mask: Mask
    fisher: list[ArrayLike | None] | None  # leaves
    upper: list[ArrayLike | None] | None


def second_moments(data: Calibration, params: PyTree, layer: Layer) -> Array | None:
    """Those of a layer's inputs; None without data."""
    return None if data.batches is None else input_gram(data.apply_fn, params, data.batches, layer, data.mask)


def knowledge(
    method: Method, data: Calibration, params: PyTree, piece: Piece, H: Array | None
) -> tuple[Iterable[tuple[PyTree, ...]], str]:
    """What the method is told of each of these matrices besides its weights, and what the data say nothing of; H is of
    the layer's inputs.
    """
    if method.needs == "weights":
        return [()] * len(piece.members), ""
    if method.needs == "inputs":
        assert H is not None
        return _moments(piece, finite(H, piece.layer)), ""
    if method.needs == "fisher":
        F = _read("fisher", data.fisher, piece)
        # A frozen matrix may matter as much as any: its weights go by size.
        dead = np.asarray(jnp.all(F == 0, (-2, -1)))
        note = f"the Fisher is 0 of {piece.where(dead)}" if dead.any() else ""
        return [(jnp.ones_like(x) if d else x,) for x, d in zip(F, dead, strict=True)], note
    assert callable(method.needs)
    assert data.loss_fn is not None
    assert data.batches is not None
    summaries, dead = gradient_summary(data.loss_fn, params, data.batches, piece, method.needs)
    return [(x,) for x in summaries], f"no gradient has reached {piece.where(dead)}" if dead.any() else ""


def _moments(piece: Piece, H: Array) -> Iterator[tuple[Array]]:
    """Of each matrix's inputs, made when they are asked for."""
    for i, is_dead in enumerate(unreached(H, piece)):
        moment = piece.moment(H, i)
        # Where nothing is known of the inputs they count as independent and of one size.
        yield (jnp.eye(len(moment), dtype=moment.dtype) if is_dead else moment,)


def _read(name: str, leaves: list[ArrayLike | None] | None, piece: Piece) -> Array:
    leaf = None if leaves is None else leaves[piece.layer.leaf]
    if leaf is None:
        raise ValueError(f"{name}= has nothing for {piece.name!r}: leave it out by layers=.")
    return piece.read(jnp.asarray(leaf))


def unreached(H: Array, piece: Piece) -> np.ndarray:
    """Which matrices have had no input but 0."""
    return np.asarray(jnp.all(piece.input_sizes(H) == 0, -1))


def _note(piece: Piece, H: Array | None, of_method: str) -> str:
    """What a report adds to a piece's figures."""
    notes = [note for note in (of_method, piece.layer.note) if note]
    dead = np.zeros(1, bool) if H is None else unreached(H, piece)
    if dead.any():
        notes.insert(0, f"no input has reached {piece.where(dead)}")
    return "; ".join(notes)


def prune_piece(
    method: Method,
    data: Calibration,
    params: PyTree,
    piece: Piece,
    leaf: Array,
    H: Array | None,
    sparsity: ReadSparsity,
    stays: Array | None,
) -> tuple[Array, Array, PrunedLayer]:
    """New matrices, their masks and what is said of them but seconds; H is of the layer's inputs."""
    W = kernel(f"{method.name} on {piece.name!r}", piece.read(leaf))
    note = ""
    if stays is not None:
        new, mask, damping = jnp.where(stays, W, 0), stays, None
    else:
        known, note = knowledge(method, data, params, piece, H)
        ends = [{}] * len(W) if data.upper is None else [{"upper": x} for x in _read("upper", data.upper, piece)]
        each, masks, dampings = zip(*_matrices(method, piece, W, known, ends, sparsity), strict=True)
        new, mask = jnp.stack(each), jnp.stack(masks)
        damping = max((x for x in dampings if x is not None), default=None)
    error, whole, dead = math.nan, math.nan, None
    if H is not None:
        error, whole = (_output_error(piece, W, x, H) for x in (new, jnp.zeros_like(W)))
        dead = int(jnp.sum(piece.input_sizes(H) == 0))
    row = PrunedLayer(
        piece.name,
        piece.shape,
        piece.size,
        piece.size - int(jnp.sum(mask)),
        error,
        error / whole if whole != 0 else 0.0,
        dead,
        damping,
        0.0,
        _note(piece, H, note),
    )
    return new, mask, row


def _output_error(piece: Piece, W: Array, new: Array, H: Array) -> float:
    return sum(float(output_error(w, x, piece.moment(H, i))) for i, (w, x) in enumerate(zip(W, new, strict=True)))


def _matrices(
    method: Method,
    piece: Piece,
    W: Array,
    known: Iterable[tuple[PyTree, ...]],
    ends: Iterable[dict[str, Array]],
    sparsity: ReadSparsity,
) -> Iterator[tuple[Array, Array, float | None]]:
    """New weights, mask and damping of each matrix."""
    for w, X, upper in zip(W, known, ends, strict=True):
        new, mask, *rest = method.prune(w, *X, sparsity, **upper)
        damping = float(rest[0]) if rest else None
        if jnp.shape(new) != w.shape or jnp.shape(mask) != w.shape or not bool(jnp.isfinite(new).all()):
            raise ValueError(
                f"{method.name} on {piece.name!r}, {piece.shape[0]} inputs by {piece.shape[1]} outputs, returned "
                f"weights of {jnp.shape(new)}, finite: {bool(jnp.isfinite(new).all())}, and a mask of "
                f"{jnp.shape(mask)}. Its matrix cannot be inverted at any damping tried, or it is no such method."
            )
        if damping is not None and method.damping is not None and damping > method.damping * (1 + 1e-5):
            warnings.warn(
                f"{piece.name!r}: its matrix was not positive definite at damping {method.damping:g}, which was raised "
                f"to {damping:g}. More calibration data, or a larger damping=, avoids this.",
                stacklevel=5,
            )
        yield jnp.asarray(new), jnp.asarray(mask, bool), damping
