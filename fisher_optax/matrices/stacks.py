"""One function of one matrix, over a stack of them: as a loop in place, or as a batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Int

from .._xla import Platform, by_platform

# One(overwritten, copied, read) -> (overwritten, copied), of one matrix.
One = Callable[[Any, Any, Any], tuple[Any, Any]]


def over_stack(
    one: One,
    overwritten: Any,
    copied: Any,
    read: Any,
    *,
    max_stack: int,
    grouped: bool = False,
) -> tuple[Any, Any]:
    """``one`` of every matrix of the stack: trees of arrays, each with the stack along its leading axis.

    Args:
      one: of a matrix: what is overwritten and what is copied, and what else it reads; gives the new ones of the two,
        with the latter whatever else it makes.
      overwritten: large arrays, which a loop writes in place.
      copied: the rest that changes. It goes from one stack to another: XLA fuses reading and writing it, and would copy
        a stack that is both, once for each of its members.
      read: what does not change.
      max_stack: how many go in one batch, at most.
      grouped: whether a CPU may take several at once, too.
    """
    everything = (overwritten, copied, read)
    largest = max(jax.tree.leaves(everything), key=lambda x: x.size)
    N = len(largest)
    if not isinstance(largest, Tracer) or N == 1:
        results = [one(*jax.tree.map(lambda x: x[i], everything)) for i in range(N)]  # noqa: B023
        return jax.tree.map(lambda *xs: jnp.stack(xs), *results)

    def loop(at_once: int, *stacks: Any) -> tuple[Any, Any]:
        if at_once == 1:
            return _in_place(one, *stacks)
        groups = jax.tree.map(lambda x: x.reshape(-1, at_once, *x.shape[1:]), stacks)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), _in_place(jax.vmap(one), *groups))

    def at_once(platform: Platform) -> int:
        if platform.numbers_at_once is None:
            return next((k for k in platform.matrices_at_once if grouped and N % k == 0), 1)
        most = min(max_stack, platform.numbers_at_once * N // max(largest.size, 1), N)
        return next((k for k in range(most, 0, -1) if N % k == 0), 1)

    return by_platform(loop, at_once, *everything)


def _in_place(one: One, overwritten: Any, copied: Any, read: Any) -> tuple[Any, Any]:
    def body(carry: Any, member: Any) -> Any:
        i, stacks = carry
        new, results = one(member_of(stacks, i), member, member_of(read, i))
        return (i + 1, put(stacks, i, new)), results

    length = len(jax.tree.leaves((overwritten, copied, read))[0])
    (_, overwritten), copied = jax.lax.scan(body, (jnp.zeros([], jnp.int32), overwritten), copied, length)
    return overwritten, copied


def member_of(stacks: Any, i: Int[Array, ""] | int) -> Any:
    """Entry i of every array."""
    return jax.tree.map(
        lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False, allow_negative_indices=False), stacks
    )


def put(stacks: Any, i: Int[Array, ""], new: Any) -> Any:
    """The stacks with entry i of every array replaced."""
    return jax.tree.map(
        lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y.astype(x.dtype), i, 0, allow_negative_indices=False),
        stacks,
        new,
    )


def repeat(count: Int[Array, ""], most: int, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    """``body(i, carry)`` for i from 0 to ``count - 1``, a number that the program finds out, and ``most`` is the
    largest of: so that what it can cost is written there.
    """
    if isinstance(count, Tracer):
        start = (jnp.zeros([], jnp.int32), carry)
        return jax.lax.while_loop(
            lambda i_carry: (i_carry[0] < count) & (i_carry[0] < most),
            lambda i_carry: (i_carry[0] + 1, body(*i_carry)),
            start,
        )[1]
    for i in range(int(count)):
        carry = body(jnp.asarray(i, jnp.int32), carry)
    return carry
