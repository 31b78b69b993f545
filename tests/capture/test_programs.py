"""Factors through shared layers, branches, calls and custom derivatives equal the sums of the program written out."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fisher_optax import capture
from tests.capture.capture_models import (
    assert_factors,
    assert_near,
    captured,
    flax_loss,
    normal,
    params_of,
    plain_loss,
    watched,
)
from tests.reference.curvature import factors

pytestmark = pytest.mark.usefixtures("x64")
F64 = {"param_dtype": jnp.float64, "dtype": jnp.float64}


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = nn.Dense(x.shape[-1], name="dense", **F64)
        return dense(nn.relu(dense(x)))


def test_dense_used_twice_sums_both_uses() -> None:
    """Left is the mean over both uses' inputs, right the sum over both, with the positions of one for N."""
    model, x = Twice(), normal(0, 5, 4)
    params = params_of(model, x)
    W, b = params["dense"]["kernel"], params["dense"]["bias"]

    def loss(W: Any, x: Any, see: Any) -> Any:
        h = see("0", x, x @ W) + b
        return jnp.mean((see("1", nn.relu(h), nn.relu(h) @ W) + b) ** 2)

    a, delta = watched(loss, W, x)
    A, D = (np.concatenate([tree["0"], tree["1"]]) for tree in (a, delta))
    stats = jax.jit(capture.value_and_grad(plain_loss(model)))(params, x)[2]["dense"]["kernel"]
    assert_factors(stats, A, D, 5, True)


class Experts(nn.Module):
    """Each expert its own rows."""

    axis: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.vmap(
            nn.Dense, in_axes=1, out_axes=1, variable_axes={"params": self.axis}, split_rngs={"params": True}
        )(4, name="experts", **F64)(x)


@pytest.mark.parametrize("axis", [0, 1])
def test_vmapped_experts_have_a_factor_each(axis: int) -> None:
    """``left`` and ``right`` are stacked over experts, whichever axis of the kernel counts them."""
    model, x = Experts(axis), normal(0, 5, 3, 2)
    params = params_of(model, x)

    def loss(e: Any, x: Any, see: Any) -> Any:
        y = see("e", x, jnp.einsum("bei,eio->beo", x, e["kernel"])) + e["bias"]
        return jnp.mean(y**2)

    leaves = jax.tree.map(lambda w: jnp.moveaxis(w, axis, 0), params["experts"])
    a, delta = watched(loss, leaves, x)
    stats = jax.jit(capture.value_and_grad(plain_loss(model)))(params, x)[2]["experts"]["kernel"]
    for e in range(3):
        left, right = factors(a["e"][:, e], delta["e"][:, e], 5, bias=stats.bias is not None)
        assert_near(stats.left[e], left)
        assert_near(stats.right[e], right)
    assert (stats.bias is not None) == (axis == 0)
    assert stats.weight == 5


@pytest.mark.parametrize("taken", [True, False])
def test_branch_counts_if_it_is_taken(taken: bool) -> None:
    """A product in a branch of `lax.cond`: its sums where the branch is taken, zeros otherwise."""
    params, x = {"W": normal(0, 3, 3), "V": normal(1, 3, 3)}, normal(2, 5, 3)

    def loss(p: Any, x: Any, choice: Any, see: Any) -> Any:
        h = see("V", x, x @ p["V"])
        return jnp.mean(jax.lax.cond(choice, lambda h: see("W", h, h @ p["W"]), lambda h: h, h) ** 2)

    stats = captured(loss, params, x, jnp.array(taken))["W"]
    if taken:
        straight = lambda p, x, see: jnp.mean(see("W", x @ p["V"], x @ p["V"] @ p["W"]) ** 2)  # noqa: E731
        a, delta = watched(straight, params, x)
        assert_factors(stats, a["W"], delta["W"], 5)
    else:
        assert stats.weight == 0
        assert not np.any(stats.left)
        assert not np.any(stats.right)


@jax.custom_jvp
def scaled_product(x: Any, W: Any) -> Any:
    return x @ W


@scaled_product.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (x, W), (dx, dW) = primals, tangents
    return x @ W, 2 * (dx @ W + x @ dW)


@jax.custom_vjp
def clipped_product(x: Any, W: Any) -> Any:
    return jnp.einsum("mn,bm->bn", W, x)


clipped_product.defvjp(
    lambda x, W: (x @ W, (x, W)), lambda kept, ct: (ct @ kept[1].T, jnp.clip(kept[0].T @ ct, -1e-2, 1e-2))
)


@jax.custom_vjp
def squared_product(x: Any, W: Any) -> Any:
    return (x @ W) ** 2


squared_product.defvjp(lambda x, W: ((x @ W) ** 2, (x, W)), lambda kept, ct: (3 * ct @ kept[1].T, kept[0].T @ ct))


@pytest.mark.parametrize("product", [scaled_product, clipped_product])
def test_function_with_its_own_derivative_that_is_a_product(product: Any) -> None:
    """Gradients are exactly those of its rule; statistics are of its input and the gradient at its output."""
    W, x = normal(0, 3, 4), normal(1, 5, 3)

    def loss(W: Any, x: Any, see: Any) -> Any:
        return jnp.mean(see("W", x, product(x, W)) ** 3)

    a, delta = watched(loss, W, x)
    assert_factors(captured(loss, W, x), a["W"], delta["W"], 5)
    _, grads, _ = capture.value_and_grad(lambda W, x: jnp.mean(product(x, W) ** 3))(W, x)
    assert_near(grads, jax.grad(lambda W: jnp.mean(product(x, W) ** 3))(W), 1e-14)


def test_function_with_its_own_derivative_that_is_more_has_no_statistics() -> None:
    """What is inside is not looked at, since its own rule says what its gradients are; these stay exactly so."""
    params, x = {"W": normal(0, 3, 4), "V": normal(2, 4, 2)}, normal(1, 5, 3)

    def loss(p: Any, x: Any) -> Any:
        return jnp.mean((squared_product(x, p["W"]) @ p["V"]) ** 2)

    value, grads, stats = capture.value_and_grad(loss)(params, x)
    wanted, exact = jax.value_and_grad(loss)(params, x)
    assert_near(value, wanted, 1e-14)
    assert_near(grads["W"], exact["W"], 1e-14)
    assert stats["W"] is None
    assert stats["V"] is not None
    with pytest.raises(ValueError, match=r"'W' .*custom_vjp_call of more than a product"):
        capture.value_and_grad(loss, strict=True)(params, x)


class Tied(nn.Module):
    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        wte = nn.Embed(6, 4, name="wte", **F64)
        return wte.attend(jnp.tanh(wte(tokens)))


def test_tied_embedding_has_the_product_s_statistics() -> None:
    """Of a table that is both looked up and multiplied by, the product counts (inputs are its columns), and a strict
    capture names the look-up.
    """
    model, tokens = Tied(), jnp.array([[0, 2, 2], [5, 2, 0]])
    params = params_of(model, tokens)

    def loss(p: Any, tokens: Any, see: Any) -> Any:
        W = p["wte"]["embedding"]
        h = jnp.tanh(W[tokens])
        return jnp.mean(see("W", h, h @ W.T) ** 2)

    a, delta = watched(loss, params, tokens)
    grad_fn = capture.value_and_grad(plain_loss(model))
    assert_factors(grad_fn(params, tokens)[2]["wte"]["embedding"], a["W"], delta["W"], 6)
    with pytest.raises(ValueError, match=r"wte/embedding.*also used the other way round"):
        capture.value_and_grad(plain_loss(model), strict=True)(params, tokens)


def test_weight_decay_in_the_loss_is_named() -> None:
    """A parameter's other uses add to its gradient, not to its statistics; a strict capture names them."""
    W, x = normal(0, 3, 4), normal(1, 5, 3)

    def loss(W: Any, x: Any, see: Any, decay: float = 0.1) -> Any:
        return jnp.mean(see("W", x, x @ W) ** 2) + decay * jnp.sum(W**2)

    a, delta = watched(loss, W, x)
    assert_factors(captured(loss, W, x), a["W"], delta["W"], 5)
    with pytest.raises(ValueError, match=r"also used by (square|integer_pow)"):
        captured(loss, W, x, strict=True)


class Regularised(nn.Module):
    """Dropout, batch normalisation with statistics of its own, and two activations with rules of their own."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.gelu(nn.Dense(4, **F64)(x))
        x = nn.Dropout(0.5, deterministic=False)(nn.BatchNorm(use_running_average=False, **F64)(x))
        return nn.Dense(2, **F64)(nn.relu(x))


def test_dropout_keys_and_mutable_collections_pass_through() -> None:
    """Value, new batch statistics and gradients are those of `jax.value_and_grad`, and both layers are captured."""
    model, x, key = Regularised(), normal(0, 6, 3), jax.random.key(3)
    variables = model.init({"params": jax.random.key(0), "dropout": key}, x)

    def loss(params: Any, batch_stats: Any, x: Any, key: Any) -> Any:
        y, updated = model.apply(
            {"params": params, "batch_stats": batch_stats}, x, rngs={"dropout": key}, mutable=["batch_stats"]
        )
        return jnp.mean(y**2), updated["batch_stats"]

    args = variables["params"], variables["batch_stats"], x, key
    wanted = jax.jit(jax.value_and_grad(loss, has_aux=True))(*args)
    (value, aux), grads, stats = jax.jit(capture.value_and_grad(loss, has_aux=True))(*args)
    for mine, theirs in zip(jax.tree.leaves(((value, aux), grads)), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-12, atol=1e-14)
    assert stats["Dense_0"]["kernel"].left.shape == (4, 4)
    assert stats["Dense_1"]["kernel"].left.shape == (5, 5)
    assert stats["BatchNorm_0"] == {"bias": None, "scale": None}


def test_flax_loss_shows_modules_by_path() -> None:
    """The oracle itself: what it sees of a two-layer model gives that model's gradients."""
    model, x = nn.Sequential([nn.Dense(4, **F64), nn.relu, nn.Dense(2, **F64)]), normal(0, 5, 3)
    params = params_of(model, x)
    a, delta = watched(flax_loss(model), params, x)
    grads = jax.grad(plain_loss(model))(params, x)
    for name in ("layers_0", "layers_2"):
        assert_near(np.asarray(a[name]).T @ np.asarray(delta[name]), grads[name]["kernel"], 1e-13)
