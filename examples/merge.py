"""Merges two networks that were tuned on two tasks into one, weighted by what each task's Fisher says it needs.

    pip install 'fisher_optax[flax]' scikit-learn && python merge.py

prints

    test accuracy, mean of 3 seeds    turned  negative      both
    base                                9.1%      7.8%      8.4%
    tuned on turned                    94.8%     16.8%     55.8%
    tuned on negative                  15.7%     95.4%     55.6%
    average                            68.6%     62.2%     65.4%
    Fisher-weighted                    73.1%     70.3%     71.7%
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import fisher_optax as fo

SEEDS, BASE_EPOCHS, EPOCHS, BATCH = 3, 2, 5, 64


class CNN(nn.Module):
    """Two convolutions, a pooling and two dense layers, for images (batch, 8, 8, 1)."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (3, 3))(x))
        x = nn.relu(nn.Conv(32, (3, 3), strides=2)(x))
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.Dense(128)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


model, tx = CNN(), optax.adam(2e-3)
TASKS = {
    "turned": lambda images: np.rot90(images, axes=(1, 2)),
    "negative": lambda images: -images,
}


def loss_fn(params, x, y):
    return fo.losses.softmax_cross_entropy(model.apply(params, x), y)


@jax.jit
def predict(params, x):
    return model.apply(params, x).argmax(1)


@jax.jit
def step(params, state, x, y):
    updates, state = tx.update(jax.grad(loss_fn)(params, x, y), state)
    return optax.apply_updates(params, updates), state


def train(params, x, y, epochs):
    state, rng = tx.init(params), np.random.default_rng(0)
    for _ in range(epochs):
        for batch in rng.permutation(len(x))[: len(x) // BATCH * BATCH].reshape(-1, BATCH):
            params, state = step(params, state, x[batch], y[batch])
    return params


def accuracies(params, x, y):
    return [float((predict(params, change(x)) == y).mean()) for change in TASKS.values()]


def best_of_merged(models, fishers, x, y):
    """Of the merged models for eleven weights of the second task, the best one on validation images."""
    weights = [(1 - c, c) for c in np.linspace(0, 1, 11)]
    merged = [fo.compression.merge(models, fishers, coefficients=c, normalize=True).params for c in weights]
    return max(merged, key=lambda params: sum(accuracies(params, x, y)))


def example_loss(params, example):
    return loss_fn(params, example[0][None], example[1][None])


def fisher_of(params, x, y):
    """The diagonal of a task's Fisher: mean squared gradients of single examples, with labels drawn from the model."""
    return fo.fisher.diagonal(example_loss, params, [(x, y)], fisher="mc", key=jax.random.key(1), microbatch=32)


def main():
    digits = load_digits()
    images = ((digits.images[..., None] - 4.9) / 6.0).astype(np.float32)  # about mean 0 and deviation 1
    x, x_test, y, y_test = train_test_split(images, digits.target, test_size=0.2, random_state=0)
    x, x_valid, y, y_valid = train_test_split(x, y, test_size=0.2, random_state=0)
    found = {}
    for seed in range(SEEDS):
        base = train(model.init(jax.random.key(seed), x[:1]), x, y, BASE_EPOCHS)
        tuned = [train(base, change(x), y, EPOCHS) for change in TASKS.values()]
        fishers = [fisher_of(p, change(x)[:512], y[:512]) for p, change in zip(tuned, TASKS.values(), strict=True)]
        same = [jax.tree.map(jnp.ones_like, base)] * 2
        models = {
            "base": base,
            **{f"tuned on {task}": params for task, params in zip(TASKS, tuned, strict=True)},
            "average": best_of_merged(tuned, same, x_valid, y_valid),
            "Fisher-weighted": best_of_merged(tuned, fishers, x_valid, y_valid),
        }
        for name, params in models.items():
            found.setdefault(name, []).append(accuracies(params, x_test, y_test))
    print(f"test accuracy, mean of {SEEDS} seeds" + "".join(f"{task:>10}" for task in (*TASKS, "both")))
    for name, values in found.items():
        mean = np.mean(values, 0)
        print(f"{name:30}" + "".join(f"{accuracy:10.1%}" for accuracy in (*mean, mean.mean())))


if __name__ == "__main__":
    main()
