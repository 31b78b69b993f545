"""Muon's application: the polar factor of each matrix, all matrices of one shape together."""

import math
from collections.abc import Sequence
from types import NoneType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .. import linalg
from ..sharding import spread
from ..types import Application, Moments

# Measured on the char-GPT trees: on a CPU a loop over the stack is faster than batched products, whose small members leave the cores waiting; accelerators batch.
MAPPED_PLATFORMS = ("cpu",)


def orthogonal(
    polynomial: Sequence[tuple[float, float, float]] | None = None,
    scale: str | float = 1.0,
    *,
    method: str = "auto",
    dtype: Any = None,
    max_stack: int = 256,
    mesh_axis: str | None = None,
) -> Application:
    """``U = scale(m, n) · polar(G)``, the polar factor by a Newton-Schulz iteration.

    Args:
      polynomial: coefficients (a, b, c) of each step, default `fo.polar_express()`.
      scale: "match_rms_adamw" ``0.2 sqrt(max(m, n))``, "shape" ``sqrt(max(1, n/m))``, "unit_rms" ``sqrt(n/m)``, or a number.
      method: "direct", "gram", or "auto": whichever takes fewer flops for the shape.
      dtype: what the iteration runs in, default float32 at least.
      max_stack: at most so many matrices of one shape are stacked into one batched iteration; larger stacks gain nothing and cost memory.
      mesh_axis: spread each stack over this axis of the mesh in scope, so that every device orthogonalises its share.

    Raises:
      ValueError: for an unknown scale, or a polynomial that is no sequence of triples.
    """
    coefficients = linalg.polar_express() if polynomial is None else linalg.as_polynomial(polynomial)
    shape_scale(scale, 1, 1)

    def each(X: Float[Array, "m n"]) -> Float[Array, "m n"]:
        return linalg.orthogonalize(X, coefficients, method=method, dtype=dtype)

    def stack(X: Float[Array, "N m n"]) -> Float[Array, "N m n"]:
        if mesh_axis is not None:
            return spread(lambda share: jax.lax.map(each, share), mesh_axis, X)
        if jax.default_backend() in MAPPED_PLATFORMS:
            return jax.lax.map(each, X)
        return jnp.concatenate([each(X[i : i + max_stack]) for i in range(0, len(X), max_stack)])

    def update(G: Any, state: Any, bases: Any, **extra: Any) -> tuple[Any, Any]:
        leaves, treedef = jax.tree.flatten(G)
        polar = by_shape(lambda X: shape_scale(scale, *X.shape[-2:]) * (each(X) if X.ndim == 2 else stack(X)), leaves)
        return treedef.unflatten(polar), state

    empty = Moments((), ())
    return Application("orthogonal", (NoneType,), lambda params: (), update, lambda state: empty, lambda state, moments: state)


def shape_scale(scale: str | float, m: int, n: int) -> Any:
    """The factor in front of the polar factor of an ``m x n`` (in x out) matrix."""
    if not isinstance(scale, str):
        return scale
    scales = {"match_rms_adamw": 0.2 * math.sqrt(max(m, n)), "shape": math.sqrt(max(1.0, n / m)), "unit_rms": math.sqrt(n / m)}
    if scale not in scales:
        raise ValueError(f"scale must be a number or one of {', '.join(map(repr, scales))}; got {scale!r}.")
    return scales[scale]


def by_shape(f: Any, leaves: list[Array]) -> list[Array]:
    """``f`` on stacks of all the leaves of one matrix shape and dtype; a matrix alone of its shape goes unstacked."""
    groups: dict[Any, list[int]] = {}
    for i, x in enumerate(leaves):
        groups.setdefault((x.shape[-2:], x.dtype), []).append(i)
    out: list[Any] = [None] * len(leaves)
    for indices in groups.values():
        if len(indices) == 1:
            out[indices[0]] = f(leaves[indices[0]])
            continue
        counts = [len(leaves[i]) if leaves[i].ndim == 3 else 1 for i in indices]
        results = f(jnp.concatenate([leaves[i].reshape(-1, *leaves[i].shape[-2:]) for i in indices]))
        starts = [sum(counts[:k]) for k in range(len(counts))]
        for i, start, count in zip(indices, starts, counts, strict=True):
            out[i] = results[start : start + count].reshape(leaves[i].shape)
    return out
