"""What the Fishers of a head take, checked: tokens and their weights, right sides, damping, numbers of rows."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from ...linalg.sketching import exact_sum

SKETCHES = ("subsample", "frequent_directions")


def tokens_and_weights(name: str, what: str, x: Any, weights: Any) -> tuple[Float[Array, "T V"], Float[Array, " T"]]:
    """One row a token, in float32 at least, and weights >= 0."""
    shape = jnp.shape(x)
    given = shape[:-1] if weights is None else jnp.shape(weights)
    if not shape or given != shape[:-1]:
        raise ValueError(
            f"{name}: got {what} {shape}, weights {given}; wanted (*positions, vocabulary) and (*positions,)."
        )
    if weights is None:
        weights = jnp.ones(given)
    elif not isinstance(weights, Tracer) and len(wrong := np.asarray(weights)[~_usable(np.asarray(weights))]):
        raise ValueError(f"{name}: weights must be finite and at least 0; got {wrong[0]}. Leave tokens out by 0.")
    return _flat(jnp.asarray(x), jnp.asarray(weights))


@jax.jit
def _flat(x: Array, w: Array) -> tuple[Array, Array]:
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return x.reshape(-1, x.shape[-1]).astype(dtype), jnp.where(_usable(w), w, 0).reshape(-1).astype(dtype)


def _usable(w: Any) -> Any:
    return (w >= 0) & (w < np.inf)


@jax.jit
def finite_rows(x: Float[Array, "T V"], w: Float[Array, " T"]) -> tuple[Float[Array, "T V"], Float[Array, " T"]]:
    """Rows of weight 0, or that are not finite, as zeros of weight 0."""
    there = (w > 0) & jnp.all(jnp.isfinite(x), -1)
    return jnp.where(there[:, None], x, 0), jnp.where(there, w, 0)


@jax.jit
def probabilities(z: Float[Array, "T V"], w: Float[Array, " T"]) -> tuple[Float[Array, "T V"], Float[Array, " T"]]:
    """`finite_rows` of the softmax of logits."""
    return finite_rows(jax.nn.softmax(z), w)


@jax.jit
def shares(w: Float[Array, " T"]) -> Float[Array, " T"]:
    """``w / Σ w``; zeros where all are 0."""
    W = jnp.sum(w)
    return w / jnp.where(W > 0, W, 1)


def check_counted(name: str, total: Array) -> None:
    """A ValueError for a total weight known to be 0."""
    if not isinstance(total, Tracer) and float(total) == 0:
        raise ValueError(f"{name}: no token counts; wanted one of weight above 0 whose numbers are finite.")


@jax.jit
def complement(p: Float[Array, "T V"]) -> Float[Array, "T V"]:
    """``1 - p`` to rounding: of a word all but certain, the sum of the others."""
    likely = p > 0.5
    others = exact_sum(jnp.where(likely, 0, p), -1)
    return jnp.where(likely, others[:, None], 1 - p)


def columns(name: str, Y: Any, rows: Float[Array, "r V"], f: Callable[[Array], Array]) -> Array:
    """``f`` of Y as a matrix; Y of ``(V, features)`` or ``(V,)``."""
    Y, V = jnp.asarray(Y), rows.shape[-1]
    if Y.ndim not in (1, 2) or len(Y) != V:
        raise ValueError(f"{name}: got Y of shape {Y.shape}; wanted ({V}, features) or ({V},).")
    return f(Y.reshape(V, -1).astype(jnp.promote_types(Y.dtype, rows.dtype))).reshape(Y.shape)


def damping_of(name: str, damping: Any, dtype: Any) -> Float[Array, ""]:
    """λ > 0 as an array."""
    λ = jnp.asarray(damping, dtype)
    if λ.ndim or (not isinstance(λ, Tracer) and not 0 < float(λ) < np.inf):
        raise ValueError(f"{name}: damping must be one finite number above 0; got {damping!r}.")
    return jnp.maximum(λ, jnp.finfo(dtype).tiny)


def check_sketch(name: str, max_rows: Any, sketch: str) -> None:
    """A ValueError for what `compress` does not know."""
    if sketch not in SKETCHES:
        raise ValueError(f"{name}: sketch must be one of {', '.join(map(repr, SKETCHES))}; got {sketch!r}.")
    if max_rows is not None and (isinstance(max_rows, bool) or not isinstance(max_rows, int) or max_rows < 1):
        raise ValueError(f"{name}: max_rows must be None or an integer of at least 1; got {max_rows!r}.")


def check_vocabularies(name: str, ours: int, theirs: int) -> None:
    """A ValueError unless they are the same."""
    if ours != theirs:
        raise ValueError(f"{name}.merge: got vocabularies of {ours} and {theirs} words; wanted the same.")
