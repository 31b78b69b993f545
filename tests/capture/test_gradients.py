"""Value, gradients and aux are those of `jax.value_and_grad`, whatever the parameters and arguments are."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze

from fisher_optax import capture
from fisher_optax.statistics import LayerFactors
from tests.capture.capture_models import normal, params_of, plain_loss
from tests.comparisons import assert_same_bits
from tests.matrices.axes_models import GPT, Block, Twice


def assert_alike(actual: Any, wanted: Any, tolerance: float = 1e-12) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(wanted)
    for (path, x), y in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(wanted), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype
        error = np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-3)
        assert error <= tolerance, f"{jax.tree_util.keystr(path)}: off by {error}"


CONVOLUTIONAL = nn.Sequential(
    [
        nn.Conv(4, (3, 3)),
        nn.relu,
        lambda x: nn.avg_pool(x, (2, 2)),
        nn.Conv(2, (2, 2)),
        nn.gelu,
        lambda x: x.mean((1, 2)),
    ]
)
MODELS: dict[str, tuple[nn.Module, Callable[[], Any]]] = {
    "transformer": (GPT(), lambda: jnp.arange(12).reshape(2, 6) % 11),
    "scanned twice": (Twice(partial(nn.Dense, 4)), lambda: normal(0, 3, 4)),
    "convolutions": (CONVOLUTIONAL, lambda: normal(0, 2, 4, 4, 3)),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", MODELS)
def test_value_and_gradients_are_those_of_jax(name: str) -> None:
    """In float64, of linen models with loops, remat, attention and convolutions."""
    model, inputs = MODELS[name]
    x = inputs()
    params, loss = params_of(model, x), plain_loss(model)
    wanted = jax.jit(jax.value_and_grad(loss))(params, x)
    assert_alike(jax.jit(lambda p, x: capture.value_and_grad(loss)(p, x)[:2])(params, x), wanted)


@pytest.mark.parametrize("jitted", [False, True])
def test_forward_pass_in_bfloat16_is_bitwise_that_of_jax(jitted: bool) -> None:
    """A tap is the identity, and no equation changes: half-precision compute rounds where it did."""
    x = jax.random.normal(jax.random.key(1), (4, 3))
    model = nn.Sequential([nn.Dense(5, dtype=jnp.bfloat16), nn.tanh, nn.Dense(3, dtype=jnp.bfloat16)])
    params = model.init(jax.random.key(0), x)["params"]

    def loss(p: Any, x: Any) -> Any:
        y = model.apply({"params": p}, x)
        return jnp.sum(jnp.square(y.astype(jnp.float32))), y

    plain, ours = jax.value_and_grad(loss, has_aux=True), capture.value_and_grad(loss, has_aux=True)
    if jitted:
        plain, ours = jax.jit(plain), jax.jit(ours)
    wanted, wanted_grads = plain(params, x)
    value, grads, stats = ours(params, x)
    assert_same_bits(value, wanted)
    assert_alike(grads, wanted_grads, 1e-2)
    kernel = stats["layers_0"]["kernel"]
    assert kernel.left.dtype == kernel.right.dtype == jnp.float32


def test_half_precision_parameters_have_float32_statistics() -> None:
    """Sums are taken in float32 at least, whatever the parameters' dtype; gradients keep it."""
    W, x = jnp.ones((3, 2), jnp.bfloat16) / 3, jnp.arange(6.0, dtype=jnp.bfloat16).reshape(2, 3)
    value, grads, stats = capture.value_and_grad(lambda W, x: jnp.mean((x @ W).astype(jnp.float32)))(W, x)
    assert (value.dtype, grads.dtype, stats.left.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    exact = np.asarray(x, np.float64)
    np.testing.assert_allclose(stats.left, exact.T @ exact / 2, rtol=1e-6)


def scale_of(name: str | None, squared: bool, f: Callable[[Any], Any]) -> Callable[[Any], Any]:
    assert isinstance(squared, bool)
    return lambda y: f(y) ** 2 if squared else f(y)


def test_what_is_no_array_reaches_the_loss_as_it_is() -> None:
    """Strings, None, flags, numbers and functions, by place and by name, and NumPy arrays as shapes to compute with."""
    shape = np.array([2, 3])

    def loss(W: Any, x: Any, name: Any, nothing: Any, squared: Any, *, f: Any, shape: Any, times: Any) -> Any:
        assert name == "mean"
        assert nothing is None
        assert isinstance(times, int)
        y = x.reshape(tuple(shape)) @ W
        return getattr(jnp, name)(scale_of(name, squared, f)(y)) * times

    given = (jnp.ones((3, 2)), jnp.arange(6.0), "mean", None, True)
    named = {"f": jnp.tanh, "shape": shape, "times": 2}
    wanted = jax.value_and_grad(loss)(*given, **named)
    assert_alike(capture.value_and_grad(loss)(*given, **named)[:2], wanted, 1e-6)


def test_aux_is_any_structure() -> None:
    """Aux comes back whole: a structure with None, integers and arrays that depend on the parameters."""

    def loss(W: Any, x: Any) -> Any:
        y = x @ W
        return jnp.mean(y), {"y": y, "none": None, "count": jnp.arange(3), "pair": (y.sum(), [y[0]])}

    args = jnp.ones((3, 2)), jnp.arange(6.0).reshape(2, 3)
    assert_alike(capture.value_and_grad(loss, has_aux=True)(*args)[0], jax.value_and_grad(loss, has_aux=True)(*args)[0])


class Pair(NamedTuple):
    W: Any
    b: Any


CONTAINERS: dict[str, tuple[Callable[[Any, Any], Any], Callable[[Any], tuple[Any, Any]], str]] = {
    # makes the parameters of W and b; reads (W, b) off them; the path of b
    "dict": (lambda W, b: {"W": W, "b": b}, lambda p: (p["W"], p["b"]), "b"),
    "list of tuples": (lambda W, b: [(W, b)], lambda p: p[0], "0/1"),
    "NamedTuple": (Pair, lambda p: (p.W, p.b), "b"),
    "FrozenDict": (
        lambda W, b: freeze({"layer": {"W": W, "b": b}}),
        lambda p: (p["layer"]["W"], p["layer"]["b"]),
        "layer/b",
    ),
    "nnx.State": (
        lambda W, b: nnx.State({"W": nnx.Param(W), "b": nnx.Param(b)}),
        lambda p: (p["W"].get_value(), p["b"].get_value()),
        "b",
    ),
    "Partitioned": (
        lambda W, b: {"W": nn.Partitioned(W, (None, "model")), "b": nn.Partitioned(b, ("model",))},
        lambda p: (p["W"].value, p["b"].value),
        "b",
    ),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_statistics_have_the_structure_of_the_parameters(name: str) -> None:
    """In any container: gradients are JAX's, the kernel's place holds its factors, the bias's None, and boxes stay."""
    make, read, path = CONTAINERS[name]
    params, x = make(jnp.full((3, 2), 0.5), jnp.ones(2)), jnp.arange(6.0).reshape(2, 3)

    def loss(p: Any, x: Any) -> Any:
        W, b = read(p)
        return jnp.mean((x @ W + b) ** 2)

    value, grads, stats = jax.jit(capture.value_and_grad(loss))(params, x)
    assert_alike((value, grads), jax.value_and_grad(loss)(params, x), 1e-6)
    factors, nothing = read(stats)
    assert isinstance(factors, LayerFactors)
    assert factors.bias == path
    assert nothing is None
    assert factors.left.shape == (3 + 1, 3 + 1)
    leaf = lambda x: x is None or isinstance(x, LayerFactors)  # noqa: E731
    assert jax.tree.structure(stats, is_leaf=leaf) == jax.tree.structure(params)


@pytest.mark.usefixtures("x64")
def test_it_can_be_mapped_and_differentiated() -> None:
    """`jax.vmap` over parameters stacks the statistics; the value can be differentiated again."""
    W, x = normal(0, 4, 3, 2), normal(1, 5, 3)
    grad_fn = capture.value_and_grad(lambda W, x: jnp.mean(jnp.tanh(x @ W) ** 2))
    mapped = jax.vmap(grad_fn, (0, None))(W, x)
    for i in range(4):
        assert_alike(jax.tree.map(lambda s, i=i: s[i], mapped), grad_fn(W[i], x))
    twice = jax.grad(lambda W: jnp.sum(grad_fn(W, x)[1] ** 2))(W[0])
    exact = jax.grad(lambda W: jnp.sum(jax.grad(lambda W: jnp.mean(jnp.tanh(x @ W) ** 2))(W) ** 2))(W[0])
    assert_alike(twice, exact)


def test_a_block_of_its_own_with_no_bias_leaves_norms_alone() -> None:
    """Parameters that are no factor of a product have None, and their gradients all the same."""
    model, x = Block(bias=False), jax.random.normal(jax.random.key(0), (2, 3, 12))
    params = model.init(jax.random.key(1), x)["params"]
    stats = jax.eval_shape(lambda p: capture.value_and_grad(plain_loss(model))(p, x)[2], params)
    assert stats["LayerNorm_0"] == {"bias": None, "scale": None}
    assert stats["attention"]["query"]["kernel"].left.shape == (12, 12)
    assert stats["attention"]["out"]["kernel"].right.shape == (12, 12)
