"""One function of one matrix, over a stack of them: as a loop in place, or as a batch."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Inexact, Int

# One(G, state, action, given, alone=False) -> (U, state, failures), for one matrix, which may be alone in its stack.
One = Callable[..., tuple[Array, Any, Array]]

# Measured on the char-GPT trees: on a CPU whole stacks leave the caches, and a product of two or three matrices of side
# 256 or 384 runs at a higher rate than that of one; accelerators want batches.
BATCHED = {"cpu": False}
AT_ONCE = (2, 3)


def over_stack(
    one: One,
    G: Inexact[Array, "N m n"],
    state: Any,
    action: Int[Array, " N"],
    given: Any = None,
    *,
    uniform: bool,
    max_stack: int,
    batched: bool | None = None,
) -> tuple[Inexact[Array, "N m n"], Any, Int[Array, " N"]]:
    """``one`` of every matrix of the stack; ``given`` is more to read for each, or nothing.

    A batch is only for an ``action`` that is the same for all (``uniform``): a branch taken by some of a batch is
    computed by all. At most ``max_stack`` go in one batch.
    """
    if not isinstance(G, Tracer) or len(G) == 1:
        return _eagerly(functools.partial(one, alone=len(G) == 1), G, state, action, given)
    batched = BATCHED.get(jax.default_backend(), True) if batched is None else batched
    if uniform and batched:
        size = min(max_stack, len(G))
        return jax.lax.map(lambda xs: one(xs[0], xs[1], action[0], xs[2]), (G, state, given), batch_size=size)
    # Factors mean decompositions, and a branch for each.
    at_once = 1 if state.factors else next((k for k in AT_ONCE if len(G) % k == 0), 1)
    if at_once == 1:
        return _in_place(one, G, state, action, given)
    grouped = jax.tree.map(lambda x: x.reshape(-1, at_once, *x.shape[1:]), (G, state, action, given))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), _in_place(jax.vmap(one), *grouped))


def _in_place(one: One, G: Array, state: Any, action: Array, given: Any) -> tuple[Array, Any, Array]:
    """A loop that overwrites gradients with directions, and factors and bases, which are most of the state."""

    def body(carry: Any, member: Any) -> Any:
        (i, kept), (inner, act, seen) = carry, member
        matrix, factors, basis = jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False, allow_negative_indices=False), kept
        )
        U, new, failed = one(matrix, state._replace(factors=factors, basis=basis, application=inner), act, seen)
        put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=i, axis=0, allow_negative_indices=False)
        made = jax.tree.map(lambda x, y: put(x, y.astype(x.dtype)), kept, (U, new.factors, new.basis))
        return (i + 1, made), (new.application, failed)

    # The rest is copied from one stack to another: XLA fuses reading and writing it, and would copy a stack that is
    # both, once for each of its members.
    kept, rest = (G, state.factors, state.basis), (state.application, action, given)
    (_, (U, factors, basis)), (application, failed) = jax.lax.scan(body, (jnp.zeros([], jnp.int32), kept), rest)
    return U, state._replace(factors=factors, basis=basis, application=application), failed


def _eagerly(one: One, G: Array, state: Any, action: Array, given: Any) -> tuple[Array, Any, Array]:
    done: Any = [one(*jax.tree.map(lambda x: x[i], (G, state, action, given))) for i in range(len(G))]  # noqa: B023
    return jax.tree.map(lambda *xs: jnp.stack(xs), *done)
