"""Approximations of the Fisher: each is what its definition says of rows, and as near as it must be."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import fisher_optax as fo
from fisher_optax.fisher.operators.approximations import METHODS, approximate
from tests.capture.capture_models import unseen, watched
from tests.reference import approximations as reference
from tests.reference.curvature import factors, relative, windows

E, C = 5, 3
PAIRS = (
    *(("ekfac", "kfac"), ("soap", "shampoo"), ("soap", "shampoo_scaled")),
    *(("nearest", name) for name in ("kfac", "dykaf", "kl", "shampoo", "shampoo_scaled")),
)


def net(params: Any, x: Any, see: Any = unseen, looped: bool = False) -> Any:
    """A convolution, a scale, two dense layers in a scan (or a loop), a head; layers have biases."""
    conv = jax.lax.conv_general_dilated(
        x, params["conv"]["kernel"], (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    h = jnp.tanh(see("conv", x, conv + params["conv"]["bias"])).sum((1, 2)) * params["scale"]
    layer = lambda h, p: jnp.tanh(h @ p["kernel"] + p["bias"])  # noqa: E731
    if looped:
        for i in range(2):
            p = jax.tree.map(lambda x, i=i: x[i], params["stack"])
            h = jnp.tanh(see(f"stack {i}", h, h @ p["kernel"] + p["bias"]))
    else:
        h, _ = jax.lax.scan(lambda h, p: (layer(h, p), None), h, params["stack"])
    return see("head", h, h @ params["head"]["kernel"] + params["head"]["bias"])


def loss(params: Any, x: Any, y: Any) -> Any:
    return fo.losses.softmax_cross_entropy(net(params, x), y)


@functools.cache
def setting() -> tuple[Any, Any, Any]:
    """Parameters, images and labels, in float64."""
    rng = np.random.default_rng(0)
    shapes: Any = {
        "conv": {"kernel": (2, 2, 1, 3), "bias": (3,)},
        "scale": (3,),
        "stack": {"kernel": (2, 3, 3), "bias": (2, 3)},
        "head": {"kernel": (3, C), "bias": (C,)},
    }
    params = jax.tree.map(lambda s: rng.normal(size=s) / 2, shapes, is_leaf=lambda s: isinstance(s, tuple))
    return params, rng.normal(size=(E, 4, 4, 1)), rng.integers(0, C, E)


@functools.cache
def scores(fisher: str) -> np.ndarray:
    """Gradients of single labels, scaled so that ``Σ g gᵀ`` is the Fisher, one after the other: (r, D)."""
    params, x, y = setting()
    flat, unravel = ravel_pytree(params)
    log_p = lambda v: jax.nn.log_softmax(net(unravel(v), x))  # noqa: E731
    p, J = np.exp(log_p(flat)), np.asarray(jax.jacrev(log_p)(flat))
    if fisher == "empirical":
        return J[np.arange(E), y] / E**0.5
    return (J * np.sqrt(p / E)[..., None]).reshape(E * C, -1)


def matrices(leaves: Any) -> dict[str, np.ndarray]:
    """Of each layer, its kernel and bias as ``(*, m, n)``; the scale as a column."""
    out = {"scale": np.asarray(leaves["scale"])[..., None]}
    *batch, _ = leaves["scale"].shape
    for name in ("conv", "head"):
        W, b = np.asarray(leaves[name]["kernel"]), np.asarray(leaves[name]["bias"])
        out[name] = np.concatenate([W.reshape(*batch, -1, W.shape[-1]), b[..., None, :]], -2)
    for i in range(2):
        W, b = np.asarray(leaves["stack"]["kernel"])[..., i, :, :], np.asarray(leaves["stack"]["bias"])[..., i, :]
        out[f"stack {i}"] = np.concatenate([W, b[..., None, :]], -2)
    return out


@functools.cache
def rows(fisher: str) -> dict[str, np.ndarray]:
    """Of each layer: (r, m, n)."""
    unravel = ravel_pytree(setting()[0])[1]
    return matrices(jax.vmap(unravel)(jnp.asarray(scores(fisher))))


@functools.cache
def places() -> dict[str, np.ndarray]:
    """Of each layer, where its matrix is among the raveled parameters."""
    flat, unravel = ravel_pytree(setting()[0])
    return {name: x.ravel().astype(int) for name, x in matrices(unravel(jnp.arange(len(flat)))).items()}


def cut(F: Any) -> dict[str, np.ndarray]:
    """The blocks of the layers; everything else has to be 0."""
    F = np.array(F)
    blocks = {name: F[np.ix_(at, at)] for name, at in places().items()}
    for at in places().values():
        F[np.ix_(at, at)] = 0
    assert not F.any()
    return blocks


@functools.cache
def made(name: str, fisher: str = "true") -> Any:
    options = {"shampoo_scaled": {"trace_scaled": True}, "kl": {"ridge": 0.1}, "dykaf": {"sweeps": 2}}.get(name, {})
    method = name.removesuffix("_scaled")
    return approximate(method, loss, *setting(), fisher=fisher, **options)


@functools.cache
def blocks(name: str, fisher: str = "true") -> dict[str, np.ndarray]:
    return cut(made(name, fisher).dense())


@functools.cache
def factors_of(fisher: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A and B of each layer, from its inputs and the gradients at its outputs."""
    params, x, y = setting()
    p = np.asarray(jax.nn.softmax(net(params, x)))
    labels = [np.full(E, c) for c in range(C)] if fisher == "true" else [y]
    weights = p.T if fisher == "true" else np.ones((1, E))
    seen = [
        watched(lambda p, x, y, see: fo.losses.softmax_cross_entropy(net(p, x, see, True), y), params, x, c)
        for c in labels
    ]
    out = {}
    for name, a in seen[0][0].items():
        axes = (3, 1) if name == "conv" else (1, 1)
        a = windows(a, (2, 2), (2, 2), [(0, 0)] * 2, (1, 1), (1, 1)) if name == "conv" else a
        δ = [
            np.asarray(d[name]) * np.sqrt(w).reshape(E, *[1] * (d[name].ndim - 1))
            for (_, d), w in zip(seen, weights, strict=True)
        ]
        out[name] = factors(a, np.concatenate(δ), E, True, axes)
    return out


def wanted(name: str, fisher: str = "true") -> dict[str, np.ndarray]:
    """By the definition."""
    of: dict[str, Any] = {
        "block_diagonal": reference.block,
        "kl": lambda G: reference.kl(G, 0.1),
        "dykaf": lambda G: reference.dykaf(G, 2),
    }
    if name in ("kfac", "ekfac"):
        found = {k: reference.in_basis(reference.block(rows(fisher)[k]), *AB) for k, AB in factors_of(fisher).items()}
        found = found if name == "ekfac" else {k: np.kron(*AB) for k, AB in factors_of(fisher).items()}
    else:
        method = of.get(name) or getattr(reference, name)
        found = {k: method(G) for k, G in rows(fisher).items()}
    return found | {"scale": reference.block(rows(fisher)["scale"])}


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    assert {k: relative(found[k], F) for k, F in expected.items() if not relative(found[k], F) < tolerance} == {}


# --- what each is


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", (*METHODS, "shampoo_scaled"))
def test_each_is_its_definition(name: str) -> None:
    """Of a convolution, dense layers, two in a scan, all with biases, and of a leaf that is no layer."""
    assert_equal(blocks(name), wanted(name))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ("block_diagonal", "kfac"))
def test_of_the_datas_labels(name: str) -> None:
    assert_equal(blocks(name, "empirical"), wanted(name, "empirical"))


@pytest.mark.usefixtures("x64")
def test_products_are_those_of_the_entries_under_jit_and_in_float32() -> None:
    product = jax.jit(lambda A, v: A @ v)
    for name in ("kfac", "ekfac", "rowwise", "block_diagonal"):
        A = made(name)
        v = np.random.default_rng(1).normal(size=A.size)
        found = ravel_pytree(product(A, A.unravel(jnp.asarray(v))))[0]
        assert relative(found, np.asarray(A.dense()) @ v) < 1e-12
    given = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32 if x.dtype == float else None), setting())
    A = jax.jit(lambda *given: approximate("ekfac", loss, *given))(*given)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(A.data))
    assert_equal(cut(A.dense()), blocks("ekfac"), 1e-4)


# --- how near it must be


def errors(name: str) -> dict[str, float]:
    return {k: relative(F, wanted("block_diagonal")[k]) for k, F in blocks(name).items() if k != "scale"}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("nearer", "farther"), PAIRS)
def test_what_is_optimal_is_nearer_in_every_layer(nearer: str, farther: str) -> None:
    """A free diagonal in the same basis; the nearest of all Kronecker products."""
    best, other = errors(nearer), errors(farther)
    assert all(best[k] < other[k] for k in best)
    assert min(best.values()) > 0.01


def linear(W: Any, x: Any, y: Any) -> Any:
    return fo.losses.gaussian(x @ W, y)


def linear_setting(seed: int = 0, n: int = 3) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(4, 2)), rng.normal(size=(n, 4)), rng.normal(size=(n, 2))


@pytest.mark.usefixtures("x64")
def test_a_kronecker_product_is_recovered() -> None:
    """Of a linear model with Gaussian outputs, whose gradients there know nothing of the inputs: F = E[x xᵀ] ⊗ I."""
    W, x, y = linear_setting(n=7)
    F = np.kron(x.T @ x / 7, np.eye(2))
    kept: dict[str, Any] = {"shampoo": {"trace_scaled": True}, "kl": {"ridge": 0.0}}
    for method in ("kfac", "nearest_kronecker", "shampoo", "kl"):
        assert relative(approximate(method, linear, W, x, y, **kept.get(method, {})).dense(), F) < 1e-10, method


@pytest.mark.usefixtures("x64")
def test_kfac_is_exact_for_one_example() -> None:
    W, x, y = linear_setting(n=1)
    A = approximate("kfac", linear, W, x, y, fisher="empirical")
    g = np.outer(x[0], x[0] @ W - y[0]).ravel()
    assert relative(A.dense(), np.outer(g, g)) < 1e-12


@pytest.mark.parametrize("scale", (0.0, 1e-9))
def test_all_are_finite_for_singular_and_tiny_fishers_in_float32(scale: float) -> None:
    """One direction of the inputs alone, as small as squares in float32 go."""
    W, x, y = linear_setting()
    x = scale * np.outer(np.arange(3.0), x[0])
    for method in ("ekfac", "shampoo", "soap", "dykaf", "kl", "nearest"):
        for options in ({}, {"ridge": 0.0}) if method == "kl" else ({},):
            A = np.asarray(
                approximate(method, linear, jnp.float32(W), jnp.float32(x), jnp.float32(y), **options).dense()
            )
            assert np.isfinite(A).all(), method
            assert A.any() == bool(scale), method


@pytest.mark.usefixtures("x64")
def test_factors_of_a_classifier_keep_their_scale_in_float32() -> None:
    """Gradients of logits sum to 0, so R is singular; of many inputs and few examples, so is L."""
    rng = np.random.default_rng(0)
    x, y, W = np.abs(rng.normal(size=(12, 24))), rng.integers(4, size=12), np.zeros((24, 4))
    loss = lambda W, x, y: fo.losses.softmax_cross_entropy(x @ W, y)  # noqa: E731
    single, double = (
        approximate("kl", loss, W.astype(dtype), x.astype(dtype), y, fisher="empirical", ridge=1e-5).dense()
        for dtype in (np.float32, np.float64)
    )
    assert relative(single, np.asarray(double)) < 0.01
