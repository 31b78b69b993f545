"""What importances cost on a 10.7M-parameter GPT, from the compiled program and the jaxpr. Nothing is run."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import fisher_optax as fo
from benchmarks.harness import nbytes
from experiments.flops import count_matmul_flops
from experiments.models.gpt import GPT
from fisher_optax.fisher.diagonals import diagonal as diagonals
from fisher_optax.fisher.diagonals.squares import Labels

MICROBATCH = 4


def gpt(layers: int, length: int, batch: int = MICROBATCH) -> tuple[Any, Any, Any, Any]:
    """An example's loss, the batch's, and shapes of parameters and texts. Six layers are 10.7M parameters."""
    model = GPT(vocabulary=65, context=256, layers=layers, width=384, heads=6)

    def example_loss(params: Any, tokens: Any) -> Any:
        return fo.losses.softmax_cross_entropy(model.apply({"params": params}, tokens[None, :-1])[0], tokens[1:])

    batch_loss = lambda p, t: jnp.mean(jax.vmap(example_loss, (None, 0))(p, t))  # noqa: E731
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 256), jnp.int32))["params"]
    return example_loss, batch_loss, params, jax.ShapeDtypeStruct((batch, length), jnp.int32)


def step_of(unit: str, groups: Any, example_loss: Any, params: Any, tokens: Any) -> tuple[Any, ...]:
    """The step of `fo.fisher.diagonal`, and its arguments."""
    rule = diagonals.Settings(example_loss, unit, Labels(), groups, None, MICROBATCH)
    state = jax.eval_shape(lambda p, t: diagonals._start(rule, p, t, None), params, tokens)
    return (lambda *args: diagonals._step(rule, *args, None)), state, params, tokens


def test_positions_cost_at_most_2_2_gradients_of_the_batch() -> None:
    example_loss, batch_loss, params, tokens = gpt(layers=6, length=257)
    assert 10.6e6 < sum(x.size for x in jax.tree.leaves(params)) < 10.9e6
    gradient = count_matmul_flops(jax.jit(jax.grad(batch_loss)), params, tokens).most
    with pytest.warns(UserWarning, match="without it stay 'block_0/norm_attention/scale'"):
        step, *arguments = step_of("position", None, example_loss, params, tokens)
    with warnings.catch_warnings(action="ignore"):
        ours = count_matmul_flops(jax.jit(step), *arguments).most
    assert gradient < ours <= 2.2 * gradient


def temporary(fn: Any, *arguments: Any) -> int:
    """Bytes that the compiled program needs beside its arguments and results."""
    return jax.jit(fn).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.filterwarnings("ignore:unit='position' sees")
def test_memory_is_bounded_by_the_microbatch_not_by_the_batch() -> None:
    """Beside what one gradient of the microbatch needs, on texts so short that its activations are little: squares of a
    microbatch, and the state that they are merged into. With groups, squares of one leaf at a time.
    """
    example_loss, batch_loss, params, tokens = gpt(layers=1, length=9)
    size, gradient = nbytes(params), temporary(jax.grad(batch_loss), params, tokens)
    assert gradient < size / 4

    def of(unit: str, groups: Any = None, batch: int = MICROBATCH) -> int:
        given = jax.ShapeDtypeStruct((batch, 9), jnp.int32)
        return temporary(*step_of(unit, groups, example_loss, params, given))

    largest = max(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    assert of("sequence", batch=4 * MICROBATCH) <= gradient + (MICROBATCH + 2) * size
    assert of("token") <= gradient + (MICROBATCH + 3) * size
    assert of("sequence", "rows", batch=4 * MICROBATCH) <= gradient + (MICROBATCH + 2) * largest
    assert of("position") <= gradient + size / 4


@pytest.mark.parametrize("unit", ("sequence", "token"))
def test_all_labels_of_a_vocabulary_need_the_memory_of_some_scores(unit: str) -> None:
    """One label's at a time, where all of them would be length x vocabulary² numbers an example."""
    words, length, width = 500, 6, 4
    loss = lambda W, e: fo.losses.softmax_cross_entropy(e[0] @ W, e[1])  # noqa: E731
    rule = diagonals.Settings(loss, unit, Labels("true"), None, None, MICROBATCH)
    W = jax.ShapeDtypeStruct((width, words), jnp.float32)
    batch = (
        jax.ShapeDtypeStruct((MICROBATCH, length, width), jnp.float32),
        jax.ShapeDtypeStruct((MICROBATCH, length), jnp.int32),
    )
    state = jax.eval_shape(lambda W, b: diagonals._start(rule, W, b, None), W, batch)
    used = temporary(lambda *args: diagonals._step(rule, *args, None), state, W, batch)
    pass_ = MICROBATCH * (length * words + words * width) * 4
    assert used < 20 * pass_ < MICROBATCH * length * words**2 * 4 / 10
