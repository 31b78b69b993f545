"""Samples of layers' examples, input Grams, and estimates from some of the positions."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fisher_optax import capture
from fisher_optax.linalg.eigenbasis import LowRank
from fisher_optax.statistics import Window
from tests.capture.capture_models import assert_factors, assert_near, captured, flax_loss, normal, params_of, watched
from tests.reference.curvature import per_example_gradients

pytestmark = pytest.mark.usefixtures("x64")
F64 = {"param_dtype": jnp.float64, "dtype": jnp.float64}


def dense_loss(p: Any, x: Any, see: Any) -> Any:
    h = jnp.tanh(see("W", x, x @ p["W"]) + p["b"])
    return jnp.mean(jnp.sum(see("V", h, h @ p["V"]) ** 2, -1))


def dense_params() -> Any:
    return {"W": normal(0, 3, 4), "b": normal(1, 4), "V": normal(2, 4, 2)}


def test_all_examples_give_each_one_s_gradient() -> None:
    """With ``size`` of at least N, input times gradient is each example's own gradient of W."""
    params, x = dense_params(), normal(3, 6, 3)
    stats = captured(dense_loss, params, x, kind=capture.LayerSamples(6))
    each = lambda W: jnp.sum((jnp.tanh(x @ W + params["b"]) @ params["V"]) ** 2, -1)  # noqa: E731
    mine = np.einsum("ri,ro->rio", stats["W"].inputs, stats["W"].gradients).reshape(6, -1)
    assert_near(mine, per_example_gradients(each, params["W"]))
    assert (stats["W"].bias, stats["W"].weight, stats["W"].window) == ("b", 6, None)


def test_some_examples_are_spread_over_all() -> None:
    """Of 12 positions 4 are taken, one of each three, input and gradient of the same one."""
    params, x = dense_params(), normal(3, 4, 3, 3)
    stats = captured(dense_loss, params, x, kind=capture.LayerSamples(4))["W"]
    a, delta = (np.asarray(t["W"]).reshape(12, -1) for t in watched(dense_loss, params, x))
    chosen = [int(np.argmin(np.abs(a - row).sum(1))) for row in np.asarray(stats.inputs)]
    assert [i // 3 for i in chosen] == [0, 1, 2, 3]
    assert_near(stats.inputs, a[chosen], 1e-15)
    assert_near(stats.gradients, 12 * delta[chosen])
    assert stats.weight == 12


@pytest.mark.parametrize("sizes", [(5,), (4, 3)])
def test_convolution_samples_are_whole_inputs(sizes: tuple[int, ...]) -> None:
    """With the window that says how inputs and gradients belong together; N counts examples."""
    ones, pads = (1,) * len(sizes), ((0, 1),) * len(sizes)
    model, x = nn.Conv(4, (2,) * len(sizes), **F64), normal(0, 3, *sizes, 2)
    params = params_of(model, x)
    stats = captured(flax_loss(model), params, x, kind=capture.LayerSamples(8))["kernel"]
    a, delta = watched(flax_loss(model), params, x)
    assert_near(stats.inputs, a[""])
    assert_near(stats.gradients, 3 * delta[""])
    assert stats.window == Window((2,) * len(sizes), ones, pads, ones, ones)
    assert (stats.weight, stats.bias) == (3, "bias")


def test_convolution_used_twice_gives_both_uses_examples() -> None:
    """One dimension and a stack of kernels: examples are joined along their own axis."""
    W, x = normal(0, 2, 2, 3, 3), normal(1, 4, 5, 3)

    def convolve(x: Any, W: Any) -> Any:
        return jax.lax.conv_general_dilated(x, W, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))

    def loss(W: Any, x: Any, see: Any) -> Any:
        h = see("0", x, convolve(x, W[0]))
        h = see("1", h, convolve(h, W[0]))
        return jnp.mean(see("2", h, convolve(h, W[1])) ** 2)

    stats = captured(loss, W, x, kind=capture.LayerSamples(4))
    a, delta = watched(loss, W, x)
    assert stats.inputs.shape == (2, 8, 5, 3)
    assert_near(stats.inputs[0], np.concatenate([a["0"], a["1"]]))
    assert_near(stats.gradients[0], 4 * np.concatenate([delta["0"], delta["1"]]))
    assert_near(stats.inputs[1, :4], a["2"])
    assert_near(stats.gradients[1, :4], 4 * delta["2"])
    assert not np.any(stats.gradients[1, 4:])


def test_scanned_stack_has_stacked_samples() -> None:
    """A convolution and a product in a scan: (layers, examples, ...)."""
    params = {"W": normal(0, 2, 3, 3), "C": normal(1, 2, 2, 3, 3)}
    x = normal(2, 4, 5, 3)

    def layer(x: Any, p: Any) -> Any:
        x = jax.lax.conv_general_dilated(x, p["C"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
        return jnp.tanh(x @ p["W"]), None

    loss = lambda p, x: jnp.mean(jax.lax.scan(layer, x, p)[0] ** 2)  # noqa: E731
    stats = jax.jit(capture.value_and_grad(loss, capture.LayerSamples(4)))(params, x)[2]
    assert stats["C"].inputs.shape == (2, 4, 5, 3)
    assert_near(stats["C"].inputs[0], x)
    assert stats["W"].inputs.shape == stats["W"].gradients.shape == (2, 4, 3)
    assert (stats["W"].weight, stats["C"].weight) == (20, 4)


def test_half_precision_samples_are_float32() -> None:
    W, x = jnp.ones((3, 2), jnp.bfloat16), jnp.ones((4, 3), jnp.bfloat16)
    loss = lambda W, x: jnp.mean((x @ W).astype(jnp.float32))  # noqa: E731
    stats = capture.value_and_grad(loss, capture.LayerSamples(2))(W, x)[2]
    assert stats.inputs.dtype == stats.gradients.dtype == jnp.float32


def test_samples_of_drawn_labels_are_scores() -> None:
    """Gaussian labels y = z + noise have scores z - y: noise of unit variance, whatever N and however many draws, and
    inputs are the layer's own. 6 standard errors of a variance from 900 numbers.
    """
    W, x = normal(0, 3, 9), normal(1, 100, 3)
    loss = lambda W, x: capture.losses.gaussian(x @ W, jnp.zeros((100, 9)))  # noqa: E731
    for n in (1, 3):
        grad_fn = capture.value_and_grad(loss, capture.LayerSamples(100), fisher="mc", n_samples=n)
        stats = grad_fn(W, x, fisher_key=jax.random.key(0))[2]
        assert_near(stats.inputs, x, 1e-12)
        assert abs(np.var(stats.gradients) - 1) < 6 * np.sqrt(2 / 900)


def test_masked_examples_have_no_gradient() -> None:
    params, x, m = dense_params(), normal(3, 6, 3), jnp.array([1, 1, 0, 1, 0, 1])

    def loss(p: Any, x: Any, m: Any, see: Any) -> Any:
        h = jnp.tanh(see("W", x, x @ p["W"]) + p["b"])
        return jnp.sum(jnp.sum((h @ p["V"]) ** 2, -1) * m) / jnp.sum(m)

    stats = captured(loss, params, x, m, kind=capture.LayerSamples(6), mask=lambda x, m: m)["W"]
    _, delta = watched(loss, params, x, m)
    assert_near(stats.gradients, 4 * delta["W"])
    assert not np.any(stats.gradients[2])
    assert stats.weight == 4


def test_input_gram_is_the_left_side_alone() -> None:
    params, x = dense_params(), normal(3, 6, 3)
    gram = captured(dense_loss, params, x, kind=capture.InputGram())
    full = captured(dense_loss, params, x)
    for name in ("W", "V"):
        assert_near(gram[name].left, full[name].left, 1e-14)
        assert gram[name].right is None
        assert gram[name].squares is None
    assert gram["W"].bias == "b"


@pytest.mark.parametrize("convolution", [False, True])
def test_max_examples_is_the_subset_s_sums_and_unbiased(convolution: bool) -> None:
    """One position (or input) of each stretch, scaled to all: over all orders of the data the mean is the full sum."""
    W = normal(0, 2, 3, 4) if convolution else normal(0, 3, 4)
    x = normal(1, 6, 5, 3) if convolution else normal(1, 6, 3)

    def loss(W: Any, x: Any, see: Any) -> Any:
        if not convolution:
            return jnp.mean(see("W", x, x @ W) ** 3)
        y = jax.lax.conv_general_dilated(x, W, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
        return jnp.mean(see("W", x, y) ** 3)

    few = capture.KroneckerFactors(max_examples=10 if convolution else 2)
    some = jax.jit(lambda x: captured(loss, W, x, kind=few))
    full = captured(loss, W, x)
    # Each of the 6 rotations of the data brings every example to every place once.
    rotated = [some(jnp.roll(x, k, 0)) for k in range(6)]
    for side in ("left", "right"):
        assert_near(sum(getattr(s, side) for s in rotated) / 6, getattr(full, side))
    assert rotated[0].weight == full.weight
    if not convolution:
        a, delta = watched(loss, W, x)
        pairs = [(i, j) for i in range(3) for j in range(3, 6)]
        sums = [np.asarray(a["W"])[[i, j]].T @ np.asarray(a["W"])[[i, j]] / 2 for i, j in pairs]
        k = int(np.argmin([np.abs(s - np.asarray(rotated[0].left)).max() for s in sums]))
        rows = list(pairs[k])
        assert_factors(rotated[0], np.asarray(a["W"])[rows], np.asarray(delta["W"])[rows], 6 * 3)


@pytest.mark.parametrize("rank", [20, 3])
def test_long_sides_are_rows(rank: int) -> None:
    """Beyond ``max_dim`` a side is rows: all of them give the exact moment, and fewer a sample scaled like it."""
    params, x = dense_params(), normal(3, 4, 3, 3)
    kind = capture.KroneckerFactors(max_dim=3, rank=rank)
    stats, full = captured(dense_loss, params, x, kind=kind), captured(dense_loss, params, x)
    left, right = stats["W"].left, stats["W"].right
    assert isinstance(left, LowRank)
    assert isinstance(right, LowRank)
    assert left.rows.shape == right.rows.shape == (min(rank, 12), 4)
    assert not isinstance(stats["V"].right, LowRank)
    if rank == 20:
        assert_near(left.rows.T @ left.rows, full["W"].left)
        assert_near(right.rows.T @ right.rows, full["W"].right)
    else:
        # The bias's input is 1 everywhere, so its entry of the moment is exact from any sample.
        assert_near((left.rows.T @ left.rows)[-1:, -1:], full["W"].left[-1:, -1:])
        a, delta = (np.asarray(t["W"]).reshape(12, -1) for t in watched(dense_loss, params, x))
        rows = np.asarray(left.rows)
        chosen = [int(np.argmin(np.abs(a - row).sum(1))) for row in rows[:, :-1] / rows[:, -1:]]
        assert_near(right.rows, delta[chosen] * np.sqrt(12 * 12 / 3))


def test_rows_of_several_uses_and_of_a_stack() -> None:
    """Rows of two uses follow each other; those of a scanned stack are stacked."""
    V, x = normal(0, 4, 4), normal(1, 5, 4)
    loss = lambda V, x, see: jnp.mean(jnp.tanh(jnp.tanh(x @ V) @ V) ** 2)  # noqa: E731
    kind = capture.KroneckerFactors(max_dim=3, rank=5)
    stats, full = captured(loss, V, x, kind=kind), captured(loss, V, x)
    assert stats.left.rows.shape == (10, 4)
    assert_near(stats.left.rows.T @ stats.left.rows, full.left)
    assert_near(stats.right.rows.T @ stats.right.rows, full.right)
    W = normal(2, 3, 4, 4)
    loop = lambda W, x, see: jnp.mean(jax.lax.scan(lambda x, W: (jnp.tanh(x @ W), None), x, W)[0] ** 2)  # noqa: E731
    stats, full = captured(loop, W, x, kind=kind), captured(loop, W, x)
    assert_near(np.einsum("lri,lrj->lij", stats.right.rows, stats.right.rows), full.right)


@pytest.mark.parametrize(
    "kind",
    [capture.KroneckerFactors(), capture.KroneckerFactors(max_dim=2), capture.LayerSamples(), capture.InputGram()],
    ids=["factors", "rows", "samples", "gram"],
)
def test_a_real_layer_of_complex_numbers_has_two_parts(kind: Any) -> None:
    """Its statistics are those of the same model in real numbers, and its loss is divided by the number of examples."""
    W, x = normal(0, 4, 3), normal(1, 5, 4) + 1j * normal(2, 5, 4)

    def in_complex(W: Any, x: Any) -> Any:
        return jnp.mean(jnp.abs(x @ W - 1j) ** 3)

    def in_real(W: Any, x: Any) -> Any:
        z = jnp.stack([x.real, x.imag], 1) @ W
        return jnp.mean((z[:, 0] ** 2 + (z[:, 1] - 1) ** 2) ** 1.5)

    _, grads, stats = capture.value_and_grad(in_complex, kind)(W, x)
    _, wanted_grads, wanted = capture.value_and_grad(in_real, kind, normalizer=5)(W, x)
    assert_near(grads, wanted_grads)
    assert jax.tree.structure(stats) == jax.tree.structure(wanted)
    jax.tree.map(assert_near, stats, wanted)


def test_a_complex_layer_has_no_mean_of_its_parts() -> None:
    kind = capture.KroneckerFactors(mode="reduce")
    [row] = capture.capture_report(
        lambda W, x: jnp.abs(x @ W).sum(), normal(0, 4, 3), 1j * normal(1, 5, 4), statistics=kind
    ).rows
    assert "use mode='expand'" in row.reason
