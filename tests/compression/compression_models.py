"""Models that are pruned in tests, and what their layers see, by hand."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

WIDTH = 6


class MLP(nn.Module):
    """Two hidden layers, then a head; each with a bias."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.relu(nn.Dense(8, name="first")(x))
        return nn.Dense(3, name="head")(nn.tanh(nn.Dense(WIDTH, name="second")(x)))


class Body(nn.Module):
    @nn.compact
    def __call__(self, x: Any, _: Any = None) -> Any:
        return x + nn.Dense(WIDTH, name="down")(nn.gelu(nn.Dense(8, name="up")(x))), None


class Scanned(nn.Module):
    """An embedding, a stack of three blocks in one loop, a convolution, and a head."""

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        x = nn.Embed(5, WIDTH, name="embed")(tokens)
        blocks = nn.scan(Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x = blocks(name="blocks")(x, None)[0]
        return nn.Dense(2, name="head")(nn.Conv(4, (3,), name="conv")(x))


class Unrolled(nn.Module):
    """The same blocks one by one."""

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        x = nn.Embed(5, WIDTH, name="embed")(tokens)
        for i in range(3):
            x = Body(name=f"block_{i}")(x)[0]
        return nn.Dense(2, name="head")(nn.Conv(4, (3,), name="conv")(x))


X = jax.random.normal(jax.random.key(0), (40, 4))
TOKENS = jax.random.randint(jax.random.key(1), (7, 5), 0, 5)
BATCHES = [X[:25], X[25:]]


@functools.cache
def mlp() -> tuple[Any, Any]:
    """Bound once, so that its programs are compiled once; with biases that are not 0."""
    model = MLP()
    params = model.init(jax.random.key(2), X)["params"]
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape), params)
    return lambda p, x: model.apply({"params": p}, x), params


@functools.cache
def scanned() -> tuple[Any, Any]:
    model = Scanned()
    return model.apply, model.init(jax.random.key(3), TOKENS)


def moment(x: Any) -> np.ndarray:
    x = np.asarray(x, np.float64).reshape(-1, np.shape(x)[-1])
    return x.T @ x / len(x)


def dense(layer: Any, x: Any) -> np.ndarray:
    return np.asarray(x, np.float64) @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer["bias"], np.float64)


V, D = 12, 8
TEXTS = jax.random.randint(jax.random.key(0), (6, 5), 0, V)


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def language_model(end: Any) -> Any:
    """Of a table, as many places, hidden matrices stored outputs first, one of that length too, and some head."""

    def apply(p: Any, tokens: Any) -> Any:
        x = p["table"][tokens] + p["places"][jnp.arange(tokens.shape[-1])]
        return end(p, jnp.tanh(jnp.tanh(x @ p["hidden"].T) @ p["up"].T) @ p["down"].T)

    return apply


BODY = {"table": normal(2, V, D), "places": normal(3, V, D)}
BODY |= {"hidden": normal(4, D, D), "up": normal(7, V, D), "down": normal(8, D, V)}
ENDS = {
    "tied": ({}, lambda p, h: h @ p["table"].T, {}),
    "outputs first": ({"out": normal(5, V, D)}, lambda p, h: h @ p["out"].T, {"out": 0}),
    "inputs first, with a bias": (
        {"out": normal(5, D, V), "plus": normal(6, V)},
        lambda p, h: h @ p["out"] + p["plus"],
        {"out": 1},
    ),
    "scaled and capped": (
        {"out": normal(5, D, V), "scale": jnp.ones(())},
        lambda p, h: 3 * jnp.tanh(p["scale"] * (h @ p["out"]) / 3),
        {"out": 1},
    ),
    "as log-probabilities under remat": (
        {"out": normal(5, D, V)},
        lambda p, h: jax.checkpoint(lambda w, h: jax.nn.log_softmax(h @ w))(p["out"], h),
        {"out": 1},
    ),
}
