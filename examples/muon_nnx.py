"""Muon in a `flax.nnx.Optimizer`: a small vision transformer on scikit-learn's digits.

    pip install 'fisher_optax[flax]' scikit-learn && python muon_nnx.py

OUTPUT
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import fisher_optax as fo

EPOCHS, BATCH, WIDTH = 10, 64, 64


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm1, self.norm2 = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, WIDTH, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs), nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Transformer(nnx.Module):
    """Sixteen patches of 2 x 2 pixels, with a learned position each."""

    def __init__(self, rngs):
        self.patches = nnx.Linear(4, WIDTH, rngs=rngs)
        self.position = nnx.Embed(16, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.norm, self.head = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.Linear(WIDTH, 10, rngs=rngs)

    def __call__(self, images):  # (batch, 8, 8)
        x = images.reshape(-1, 4, 2, 4, 2).swapaxes(2, 3).reshape(-1, 16, 4)
        x = self.patches(x) + self.position(jnp.arange(16))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


@nnx.jit
def step(model, optimizer, x, y):
    def loss_fn(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return loss


def main():
    digits = load_digits()
    split = train_test_split((digits.images / 16).astype(np.float32), digits.target, test_size=0.2, random_state=0)
    x, x_test, y, y_test = split
    model = Transformer(nnx.Rngs(0))
    steps = EPOCHS * (len(x) // BATCH)
    tx = fo.muon(optax.cosine_decay_schedule(1e-2, steps))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    print(fo.report(tx, nnx.state(model, nnx.Param)))
    rng = np.random.default_rng(0)
    for epoch in range(EPOCHS):
        order = rng.permutation(len(x))[: len(x) // BATCH * BATCH].reshape(-1, BATCH)
        losses = [step(model, optimizer, x[batch], y[batch]) for batch in order]
        accuracy = (model(x_test).argmax(1) == y_test).mean()
        print(f"epoch {epoch + 1}: training loss {np.mean(losses):.4f}, test accuracy {accuracy:.1%}")


if __name__ == "__main__":
    main()
