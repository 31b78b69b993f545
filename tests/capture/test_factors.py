"""Factors of single layers equal dense float64 sums over the layer's inputs and output gradients."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fisher_optax import capture
from tests.capture.capture_models import (
    assert_factors,
    assert_near,
    captured,
    flax_loss,
    normal,
    params_of,
    watched,
)
from tests.reference.curvature import windows

pytestmark = pytest.mark.usefixtures("x64")
F64 = {"param_dtype": jnp.float64, "dtype": jnp.float64}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(6, 3), (2, 4, 3), (3,)])
def test_dense_sums_over_all_leading_positions(bias: bool, shape: tuple[int, ...]) -> None:
    """Vectors, batches and sequences: P is the number of leading positions, which the normaliser is by default too."""
    model, x = nn.Dense(5, use_bias=bias, **F64), normal(0, *shape)
    params, positions = params_of(model, x), int(np.prod(shape[:-1]))
    stats = captured(flax_loss(model), params, x)
    a, delta = watched(flax_loss(model), params, x)
    assert_factors(stats["kernel"], a[""], delta[""], positions, bias)
    assert stats["kernel"].weight == positions
    assert not bias or (stats["kernel"].bias, stats["bias"]) == ("bias", None)


def test_dense_general_groups_several_input_and_output_axes() -> None:
    """Inputs and outputs of several axes are one row-major axis each, and a two-axis bias belongs to them."""
    model, x = nn.DenseGeneral((2, 4), axis=(-2, -1), **F64), normal(0, 6, 3, 2)
    params = params_of(model, x)
    a, delta = watched(flax_loss(model), params, x)
    assert_factors(captured(flax_loss(model), params, x)["kernel"], a[""], delta[""], 6, True, (2, 2))


def test_inputs_contracted_in_another_order_come_out_in_the_kernel_s() -> None:
    """A product that meets the input's axes the other way round: left is in the order of the kernel's axes."""
    W, x = normal(0, 2, 3, 4), normal(1, 6, 3, 2)

    def loss(W: Any, x: Any, see: Any) -> Any:
        return jnp.mean(see("W", x, jax.lax.dot_general(x, W, (((1, 2), (1, 0)), ((), ())))) ** 3)

    a, delta = watched(loss, W, x)
    assert_factors(captured(loss, W, x), a["W"].swapaxes(1, 2), delta["W"], 6, False, (2, 1))


def test_attention_captures_all_four_projections() -> None:
    model, x = nn.MultiHeadDotProductAttention(3, **F64), normal(0, 2, 4, 6)
    params = params_of(model, x)
    stats = captured(flax_loss(model), params, x)
    a, delta = watched(flax_loss(model), params, x)
    for name, axes in {"query": (1, 2), "key": (1, 2), "value": (1, 2), "out": (2, 1)}.items():
        if name == "key":  # a bias of keys adds the same to all scores of a query: its gradient is exactly 0
            assert np.abs(np.sum(np.asarray(delta[name]), axis=(0, 1))).max() < 1e-12
        assert_factors(stats[name]["kernel"], a[name], delta[name], 8, True, axes)


CONVOLUTIONS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "valid": ((5, 4), dict(kernel_size=(3, 2), padding="VALID")),
    "same with strides": ((5, 4), dict(kernel_size=(3, 2), strides=(2, 1))),
    "explicit padding": ((4, 3), dict(kernel_size=(2, 2), padding=((1, 0), (0, 2)))),
    "dilated kernel": ((6, 5), dict(kernel_size=(2, 3), kernel_dilation=(2, 1), padding="VALID")),
    "dilated input": ((3, 3), dict(kernel_size=(2, 2), input_dilation=(2, 1), padding=((1, 1), (0, 0)))),
    "one dimension": ((7,), dict(kernel_size=(3,), strides=(2,))),
    "three dimensions": ((3, 2, 3), dict(kernel_size=(2, 2, 1), padding="VALID")),
    "a window of one place": ((3, 2), dict(kernel_size=(1, 1))),
    "without bias": ((4, 4), dict(kernel_size=(2, 2), use_bias=False)),
}


def same(sizes: Any, kernel: Any, strides: Any) -> list[tuple[int, int]]:
    """The padding with which ceil(size / stride) windows fit, the odd one at the end."""
    out = []
    for n, k, s in zip(sizes, kernel, strides, strict=True):
        total = max((-(-n // s) - 1) * s + k - n, 0)
        out.append((total // 2, total - total // 2))
    return out


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_sums_over_windows(name: str) -> None:
    """``left`` over what every output position sees, window first and channels last, as the kernel is stored; N counts
    examples, not places.
    """
    sizes, options = CONVOLUTIONS[name]
    model, x = nn.Conv(4, **options, **F64), normal(0, 3, *sizes, 2)
    params, ones, kernel = params_of(model, x), (1,) * len(sizes), options["kernel_size"]
    strides, padding = options.get("strides", ones), options.get("padding", "SAME")
    if isinstance(padding, str):
        padding = same(sizes, kernel, strides) if padding == "SAME" else [(0, 0)] * len(sizes)
    a, delta = watched(flax_loss(model), params, x)
    seen = windows(
        a[""], kernel, strides, padding, options.get("kernel_dilation", ones), options.get("input_dilation", ones)
    )
    assert seen.shape[: 1 + len(sizes)] == delta[""].shape[:-1]
    stats = captured(flax_loss(model), params, x)["kernel"]
    assert_factors(stats, seen, delta[""], 3, options.get("use_bias", True), (len(sizes) + 1, 1))


def test_transposed_convolution_is_one_over_a_dilated_input() -> None:
    model, x = nn.ConvTranspose(4, (3, 2), strides=(2, 1), padding="VALID", **F64), normal(0, 3, 3, 4, 2)
    params = params_of(model, x)
    a, delta = watched(flax_loss(model), params, x)
    seen = windows(a[""], (3, 2), (1, 1), [(2, 2), (1, 1)], (1, 1), (2, 1))
    assert_factors(captured(flax_loss(model), params, x)["kernel"], seen, delta[""], 3, True, (3, 1))


def test_convolution_of_another_layout_comes_out_in_its_own_order() -> None:
    """Channels first, kernels (out, in, height, width): inputs are in the order (in, height, width)."""
    W, x = normal(0, 4, 2, 3, 2), normal(1, 3, 2, 5, 4)

    def loss(W: Any, x: Any, see: Any) -> Any:
        layout = ("NCHW", "OIHW", "NCHW")
        y = jax.lax.conv_general_dilated(x, W, (1, 2), "VALID", dimension_numbers=layout)
        return jnp.mean(see("W", x, y) ** 3)

    a, delta = watched(loss, W, x)
    seen = windows(a["W"].transpose(0, 2, 3, 1), (3, 2), (1, 2), [(0, 0)] * 2, (1, 1), (1, 1))
    seen = np.moveaxis(seen, -1, -3)
    assert_factors(captured(loss, W, x), seen, delta["W"].transpose(0, 2, 3, 1), 3, False, (3, 1))


def test_grouped_convolution_is_no_matrix_and_is_left_out() -> None:
    """A kernel whose groups see different channels has no left factor; a strict capture says so."""
    model, x = nn.Sequential([nn.Conv(4, (1,), feature_group_count=2, **F64), nn.Dense(3, **F64)]), normal(0, 3, 5, 2)
    params = params_of(model, x)
    stats = captured(flax_loss(model), params, x)
    assert stats["layers_0"]["kernel"] is None
    assert stats["layers_1"]["kernel"] is not None
    with pytest.raises(ValueError, match=r"layers_0/kernel.*no product with it was found"):
        captured(flax_loss(model), params, x, strict=True)


PRODUCTS: dict[str, tuple[tuple[int, ...], Any, tuple[int, int], str]] = {
    # shape of W, the product, how W's canonical matrix is read: number of its axes in and out, and its order
    "x @ W": ((3, 4), lambda W, x: x @ W, (1, 1), "io"),
    "einsum, W last": ((3, 4), lambda W, x: jnp.einsum("btm,mn->btn", x, W), (1, 1), "io"),
    "einsum, W first": ((3, 4), lambda W, x: jnp.einsum("mn,btm->btn", W, x), (1, 1), "io"),
    "einsum, W first and transposed": ((4, 3), lambda W, x: jnp.einsum("nm,btm->btn", W, x), (1, 1), "oi"),
    "W @ x, vmapped": ((4, 3), lambda W, x: jax.vmap(jax.vmap(lambda v: W @ v))(x), (1, 1), "oi"),
    "x @ W.T": ((4, 3), lambda W, x: x @ W.T, (1, 1), "oi"),
    "through a reshape": ((12,), lambda W, x: x @ W.reshape(3, 4), (1, 1), "none"),
    "through a cast": ((3, 4), lambda W, x: x @ W.astype(jnp.float32).astype(jnp.float64), (1, 1), "io"),
    "jit inside": ((3, 4), lambda W, x: jax.jit(jnp.matmul)(x, W), (1, 1), "io"),
    "one head": ((3, 1, 4), lambda W, x: jnp.einsum("btm,mhd->bthd", x, W), (1, 2), "io"),
    "one input axis of length 1": ((1, 3, 4), lambda W, x: x @ W.reshape(3, 4), (1, 1), "io"),
    "one output": ((3, 1), lambda W, x: x @ W, (1, 1), "io"),
    "heads": ((3, 2, 2), lambda W, x: jnp.einsum("btm,mhd->bhtd", x, W).transpose(0, 2, 1, 3), (1, 2), "io"),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_in_any_form(name: str) -> None:
    """The same sums whichever operand the parameter is, and however it is turned on its way there."""
    shape, product, axes, order = PRODUCTS[name]
    W, x = normal(0, *shape), normal(1, 2, 5, 3)

    def loss(W: Any, x: Any, see: Any) -> Any:
        return jnp.mean(see("W", x, product(W["W"], x)) ** 3)

    if order == "none":
        with pytest.raises(ValueError, match="no layer of this model can be captured"):
            captured(loss, {"W": W}, x)
        return
    a, delta = watched(loss, {"W": W}, x)
    assert_factors(captured(loss, {"W": W}, x)["W"], a["W"], delta["W"], 10, False, axes)


@pytest.mark.parametrize("first", [True, False])
def test_bias_in_either_order(first: bool) -> None:
    params = {"W": normal(0, 3, 4), "b": normal(2, 4)}

    def loss(p: Any, x: Any, see: Any) -> Any:
        y = see("W", x, x @ p["W"])
        return jnp.mean((p["b"] + y if first else y + p["b"]) ** 3)

    a, delta = watched(loss, params, normal(1, 5, 3))
    assert_factors(captured(loss, params, normal(1, 5, 3))["W"], a["W"], delta["W"], 5, True)


def test_bias_of_a_single_output() -> None:
    """An axis of length 1 is still the output, which the bias belongs to."""
    model, x = nn.Conv(1, (2,), **F64), normal(0, 3, 4, 2)
    params = params_of(model, x)
    stats = captured(flax_loss(model), params, x)["kernel"]
    assert (stats.left.shape, stats.right.shape, stats.bias) == ((5, 5), (1, 1), "bias")


NO_BIAS = {
    "read twice": lambda y, b: (y + b) * y,
    "scaled first": lambda y, b: 2 * y + b,
    "used elsewhere too": lambda y, b: (y + b) * b,
}


@pytest.mark.parametrize("name", ["read twice", "scaled first", "used elsewhere too"])
def test_what_is_not_the_bias_of_a_product_is_left_out_of_it(name: str) -> None:
    """Where b's gradient is not the sum of the product's output gradients, the factors are W's alone."""
    params = {"W": normal(0, 3, 4), "b": normal(2, 4)}

    def loss(p: Any, x: Any, see: Any) -> Any:
        return jnp.mean(NO_BIAS[name](see("W", x, x @ p["W"]), p["b"]) ** 3)

    a, delta = watched(loss, params, normal(1, 5, 3))
    assert_factors(captured(loss, params, normal(1, 5, 3))["W"], a["W"], delta["W"], 5, False)


def test_embedding_has_counts_for_its_left_factor() -> None:
    """The Fisher of an embedding is exactly diag(counts) / P on the left: one number a token."""
    model, tokens = nn.Embed(6, 4, param_dtype=jnp.float64, dtype=jnp.float64), jnp.array([[0, 2, 2], [5, 2, 0]])
    params = params_of(model, tokens)
    stats = captured(flax_loss(model), params, tokens)["embedding"]
    _, delta = watched(flax_loss(model, (nn.Embed,)), params, tokens)
    assert_near(stats.left, np.array([2, 0, 3, 0, 0, 1]) / 6)
    delta = np.asarray(delta[""]).reshape(6, 4)
    assert_near(stats.right, 6 * delta.T @ delta)


NNX = {
    "Linear": (lambda rngs: nnx.Linear(3, 4, **F64, rngs=rngs), (5, 3), "kernel"),
    "Conv": (lambda rngs: nnx.Conv(3, 4, (2,), **F64, rngs=rngs), (5, 4, 3), "kernel"),
    "LinearGeneral": (
        lambda rngs: nnx.LinearGeneral((2, 3), (4, 2), axis=(1, 2), **F64, rngs=rngs),
        (5, 2, 3),
        "kernel",
    ),
    "Embed": (lambda rngs: nnx.Embed(6, 4, **F64, rngs=rngs), None, "embedding"),
}


@pytest.mark.parametrize("name", NNX)
def test_nnx_layers_are_captured_alike(name: str) -> None:
    """The same products, in a State whose Params hold the statistics: gradients are the sums of inputs times δ, so left
    and right of a single position multiply to the gradient's own outer product.
    """
    make, shape, leaf = NNX[name]
    graph, state = nnx.split(make(nnx.Rngs(0)))
    x = jnp.array([3]) if shape is None else normal(1, *shape)[:1]
    if name == "Conv":
        x = x[:, :2]
        state["bias"].set_value(normal(2, 4))

    def loss(state: Any, x: Any) -> Any:
        y = nnx.merge(graph, state)(x)
        return jnp.sum((y[:, :1] if name == "Conv" else y) ** 3)

    _, grads, stats = jax.jit(capture.value_and_grad(loss, normalizer=1))(state, x)
    factors = stats[leaf].get_value()
    g = np.asarray(grads[leaf].get_value()).reshape(-1, factors.right.shape[-1])
    left = np.diag(factors.left) if name == "Embed" else factors.left
    if factors.bias is not None:
        g = np.vstack([g, np.asarray(grads[factors.bias].get_value()).reshape(1, -1)])
    if name == "Conv":  # of two places, one has a gradient: the other's input is in left all the same
        assert factors.left.shape == (2 * 3 + 1, 2 * 3 + 1)
        assert_near(factors.right, np.outer(g[-1], g[-1]))
    else:
        assert_near(np.kron(left, factors.right), np.outer(g.ravel(), g.ravel()))
