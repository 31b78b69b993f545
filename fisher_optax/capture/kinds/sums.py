"""What the kinds of statistics share: what a tap sees, and how sums of several taps are put together."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from ...matrices.axes import wide_dtype


class Seen(NamedTuple):
    """What a tap sees: a layer's input and output gradient, and what it was given."""

    x: Array
    delta: Any
    mask: Any  # of the positions that count, or None
    bases: Any  # (Q_A, Q_B), or None
    devices: int = 1  # whose sums are added up
    device: Any = 0  # the number of this one


def accumulator(*dtypes: Any) -> Any:
    """The dtype of sums: float32 at least."""
    return jnp.result_type(jnp.float32, *map(wide_dtype, dtypes))


def joined(xs: Sequence[Array], axis: int | None) -> Array:
    """What several products with one parameter saw: rows after one another along ``axis``, or without one the sum."""
    return sum(xs[1:], xs[0]) if axis is None else jnp.concatenate(xs, axis)


def times(x: Array, scale: Any) -> Array:
    """``x`` times a number, or one for each matrix of a stack."""
    scale = jnp.asarray(scale, x.dtype)
    return x * scale.reshape(*scale.shape, *[1] * (x.ndim - scale.ndim))


def check_counts(name: str, **counts: Any) -> None:
    """Raises ``ValueError`` for an option that is neither None nor an integer of at least 1."""
    for option, value in counts.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}: {option} must be an integer of at least 1; got {value!r}.")
