"""A small convolutional network in Flax linen: two convolutions, a pooling, two dense layers.

Source: the shape of LeNet-5 (LeCun et al. 1998), with ReLU and a stride in place of its first pooling.
"""

import flax.linen as nn
from jaxtyping import Array, Float


class CNN(nn.Module):
    """Convolutions with 16 and 32 channels, then a hidden layer of 128; every layer has a bias.

    Each weight is the kernel of a `flax.linen.Conv` (``conv1``, ``conv2``) or a `flax.linen.Dense` (``hidden``,
    ``head``). An image of h x w pixels reaches ``hidden`` as 32 x h/4 x w/4 numbers, so h and w are at least 4.

    Args:
        classes: number of logits.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> images = jnp.zeros((2, 28, 28, 1))
        >>> params = CNN(classes=10).init(jax.random.key(0), images)["params"]
        >>> CNN(classes=10).apply({"params": params}, images).shape
        (2, 10)
        >>> sum(leaf.size for leaf in jax.tree.leaves(params))
        206922
    """

    classes: int

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch classes"]:
        del train  # it computes the same in training and afterwards
        x = nn.relu(nn.Conv(16, (3, 3), name="conv1")(images))
        x = nn.relu(nn.Conv(32, (3, 3), strides=2, name="conv2")(x))
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.Dense(128, name="hidden")(x.reshape(len(x), -1)))
        return nn.Dense(self.classes, name="head")(x)
