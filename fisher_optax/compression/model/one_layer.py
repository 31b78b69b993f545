"""One layer pruned by one method: what the method is told, what it returns, and what that did to the outputs."""

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree

from ..matrix.checking import kernel
from ..matrix.masks import ReadSparsity
from ..matrix.pruned import output_error
from .calibration import Mask, finite, gradient_summary, input_gram
from .layers import Layer
from .methods import Method
from .reports import PrunedLayer
from .uses import places


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
    method: Method, data: Calibration, params: PyTree, layer: Layer, H: Array | None
) -> list[tuple[PyTree, ...]]:
    """What the method is told of each of a layer's matrices besides its weights."""
    if method.needs == "weights":
        return [()] * len(layer.members)
    if method.needs == "inputs":
        assert H is not None
        # Where nothing is known of the inputs they count as independent and of one size.
        return [
            (jnp.eye(len(moment), dtype=moment.dtype) if dead else moment,)
            for moment, dead in zip(finite(H, layer), unreached(H), strict=True)
        ]
    if method.needs == "fisher":
        return [(F,) for F in _read("fisher", data.fisher, layer)]
    assert callable(method.needs)
    assert data.loss_fn is not None
    assert data.batches is not None
    return [(summary,) for summary in gradient_summary(data.loss_fn, params, data.batches, layer, method.needs)]


def _read(name: str, leaves: list[ArrayLike | None] | None, layer: Layer) -> Array:
    if leaves is None or leaves[layer.leaf] is None:
        raise ValueError(f"{name}= has nothing for {layer.name!r}: leave it out by layers=.")
    return layer.read(jnp.asarray(leaves[layer.leaf]))


def unreached(H: Array) -> np.ndarray:
    """Which of a layer's matrices have had no input but 0."""
    return np.asarray(jnp.all(jnp.diagonal(H, axis1=-2, axis2=-1) == 0, -1))


def _note(layer: Layer, leaf: Array, H: Array | None) -> str:
    """What a report adds to a layer's figures."""
    notes = [layer.note] if layer.note else []
    dead = np.zeros(1, bool) if H is None else unreached(H)
    if dead.any():
        stack = tuple(leaf.shape[a] for a in layer.axes.batch)
        where = "it" if dead.all() else places(layer.members[dead], stack)
        notes.insert(0, f"no input has reached {where}")
    return "; ".join(notes)


def prune_layer(
    method: Method,
    data: Calibration,
    params: PyTree,
    layer: Layer,
    leaf: Array,
    sparsity: ReadSparsity,
    stays: Array | None,
) -> tuple[Array, Array, PrunedLayer]:
    began = time.perf_counter()
    W = kernel(f"{method.name} on {layer.name!r}", layer.read(leaf))
    H = second_moments(data, params, layer)
    if stays is not None:
        new, mask, damping = jnp.where(stays, W, 0), stays, None
    else:
        known = knowledge(method, data, params, layer, H)
        ends = [{}] * len(W) if data.upper is None else [{"upper": x} for x in _read("upper", data.upper, layer)]
        pieces = _pieces(method, layer, W, known, ends, sparsity)
        each, masks, dampings = zip(*pieces, strict=True)
        new, mask = jnp.stack(each), jnp.stack(masks)
        damping = max((x for x in dampings if x is not None), default=None)
    error, whole, dead = math.nan, math.nan, None
    if H is not None:
        error, whole = (float(jnp.sum(output_error(W, x, H))) for x in (new, jnp.zeros_like(W)))
        dead = int(jnp.sum(jnp.diagonal(H, axis1=-2, axis2=-1) == 0))
    row = PrunedLayer(
        layer.name,
        layer.shape,
        layer.size,
        layer.size - int(jnp.sum(mask)),
        error,
        error / whole if whole != 0 else 0.0,
        dead,
        damping,
        time.perf_counter() - began,
        _note(layer, leaf, H),
    )
    return new, mask, row


def _pieces(
    method: Method,
    layer: Layer,
    W: Array,
    known: Sequence[tuple[PyTree, ...]],
    ends: Sequence[dict[str, Array]],
    sparsity: ReadSparsity,
) -> Iterator[tuple[Array, Array, float | None]]:
    """New weights, mask and damping of each matrix."""
    for w, X, upper in zip(W, known, ends, strict=True):
        new, mask, *rest = method.prune(w, *X, sparsity, **upper)
        damping = float(rest[0]) if rest else None
        if jnp.shape(new) != w.shape or jnp.shape(mask) != w.shape or not bool(jnp.isfinite(new).all()):
            raise ValueError(
                f"{method.name} on {layer.name!r}, {layer.shape[0]} inputs by {layer.shape[1]} outputs, returned "
                f"weights of {jnp.shape(new)}, finite: {bool(jnp.isfinite(new).all())}, and a mask of "
                f"{jnp.shape(mask)}. Its matrix cannot be inverted at any damping tried, or it is no such method."
            )
        if damping is not None and method.damping is not None and damping > method.damping * (1 + 1e-5):
            warnings.warn(
                f"{layer.name!r}: its matrix was not positive definite at damping {method.damping:g}, which was raised "
                f"to {damping:g}. More calibration data, or a larger damping=, avoids this.",
                stacklevel=4,
            )
        yield jnp.asarray(new), jnp.asarray(mask, bool), damping
