"""What statistics add to a gradient, read from the program: products from its jaxpr, memory from the compiler's own
count. Nothing is run, so it holds on every machine of the platform.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import fisher_optax as fo
from benchmarks.harness import nbytes
from benchmarks.steps import peak_bytes
from experiments.flops import count_matmul_flops
from experiments.models.gpt import Block
from experiments.models.small import Model, gpt, of_flax

LAYERS, WIDTH, BATCH, CONTEXT = 6, 384, 64, 256  # 10.7M parameters
SIDES = ((WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH))  # of a block's layers
OWN = 2 * BATCH * CONTEXT * LAYERS * sum(m**2 + n**2 for m, n in SIDES)  # flops of their factors: 2 N (m² + n²) each


def shapes(model: Model) -> tuple[Any, ...]:
    """The arguments of a model's loss."""
    return tuple(jax.eval_shape(lambda key: (model.init(key), *model.draw(key)), jax.random.key(0)))


def flops(statistics: Any) -> int:
    """Of a gradient of the GPT with these statistics, or none."""
    model = gpt(batch=BATCH)
    plain = jax.value_and_grad(model.loss_fn)
    grad_fn = plain if statistics is None else fo.value_and_grad(model.loss_fn, statistics)
    return count_matmul_flops(jax.jit(grad_fn), *shapes(model)).most


def test_factors_cost_their_own_products() -> None:
    """No product of the gradient is made twice; 5% are left for the embeddings' factors."""
    assert flops(fo.KroneckerFactors()) <= OWN + 1.05 * flops(None)


@pytest.mark.parametrize(
    ("statistics", "most"), [(fo.KroneckerFactors(max_examples=2048), 1.25), (fo.LayerSamples(64), 1.05)]
)
def test_estimates_are_a_small_part_of_the_gradient(statistics: Any, most: float) -> None:
    """2048 of 16384 positions is the largest power of two that fits; samples need no products at all."""
    assert flops(statistics) <= most * flops(None)


class _Layer(nn.Module):
    """A block as a scan wants it."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return Block(LAYERS, heads=4, dropout=0.0, bias=True, dtype=jnp.dtype("float32"))(x, train=True), None


class _Scanned(nn.Module):
    """A GPT whose blocks are one loop that keeps only its carry, and makes the rest anew on the way back."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": LAYERS}
        x, _ = nn.scan(nn.remat(_Layer), **options)()(nn.Embed(65, 64)(tokens), None)
        return nn.Dense(65)(x)


def scanned() -> Model:
    """It has little memory to spare in which to hide: its plain gradient keeps 6 x 1024 x 64 numbers of the loop."""
    small = gpt(batch=16, context=64)
    return of_flax(_Scanned(), jnp.zeros((1, 64), jnp.int32), small.loss, small.draw, small.max_examples)


def peak(fn: Callable[..., Any], arguments: tuple[Any, ...]) -> int:
    return peak_bytes(jax.jit(fn).lower(*arguments).compile())


@pytest.mark.parametrize("make", [gpt, scanned])
def test_memory_grows_by_the_statistics_alone(make: Callable[[], Model]) -> None:
    """At most 1.15 times what the plain gradient needs, and the bytes of the statistics: nothing of the size of
    positions x width is kept. The 10.7M-parameter GPT is compiled for a batch of 8.
    """
    model = make()
    arguments = shapes(model)
    plain = peak(jax.value_and_grad(model.loss_fn), arguments)
    assert plain > nbytes(arguments[0])  # the compiler has counted: the gradients alone are as much
    for statistics in (fo.KroneckerFactors(), fo.LayerSamples(64), fo.InputGram()):
        grad_fn = fo.value_and_grad(model.loss_fn, statistics)
        kept = nbytes(jax.eval_shape(grad_fn, *arguments)[2])
        assert peak(grad_fn, arguments) <= 1.15 * plain + kept, statistics
