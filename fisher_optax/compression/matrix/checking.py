"""What every method asks of its arrays, with errors that say what to do."""

from typing import TypeAlias

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array

Number: TypeAlias = float | np.number | np.ndarray | Array  # a real one, which may be traced


def require_finite(name: str, x: ArrayLike, what: str, advice: str) -> None:
    """Raises ``ValueError`` for NaN or infinity; under `jit` there is nothing to look at yet."""
    if isinstance(x, Tracer):
        return
    bad = int(np.sum(~np.isfinite(np.asarray(x, np.float64))))
    if bad:
        raise ValueError(f"{name}: {bad} of {np.size(x)} entries of {what} are not finite. {advice}")


def kernel(name: str, W: ArrayLike) -> Array:
    """A kernel ``(*batch, inputs, outputs)`` as an array.

    Raises:
      TypeError, ValueError: for what is no real matrix, or not finite.
    """
    W = jnp.asarray(W)
    if not jnp.issubdtype(W.dtype, jnp.floating):
        raise TypeError(f"{name} prunes real floating-point weights; got {W.dtype}.")
    if W.ndim < 2:
        raise ValueError(f"{name} takes a kernel (inputs, outputs); got shape {W.shape}.")
    require_finite(name, W, "the weights", "Prune a model that has not diverged.")
    return W


def gram(name: str, H: ArrayLike, W: Array) -> Array:
    """The second moment of a kernel's inputs ``(*batch, inputs, inputs)``, in float32 at least.

    Raises:
      ValueError: for another shape, entries that are not finite, and a diagonal below 0.
    """
    H = jnp.asarray(H)
    H = H.astype(jnp.promote_types(jnp.promote_types(H.dtype, W.dtype), jnp.float32))
    m = W.shape[-2]
    if H.shape != (*W.shape[:-2], m, m):
        raise ValueError(
            f"{name}: a kernel of {W.shape}, inputs first, needs H of {(*W.shape[:-2], m, m)}, the mean of x xᵀ over "
            f"its inputs x; got {H.shape}."
        )
    require_finite(name, H, "H", "Look for NaN or infinity in the calibration data.")
    negative = jnp.any(jnp.diagonal(H, axis1=-2, axis2=-1) < 0)
    if not isinstance(negative, Tracer) and bool(negative):
        raise ValueError(f"{name}: H has a negative diagonal, so it is no second moment: pass the mean of x xᵀ.")
    return H
