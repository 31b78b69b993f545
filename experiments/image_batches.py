"""How images become what a step or an evaluation reads: their scale, order, augmentation and batches."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from experiments.images import Part

EVAL_BATCH = 500
EDGE = 4  # pixels that a random crop moves an image at most

Raw = UInt8[Array, "batch height width channels"]
Inputs = Float[Array, "batch height width channels"]


class Scale(NamedTuple):
    """Of the training images, a number a channel: with it, pixels have mean 0 and variance 1."""

    mean: Float[Array, " channels"]
    std: Float[Array, " channels"]


def scale_of(part: Part) -> Scale:
    mean = part.images.mean((0, 1, 2), dtype=np.float64)
    std = part.images.std((0, 1, 2), dtype=np.float64)
    return Scale(*(jnp.asarray(a, jnp.float32) for a in (mean, np.maximum(std, 1))))  # 1: one level, of all one colour


def standardize(images: Raw, scale: Scale) -> Inputs:
    return (images.astype(jnp.float32) - scale.mean) / scale.std


@functools.partial(jax.jit, static_argnums=2)
def shuffled(key: PRNGKeyArray, epoch: Array, examples: int) -> Int[Array, " examples"]:
    """The order of the images in an epoch."""
    return jax.random.permutation(jax.random.fold_in(jax.random.fold_in(key, 0), epoch), examples)


def crop_and_flip(images: Inputs, key: PRNGKeyArray) -> Inputs:
    """Each image moved by up to `EDGE` pixels either way over zeros, the mean of all, and mirrored or not."""
    crop_key, flip_key = jax.random.split(key)
    count, height, width, channels = images.shape
    padded = jnp.pad(images, ((0, 0), (EDGE, EDGE), (EDGE, EDGE), (0, 0)))
    corners = jax.random.randint(crop_key, (count, 2), 0, 2 * EDGE + 1)

    def crop(image: Array, corner: Array) -> Array:
        return jax.lax.dynamic_slice(image, (*corner, 0), (height, width, channels))

    flipped = jax.random.bernoulli(flip_key, 0.5, (count, 1, 1, 1))
    cropped = jax.vmap(crop)(padded, corners)
    return jnp.where(flipped, cropped[:, :, ::-1], cropped)


def evenly_spaced(part: Part, count: int) -> Part:
    chosen = np.linspace(0, len(part.labels) - 1, min(count, len(part.labels))).astype(int)
    return Part(part.images[chosen], part.labels[chosen])


class Batches(NamedTuple):
    """All images of an evaluation in batches of one size; what fills up the last one is not ``valid``."""

    images: UInt8[np.ndarray, "batches batch height width channels"]
    labels: Int[np.ndarray, "batches batch"]
    valid: Bool[np.ndarray, "batches batch"]


def in_batches(part: Part) -> Batches:
    count, size = len(part.labels), min(EVAL_BATCH, len(part.labels))
    batches = -(-count // size)
    wrapped = np.arange(batches * size)
    arrays = (part.images[wrapped % count], part.labels[wrapped % count], wrapped < count)
    return Batches(*(array.reshape(batches, size, *array.shape[1:]) for array in arrays))
