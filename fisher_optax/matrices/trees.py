"""Trees that come from outside: told from functions, and read leaf by leaf as arrays."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .axes import path_names


def is_function(x: Any) -> bool:
    """Whether ``x`` is to be called, and is not a tree: an Equinox or nnx module, or any node with a ``__call__``, is a
    tree though it could be called. As in `optax.masked`, a tree is a function where all of its leaves are.
    """
    leaves = jax.tree.leaves(x)
    return isinstance(x, jax.tree_util.Partial) or (callable(x) and len(leaves) > 0 and all(map(callable, leaves)))


def made(tree: Any | Callable[[Any], Any], params: Any) -> Any:
    """``tree``, or what it makes of ``params`` where it is a function."""
    return tree(params) if is_function(tree) else tree


def arrays(tree: Any) -> Any:
    """``tree`` with an array for each leaf: numbers become arrays, and float8 and float4, which JAX promotes to no
    other type, are cast to float32. Every `jax.ShapeDtypeStruct` stays one.

    Raises ``TypeError`` for a leaf that is neither an array nor a number, and for the gradient of an integer.
    """
    return jax.tree_util.tree_map_with_path(_array, tree)


def shapes(tree: Any) -> Any:
    """The shape and the dtype of each leaf, numbers included. Raises as `arrays`."""

    def one(path: Any, x: Any) -> jax.ShapeDtypeStruct:
        x = x if hasattr(x, "dtype") else _array(path, x)
        return jax.ShapeDtypeStruct(x.shape, x.dtype)

    return jax.tree_util.tree_map_with_path(one, tree)


def step_dtype(dtype: Any) -> Any:
    """The dtype of the update for a gradient of this dtype: its own, or for whole numbers that of a Python float."""
    return dtype if jnp.issubdtype(dtype, jnp.inexact) else jnp.result_type(float)


def floating(x: Any) -> jax.Array:
    """An array or a number as an array in its `step_dtype`."""
    return jnp.asarray(x, step_dtype(jnp.result_type(x)))


def wide_dtype(dtype: Any) -> Any:
    """float32 for a type that JAX promotes to no other, float8 and float4; any other as it is."""
    return jnp.float32 if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits <= 8 else dtype


def _array(path: Any, x: Any) -> Any:
    if not isinstance(x, jax.Array | jax.ShapeDtypeStruct):
        if getattr(x, "dtype", None) == jax.dtypes.float0:
            raise TypeError(
                f"the gradient of {_named(path)} is float0, which jax.grad(allow_int=True) gives for an integer: give "
                "the optimizer the floating-point parameters alone, as by optax.masked or eqx.partition."
            )
        try:
            x = jnp.asarray(x, jnp.result_type(x))  # a Python number's own dtype, but not weak
        except TypeError:
            raise TypeError(
                f"{_named(path)} is {type(x).__name__}, no array and no number: pass arrays alone, as "
                "eqx.filter(model, eqx.is_array) gives them."
            ) from None
    wide = wide_dtype(x.dtype)
    if wide == x.dtype:
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, wide, sharding=x.sharding)
    return x.astype(wide)


def _named(path: Any) -> str:
    return repr("/".join(path_names(path)))
