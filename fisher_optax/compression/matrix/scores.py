"""Pruning that removes the weights of smallest score and leaves the others as they are.

    magnitude   |W_ij|
    Wanda       |W_ij| sqrt(H_ii), H the mean of x xᵀ: the size of what the weight adds to an output
    Fisher      F_ij W_ij² / 2: the rise of the loss to second order, of a model at a minimum

Sources: Sun et al. 2024 (arXiv 2306.11695), equation 1, for Wanda; LeCun et al. 1990, "Optimal Brain Damage", with the
Fisher's diagonal as the curvature (Theis et al. 2018, arXiv 1801.05787).
"""

import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from ..._arguments import in_range
from ...fisher.diagonals.diagonal_fisher import DiagonalFisher
from ...linalg import unit_scale
from .checking import Number, gram, kernel, require_finite
from .masks import Sparsity, mask
from .pruned import Pruned


def magnitude(W: ArrayLike, sparsity: Sparsity, *, scope: str = "matrix") -> Pruned:
    """Remove the smallest weights.

    Args:
      W: a kernel ``(*batch, inputs, outputs)``.
      sparsity: a share of weights to remove, which may be traced, or "N:M" (see `mask`).
      scope: where the k smallest are looked for: in each "matrix" or among the inputs of each "output".

    Raises:
      TypeError, ValueError: for no real matrix, weights that are not finite (under `jit` these go unnoticed), and what
        `mask` refuses.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> print(fo.compression.magnitude(jnp.array([[1.0, -4.0], [3.0, 2.0]]), 0.5).weights)
      [[ 0. -4.]
       [ 3.  0.]]
    """
    W = kernel("magnitude", W)
    return _without(W, magnitude_scores(W), sparsity, scope)


def wanda(W: ArrayLike, H: ArrayLike, sparsity: Sparsity, *, scope: str = "output") -> Pruned:
    """Remove the weights that add least to a layer's outputs.

    Arguments are those of `magnitude`, but for

      H: ``(*batch, inputs, inputs)``, the mean of x xᵀ over the layer's inputs; its diagonal is read.
      scope: "output", since the paper found a comparison within each output to be the better one.

    Raises:
      TypeError, ValueError: as `magnitude`; for H of another shape, not finite, or with a negative diagonal.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> W, H = jnp.array([[3.0], [1.0]]), jnp.diag(jnp.array([1.0, 100.0]))
      >>> print(fo.compression.wanda(W, H, 0.5).weights.T)
      [[0. 1.]]
    """
    W = kernel("wanda", W)
    return _without(W, wanda_scores(W, H), sparsity, scope)


def fisher(
    W: ArrayLike,
    F: ArrayLike | DiagonalFisher,
    sparsity: Sparsity,
    *,
    scope: str = "matrix",
    upper: ArrayLike | DiagonalFisher | None = None,
    threshold: Number | None = None,
) -> Pruned:
    """Remove the weights that the loss, by the diagonal Fisher, misses least; if asked, only where that is sure.

    Arguments are those of `magnitude`, but for

      F: the diagonal of the Fisher, shaped like W: the entry for this kernel of a `DiagonalFisher`'s mean.
      upper: the upper end of F's confidence interval, shaped like W. Only weights with ``upper W² / 2 < threshold`` may
        go then: the k smallest of these, or all where there are fewer than k.
      threshold: in nats of loss per example: what the removal of one weight may cost.

    Raises:
      TypeError, ValueError: as `magnitude`; for F or ``upper`` of another shape, negative, or NaN, and F infinite; for
        ``upper`` below F, or without ``threshold``.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> W, F = jnp.array([[3.0, 1.0]]), jnp.array([[1.0, 16.0]])
      >>> print(fo.compression.fisher(W, F, 0.5).weights)
      [[0. 1.]]
      >>> print(fo.compression.fisher(W, F, 0.5, upper=2 * F, threshold=1.0).mask)
      [[ True  True]]
    """
    W = kernel("fisher", W)
    F = _diagonal("F", F, W)
    require_finite("fisher", F, "F", "Look for NaN or infinity in the gradients it was taken from.")
    if (upper is None) != (threshold is None):
        raise ValueError("fisher: upper= and threshold= go together: the bound on F, and the loss it is held against.")
    # Powers of two change no order, and no product leaves the range.
    flat = (1, W.size)
    scores = fisher_scores(unit_scale(_wide(W).reshape(flat)), unit_scale(F.reshape(flat))).reshape(W.shape)
    if upper is None or threshold is None:
        return _without(W, scores, sparsity, scope)
    in_range("threshold", threshold, 0)
    upper = _diagonal("upper", upper, W)
    if not isinstance(low := jnp.any(upper < F), Tracer) and bool(low):
        raise ValueError("fisher: upper is below F somewhere: pass the second of confidence_interval()'s two.")
    sure = fisher_scores(W, upper) < threshold
    return _without(W, jnp.where(sure, scores, jnp.inf), sparsity, scope, ~sure)


def magnitude_scores(W: ArrayLike) -> Float[Array, "*batch inputs outputs"]:
    """``|W|``, in float32 at least."""
    return jnp.abs(_wide(W))


def wanda_scores(W: ArrayLike, H: ArrayLike) -> Float[Array, "*batch inputs outputs"]:
    """``|W_ij| sqrt(H_ii)``; what raises is as in `wanda`."""
    H = gram("wanda", H, jnp.asarray(W))
    return jnp.abs(_wide(W)) * jnp.sqrt(jnp.diagonal(H, axis1=-2, axis2=-1))[..., None]


def fisher_scores(W: ArrayLike, F: ArrayLike) -> Float[Array, "*batch inputs outputs"]:
    """``F W² / 2``, nats of loss per example, which may be compared between layers."""
    return jnp.asarray(F) * jnp.square(_wide(W)) / 2


def _wide(W: ArrayLike) -> Array:
    """In float32 at least."""
    W = jnp.asarray(W)
    return W.astype(jnp.promote_types(W.dtype, jnp.float32))


def _diagonal(name: str, F: ArrayLike | DiagonalFisher, W: Array) -> Array:
    """A diagonal shaped like W; raises for anything else, NaN and negative entries."""
    if isinstance(F, DiagonalFisher):
        raise TypeError(f"fisher: {name} is an array shaped like the kernel; pass its leaf of fisher.mean.")
    F = jnp.asarray(F)
    if F.shape != W.shape:
        raise ValueError(
            f"fisher: {name} must be shaped like the kernel, {W.shape}; got {F.shape}. Take the Fisher's diagonal by "
            "parameter, groups=None."
        )
    if not isinstance(right := jnp.all(F >= 0), Tracer) and not bool(right):
        raise ValueError(f"fisher: {name} must be at least 0 everywhere, as a mean of squares is, and not NaN.")
    return F.astype(jnp.promote_types(jnp.promote_types(F.dtype, W.dtype), jnp.float32))


def _without(
    W: Array, scores: Array, sparsity: Sparsity, scope: str, retained: Bool[Array, "..."] | bool = False
) -> Pruned:
    """The smallest scores gone, but for what is retained anyway."""
    stays = mask(scores, sparsity, scope) | retained
    return Pruned(jnp.where(stays, W, 0), stays)
