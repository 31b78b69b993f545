"""One layer pruned by one method: what the method is told, what it returns, and what that did to the outputs."""

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from ..matrix.checking import kernel
from ..matrix.pruned import output_error
from .calibration import gradient_summary, input_gram
from .layers import Layer
from .methods import Method
from .reports import PrunedLayer


class Calibration(NamedTuple):
    """Where a method's knowledge comes from."""

    apply_fn: Callable[..., Any]
    loss_fn: Callable[..., Any] | None
    batches: Iterable[Any]
    mask: Any
    fisher: list[Any] | None  # leaves
    upper: list[Any] | None


def knowledge(method: Method, data: Calibration, params: Any, layer: Layer, H: Array) -> list[tuple[Any, ...]]:
    """What the method is told of each of a layer's matrices besides its weights."""
    if method.needs == "weights":
        return [()] * len(layer.members)
    if method.needs == "inputs":
        return [(one,) for one in H]
    if method.needs == "fisher":
        return [(one,) for one in _read("fisher", data.fisher, layer)]
    assert data.loss_fn is not None
    return [(one,) for one in gradient_summary(data.loss_fn, params, data.batches, layer, method.needs)]


def _read(name: str, leaves: list[Any] | None, layer: Layer) -> Array:
    if leaves is None or leaves[layer.leaf] is None:
        raise ValueError(f"{name}= has nothing for {layer.name!r}: leave it out by layers=.")
    return layer.read(jnp.asarray(leaves[layer.leaf]))


def prune_layer(
    method: Method, data: Calibration, params: Any, layer: Layer, leaf: Array, sparsity: Any, stays: Any
) -> tuple[Array, Array, PrunedLayer]:
    began = time.perf_counter()
    W = kernel(f"{method.name} on {layer.name!r}", layer.read(leaf))
    H = input_gram(data.apply_fn, params, data.batches, layer, data.mask)
    if stays is not None:
        new, kept, damping = jnp.where(stays, W, 0), stays, None
    else:
        known = knowledge(method, data, params, layer, H)
        ends = [{}] * len(W) if data.upper is None else [{"upper": x} for x in _read("upper", data.upper, layer)]
        each, masks, dampings = zip(*_pieces(method, layer, W, known, ends, sparsity), strict=True)
        new, kept = jnp.stack(each), jnp.stack(masks)
        damping = max((x for x in dampings if x is not None), default=None)
    error, whole = (float(jnp.sum(output_error(W, x, H))) for x in (new, jnp.zeros_like(W)))
    dead = int(jnp.sum(jnp.diagonal(H, axis1=-2, axis2=-1) == 0))
    row = PrunedLayer(
        layer.name,
        layer.shape,
        layer.size,
        layer.size - int(jnp.sum(kept)),
        error,
        error / whole if whole > 0 else 0.0,
        dead,
        damping,
        time.perf_counter() - began,
    )
    return new, kept, row


def _pieces(
    method: Method, layer: Layer, W: Array, known: Sequence[tuple[Any, ...]], ends: Sequence[Any], sparsity: Any
) -> Iterator[tuple[Array, Array, float | None]]:
    """New weights, mask and damping of each matrix."""
    for w, X, upper in zip(W, known, ends, strict=True):
        new, kept, *rest = method.prune(w, *X, sparsity, **upper)
        damping = float(rest[0]) if rest else None
        if jnp.shape(new) != w.shape or jnp.shape(kept) != w.shape or not bool(jnp.isfinite(new).all()):
            raise ValueError(
                f"{method.name} on {layer.name!r}, {layer.shape[0]} inputs by {layer.shape[1]} outputs, returned "
                f"weights of {jnp.shape(new)}, finite: {bool(jnp.isfinite(new).all())}, and a mask of "
                f"{jnp.shape(kept)}. Its matrix cannot be inverted at any damping tried, or it is no such method."
            )
        if damping is not None and method.damping is not None and damping > method.damping * (1 + 1e-5):
            warnings.warn(
                f"{layer.name!r}: its matrix was not positive definite at damping {method.damping:g}, which was raised "
                f"to {damping:g}. More calibration data, or a larger damping=, avoids this.",
                stacklevel=4,
            )
        yield jnp.asarray(new), jnp.asarray(kept, bool), damping
