"""oBERT, the Optimal BERT Surgeon: pruning by the empirical Fisher in blocks, with an update of what stays.

A kernel, flat in the order (outputs, inputs), is cut into blocks of B weights; with gradients g of m examples

    F = λ I + (1/m) Σ g gᵀ                    by block
    scores   ρ_j = w_j² / (2 [F⁻¹]_jj)        the least rise of ½ ΔᵀFΔ that setting w_j to 0 can cost
    update   w ← w - Σ_j F⁻¹ e_j w_j / [F⁻¹]_jj    over the j that go, one by one as the paper does, or
             w ← w - F⁻¹_:P (F⁻¹_PP)⁻¹ w_P    for the whole set P: the minimum of ½ ΔᵀFΔ

The mean of g gᵀ is kept, and inverted once by Cholesky: means of batches merge, which the paper's m rank-one
corrections of I / λ do not. In float32 it errs by the condition number of F times 1e-7: less than these where examples
outnumber the weights of a block and are little correlated, more elsewhere (1e-4 of a score is usual at the default
damping).

Source: Kurtic et al. 2022 (arXiv 2203.07259), equations 3 to 8.
"""

import warnings
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.lax import Precision
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from ..._arguments import in_range
from ...linalg import cholesky_inverse, unit_scale
from .checking import Number, kernel, require_finite
from .masks import Pattern, ReadSparsity, Sparsity, as_sparsity, mask
from .pruned import Pruned

# Ten times the damping each.
TRIES = 20


def obert(
    W: ArrayLike,
    grads: ArrayLike,
    sparsity: Sparsity,
    block: int = 50,
    *,
    damping: Number = 1e-3,
    exact: bool = False,
    recomputations: int = 1,
    scope: str = "matrix",
) -> Pruned:
    """Remove the weights that cost least by the blocks of the empirical Fisher, and let the others make up for them.

    Args:
      W: a kernel ``(*batch, inputs, outputs)``.
      grads: ``(m, *batch, inputs, outputs)``, gradients of m examples, or of m small batches as the paper takes.
      sparsity: a share of weights to remove, which may be traced, or "N:M" (see `mask`).
      block: weights in a block, of consecutive inputs of an output. Memory is about ``4 block`` times the kernel.
      damping: λ as a share of the mean of F's diagonal, so that the scale of the loss does not matter; the paper's
        absolute 1e-7 means something else to every loss. 1e-3 is about the least that float32 inverts to three digits.
      exact: the joint minimum instead of the paper's update, which neglects that what goes together is correlated.
      recomputations: how many steps the sparsity takes, evenly. In each one F is inverted anew for what is left; what
        is gone stays gone.
      scope: as in `mask`.

    Returns:
      ``Pruned``. Without any gradient, a kernel is pruned by magnitude.

    Warns:
      UserWarning: where F is singular to working precision; the damping is raised tenfold until it is not. Under `jit`
      that happens silently.

    Raises:
      TypeError, ValueError: for arrays of other shapes or not finite (under `jit` the result is NaN), for options out
        of their range, and what `mask` refuses.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> g = jnp.array([[[1.0], [1.0]], [[2.0], [2.0]], [[0.0], [0.5]]])  # the two inputs do nearly the same
      >>> print(fo.compression.obert(jnp.array([[1.0], [2.0]]), g, 0.5).weights.T.round(2))
      [[0.   2.95]]
    """
    W = kernel("obert", W)
    if isinstance(block, bool) or not isinstance(block, int) or block < 1:
        raise ValueError(f"obert: block must be a whole number of at least 1; got {block!r}.")
    grads = jnp.asarray(grads)
    if grads.ndim == 0 or grads.shape[1:] != W.shape or len(grads) == 0:
        raise ValueError(
            f"obert: a kernel of {W.shape} needs gradients of {('m', *W.shape)}, m of them; got {grads.shape}. "
            "Take single examples' by jax.vmap(jax.grad(loss), (None, 0))."
        )
    require_finite("obert", grads, "the gradients", "Leave out the examples they come from.")
    grads = grads.astype(jnp.promote_types(jnp.promote_types(grads.dtype, W.dtype), jnp.float32))
    # Only the order of scores matters here, and squares of tiny gradients vanish.
    F = block_moments(unit_scale(grads.reshape(1, -1)).reshape(grads.shape), block)
    options = {"damping": damping, "exact": exact, "recomputations": recomputations, "scope": scope}
    weights, stays, used = from_moments(W, F, sparsity, **options)
    _report("obert", damping, used)
    return Pruned(weights, stays)


def from_moments(
    W: ArrayLike,
    F: ArrayLike,
    sparsity: Sparsity,
    *,
    damping: Number = 1e-3,
    exact: bool = False,
    recomputations: int = 1,
    scope: str = "matrix",
) -> tuple[Array, Array, Number]:
    """`obert` from what `block_moments` gives: new weights, mask, and the damping it took, without a warning."""
    W, F = _checked("obert", W, F, damping)
    if isinstance(recomputations, bool) or not isinstance(recomputations, int) or recomputations < 1:
        raise ValueError(f"obert: recomputations must be a whole number of at least 1; got {recomputations!r}.")
    sparsity, new, stays = as_sparsity(sparsity), W.astype(F.dtype), jnp.ones(W.shape, bool)
    for step in range(1, recomputations + 1):
        choose = partial(mask, sparsity=_share_of(sparsity, step, recomputations), scope=scope)
        new, stays, damping = _stage(new, F, choose, damping, exact, stays)
    return new.astype(W.dtype), stays, damping


def obert_step(
    W: Float[Array | np.ndarray, "*batch inputs outputs"],
    F: Float[Array | np.ndarray, "*batch blocks B B"],
    stays_from_scores: Callable[[Array], Array],
    *,
    damping: Number = 1e-3,
    exact: bool = False,
    stays: ArrayLike | None = None,
) -> Pruned:
    """One step of `obert`, from `block_moments`; pure, under `jit` too.

    Args:
      F: the mean of g gᵀ by block.
      stays_from_scores: the mask that follows from scores shaped like W: nats, if gradients are of nats, so that they
        may be compared between kernels; -inf for what is gone.
      stays: the mask so far: what is False is gone, and W is 0 there. None: nothing is gone.

    Raises and warns as `obert`.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> W, F = jnp.array([[1.0], [2.0]]), jnp.array([[[1.0, 0.9], [0.9, 1.0]]])
      >>> print(fo.compression.obert_step(W, F, lambda scores: scores > jnp.min(scores)).weights.T.round(1))
      [[0.  2.9]]
    """
    W, F = _checked("obert_step", W, F, damping)
    new, stays, used = _stage(W.astype(F.dtype), F, stays_from_scores, damping, exact, _all_or(stays, W))
    _report("obert_step", damping, used)
    return Pruned(new.astype(W.dtype), stays)


def block_moments(
    g: Float[Array | np.ndarray, "m *batch inputs outputs"], block: int
) -> Float[Array, "*batch blocks B B"]:
    """The mean over m of ``g gᵀ`` by block, in float32 at least, B at most the number of weights; zeros fill the last.

    Means of as many gradients each average to that of all.

    >>> print(block_moments(jnp.array([[[1.0], [2.0], [3.0]]]), 2))
    [[[1. 2.]
      [2. 4.]]
    <BLANKLINE>
     [[9. 0.]
      [0. 0.]]]
    """
    g = jnp.asarray(g)
    blocks = _blocks(g.astype(jnp.promote_types(g.dtype, jnp.float32)), min(block, g.shape[-2] * g.shape[-1]))
    return jnp.einsum("m...i,m...j->...ij", blocks, blocks, precision=Precision.HIGHEST) / len(g)


def obert_scores(
    W: Float[Array | np.ndarray, "*batch inputs outputs"],
    F: Float[Array | np.ndarray, "*batch blocks B B"],
    *,
    damping: Number = 1e-3,
    stays: ArrayLike | None = None,
) -> Float[Array, "*batch inputs outputs"]:
    """The scores of `obert_step`, damped alike but without a warning: for a ranking over all layers."""
    W, F = _checked("obert_scores", W, F, damping)
    return _scores(W.astype(F.dtype), F, _all_or(stays, W), damping)[0]


def _checked(name: str, W: ArrayLike, F: ArrayLike, damping: Number) -> tuple[Array, Array]:
    """A kernel, and its F in float32 at least."""
    W, F = kernel(name, W), jnp.asarray(F)
    in_range("damping", damping, 0)
    *batch, m, n = W.shape
    B = max(1, *F.shape[-1:], 1)
    if F.shape != (*batch, -(-m * n // B), B, B):
        raise ValueError(f"{name}: F {F.shape} is not of a kernel of {W.shape}: take block_moments of its gradients.")
    require_finite(name, F, "F", "Leave out the gradients that are not finite.")
    return W, F.astype(jnp.promote_types(jnp.promote_types(F.dtype, W.dtype), jnp.float32))


def _all_or(stays: ArrayLike | None, W: Array) -> Array:
    return jnp.ones(W.shape, bool) if stays is None else jnp.asarray(stays, bool)


def _share_of(sparsity: ReadSparsity, step: int, steps: int) -> float | Array | Pattern:
    """The sparsity after one of so many even steps."""
    if step == steps:
        return sparsity
    if isinstance(sparsity, Pattern):
        return sparsity._replace(keep=sparsity.of - -(-(sparsity.of - sparsity.keep) * step // steps))
    return sparsity * step / steps


def _stage(
    W: Array, F: Array, choose: Callable[[Array], Array], damping: Number, exact: bool, stays: Array
) -> tuple[Array, Array, Array]:
    """New weights and mask, and the damping they took. Neither program depends on the sparsity."""
    scores, inverse, λ = _scores(W, F, stays, damping)
    left = choose(scores) & stays
    return (_joint(W, F, stays, left, λ) if exact else _each(W, inverse, stays, left)), left, λ


@jax.jit
@partial(jnp.vectorize, signature="(i,o),(k,b,b),(i,o),()->(i,o),(k,b,b),()")
def _scores(W: Array, F: Array, stays: Array, damping: Array) -> tuple[Array, Array, Array]:
    """Scores, the inverse of F over its mean diagonal for what stays, and the damping it took."""

    def attempt(tried: tuple[Array, ...]) -> tuple[Array, ...]:
        _, _, λ, i = tried
        λ = jnp.where(i == 0, λ, jnp.maximum(10 * λ, jnp.finfo(λ.dtype).eps))
        A = _damped(F, stays, λ)
        inverse = jax.vmap(cholesky_inverse)(A)
        inflation = jnp.diagonal(A, axis1=-2, axis2=-1) * jnp.diagonal(inverse, axis1=-2, axis2=-1)
        # Of a singular A, rounding may hold the smallest pivots above 0.
        return inverse, jnp.all(inflation * 4 * jnp.finfo(A.dtype).eps < 1), λ, i + 1

    def again(tried: tuple[Array, ...]) -> Array:
        _, works, _, i = tried
        return ~works & (i < jnp.where(jnp.all(jnp.isfinite(F)), TRIES, 1))

    start = jnp.zeros_like(F), jnp.zeros([], bool), damping.astype(F.dtype), jnp.zeros([], jnp.int32)
    inverse, _, λ, _ = jax.lax.while_loop(again, attempt, start)
    diagonal = _unblocked(jnp.diagonal(inverse, axis1=-2, axis2=-1), W.shape)
    return jnp.where(stays, jnp.square(W) * (_mean_diagonal(F, W) / 2) / diagonal, -jnp.inf), inverse, λ


@jax.jit
@partial(jnp.vectorize, signature="(i,o),(k,b,b),(i,o),(i,o)->(i,o)")
def _each(W: Array, inverse: Array, stays: Array, left: Array) -> Array:
    """The paper's update: the sum of those of single removals."""
    diagonal = jnp.diagonal(inverse, axis1=-2, axis2=-1)
    gone = _blocks(jnp.where(stays & ~left, W, 0), inverse.shape[-1])
    return jnp.where(left, W - _unblocked(_apply(inverse, gone / diagonal), W.shape), 0)


@jax.jit
@partial(jnp.vectorize, signature="(i,o),(k,b,b),(i,o),(i,o),()->(i,o)")
def _joint(W: Array, F: Array, stays: Array, left: Array, λ: Array) -> Array:
    """The joint minimum: ``F_SS Δ_S = F_SP w_P`` with S what is left, the same as in terms of F⁻¹."""
    A = F / _mean_diagonal(F, W)
    gone = _blocks(jnp.where(stays & ~left, W, 0), F.shape[-1])
    Δ = _apply(jax.vmap(cholesky_inverse)(_damped(F, left, λ)), _apply(A, gone))
    return jnp.where(left, W + _unblocked(Δ, W.shape), 0)


def _damped(F: Array, stays: Array, λ: Array) -> Array:
    """F over its mean diagonal, plus λ, for what stays; the identity elsewhere, and where zeros fill the last block."""
    here = _blocks(stays, F.shape[-1])
    A = jnp.where(here[..., None] & here[..., None, :], F / _mean_diagonal(F, stays), 0)
    return A + jnp.where(here, λ, 1)[..., None] * jnp.eye(F.shape[-1], dtype=F.dtype)


def _mean_diagonal(F: Array, W: Array) -> Array:
    """Over the weights; 1 where all gradients were 0."""
    mean = jnp.trace(F, axis1=-2, axis2=-1).sum() / W.size
    return jnp.where(mean == 0, 1, mean)


def _apply(A: Float[Array, "k b b"], x: Float[Array, "k b"]) -> Float[Array, "k b"]:
    return jnp.matmul(A, x[..., None], precision=Precision.HIGHEST)[..., 0]


def _blocks(x: Array, B: int) -> Array:
    """``(*batch, inputs, outputs)`` as ``(*batch, blocks, B)``, filled with zeros (False)."""
    flat = x.mT.reshape(*x.shape[:-2], -1)
    flat = jnp.pad(flat, [(0, 0)] * (flat.ndim - 1) + [(0, -flat.shape[-1] % B)])
    return flat.reshape(*x.shape[:-2], -1, B)


def _unblocked(x: Array, shape: tuple[int, ...]) -> Array:
    m, n = shape
    return x.ravel()[: m * n].reshape(n, m).T


def _report(name: str, asked: Number, used: Number) -> None:
    """A warning where the damping had to be raised."""
    if isinstance(asked, Tracer) or isinstance(used, Tracer):
        return
    worst, asked = float(jnp.max(used)), float(asked)
    if worst > asked * (1 + 1e-6):
        text = f"{name}: F + {asked:g} of its mean diagonal is singular to working precision; took {worst:g} instead."
        warnings.warn(f"{text} Pass more gradients, or that damping.", UserWarning, stacklevel=3)
