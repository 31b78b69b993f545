"""FROG and K-FROG on what they may be given: any scale, zeros, stacks, half precision, other leaves, and mistakes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisher_optax as fo
from fisher_optax.statistics import LayerFactors, Samples
from tests.optimizers.frog_layers import (
    LAYERS,
    METHODS,
    direction,
    each_method,
    given,
    joined,
    rows_of,
    sampled,
    window,
)
from tests.reference.frog import Frog


@pytest.mark.parametrize("layer", ["dense", "conv"])
@pytest.mark.parametrize("scale", [2.0**-60, 2.0**60])
def test_scales_of_gradients_inputs_and_samples_do_not_matter_to_frog(layer: str, scale: float) -> None:
    grads, samples = sampled(LAYERS[layer], dtype=jnp.float32)
    wanted = direction(fo.scale_by_frog(), grads, samples)
    larger = jax.tree.map(lambda x: x * scale, grads)
    x, y = samples.inputs, samples.gradients
    variants = [(larger, x, y), (grads, x * scale, y), (grads, x, y * scale), (larger, x * scale, y * scale)]
    for g, inputs, gradients in variants:
        actual = direction(fo.scale_by_frog(), g, Samples(inputs, gradients, jnp.ones([]), window=samples.window))
        np.testing.assert_allclose(joined(actual), joined(wanted), rtol=1e-6)


@pytest.mark.parametrize("scale", [2.0**-40, 2.0**40])
def test_how_kfrog_scales(scale: float) -> None:
    """As the gradient, as one over the samples' gradients, and as one over the inputs if ε goes with their square."""
    grads, samples = sampled(LAYERS["conv"], dtype=jnp.float32)
    x, y, w = samples.inputs, samples.gradients, samples.window
    wanted = joined(direction(fo.scale_by_kfrog(damping=1e-2), grads, samples))
    larger = jax.tree.map(lambda g: g * scale, grads)
    for g, inputs, gradients, damping, factor in (
        (larger, x, y, 1e-2, scale),
        (grads, x, y * scale, 1e-2, 1 / scale),
        (grads, x * scale, y, 1e-2 * scale**2, 1 / scale),
    ):
        scaled = Samples(inputs, gradients, jnp.ones([]), window=w)
        actual = joined(direction(fo.scale_by_kfrog(damping=damping), g, scaled))
        np.testing.assert_allclose(actual, wanted * factor, rtol=1e-5, atol=1e-6 * np.abs(wanted * factor).max())


@each_method
@pytest.mark.parametrize("layer", ["dense-bias", "conv-geometry-bias", "conv"])
def test_no_scale_gives_nan(method: str, layer: str) -> None:
    tx = getattr(fo, f"scale_by_{method}")()
    case = LAYERS[layer]
    grads, samples = sampled(case, dtype=jnp.float32)
    update, state = jax.jit(tx.update), tx.init(grads)
    for a in (0.0, 1e-15, 1.0, 1e15):
        for b in (0.0, 1e-15, 1.0, 1e15):
            for c in (0.0, 1e-15, 1.0, 1e15):
                s = Samples(samples.inputs * a, samples.gradients * b, jnp.ones([]), window=samples.window)
                scaled = jax.tree.map(lambda g, c=c: g * c, grads)
                Z = joined(update(scaled, state, grads, statistics=given(s))[0])
                assert np.isfinite(Z).all(), (a, b, c)
                silent = c == 0 or (method == "kfrog" and (b == 0 or (a == 0 and not case.bias)))
                # K-FROG's step has a scale, which may lie below float32's range.
                assert not Z.any() if silent else Z.any() or method == "kfrog", (a, b, c)


@each_method
def test_zero_columns(method: str) -> None:
    """No gradient: no step. No sampled gradient: FROG takes the identity as Fisher, K-FROG stays."""
    grads, samples = sampled(LAYERS["dense-bias"], dtype=jnp.float32)
    grads = {"layer": {"kernel": grads["layer"]["kernel"].at[:, 0].set(0), "bias": grads["layer"]["bias"].at[0].set(0)}}
    silent = Samples(samples.inputs, samples.gradients.at[:, 1].set(0), jnp.ones([]))
    tx = getattr(fo, f"scale_by_{method}")(damping=0.5)
    Z, M = joined(direction(tx, grads, silent)), joined(grads)
    assert not Z[:, 0].any()
    alone = M[:, 1] / np.linalg.norm(M[:, 1]) / np.sqrt(1.5)
    np.testing.assert_allclose(Z[:, 1], alone if method == "frog" else 0 * alone, rtol=1e-6)
    np.testing.assert_allclose(Z[:, 2], joined(direction(tx, grads, samples))[:, 2], rtol=1e-6)


@pytest.mark.usefixtures("x64")
@each_method
@pytest.mark.parametrize("layer", ["dense-bias", "conv", "conv-geometry-bias"])
def test_a_stack_is_its_layers(method: str, layer: str) -> None:
    case, tx = LAYERS[layer], getattr(fo, f"scale_by_{method}")
    parts = [sampled(case, seed) for seed in range(3)]
    grads = jax.tree.map(lambda *xs: jnp.stack(xs), *(g for g, _ in parts))
    inputs, gradients = (jnp.stack([getattr(s, name) for _, s in parts]) for name in ("inputs", "gradients"))
    samples = Samples(inputs, gradients, jnp.ones([]), window=case.window)
    k = len(case.kernel)
    axes = {"kernel": fo.MatrixAxes(tuple(range(1, k)), k, 0)} | ({"bias": None} if case.bias else {})
    whole = direction(tx(axes={"layer": axes}), grads, samples)
    for i, part in enumerate(parts):
        wanted = joined(direction(tx(), *part))
        np.testing.assert_allclose(joined(jax.tree.map(lambda x, i=i: x[i], whole)), wanted, rtol=1e-9, atol=1e-9)


@each_method
@pytest.mark.parametrize("layer", ["dense-bias", "conv-1d-bias"])
def test_half_precision_is_rounded_once(method: str, layer: str) -> None:
    """bfloat16 gradients and samples give float32's direction, rounded."""
    tx = getattr(fo, f"scale_by_{method}")()
    half = sampled(LAYERS[layer], dtype=jnp.bfloat16)
    single = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    actual, wanted = direction(tx, *half), direction(tx, *single)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(actual))
    assert jax.tree.all(jax.tree.map(lambda a, w: jnp.array_equal(a, w.astype(jnp.bfloat16)), actual, wanted))


@each_method
def test_momentum_dtype_is_that_of_the_state(method: str) -> None:
    tx = getattr(fo, method)(0.1, momentum_dtype=jnp.bfloat16)
    state = tx.init({"layer": {"kernel": jnp.zeros((4, 3))}})
    assert [x.dtype for x in jax.tree.leaves(state) if x.shape == (4, 3)] == [jnp.bfloat16]


@pytest.mark.usefixtures("x64")
@each_method
def test_mask_and_fallback(method: str) -> None:
    """A masked layer does not decay; embeddings, heads and scales are AdamW's by default, and anyone's if asked."""
    make, row = METHODS[method]
    rng = np.random.default_rng(2)
    shapes = {"norm": {"scale": (6,)}, "embed": {"embedding": (5, 4)}, "head": {"kernel": (4, 5), "bias": (5,)}}
    others, gradients = (
        jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s)), shapes, is_leaf=lambda x: isinstance(x, tuple))
        for _ in range(2)
    )
    grads, samples = sampled(LAYERS["dense-bias"])
    params = sampled(LAYERS["dense-bias"], 9)[0] | others
    mask = jax.tree.map(lambda _: False, params)
    for fallback, wanted in ((None, optax.adamw(0.1, weight_decay=0.0)), (optax.sgd(0.3), optax.sgd(0.3))):
        tx = make(0.1, weight_decay=0.5, mask=mask, fallback=fallback)
        updates, _ = jax.jit(tx.update)(grads | gradients, tx.init(params), params, statistics=given(samples))
        expected, _ = wanted.update(gradients, wanted.init(others), others)
        for name, group in expected.items():
            jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-12), updates[name], group)
        model = Frog(joined(params), 0.1, row=row)
        moved = model.step(joined(grads), *rows_of(samples, bias=True)) - joined(params)
        np.testing.assert_allclose(joined(updates), moved, rtol=1e-8)


@each_method
def test_statistics_are_needed_at_every_step(method: str) -> None:
    tx = METHODS[method][0](0.1)
    grads, samples = sampled(LAYERS["dense"], dtype=jnp.float32)
    state = tx.init(grads)
    with pytest.raises(ValueError, match=f"fo.{method} keeps no curvature.*fo.LayerSamples"):
        tx.update(grads, state, grads, statistics=None)
    with pytest.raises(TypeError, match=f"fo.{method}: update needs statistics=.*fo.LayerSamples"):
        tx.update(grads, state, grads)
    factors = LayerFactors(jnp.eye(5), jnp.eye(3), None, jnp.ones([]))
    with pytest.raises(TypeError, match="are LayerFactors, wanted Samples"):
        tx.update(grads, state, grads, statistics={"layer": {"kernel": factors}})
    with pytest.raises(ValueError, match="no statistics for 'layer/kernel'"):
        tx.update(grads, state, grads, statistics={"other": {"kernel": samples}})


@pytest.mark.parametrize(
    ("inputs", "gradients", "geometry"),
    [
        ((4, 6), (4, 3), None),
        ((4, 5), (4, 2), None),
        ((4, 5), (3, 3), None),
        ((0, 5), (0, 3), None),
        ((2, 4, 5), (2, 4, 3), None),
        ((4, 5), (4, 3), window((1,))),
        ((4, 7, 5), (4, 5, 3), window((3,))),
    ],
)
def test_samples_of_another_layer_are_refused(inputs: Any, gradients: Any, geometry: Any) -> None:
    grads, _ = sampled(LAYERS["dense"], dtype=jnp.float32)
    samples = Samples(jnp.ones(inputs), jnp.ones(gradients), jnp.ones([]), window=geometry)
    with pytest.raises(ValueError, match=r"samples of 'layer/kernel'.*5 inputs and 3 outputs"):
        direction(fo.scale_by_frog(), grads, samples)


@each_method
@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("momentum", 1.0, ValueError),
        ("damping", 0.0, ValueError),
        ("damping", -1.0, ValueError),
        ("damping", "small", TypeError),
        ("iterations", 0, ValueError),
        ("iterations", True, ValueError),
        ("weight_decay", -0.1, ValueError),
        ("learning_rate", -0.1, ValueError),
        ("fallback", 3, TypeError),
    ],
)
def test_wrong_options_are_refused_by_name(method: str, option: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=option):
        METHODS[method][0](**{"learning_rate": 0.1, option: value})


def test_what_has_no_samples_is_left_to_the_fallback_as_the_error_says() -> None:
    """A loop's weights have factors and no samples."""
    q = {"loop": jnp.eye(4), "out": jnp.eye(4)}

    def looped(q: Any, x: Any) -> Any:
        h = jax.lax.scan(lambda h, _: (jnp.tanh(h @ q["loop"]), None), x, length=3)[0]
        return fo.losses.gaussian(h @ q["out"].T, jnp.ones((12, 4)))

    kind, x = fo.LayerSamples(8), jnp.ones((12, 4))
    _, grads, stats = fo.value_and_grad(looped, kind)(q, x)
    with pytest.raises(ValueError, match=r"no statistics for 'loop'.*batch, statistics=fo\.LayerSamples\(\.\.\.\)"):
        fo.frog(0.1).update(grads, fo.frog(0.1).init(q), q, statistics=stats)
    axes = fo.infer_axes(looped, q, x, statistics=kind)
    assert axes == {"loop": None, "out": fo.MatrixAxes(1, 0, head=True)}
    tx = fo.frog(0.1, axes=axes)
    jax.eval_shape(lambda: tx.update(grads, tx.init(q), q, statistics=stats))
