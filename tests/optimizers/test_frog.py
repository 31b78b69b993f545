"""FROG and K-FROG against the author's trajectories and against the NumPy reference, in float64."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisher_optax as fo
from fisher_optax.linalg import conjugate_gradient
from fisher_optax.preconditioner.applications.conjugate_gradient import frog_direction, kfrog_direction
from fisher_optax.statistics import Samples
from tests.optimizers.frog_layers import (
    LAYERS,
    METHODS,
    assert_same,
    each_layer,
    each_method,
    joined,
    rows_of,
    run,
    sampled,
    window,
)
from tests.reference.frog import Frog

GOLDEN = np.load(Path(__file__).parent / "golden" / "frog_conv.npz")
GOLDEN_CASES = {
    "k4": {"learning_rate": 1e-2, "iterations": 4, "damping": 1e-3, "momentum": 0.0},
    "k3_mom_wd": {"learning_rate": 1e-2, "iterations": 3, "damping": 1e-2, "momentum": 0.9, "weight_decay": 1e-2},
}


def golden(case: str, name: str) -> np.ndarray:
    """In Flax's order of axes."""
    x = GOLDEN[f"{case}/{name}"]
    return np.moveaxis(x, (-4, -3), (-1, -2)) if "conv" in name else np.moveaxis(x, 1, -1) if name == "x" else x


WINDOWS = [window((3, 3), strides, ((1, 1), (1, 1))) for strides in ((1, 1), (2, 2))]


def batch(case: str) -> list[Any]:
    return [jnp.asarray(golden(case, name)) for name in ("x", "y", "linear")]


def golden_loss(kernels: list[Any], x: Any, labels: Any, linear: Any, taps: Any = (0, 0)) -> tuple[Any, list[Any]]:
    """The loss of both convolutions, with ``taps`` added to their outputs, and their inputs."""
    inputs, out = [], x
    for W, w, tap in zip(kernels, WINDOWS, taps, strict=True):
        inputs.append(jax.nn.relu(out) if inputs else out)
        order = ("NHWC", "HWIO", "NHWC")
        out = tap + jax.lax.conv_general_dilated(inputs[-1], W, w.strides, w.padding, dimension_numbers=order)
    logits = jnp.moveaxis(out, -1, 1).reshape(len(x), -1) @ linear.T
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), inputs


through_taps = jax.jit(jax.grad(golden_loss, argnums=(0, 4), has_aux=True))
with_samples = jax.jit(fo.value_and_grad(golden_loss, fo.LayerSamples(16), has_aux=True))


def golden_gradients(case: str, kernels: list[Any]) -> tuple[list[Any], list[Samples]]:
    """With every example as a sample."""
    taps = jnp.zeros((16, 8, 8, 5)), jnp.zeros((16, 4, 4, 4))
    (grads, cotangents), inputs = through_taps(kernels, *batch(case), taps)
    parts = zip(inputs, cotangents, WINDOWS, strict=True)
    return grads, [Samples(a, 16 * y, jnp.asarray(16.0), window=w) for a, y, w in parts]


def captured_gradients(case: str, kernels: list[Any]) -> tuple[list[Any], list[Samples]]:
    """As `golden_gradients`."""
    (_, _), grads, samples = with_samples(kernels, *batch(case))
    return grads, samples


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_the_reference_follows_the_authors_trajectories(case: str) -> None:
    """With the author's guards in conjugate gradients it is the author's rule."""
    starts = [golden(case, f"conv{i}_0") for i in (1, 2)]
    models = [Frog(W.reshape(-1, W.shape[-1]), **GOLDEN_CASES[case], guard=1e-10) for W in starts]
    for t in range(5):
        kernels = [jnp.asarray(model.W.reshape(W.shape)) for model, W in zip(models, starts, strict=True)]
        grads, samples = golden_gradients(case, kernels)
        for i, (model, G, s) in enumerate(zip(models, grads, samples, strict=True)):
            W = model.step(np.asarray(G).reshape(-1, G.shape[-1]), *rows_of(s, bias=False))
            assert_same(W.reshape(G.shape), golden(case, f"conv{i + 1}")[t], starts[i], 1e-8)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("gradients", [golden_gradients, captured_gradients])
@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_the_authors_trajectories(case: str, gradients: Any) -> None:
    """With samples made by hand, and as an unmodified model gives them."""
    names = ("conv1", "conv2")
    start = {name: {"kernel": jnp.asarray(golden(case, f"{name}_0"))} for name in names}
    params, tx = start, fo.frog(**GOLDEN_CASES[case])
    state, update = tx.init(params), jax.jit(tx.update)
    for t in range(5):
        grads, samples = gradients(case, [params[name]["kernel"] for name in names])
        for name, G in zip(names, grads, strict=True):
            wanted = golden(case, f"grad_{name}")[t]
            np.testing.assert_allclose(G, wanted, rtol=1e-5, atol=1e-7 * np.abs(wanted).max())
        tree, stats = ({n: {"kernel": x} for n, x in zip(names, xs, strict=True)} for xs in (grads, samples))
        updates, state = update(tree, state, params, statistics=stats)
        params = optax.apply_updates(params, updates)
        for name in names:
            assert_same(params[name]["kernel"], golden(case, name)[t], start[name]["kernel"], 1e-6)


@pytest.mark.usefixtures("x64")
@each_layer
@each_method
def test_every_layer_follows_the_reference(method: str, layer: str) -> None:
    """Three steps with momentum and decay, each column's Fisher formed in the reference."""
    make, row = METHODS[method]
    case = LAYERS[layer]
    params, steps = sampled(case, 9)[0], [sampled(case, seed) for seed in range(3)]
    options = {"momentum": 0.7, "damping": 0.03, "iterations": 4, "weight_decay": 0.3}
    model = Frog(joined(params), 0.1, **options, row=row)
    for W, (grads, samples) in zip(run(make(0.1, **options), params, steps), steps, strict=True):
        assert_same(W, model.step(joined(grads), *rows_of(samples, case.bias)), joined(params), 1e-9)


@pytest.mark.usefixtures("x64")
@each_layer
@each_method
def test_many_iterations_solve_each_column_exactly(method: str, layer: str) -> None:
    make, row = METHODS[method]
    case = LAYERS[layer]
    params, step = sampled(case, 9)[0], sampled(case)
    (W,) = run(make(0.1, damping=0.1, iterations=60), params, [step])
    model = Frog(joined(params), 0.1, damping=0.1, iterations=None, row=row)
    assert_same(W, model.step(joined(step[0]), *rows_of(step[1], case.bias)), joined(params), 1e-9)


@pytest.mark.usefixtures("x64")
@each_method
def test_schedules(method: str) -> None:
    """Each of the four reads the number of its step, as the reference does with numbers set before each."""
    make, row = METHODS[method]
    case, names = LAYERS["dense-bias"], ("lr", "momentum", "damping", "wd")
    numbers = [(0.1, 0.9, 0.01, 0.5), (0.03, 0.5, 0.1, 0.2), (0.2, 0.7, 0.3, 0.0)]
    lr, momentum, damping, wd = (
        functools.partial(jnp.take, jnp.asarray(column)) for column in zip(*numbers, strict=True)
    )
    params, steps = sampled(case, 9)[0], [sampled(case, seed) for seed in range(3)]
    path = run(make(lr, momentum, damping, 3, wd), params, steps)
    model = Frog(joined(params), 0.0, iterations=3, row=row)
    for W, (grads, samples), now in zip(path, steps, numbers, strict=True):
        vars(model).update(zip(names, now, strict=True))
        assert_same(W, model.step(joined(grads), *rows_of(samples, case.bias)), joined(params), 1e-9)


def biggest(jaxpr: Any) -> int:
    """The size of the largest array a program makes, in whatever depth."""
    sizes = [0]
    for eqn in jaxpr.eqns:
        sizes += [x.aval.size for x in eqn.outvars]
        inner = [getattr(p, "jaxpr", p) for p in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "eqns"))]
        sizes += [biggest(p) for p in inner if hasattr(p, "eqns")]
    return max(sizes)


@pytest.mark.parametrize("solve", [frog_direction, kfrog_direction])
def test_patches_are_never_written_out(solve: Any) -> None:
    r, places, channels, n, w = 8, (12, 12), 16, 4, window((3, 3), padding=((1, 1), (1, 1)))
    shapes = [(9 * channels + 1, n), (r, *places, channels), (r, *places, n)]
    jaxpr = jax.make_jaxpr(lambda M, x, y: solve(M, x, y, w, 1e-3, 4))(*map(jnp.ones, shapes)).jaxpr
    assert biggest(jaxpr) == r * 12 * 12 * channels


@pytest.mark.usefixtures("x64")
def test_conjugate_gradients_solve_each_column_and_stop_where_they_are_done() -> None:
    """A matrix a column: two distinct eigenvalues take two steps, later ones change nothing, and zero stays zero."""
    rng = np.random.default_rng(0)
    Q = np.linalg.qr(rng.normal(size=(3, 6, 6)))[0]
    A = Q * np.array([2.0, 2, 2, 5, 5, 5]) @ Q.mT
    B = rng.normal(size=(6, 3)) * [1, 0, 1e100]
    wanted = np.linalg.solve(A, B.T[..., None])[..., 0].T
    for iterations in (2, 3, 200):
        Z = conjugate_gradient(lambda Z: jnp.einsum("nij,jn->in", A, Z), jnp.asarray(B), iterations)
        assert not np.any(Z[:, 1])
        np.testing.assert_allclose(Z, wanted, rtol=1e-12)
