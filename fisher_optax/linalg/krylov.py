"""Conjugate gradients on many systems at once, each with a matrix of its own that is never formed."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

UNROLLED = 8


def conjugate_gradient(
    product: Callable[[Array], Array],
    B: Float[Array, "d n"],
    iterations: int,
    energy: Callable[[Array], Array] | None = None,
) -> Float[Array, "d n"]:
    """So many steps from 0 towards ``Z`` with ``product(Z) = B``, where ``product`` acts on each column alone.

    A column that is solved, or is zero, stays as it is. There is no epsilon: the scale of B is that of Z.

    Args:
      product: linear, symmetric and positive definite in each column.
      B: the right-hand sides, as columns.
      iterations: fixed, so that a step takes the same time for every B; 1 or more.
      energy: ``<P, product(P)>`` of each column, ``(1, n)``, where it costs less than the product: the last step needs
        no more.

    Source: Hestenes and Stiefel 1952, equations 3:1.

    Example:
      >>> import jax.numpy as jnp
      >>> λ = jnp.array([[1.0, 2.0], [4.0, 2.0]])  # one diagonal matrix a column
      >>> print(conjugate_gradient(lambda Z: λ * Z, jnp.full((2, 2), 8.0), 2))
      [[8. 4.]
       [2. 4.]]
    """

    def step(state: tuple[Array, ...], _: None) -> tuple[tuple[Array, ...], None]:
        Z, R, P, rr = state
        AP = product(P)
        α = _over(rr, _dots(P, AP))
        Z, R = Z + α * P, R - α * AP
        new = _dots(R, R)
        return (Z, R, R + _over(new, rr) * P, new), None

    # A few steps are unrolled: XLA's convolutions for a CPU are slow inside a loop.
    start, steps = (jnp.zeros_like(B), B, B, _dots(B, B)), iterations - 1
    unroll = steps if steps < UNROLLED else 1
    Z, _, P, rr = jax.lax.scan(step, start, length=steps, unroll=max(unroll, 1))[0]
    return Z + _over(rr, energy(P) if energy else _dots(P, product(P))) * P


def _dots(P: Float[Array, "d n"], Q: Float[Array, "d n"]) -> Float[Array, "1 n"]:
    return jnp.sum(P * Q, axis=0, keepdims=True)


def _over(a: Array, b: Array) -> Array:
    """``a / b``, and 0 where b is none that a positive definite matrix gives."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)
