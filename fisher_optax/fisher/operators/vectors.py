"""Trees as vectors that a matrix, given by its entries or as an operator, multiplies."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree

from ...matrices.floats import without_rest
from ..log_density import promoted
from .operator import Operator


def size_of(F: Array | Operator) -> int:
    """D, of a D x D matrix."""
    return F.size if isinstance(F, Operator) else len(F)


def raveled(F: Array | Operator, v: PyTree) -> tuple[Array, Callable[[Array], PyTree]]:
    """A tree like the parameters, or a vector already, as a vector, and its way back. What is no floating point passes
    through, where F has no entries for it.

    Raises:
      ValueError: for a tree that F is not of.
    """
    floats, whole = (v, lambda x: x) if _fits(F, v) else without_rest(v)
    if not _fits(F, floats):
        structure, shapes = jax.tree.structure(v), [jnp.shape(x) for x in jax.tree.leaves(v)]
        raise ValueError(
            f"F wants a tree like the parameters, or a vector of {size_of(F)}; got {structure} of shapes {shapes}."
        )
    flat, unravel = ravel_pytree(jax.tree.map(promoted, floats))
    return flat, lambda x: whole(unravel(x))


def _fits(F: Array | Operator, v: PyTree) -> bool:
    leaves, structure = jax.tree.flatten(v)
    shapes = [jnp.shape(x) for x in leaves]
    if isinstance(F, Operator) and shapes != [(F.size,)]:
        return structure == F.structure and shapes == [x.shape for x in F.leaves]
    return sum(map(math.prod, shapes)) == size_of(F)
