"""Losses that know the distribution they are the likelihood of, so that labels can be drawn from the model itself.

Each is a mean over examples (positions) with ``weights``, ``Σ w_i ℓ_i / Σ w_i``, of ℓ = -log p(y | z) with logits z:

    softmax cross-entropy   ℓ = -Σ_c q_c log p_c,  p = softmax(z)         Fisher of z: diag(p) - p pᵀ
    sigmoid cross-entropy   ℓ = Σ_k log(1 + exp z_k) - y_k z_k            diag(s (1 - s)), s = sigmoid(z)
    Gaussian                ℓ = |z - y|² / 2                              I
    normal                  ℓ = Σ_k (s_k + (m_k - y_k)² exp(-s_k)) / 2    diag(exp(-s), 1/2),  z = (m, s)

A weight counts an example w times, in every Fisher: with F_i that of the example's own ℓ_i, the whole has
``Σ w_i F_i / Σ w_i``, so that gradients of ℓ_i enter squares times √w_i; this is the curvature of the weighted mean. An
example whose weight is 0 is not there: neither in the mean, nor in any statistics; its label may be anything. In the
same way a mean that enters the whole times c counts c times, and several add up.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .._xla import automatic
from .distributions import DISTRIBUTIONS, data_score
from .program.jaxprs import Typed, Value, varying, varying_as
from .program.walk import LOSS


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
    """Mean over examples of ``|z - y|² / 2``: the squared error of outputs with unit variance. The last axis is one of
    outputs: where they are single numbers, it has length 1.

    Arguments and what raises are as in `softmax_cross_entropy`.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> float(fo.losses.gaussian(jnp.zeros((5, 2)), jnp.ones((5, 2))))
      1.0
    """
    return _loss("gaussian", outputs, jnp.asarray(labels), outputs.shape, weights)


def normal(
    means: Float[Array, "*positions outputs"],
    log_variances: Float[Array, "*positions outputs"],
    labels: ArrayLike,
    weights: ArrayLike | None = None,
) -> Float[Array, ""]:
    """Mean over examples of ``Σ_k (s_k + (y_k - m_k)² exp(-s_k)) / 2``: outputs whose variance the model tells as well.

    Its curvature depends on the labels: "ggn" is the Fisher in expectation over the model's labels alone.

    Args:
      means, log_variances: m and s, with variances ``exp(s)``.
      labels, weights: as in `gaussian`.

    Raises:
      ValueError: where shapes do not fit.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> float(fo.losses.normal(jnp.zeros((5, 1)), jnp.zeros((5, 1)), jnp.ones((5, 1))))
      0.5
    """
    if means.shape != log_variances.shape:
        raise ValueError(f"fo.losses.normal: got means {means.shape}, log_variances {log_variances.shape}.")
    z = jnp.concatenate([means, log_variances], -1)
    return _loss("normal", z, jnp.asarray(labels), means.shape, weights)


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
    result: ShapedArray,
    z: Array,
    y: Value,
    *weights: Value,
) -> Array:
    """K zeros whose gradients with respect to the logits are, one after the other, what the Fisher is made of.

    For "mc", the scores of K = ``samples`` draws of labels from the model; for "true", the K columns of a root of the
    Fisher of the logits, each position's with signs of its own; for "empirical", the scores of the data's labels. Each
    example's are times ``sqrt(w_i / (Σ w K))`` or ``sqrt(w_i / Σ w)``, so that the sum of the outer products of
    gradients is the weighted mean over examples. Where a layer's position feeds the losses of several (attention),
    products of columns of different positions enter too: scores are uncorrelated, and signs at random make these
    products cancel in the mean. Devices along ``axes`` have examples of one mean, and all draw labels and signs of
    their own. Of a loss that vmap made several of, as ``result`` shows, there are as many zeros of each, for each share
    of its own in the whole.
    """
    p, lead = DISTRIBUTIONS[name], result.shape
    z = varying_as(z, y, *weights)

    # All that is read on the way back is an operand: inside a remat, what is closed over is gone by then.
    @jax.custom_vjp
    def zeros(z: Array, others: PyTree) -> Array:
        del others
        made = jnp.zeros((passes(fisher, samples, z), *lead), jnp.promote_types(z.dtype, jnp.float32))
        return on_each(made, varying(z) - frozenset(axes))

    def backward(residuals: tuple[Array, PyTree], ct: Array) -> tuple[Array, None]:
        z, (key, y, weights) = residuals
        full = z.astype(jnp.promote_types(z.dtype, jnp.float32))
        w = example_weights(full, *weights)
        share = jnp.sqrt(w * math.prod(lead) / total(w, axes))[..., None]
        own = own_key(jax.random.key(0) if key is None else key, z)
        ct = ct.reshape(len(ct), *lead, *[1] * (z.ndim - 1 - len(lead)))
        if fisher == "true":
            signs = jax.random.rademacher(own, z.shape, full.dtype)
            scores = p.root(full, signs * jnp.moveaxis(ct, 0, -1), 1)
        elif fisher == "empirical":
            scores = ct[0, ..., None] * data_score(name, full, y)
        else:
            drawn = jax.vmap(lambda k: p.score(full, p.sample(k, full, 1)))(jax.random.split(own, samples))
            scores = jnp.sum(ct[..., None] * drawn, 0) / samples**0.5
        return varying_as(jnp.where(share == 0, 0, share * scores), z).astype(z.dtype), None

    zeros.defvjp(lambda z, others: (zeros(z, others), (z, others)), backward)
    return zeros(z, (key, jnp.asarray(y), weights))


def no_shifts(results: Sequence[ShapedArray], value: Typed) -> list[Array]:
    """Zeros to be added to losses: the gradients of ``value`` there are their factors in it, one for all devices
    wherever ``value`` is.
    """
    return [on_each(jnp.zeros(x.shape, x.dtype), varying(x) & varying(value)) for x in results]


def on_each(x: Array, axes: frozenset[str]) -> Array:
    """``x``, taken to differ between the devices along these axes."""
    return jax.lax.pcast(x, tuple(sorted(axes)), to="varying") if axes else x


def own_key(key: PRNGKeyArray, z: Array) -> PRNGKeyArray:
    """The key of a device's own examples, wherever they differ between devices."""
    axes = tuple(sorted(varying(z)))
    return jax.random.fold_in(key, jax.lax.axis_index(axes)) if axes else key


def passes(fisher: str, samples: int, logits: Array | ShapedArray) -> int:
    """How many zeros `pseudo_loss` has of a loss."""
    return {"mc": samples, "true": logits.shape[-1], "empirical": 1}[fisher]
