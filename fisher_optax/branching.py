"""`lax.cond` and `lax.switch` that pick in Python where the choice is known, so that calls outside `jit` compile
nothing anew.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.core import Tracer
from jaxtyping import Array


def branch(choice: Array, yes: Callable[..., Any], no: Callable[..., Any], *operands: Any) -> Any:
    """``yes(*operands)`` or ``no(*operands)``."""
    if isinstance(choice, Tracer):
        return jax.lax.cond(choice, yes, no, *operands)
    return (yes if choice else no)(*operands)


def switch(index: Array, branches: Sequence[Callable[..., Any]], *operands: Any) -> Any:
    """``branches[index](*operands)``."""
    if isinstance(index, Tracer):
        return jax.lax.switch(index, branches, *operands)
    return branches[int(index)](*operands)
