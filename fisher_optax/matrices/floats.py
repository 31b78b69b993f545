"""What is no floating-point parameter: counters, masks and the states of random numbers pass through as they are."""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import PyTree

OfParams: TypeAlias = Callable[..., PyTree]


def is_floating(x: ArrayLike | jax.ShapeDtypeStruct) -> bool:
    """Whether a leaf has gradients."""
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def without_rest(params: PyTree) -> tuple[PyTree, Callable[[PyTree], PyTree]]:
    """The floating-point leaves, with None for the others, and what puts those back.

    >>> floats, whole = without_rest({"w": 1.5, "steps": 3})
    >>> floats, whole({"w": 0.0, "steps": None})
    ({'steps': None, 'w': 1.5}, {'steps': 3, 'w': 0.0})
    """
    leaves, structure = jax.tree.flatten(params)
    own = list(map(is_floating, leaves))
    if all(own):
        return params, lambda tree: tree

    def whole(tree: PyTree) -> PyTree:
        found = structure.flatten_up_to(tree)
        return structure.unflatten([x if is_own else rest for x, rest, is_own in zip(found, leaves, own, strict=True)])

    return structure.unflatten([x if is_own else None for x, is_own in zip(leaves, own, strict=True)]), whole


def on_whole(f: OfParams, params: PyTree, whole: Callable[[PyTree], PyTree]) -> OfParams:
    """``f`` of the floating-point leaves alone; where ``params`` has no others, f itself, which `jit` knows again."""
    if all(map(is_floating, jax.tree.leaves(params))):
        return f
    return lambda floats, *args: f(whole(floats), *args)


def with_rest_apart(f: OfParams, params: PyTree) -> tuple[OfParams, PyTree, tuple[PyTree, ...]]:
    """``f`` of the floating-point leaves and, as an argument before its own, of the others, which may be shapes alone;
    where ``params`` has no others, f and no such argument.
    """
    leaves, structure = jax.tree.flatten(params)
    if all(map(is_floating, leaves)):
        return f, params, ()
    rest = [None if is_floating(x) else x for x in leaves]

    def of_floats(floats: PyTree, rest: list[PyTree], *args: PyTree, **kwargs: PyTree) -> PyTree:
        found = structure.flatten_up_to(floats)
        return f(
            structure.unflatten([x if y is None else y for x, y in zip(found, rest, strict=True)]), *args, **kwargs
        )

    return of_floats, without_rest(params)[0], (rest,)
