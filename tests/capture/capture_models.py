"""Programs to capture, and an oracle that sees the inputs and output gradients of their layers without any tap of ours.

A program here takes ``see(name, a, y)``, to be called with the input and the output of each product that is to be
compared: the program under test gets one that returns ``y``, the oracle one that adds zeros and differentiates by them.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fisher_optax import capture
from tests.reference.curvature import factors

TIGHT = 1e-10  # in float64, of a Frobenius norm


def normal(seed: int, *shape: int, dtype: Any = None) -> Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype or jnp.float64)


def unseen(name: str, a: Any, y: Any) -> Any:
    """What the program under test gets."""
    del name, a
    return y


def watched(loss: Callable[..., Any], params: Any, *args: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs, and the gradients of ``loss(params, *args, see)`` at the outputs, of each product shown to ``see``."""
    shapes: dict[str, Any] = {}

    def measure(name: str, a: Any, y: Any) -> Any:
        shapes[name] = jax.ShapeDtypeStruct(y.shape, y.dtype)
        return y

    jax.eval_shape(lambda p: loss(p, *args, measure), params)

    def probed(zeros: dict[str, Array]) -> tuple[Array, dict[str, Any]]:
        inputs = {}

        def see(name: str, a: Any, y: Any) -> Any:
            inputs[name] = a
            return y + zeros[name]

        return loss(params, *args, see), inputs

    zeros = {name: jnp.zeros(x.shape, x.dtype) for name, x in shapes.items()}
    gradients, inputs = jax.jit(jax.grad(probed, has_aux=True))(zeros)
    return inputs, gradients


def captured(loss: Callable[..., Any], params: Any, *args: Any, kind: Any = None, **options: Any) -> Any:
    """Statistics of ``loss(params, *args, see)`` by the package."""
    grad_fn = capture.value_and_grad(lambda p, *args: loss(p, *args, unseen), kind, **options)
    return jax.jit(lambda *args: grad_fn(*args)[2])(params, *args)


def flax_loss(
    model: nn.Module, kinds: tuple[type, ...] = (nn.Dense, nn.DenseGeneral, nn.Conv, nn.ConvTranspose)
) -> Any:
    """``loss(params, *args, see)`` of a linen model: the mean square of what it returns; modules are shown by path."""

    def loss(params: Any, *args: Any) -> Array:
        *inputs, see = args

        def interceptor(call: Any, given: Any, kwargs: Any, context: Any) -> Any:
            y = call(*given, **kwargs)
            shown = isinstance(context.module, kinds) and context.method_name == "__call__"
            return see("/".join(context.module.path), given[0], y) if shown else y

        with nn.intercept_methods(interceptor):
            return jnp.mean(jnp.square(model.apply({"params": params}, *inputs)))

    return loss


def plain_loss(model: nn.Module) -> Callable[..., Array]:
    """The same, without anything that looks on."""
    return lambda params, *inputs: jnp.mean(jnp.square(model.apply({"params": params}, *inputs)))


def params_of(model: nn.Module, *inputs: Any) -> Any:
    """Random in every leaf, biases too, in the dtype of floats."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    leaves, structure = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    made = [jax.random.normal(k, x.shape, jnp.float64) / 2 for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, made)


def assert_factors(
    stats: Any, a: Any, delta: Any, N: float, bias: bool = False, axes: tuple[int, int] = (1, 1)
) -> None:
    """``left`` and ``right`` are the dense sums over these inputs and output gradients."""
    left, right = factors(a, delta, N, bias, axes)
    assert_near(stats.left, left)
    assert_near(stats.right, right)
    assert (stats.bias is not None) == bias


def assert_near(x: Any, wanted: Any, tolerance: float = TIGHT) -> None:
    x, wanted = np.asarray(x, np.float64), np.asarray(wanted, np.float64)
    assert x.shape == wanted.shape
    error, norm = np.linalg.norm(x - wanted), np.linalg.norm(wanted)
    assert norm > 0
    assert error <= tolerance * norm, f"off by {error} of {norm}"
