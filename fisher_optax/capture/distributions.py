"""The distributions that losses are the likelihoods of: their scores, their Fishers, and how labels are drawn."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray


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


def _halves(z: Array) -> tuple[Array, Array]:
    """Means and the logarithms of variances."""
    m, s = jnp.split(z, 2, -1)
    return m, s


def _normal_losses(z: Array, y: Array) -> Array:
    m, s = _halves(z)
    return jnp.sum(s + jnp.square(y - m) * jnp.exp(-s), -1) / 2


def _normal_score(z: Array, y: Array) -> Array:
    m, s = _halves(z)
    return jnp.concatenate([(m - y) * jnp.exp(-s), (1 - jnp.square(y - m) * jnp.exp(-s)) / 2], -1)


def _normal_sample(key: PRNGKeyArray, z: Array, τ: float) -> Array:
    m, s = _halves(z)
    return m + jnp.exp(s / 2) * τ**0.5 * jax.random.normal(key, m.shape, z.dtype)


def _normal_root(z: Array, ct: Array, τ: float) -> Array:
    # With u of variance τ, E u² = τ and E (1 - u²)² = 1 - 2τ + 3τ²; u and 1 - u² are uncorrelated.
    _, s = _halves(z)
    of_means, of_variances = _halves(jnp.broadcast_to(ct, z.shape))
    return jnp.concatenate([(τ * jnp.exp(-s)) ** 0.5 * of_means, (1 - 2 * τ + 3 * τ**2) ** 0.5 / 2 * of_variances], -1)


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
    "normal": Distribution(_normal_losses, _normal_score, _normal_sample, _normal_root),
}


def data_score(name: str, z: Array, y: Array) -> Array:
    """Of the data's own labels, numbers of classes or probabilities."""
    return jax.grad(lambda z: jnp.sum(DISTRIBUTIONS[name].losses(z, y)))(z)
