"""Losses that know the distribution they are the likelihood of, so that labels can be drawn from the model itself.

Each is a mean over examples (positions) with ``weights``, ``Σ w_i ℓ_i / Σ w_i``, of ℓ = -log p(y | z) with logits z:

    softmax cross-entropy   ℓ = -Σ_c q_c log p_c,  p = softmax(z)         Fisher of z: diag(p) - p pᵀ
    sigmoid cross-entropy   ℓ = Σ_k log(1 + exp z_k) - y_k z_k            diag(s (1 - s)), s = sigmoid(z)
    Gaussian                ℓ = |z - y|² / 2                              I

An example whose weight is 0 is not there: neither in the mean, nor in any statistics; its label may be anything. Other
weights act on output gradients alone: by w in "mc" and "true", the Fisher of the weighted mean, and by w² in
"empirical", whose gradients are the loss's own.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray

from .._xla import automatic
from .program.jaxprs import Value, varying, varying_as
from .program.walk import LOSS


class Distribution(NamedTuple):
    """How one loss reads its logits ``(*positions, C)``.

    ``score(z, y)`` is the gradient of each example's loss; ``sample(key, z, τ)`` draws labels from the model at
    temperature τ (logits z / τ; of a Gaussian, variance τ); ``root(z, ct, τ)`` is ``J ct`` for a C x C matrix J, with
    ``J Jᵀ`` the mean of ``score scoreᵀ`` over such labels: at τ = 1 the Fisher of z.
    """

    losses: Callable[[Array, Array], Array]
    score: Callable[[Array, Array], Array]
    sample: Callable[[PRNGKeyArray, Array, float], Array]
    root: Callable[[Array, Array, float], Array]


def _softmax_losses(z: Array, y: Array) -> Array:
    log_p = jax.nn.log_softmax(z)
    if y.ndim < z.ndim:
        return -jnp.take_along_axis(log_p, y[..., None], -1)[..., 0]
    return -jnp.sum(y * log_p, -1)


def _softmax_score(z: Array, y: Array) -> Array:
    return jax.nn.softmax(z) - jax.nn.one_hot(y, z.shape[-1], dtype=z.dtype)


def _softmax_root(z: Array, ct: Array, τ: float) -> Array:
    r = jnp.sqrt(jax.nn.softmax(z / τ))
    return r * ct - jax.nn.softmax(z) * jnp.sum(r * ct, -1, keepdims=True)


def _sigmoid_losses(z: Array, y: Array) -> Array:
    return jnp.sum(jax.nn.softplus(z) - y * z, -1)


def _sigmoid_root(z: Array, ct: Array, τ: float) -> Array:
    s, warm = jax.nn.sigmoid(z), jax.nn.sigmoid(z / τ)
    # Scores at another temperature have a mean, m, and J Jᵀ = diag(v) + m mᵀ.
    v, m = warm * (1 - warm), s - warm
    u = m / jnp.sqrt(jnp.maximum(v, 1e-12))
    α = 1 / (1 + jnp.sqrt(1 + jnp.sum(u * u, -1, keepdims=True)))
    return jnp.sqrt(v) * ct + m * α * jnp.sum(u * ct, -1, keepdims=True)


DISTRIBUTIONS = {
    "softmax_cross_entropy": Distribution(
        _softmax_losses, _softmax_score, lambda key, z, τ: jax.random.categorical(key, z / τ), _softmax_root
    ),
    "sigmoid_cross_entropy": Distribution(
        _sigmoid_losses,
        lambda z, y: jax.nn.sigmoid(z) - y,
        lambda key, z, τ: jax.random.bernoulli(key, jax.nn.sigmoid(z / τ)).astype(z.dtype),
        _sigmoid_root,
    ),
    "gaussian": Distribution(
        lambda z, y: jnp.sum(jnp.square(z - y), -1) / 2,
        lambda z, y: z - y,
        lambda key, z, τ: z + τ**0.5 * jax.random.normal(key, z.shape, z.dtype),
        lambda z, ct, τ: τ**0.5 * jnp.broadcast_to(ct, z.shape),
    ),
}


def softmax_cross_entropy(
    logits: Float[Array, "*positions classes"], labels: ArrayLike, weights: ArrayLike | None = None
) -> Float[Array, ""]:
    """Mean of ``-log softmax(logits)[label]``, in nats.

    Args:
      logits: of any float dtype; computed in float32 at least.
      labels: class numbers ``(*positions,)``, or probabilities ``(*positions, classes)``.
      weights: ``(*positions,)``, or of its leading axes; 0 leaves an example out. None: all count alike.

    Raises:
      ValueError: where shapes do not fit.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> round(float(fo.losses.softmax_cross_entropy(jnp.zeros((2, 4)), jnp.array([0, 3]))), 4)
      1.3863
    """
    labels = jnp.asarray(labels)
    soft = jnp.issubdtype(labels.dtype, jnp.floating)
    wanted = logits.shape if soft else logits.shape[:-1]
    return _loss("softmax_cross_entropy", logits, labels, wanted, weights)


def sigmoid_cross_entropy(
    logits: Float[Array, "*positions outputs"], labels: ArrayLike, weights: ArrayLike | None = None
) -> Float[Array, ""]:
    """Mean over examples of ``Σ_k log(1 + exp z_k) - y_k z_k``, in nats: yes-or-no outputs, labels in [0, 1].

    Arguments and what raises are as in `softmax_cross_entropy`.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> round(float(fo.losses.sigmoid_cross_entropy(jnp.zeros((5, 1)), jnp.ones((5, 1)))), 4)
      0.6931
    """
    return _loss("sigmoid_cross_entropy", logits, jnp.asarray(labels), logits.shape, weights)


def gaussian(
    outputs: Float[Array, "*positions outputs"], labels: ArrayLike, weights: ArrayLike | None = None
) -> Float[Array, ""]:
    """Mean over examples of ``|z - y|² / 2``: the squared error of outputs with unit variance.

    Arguments and what raises are as in `softmax_cross_entropy`.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> float(fo.losses.gaussian(jnp.zeros((5, 2)), jnp.ones((5, 2))))
      1.0
    """
    return _loss("gaussian", outputs, jnp.asarray(labels), outputs.shape, weights)


def _loss(name: str, z: Array, y: Array, wanted: tuple[int, ...], weights: ArrayLike | None) -> Float[Array, ""]:
    w = () if weights is None else (jnp.asarray(weights),)
    leading = z.shape[: w[0].ndim] if w and w[0].ndim < z.ndim else None
    if y.shape != wanted or (w and w[0].shape != leading):
        shapes = f"logits {z.shape}, labels {y.shape}" + (f", weights {w[0].shape}" if w else "")
        raise ValueError(f"fo.losses.{name}: got {shapes}; wanted labels {wanted}, weights of its leading axes.")
    return _JITTED[name](z, y, *w)


def example_weights(z: Array, *weights: Value) -> Array:
    """The weight of every position."""
    if not weights:
        return jnp.ones(z.shape[:-1], jnp.promote_types(z.dtype, jnp.float32))
    w = jnp.asarray(weights[0]).astype(jnp.promote_types(z.dtype, jnp.float32))
    return jnp.broadcast_to(w.reshape(*w.shape, *[1] * (z.ndim - 1 - w.ndim)), z.shape[:-1])


def _marked(name: str) -> Callable[..., Array]:
    """The loss, jitted under a name by which it is found in a traced program."""

    def loss(z: Array, y: Array, *weights: Array) -> Array:
        z = z.astype(jnp.promote_types(z.dtype, jnp.float32))
        w = example_weights(z, *weights)
        # What is left out may be NaN, and 0 times the gradient there would be too.
        z, y = (jnp.where((w == 0).reshape(*w.shape, *[1] * (x.ndim - w.ndim)), 0, x) for x in (z, y))
        return automatic(lambda z, y, w: jnp.sum(w * DISTRIBUTIONS[name].losses(z, y)), z, y, w) / total(w)

    loss.__name__ = loss.__qualname__ = LOSS + name
    return jax.jit(loss)


def total(w: Array, axes: tuple[str, ...] = ()) -> Array:
    """What the sum over examples is divided by: the weights of all devices along ``axes`` together, 1 if all are 0."""
    W = jnp.sum(w.astype(jnp.promote_types(w.dtype, jnp.float32)))
    W = jax.lax.psum(W, axes) if axes else W
    return jnp.where(W == 0, 1, W)


_JITTED = {name: _marked(name) for name in DISTRIBUTIONS}


def pseudo_loss(
    name: str,
    fisher: str,
    samples: int,
    key: PRNGKeyArray | None,
    axes: tuple[str, ...],
    z: Array,
    y: Value,
    *weights: Value,
) -> Array:
    """K zeros whose gradients with respect to the logits are, one after the other, what the Fisher is made of.

    For "mc", the scores of K = ``samples`` draws of labels from the model; for "true", the K columns of a root of the
    Fisher of the logits, each position's with signs of its own; each example's times ``sqrt(w_i / (Σ w K))`` or
    ``sqrt(w_i / Σ w)``, so that the sum of the outer products of gradients is the weighted mean over examples. Where
    a layer's position feeds the losses of several (attention), products of columns of different positions enter too:
    scores are uncorrelated, and signs at random make these products cancel in the mean. Devices along ``axes`` have
    examples of one mean, and all draw labels and signs of their own.
    """
    p = DISTRIBUTIONS[name]
    z = varying_as(z, y, *weights)

    @jax.custom_vjp
    def zeros(z: Array) -> Array:
        return jnp.zeros(samples if fisher == "mc" else z.shape[-1], jnp.promote_types(z.dtype, jnp.float32))

    def backward(z: Array, ct: Array) -> tuple[Array]:
        full = z.astype(jnp.promote_types(z.dtype, jnp.float32))
        w = example_weights(full, *weights)
        share = jnp.sqrt(w / total(w, axes))[..., None]
        own = own_key(jax.random.key(0) if key is None else key, z)
        if fisher == "true":
            signs = jax.random.rademacher(own, z.shape, full.dtype)
            return (varying_as(share * p.root(full, signs * ct[(None,) * (z.ndim - 1)], 1), z).astype(z.dtype),)
        drawn = jax.vmap(lambda k: p.score(full, p.sample(k, full, 1)))(jax.random.split(own, samples))
        return ((share * jnp.tensordot(ct, drawn, 1) / samples**0.5).astype(z.dtype),)

    zeros.defvjp(lambda z: (zeros(z), z), backward)
    return zeros(z)


def own_key(key: PRNGKeyArray, z: Array) -> PRNGKeyArray:
    """The key of a device's own examples, wherever they differ between devices."""
    axes = tuple(sorted(varying(z)))
    return jax.random.fold_in(key, jax.lax.axis_index(axes)) if axes else key


def passes(fisher: str, samples: int, logits: Array | ShapedArray) -> int:
    """How many zeros `pseudo_loss` has."""
    return samples if fisher == "mc" else logits.shape[-1]
