"""`lax.cond` that picks in Python where the choice is known, so that calls outside `jit` compile nothing anew."""

from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer
from jaxtyping import Array


def branch(choice: Array, yes: Callable[..., Any], no: Callable[..., Any], *operands: Any) -> Any:
    """``yes(*operands)`` or ``no(*operands)``."""
    if isinstance(choice, Tracer):
        return jax.lax.cond(choice, yes, no, *operands)
    return (yes if choice else no)(*operands)
