"""Muon against the NumPy reference, in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisher_optax as fo
from tests.reference.muon import JORDAN, POLAR_EXPRESS_START, YOU, Muon, polar

POLYNOMIALS = {
    "polar-express": (fo.polar_express(steps=5), None),
    "jordan": (fo.jordan(5), JORDAN),
    "you": (fo.you(), YOU),
    "own": ([(2.0, -1.5, 0.5), (1.5, -0.5, 0.0)], [(2.0, -1.5, 0.5), (1.5, -0.5, 0.0)]),
}
# A leaf, its axes (None: by the rules for its shape), and how to see it as a stack of matrices.
LEAVES = {
    "square": ((5, 5), None, (1, 5, 5)),
    "tall": ((9, 4), None, (1, 9, 4)),
    "wide": ((3, 8), None, (1, 3, 8)),
    "stacked": ((2, 6, 3), fo.MatrixAxes(inputs=(1,), outputs=(2,), batch=(0,)), (2, 6, 3)),
    "conv": ((3, 3, 2, 5), None, (1, 18, 5)),
    "dense-general": ((4, 2, 3), fo.MatrixAxes(inputs=(0,), outputs=(1, 2)), (1, 4, 6)),
}


def trajectory(tx: optax.GradientTransformationExtraArgs, W: np.ndarray, grads: np.ndarray) -> np.ndarray:
    params = {"kernel": jnp.asarray(W)}
    state, update, path = tx.init(params), jax.jit(tx.update), []
    for G in grads:
        updates, state = update({"kernel": jnp.asarray(G)}, state, params)
        params = optax.apply_updates(params, updates)
        path.append(np.asarray(params["kernel"]))
    return np.stack(path)


def check(leaf: str, wanted_polynomial: Any, method: str = "auto", **options: Any) -> None:
    """Three steps of `fo.muon` on the leaf equal the reference on each of its matrices, to 1e-10 of the parameters."""
    shape, axes, stack = LEAVES[leaf]
    rng = np.random.default_rng(0)
    W, grads = rng.normal(size=shape), rng.normal(size=(3, *shape))
    actual = trajectory(
        fo.muon(0.1, axes=None if axes is None else {"kernel": axes}, method=method, **options), W, grads
    )
    options["polynomial"] = wanted_polynomial
    models = [Muon(w, 0.1, **options) for w in W.reshape(stack)]
    for W, G in zip(actual, grads, strict=True):
        wanted = np.stack([model.step(g) for model, g in zip(models, G.reshape(stack), strict=True)])
        np.testing.assert_allclose(W.reshape(stack), wanted, rtol=1e-10, atol=1e-10)


def coefficients(polynomial: Any) -> list[tuple[float, ...]]:
    return [tuple(float(x) for x in step) for step in polynomial]


def test_named_polynomials_are_the_published_ones() -> None:
    np.testing.assert_allclose(coefficients(fo.jordan(5)), JORDAN, rtol=1e-15)
    np.testing.assert_allclose(coefficients(fo.you()), YOU, rtol=1e-15)
    np.testing.assert_allclose(coefficients(fo.polar_express(steps=5))[:2], POLAR_EXPRESS_START, rtol=1e-9)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("method", ["auto", "direct", "gram"])
def test_every_shape_and_method(leaf: str, method: str) -> None:
    check(leaf, coefficients(fo.polar_express(steps=5)), method=method)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("polynomial", POLYNOMIALS)
def test_every_polynomial(polynomial: str) -> None:
    given, wanted = POLYNOMIALS[polynomial]
    check("tall", wanted or coefficients(given), polynomial=given)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("leaf", ["square", "tall", "wide", "conv"])
@pytest.mark.parametrize("scale", ["match_rms_adamw", "shape", "unit_rms", 0.3])
def test_every_scale(scale: str | float, leaf: str) -> None:
    check(leaf, JORDAN, scale=scale, polynomial=fo.jordan(5))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.4])
def test_momentum_and_decay(nesterov: bool, weight_decay: float) -> None:
    check("square", JORDAN, beta=0.8, nesterov=nesterov, weight_decay=weight_decay, polynomial=fo.jordan(5))


@pytest.mark.usefixtures("x64")
def test_the_default_is_polar_express_at_adamws_scale() -> None:
    check("wide", coefficients(fo.polar_express(steps=5)))


@pytest.mark.usefixtures("x64")
def test_the_direction_is_orthogonal_and_forgets_the_scale() -> None:
    """All singular values lie near 1, and 1e100 times the gradient moves as the gradient does."""
    G = np.random.default_rng(1).normal(size=(6, 4))
    tx = fo.scale_by_muon(scale=1.0, polynomial=fo.polar_express(steps=8))
    params = {"kernel": jnp.zeros((6, 4))}
    state = tx.init(params)
    first, large = (tx.update({"kernel": jnp.asarray(G * s)}, state, params)[0]["kernel"] for s in (1.0, 1e100))
    np.testing.assert_allclose(np.linalg.svd(first, compute_uv=False), 1, atol=1e-3)
    np.testing.assert_allclose(large, first, rtol=1e-12)
    np.testing.assert_allclose(first, polar(G, coefficients(fo.polar_express(steps=8))), rtol=1e-10)


@pytest.mark.usefixtures("x64")
def test_mask_and_fallback() -> None:
    """A masked matrix does not decay; embeddings, heads and vectors are AdamW's by default, and anyone's if asked."""
    rng = np.random.default_rng(2)
    shapes = {"dense": {"kernel": (4, 6), "bias": (6,)}, "embed": {"embedding": (5, 4)}, "head": {"kernel": (4, 5)}}
    params, grads = (
        jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s)), shapes, is_leaf=lambda x: isinstance(x, tuple))
        for _ in range(2)
    )
    mask = jax.tree.map(lambda _: False, params)
    for fallback, wanted in ((None, optax.adamw(0.1, weight_decay=0.0)), (optax.sgd(0.3), optax.sgd(0.3))):
        tx = fo.muon(0.1, weight_decay=0.5, mask=mask, fallback=fallback)
        updates, _ = tx.update(grads, tx.init(params), params)
        expected, _ = wanted.update(grads, wanted.init(params), params)
        for module, leaf in (("dense", "bias"), ("embed", "embedding"), ("head", "kernel")):
            np.testing.assert_allclose(updates[module][leaf], expected[module][leaf], rtol=1e-12)
        model = Muon(params["dense"]["kernel"], 0.1, polynomial=coefficients(fo.polar_express(steps=5)))
        moved = model.step(np.asarray(grads["dense"]["kernel"])) - params["dense"]["kernel"]
        np.testing.assert_allclose(updates["dense"]["kernel"], moved, rtol=1e-9)


@pytest.mark.parametrize(("option", "value"), [("scale", "big"), ("method", "svd"), ("polynomial", [(1.0, 2.0)])])
def test_wrong_options_are_refused_by_name(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=option):
        fo.muon(0.1, **{option: value})


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_complex_matrix_gets_the_unitary_factor(nesterov: bool) -> None:
    """Where `axes` names it, beside real leaves, for which nothing changes; its momentum is complex, in half types too.
    A gradient whose imaginary part is not finite is skipped."""
    rng = np.random.default_rng(4)
    G = {"a": rng.normal(size=(5, 3)), "z": rng.normal(size=(2, 3, 5)) + 1j * rng.normal(size=(2, 3, 5))}
    G = {name: jnp.asarray(x, jnp.complex64 if name == "z" else jnp.float32) for name, x in G.items()}
    axes = {"a": fo.MatrixAxes(), "z": fo.MatrixAxes(1, 2, 0)}
    options = dict(scale=1.0, polynomial=fo.polar_express(8), nesterov=nesterov, momentum_dtype=jnp.bfloat16)
    tx, alone = fo.muon(1.0, axes=axes, **options), fo.muon(1.0, axes={"a": axes["a"]}, **options)
    assert {row.method for row in fo.report(tx, G).rows} == {"muon"}
    update = jax.jit(tx.update)
    u, state = update(G, tx.init(G), G)
    u, state = update(jax.tree.map(lambda x: 2 * x, G), state, G)
    U, _, Vh = np.linalg.svd(np.asarray(G["z"]), full_matrices=False)
    np.testing.assert_allclose(u["z"], -U @ Vh, atol=1e-3)
    a = {"a": G["a"]}
    np.testing.assert_allclose(u["a"], alone.update(a, alone.init(a), a)[0]["a"], atol=5e-3)
    u, state = update(G | {"z": G["z"].at[0, 0, 0].set(1 + 1j * np.nan)}, state, G)
    assert not any(np.any(x) for x in jax.tree.leaves(u))
    assert fo.health(state).skipped == 1
