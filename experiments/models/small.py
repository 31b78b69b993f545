"""Three networks with their losses and made-up data, for what times or counts a training step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

import fisher_optax as fo
from experiments.models.cnn import CNN
from experiments.models.gpt import GPT


class Model(NamedTuple):
    """A network with its loss, and the means to start and to feed it."""

    init: Callable[[Any], Any]  # key -> params
    logits: Callable[[Any, Any], Any]  # (params, x) -> logits
    loss: Callable[[Any, Any], Any]  # (logits, y) -> scalar, one of `fo.losses`
    draw: Callable[[Any], tuple[Any, Any]]  # key -> (x, y)
    max_examples: int  # about a quarter of the positions of a batch; of a convolution's many, fewer

    def loss_fn(self, params: Any, x: Any, y: Any) -> Any:
        """What is trained."""
        return self.loss(self.logits(params, x), y)


def of_flax(net: nn.Module, x: Any, loss: Callable[..., Any], draw: Callable[..., Any], max_examples: int) -> Model:
    """A Flax module whose inputs are like ``x``."""
    return Model(
        lambda key: net.init(key, x)["params"],
        lambda params, x: net.apply({"params": params}, x),
        loss,
        draw,
        max_examples,
    )


class Autoencoder(nn.Module):
    """784-1000-500-250-30-250-500-1000-784 with biases, of Hinton and Salakhutdinov 2006, here with tanh."""

    widths: tuple[int, ...] = (1000, 500, 250, 30, 250, 500, 1000)

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for width in self.widths:
            x = nn.tanh(nn.Dense(width)(x))
        return nn.Dense(784)(x)


def mlp(batch: int = 500) -> Model:
    """The autoencoder on random numbers between 0 and 1."""

    def draw(key: Any) -> tuple[Any, Any]:
        x = jax.random.uniform(key, (batch, 784))
        return x, x

    return of_flax(Autoencoder(), jnp.zeros((1, 784)), fo.losses.sigmoid_cross_entropy, draw, batch // 4)


def cnn(batch: int = 256) -> Model:
    """The CNN of `experiments.train_images` on random images of 28 x 28."""

    def draw(key: Any) -> tuple[Any, Any]:
        images, labels = jax.random.split(key)
        return jax.random.uniform(images, (batch, 28, 28, 1)), jax.random.randint(labels, (batch,), 0, 10)

    return of_flax(CNN(classes=10), jnp.zeros((1, 28, 28, 1)), fo.losses.softmax_cross_entropy, draw, 32 * batch)


def gpt(batch: int = 8, layers: int = 6, width: int = 384, heads: int = 6, context: int = 256) -> Model:
    """The character GPT of `experiments.train_gpt`, 10.7M parameters as it stands, on random characters."""

    def draw(key: Any) -> tuple[Any, Any]:
        text = jax.random.randint(key, (batch, context + 1), 0, 65)
        return text[:, :-1], text[:, 1:]

    tokens, net = jnp.zeros((1, context), jnp.int32), GPT(65, context, layers, width, heads)
    return of_flax(net, tokens, fo.losses.softmax_cross_entropy, draw, batch * context // 4)


MODELS: dict[str, Callable[[], Model]] = {"mlp": mlp, "cnn": cnn, "gpt": gpt}
