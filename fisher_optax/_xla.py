"""Choices that are made in Python where they can be, and hidden from the compiler where that spares work."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool


def branch(choice: Array | bool, yes: Callable[..., Any], no: Callable[..., Any], *operands: Any) -> Any:
    """``yes(*operands)`` or ``no(*operands)``: `jax.lax.cond`, but calls outside `jit` compile nothing anew."""
    if isinstance(choice, Tracer):
        return jax.lax.cond(choice, yes, no, *operands)
    return (yes if choice else no)(*operands)


def select(choice: Array | None, yes: Any, no: Any) -> Any:
    """``yes`` (for None, too) or ``no``, two trees of one structure.

    Unlike a conditional, which copies all that it returns, this is one pass that XLA fuses with what made the arrays.
    """
    if choice is None:
        return yes
    return jax.tree.map(lambda a, b: a if a is b else jax.lax.select(choice, a, b), yes, no)


def materialized(choice: Bool[Array, ""], count: Array) -> Bool[Array, ""]:
    """``choice``, as a conditional's result: XLA computes a scalar of scalars anew in every kernel that reads it, for
    each entry. ``count`` is any counter from 0 on; the branches compare as loops do, and share their kernel.
    """
    return jax.lax.cond(choice, lambda n: n < jnp.iinfo(n.dtype).max, lambda n: n < 0, count)


def dynamic_indices(n: int, choice: Array) -> Sequence[Any]:
    """0 to n - 1 where ``choice`` is true, as results of the program and not as constants: slices that differ by such a
    number alone become one kernel, where constants make a kernel each, to be compiled on its own.
    """
    if not isinstance(choice, Tracer):
        return range(n)
    known, other = (tuple(jnp.asarray(i * j, jnp.int32) for i in range(n)) for j in (1, 0))
    return jax.lax.cond(choice, lambda: known, lambda: other)


def sequenced_after(done: Any, values: Any, count: Array) -> Any:
    """The arrays ``values``, but not before those of ``done`` are there: what is made of them may then overwrite what
    these were made of, and use the memory that they no longer need. ``count`` is any counter from 0 on.
    """
    if not any(isinstance(x, Tracer) for x in jax.tree.leaves(done)):
        return values
    below = functools.reduce(jnp.logical_or, [x[(0,) * x.ndim].real < 0 for x in jax.tree.leaves(done)])
    there = below | (count >= 0)  # true, but the compiler cannot know
    return jax.tree.map(lambda x: jax.lax.select(there, x, jnp.zeros_like(x)), values)
