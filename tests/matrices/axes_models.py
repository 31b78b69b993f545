"""Flax models for the tests of axes, and short ways to say what was read."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from fisher_optax.matrices.axes import LeafAxes, MatrixAxes
from fisher_optax.matrices.rules import resolve_axes

Tree = dict[str, Any]


def leaf(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def tree(shapes: dict[str, tuple[int, ...]]) -> Tree:
    """{"a/b": (2, 3)} as nested dictionaries of leaves."""
    out: Tree = {}
    for path, shape in shapes.items():
        *modules, name = path.split("/")
        node = out
        for module in modules:
            node = node.setdefault(module, {})
        node[name] = leaf(*shape)
    return out


def params_of(model: nn.Module, *inputs: Any) -> Tree:
    return jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]


def nnx_params(make: Callable[[nnx.Rngs], Any]) -> nnx.State:
    return nnx.state(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param)


def by_path(params: Any, axes: Any = None) -> dict[str, LeafAxes]:
    return {x.path: x for x in resolve_axes(params, axes)}


def groups(params: Any) -> dict[str, str]:
    """Path -> the sizes of "inputs | outputs" or "batch | inputs | outputs", for the leaves that have axes."""

    def show(shape: tuple[int, ...], axes: MatrixAxes) -> str:
        return " | ".join(" ".join(str(shape[i]) for i in g) for g in (axes.batch, axes.inputs, axes.outputs) if g)

    return {x.path: show(x.shape, x.axes) for x in resolve_axes(params) if x.axes is not None}


class MLP(nn.Module):
    bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(7, use_bias=self.bias)(x)
        return nn.Dense(3, use_bias=self.bias)(nn.relu(x))


class ResNetBlock(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.Conv(8, (3, 3), use_bias=False)(x)
        y = nn.Conv(16, (3, 3), use_bias=False)(nn.relu(nn.BatchNorm(use_running_average=True)(y)))
        return nn.BatchNorm(use_running_average=True)(y) + nn.Conv(16, (1, 1), use_bias=False, name="proj")(x)


class Block(nn.Module):
    """A transformer block: width 12, 3 heads of 4, 20 hidden."""

    bias: bool = True
    norm: type[nn.Module] | None = nn.LayerNorm

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = self.norm or (lambda: lambda x: x)
        x = x + nn.MultiHeadDotProductAttention(3, use_bias=self.bias, name="attention")(norm()(x))
        hidden = nn.Dense(20, use_bias=self.bias)(norm()(x))
        return x + nn.Dense(12, use_bias=self.bias)(nn.gelu(hidden))


class Step(nn.Module):
    """A module as the body of `nn.scan`."""

    make: Callable[[], nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array, _: Any) -> tuple[jax.Array, None]:
        return self.make()(x), None


def scanned(make: Callable[[], nn.Module], length: int, axis: int = 0) -> nn.Module:
    return nn.scan(nn.remat(Step), variable_axes={"params": axis}, split_rngs={"params": True}, length=length)(make)


class Twice(nn.Module):
    """A scan of a scan, with a normalisation between the two."""

    make: Callable[[], nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return scanned(self.make, 2)(nn.LayerNorm(name="between")(x), None)[0]


class Experts(nn.Module):
    bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(5, name="router")(nn.LayerNorm()(x))[..., None] * x[..., None, :]
        return nn.vmap(MLP, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=-2)(
            self.bias, name="experts"
        )(x)


class GPT(nn.Module):
    """Two blocks, the head tied to the embedding."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        wte = nn.Embed(11, 12, name="wte")
        x = wte(tokens) + self.param("wpe", nn.initializers.normal(), (6, 12))
        for _ in range(2):
            x = Block(bias=False)(x)
        return wte.attend(nn.LayerNorm(name="ln_f")(x))


X = leaf(2, 6, 12)
IMAGE = leaf(1, 8, 8, 5)
ATTENTION = {"query": "12 | 3 4", "key": "12 | 3 4", "value": "12 | 3 4", "out": "3 4 | 12"}
