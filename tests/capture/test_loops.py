"""Factors through loops equal the sums of the program written out."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fisher_optax import capture
from tests.capture.capture_models import assert_factors, assert_near, captured, normal, params_of, plain_loss, watched
from tests.reference.curvature import factors

pytestmark = pytest.mark.usefixtures("x64")
F64 = {"param_dtype": jnp.float64, "dtype": jnp.float64}
LAYERS = 3


class Layer(nn.Module):
    """The body of a stack."""

    @nn.compact
    def __call__(self, x: jax.Array, _: Any = None) -> tuple[jax.Array, None]:
        return nn.tanh(nn.Dense(x.shape[-1], name="dense", **F64)(x)), None


def stacked(axis: int, remat: bool) -> nn.Module:
    body = nn.remat(Layer) if remat else Layer
    return nn.scan(body, variable_axes={"params": axis}, split_rngs={"params": True}, length=LAYERS)()


class First(nn.Module):
    """A scanned model's final carry."""

    axis: int = 0
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return stacked(self.axis, self.remat)(x, None)[0]


def by_hand(params: Any, x: Any, see: Any) -> Any:
    """The stack, one layer after the other, of kernels ``(L, n, n)`` and biases ``(L, n)``."""
    for i in range(LAYERS):
        x = jnp.tanh(see(str(i), x, x @ params["kernel"][i]) + params["bias"][i])
    return jnp.mean(x**2)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
def test_scanned_stack_has_stacked_factors(axis: int, remat: bool) -> None:
    """Each layer its own sums, in the order of the stack, wherever the kernel counts layers; rematerialised or not. A
    stack's bias joins where kernel and bias count layers first.
    """
    model, x = First(axis, remat), normal(0, 5, 4)
    params = params_of(model, x)
    stats = jax.jit(lambda p: capture.value_and_grad(plain_loss(model))(p, x)[2])(params)
    (dense,) = (s["dense"] for s in stats.values())
    (leaves,) = (jax.tree.map(lambda w: jnp.moveaxis(w, axis, 0), p["dense"]) for p in params.values())
    a, delta = watched(by_hand, leaves, x)
    for i in range(LAYERS):
        left, right = factors(a[str(i)], delta[str(i)], 5, bias=axis == 0)
        assert_near(dense["kernel"].left[i], left)
        assert_near(dense["kernel"].right[i], right)
    assert dense["kernel"].weight == 5
    assert (dense["kernel"].bias is not None) == (axis == 0)


def test_scan_backwards_and_scan_inside_scan() -> None:
    """A loop in reverse, and one over a stack of stacks."""
    W, x = normal(0, 2, 3, 4, 4), normal(1, 5, 4)

    def loss(W: Any, x: Any, see: Any) -> Any:
        del see
        inner = lambda x, W: (jnp.tanh(x @ W), None)  # noqa: E731
        x, _ = jax.lax.scan(lambda x, W: (jax.lax.scan(inner, x, W)[0], None), x, W, reverse=True)
        return jnp.mean(x**2)

    def unrolled(W: Any, x: Any, see: Any) -> Any:
        for i in (1, 0):
            for j in range(3):
                x = jnp.tanh(see(f"{i}{j}", x, x @ W[i, j]))
        return jnp.mean(x**2)

    stats = captured(loss, W, x)
    a, delta = watched(unrolled, W, x)
    assert stats.left.shape == (2, 3, 4, 4)
    for i, j in np.ndindex(2, 3):
        left, right = factors(a[f"{i}{j}"], delta[f"{i}{j}"], 5)
        assert_near(stats.left[i, j], left)
        assert_near(stats.right[i, j], right)


def test_stack_indexed_by_a_python_loop() -> None:
    """``W[i]`` with a number is matrix i of the stack; the default normaliser is the positions of one use."""
    params, x = {"kernel": normal(0, LAYERS, 4, 4), "bias": normal(2, LAYERS, 4)}, normal(1, 5, 4)
    stats = captured(by_hand, params, x)["kernel"]
    a, delta = watched(by_hand, params, x)
    for i in range(LAYERS):
        left, right = factors(a[str(i)], delta[str(i)], 5, bias=True)
        assert_near(stats.left[i], left)
        assert_near(stats.right[i], right)
    assert stats.weight == 5


def recurrent(params: Any, x: Any, see: Any) -> Any:
    """``h_t = tanh(x_t U + h_{t-1} W + b)``, a loop over time."""
    del see

    def step(h: Any, x_t: Any) -> Any:
        h = jnp.tanh(x_t @ params["U"] + (h @ params["W"] + params["b"]))
        return h, h

    return jnp.mean(jax.lax.scan(step, jnp.zeros((x.shape[1], 4)), x)[1] ** 2)


def unrolled(params: Any, x: Any, see: Any) -> Any:
    h, outs = jnp.zeros((x.shape[1], 4)), []
    for t in range(len(x)):
        h = jnp.tanh(x[t] @ params["U"] + (see(str(t), h, h @ params["W"]) + params["b"]))
        outs.append(h)
    return jnp.mean(jnp.stack(outs) ** 2)


def test_shared_weights_sum_over_the_steps_of_a_loop() -> None:
    """A recurrent matrix: all steps' inputs and output gradients are positions of one layer."""
    params, x = {"U": normal(0, 3, 4), "W": normal(1, 4, 4), "b": normal(2, 4)}, normal(3, 6, 5, 3)
    stats = captured(recurrent, params, x)
    a, delta = watched(unrolled, params, x)
    steps = [str(t) for t in range(6)]
    A, D = (np.concatenate([tree[t] for t in steps]) for tree in (a, delta))
    assert_factors(stats["W"], A, D, 30, True)
    assert stats["U"].weight == 30


def test_matrix_of_a_stack_met_again_and_again_is_one_in_a_loop() -> None:
    """Time around a stack of layers: sums over time for each layer, and no samples, which would add up."""
    W, x = normal(0, 2, 3, 3), normal(1, 4, 5, 3)

    def loss(W: Any, x: Any, see: Any) -> Any:
        del see
        layers = lambda h, x_t: (jax.lax.scan(lambda h, W: (jnp.tanh(h @ W), None), h + x_t, W)[0], None)  # noqa: E731
        return jnp.mean(jax.lax.scan(layers, jnp.zeros((5, 3)), x)[0] ** 2)

    assert captured(loss, W, x).weight == 20
    with pytest.raises(ValueError, match="used in a loop: samples do not add up"):
        captured(loss, W, x, kind=capture.LayerSamples(4))


@pytest.mark.parametrize("split", [list, jnp.unstack])
def test_stack_taken_apart_by_iteration(split: Any) -> None:
    """``for W in stack`` is matrix after matrix, as by their numbers."""
    params, x = {"kernel": normal(0, LAYERS, 4, 4), "bias": normal(2, LAYERS, 4)}, normal(1, 5, 4)

    def loss(params: Any, x: Any, see: Any) -> Any:
        return by_hand({name: split(leaf) for name, leaf in params.items()}, x, see)

    stats = captured(loss, params, x)["kernel"]
    wanted = captured(by_hand, params, x)["kernel"]
    assert_near(stats.left, wanted.left)
    assert_near(stats.right, wanted.right)
    assert stats.bias == wanted.bias == "bias"
