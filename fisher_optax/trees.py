"""Trees that come from outside: told from functions."""

from collections.abc import Callable
from typing import Any

import jax


def is_function(x: Any) -> bool:
    """Whether ``x`` is to be called, and is not a tree: an Equinox or nnx module, or any node with a ``__call__``, is a
    tree though it could be called. As in `optax.masked`, a tree is a function where all of its leaves are.
    """
    leaves = jax.tree.leaves(x)
    return isinstance(x, jax.tree_util.Partial) or (callable(x) and len(leaves) > 0 and all(map(callable, leaves)))


def made(tree: Any | Callable[[Any], Any], params: Any) -> Any:
    """``tree``, or what it makes of ``params`` where it is a function."""
    return tree(params) if is_function(tree) else tree
