"""ResNet-18 for small images in Flax linen: the first convolution is 3 x 3 without a stride, and no pooling follows it.

Source: He et al. 2016 (arXiv 1512.03385), Table 1, with the stem of their CIFAR-10 networks (section 4.2).
"""

import flax.linen as nn
from jaxtyping import Array, Float


class Block(nn.Module):
    """Two convolutions, each followed by a BatchNorm, added to the input, which a 1 x 1 one projects if need be."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"], train: bool) -> Float[Array, "batch h_out w_out features"]:
        y = nn.relu(norm(train, "norm1")(conv(self.features, 3, self.stride, "conv1")(x)))
        y = norm(train, "norm2")(conv(self.features, 3, 1, "conv2")(y))
        if x.shape != y.shape:
            x = norm(train, "norm_shortcut")(conv(self.features, 1, self.stride, "shortcut")(x))
        return nn.relu(x + y)


def conv(features: int, size: int, stride: int, name: str) -> nn.Conv:
    # No bias: the norm that follows would take it out. The paper's padding is the same on all sides; "SAME" is not.
    init = nn.initializers.he_normal()
    return nn.Conv(features, (size, size), stride, padding=size // 2, use_bias=False, kernel_init=init, name=name)


def norm(train: bool, name: str) -> nn.BatchNorm:
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, name=name)


class ResNet(nn.Module):
    """Stages of blocks, each stage twice as wide as the one before, then the mean over the pixels and a dense ``head``.

    With ``train=True`` the norms take mean and variance from the batch and update the collection ``batch_stats``, so
    apply it with ``mutable=["batch_stats"]``; otherwise they take the running ones.

    Args:
        classes: number of logits.
        blocks: how many in each stage; the default is ResNet-18.
        width: channels of the first stage; 64 is the paper's.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> images = jnp.zeros((2, 32, 32, 3))
        >>> variables = jax.eval_shape(ResNet(classes=10).init, jax.random.key(0), images)
        >>> sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
        11173962
    """

    classes: int
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    width: int = 64

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch classes"]:
        x = nn.relu(norm(train, "norm")(conv(self.width, 3, 1, "stem")(images)))
        for stage, count in enumerate(self.blocks):
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                x = Block(self.width * 2**stage, stride, name=f"block_{stage}_{block}")(x, train)
        return nn.Dense(self.classes, name="head")(x.mean(axis=(1, 2)))
