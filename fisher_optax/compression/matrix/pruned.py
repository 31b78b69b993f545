"""What pruning returns, and what it costs in a layer's outputs."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.lax import Precision
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float


class Pruned(NamedTuple):
    """New weights, exactly 0 where the mask is False; unpacks as ``pruned, mask``."""

    weights: Float[Array, "*batch inputs outputs"]
    mask: Bool[Array, "*batch inputs outputs"]


def output_error(W: ArrayLike, new: ArrayLike, H: ArrayLike) -> Float[Array, "*batch"]:
    """``½ tr(Δᵀ H Δ)`` with Δ = new - W: half the squared change of a layer's outputs, a mean over its inputs.

    Args:
      W, new: ``(*batch, inputs, outputs)``.
      H: ``(*batch, inputs, inputs)``, the mean of x xᵀ.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> float(fo.compression.output_error(jnp.ones((2, 1)), jnp.array([[1.0], [0.0]]), 2 * jnp.eye(2)))
      1.0
    """
    H = jnp.asarray(H)
    Δ = (jnp.asarray(new) - jnp.asarray(W)).astype(H.dtype)
    return jnp.sum(Δ * jnp.matmul(H, Δ, precision=Precision.HIGHEST), (-2, -1)) / 2
