"""One function of one matrix, over a stack of them: as a loop in place, or as a batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Int

# One(overwritten, copied, read) -> (overwritten, copied), of one matrix.
One = Callable[[Any, Any, Any], tuple[Any, Any]]

# Measured on the char-GPT trees: on a CPU whole stacks leave the caches, and a product of two or three matrices of side
# 256 or 384 runs at a higher rate than that of one; accelerators want batches.
BATCHED = {"cpu": False}
AT_ONCE = (2, 3)


def over_stack(
    one: One,
    overwritten: Any,
    copied: Any,
    read: Any,
    *,
    max_stack: int,
    grouped: bool = False,
    batched: bool | None = None,
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
      grouped: whether a loop may take two or three at once.
      batched: default: by the platform.
    """
    everything = (overwritten, copied, read)
    N = len(jax.tree.leaves(everything)[0])
    if not isinstance(jax.tree.leaves(everything)[0], Tracer) or N == 1:
        results = [one(*jax.tree.map(lambda x: x[i], everything)) for i in range(N)]  # noqa: B023
        return jax.tree.map(lambda *xs: jnp.stack(xs), *results)
    batched = BATCHED.get(jax.default_backend(), True) if batched is None else batched
    if batched:
        return jax.lax.map(lambda xs: one(*xs), everything, batch_size=min(max_stack, N))
    at_once = next((k for k in AT_ONCE if N % k == 0), 1) if grouped else 1
    if at_once == 1:
        return _in_place(one, *everything)
    groups = jax.tree.map(lambda x: x.reshape(-1, at_once, *x.shape[1:]), everything)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), _in_place(jax.vmap(one), *groups))


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
