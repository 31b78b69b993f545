"""What the kinds of statistics share: how sums of several taps are put together."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array

from ...matrices.axes import wide_dtype


def accumulator(*dtypes: DTypeLike) -> jnp.dtype:
    """The dtype of sums: float32 at least."""
    return jnp.result_type(jnp.float32, *map(wide_dtype, dtypes))


def joined(xs: Sequence[Array], axis: int | None) -> Array:
    """What several products with one parameter saw: rows after one another along ``axis``, or without one the sum."""
    return sum(xs[1:], xs[0]) if axis is None else jnp.concatenate(xs, axis)


def times(x: Array, scale: ArrayLike) -> Array:
    """``x`` times a number, or one for each matrix of a stack."""
    scale = jnp.asarray(scale, x.dtype)
    return x * scale.reshape(*scale.shape, *[1] * (x.ndim - scale.ndim))


def check_counts(name: str, **counts: object) -> None:
    """Raises ``ValueError`` for an option that is neither None nor an integer of at least 1."""
    for option, value in counts.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}: {option} must be an integer of at least 1; got {value!r}.")
