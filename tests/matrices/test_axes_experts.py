"""Experts are a batch where axes are inferred: by what the next weight has a matrix for each of."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_optax as fo
from tests.matrices.axes_models import leaf

E, D, H, L = 4, 6, 8, 3
X = leaf(5, D)
Loss = Callable[[Any, jax.Array], jax.Array]
INTO, OUT = fo.MatrixAxes(1, 2, 0), fo.MatrixAxes(1, 2, 0)


def through(act: Callable[[jax.Array], jax.Array]) -> Loss:
    def loss(p: Any, x: jax.Array) -> jax.Array:
        return jnp.einsum("beh,ehd->bd", act(jnp.einsum("bd,edh->beh", x, p["wi"])), p["wo"]).sum()

    return loss


def gated(p: Any, x: jax.Array) -> jax.Array:
    """The experts' axis in another place, gates on it, and each expert's own result."""
    gates = jax.nn.softmax(x @ p["gate"])
    h = jax.nn.silu(jnp.einsum("bd,edh->ebh", x, p["wi"])) * gates.T[..., None]
    return jnp.einsum("ebh,ehd->ebd", h, p["wo"]).sum()


WEIGHTS = {"wi": leaf(E, D, H), "wo": leaf(E, H, D)}


ACTIVATIONS = {
    "tanh": jnp.tanh,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "jitted": jax.jit(jax.nn.relu),
    "linear": lambda h: 2 * h,
}


@pytest.mark.parametrize("act", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_one_matrix_an_expert_through_every_activation(act: Callable[[jax.Array], jax.Array]) -> None:
    """Where the next product keeps experts apart. Summed over them, it has the inputs of all."""

    def loss(p: Any, x: jax.Array) -> jax.Array:
        return jnp.einsum("beh,ehd->bed", act(jnp.einsum("bd,edh->beh", x, p["wi"])), p["wo"]).sum()

    axes = fo.infer_axes(loss, WEIGHTS, X)
    assert axes == {"wi": INTO, "wo": OUT}
    summed = fo.infer_axes(through(act), WEIGHTS, X)
    assert (summed["wi"].batch, summed["wo"].inputs) == ((), (0, 1))


def test_gates_and_loops_hide_nothing() -> None:
    axes = fo.infer_axes(gated, WEIGHTS | {"gate": leaf(D, E)}, X)
    assert axes == {"wi": INTO, "wo": OUT, "gate": None}

    def loss(p: Any, x: jax.Array) -> jax.Array:
        def body(x: jax.Array, w: Any) -> tuple[jax.Array, None]:
            h = jax.nn.gelu(jnp.einsum("bd,edh->beh", x, w["wi"]))
            return x + jnp.einsum("beh,ehd->bed", h, w["wo"]).sum(1), None

        return jax.lax.scan(jax.checkpoint(body), x, jax.tree.map(lambda w: jnp.moveaxis(w, 1, 0), p))[0].sum()

    axes = fo.infer_axes(loss, {"wi": leaf(E, L, D, H), "wo": leaf(E, L, H, D)}, X)
    assert axes == {"wi": fo.MatrixAxes(2, 3, (0, 1)), "wo": fo.MatrixAxes(2, 3, (0, 1))}


MIXING = {
    "sums": lambda h: jnp.cumsum(h, 1),
    "another order": lambda h: h[:, ::-1],
    "sorted": lambda h: jnp.sort(h, 1),
    "a product of square matrices": lambda h: jnp.ones((5, E, E)) @ h,
}


@pytest.mark.parametrize("mix", MIXING.values(), ids=MIXING.keys())
def test_what_mixes_experts_leaves_one_matrix(mix: Callable[[jax.Array], jax.Array]) -> None:
    def loss(p: Any, x: jax.Array) -> jax.Array:
        return jnp.einsum("beh,ehd->bed", mix(jnp.einsum("bd,edh->beh", x, p["wi"])), p["wo"]).sum()

    assert fo.infer_axes(loss, WEIGHTS, X)["wi"] == fo.MatrixAxes(1, (0, 2))


def test_a_bias_of_experts_goes_with_them_and_statistics_see_one_matrix() -> None:
    """Muon orthogonalizes each expert; with ``statistics=`` K-FAC gets the matrix that it has factors of."""
    rng = np.random.default_rng(0)
    shapes = {"wi": (E, D, H), "b": (E, H), "wo": (E, H, D)}
    params = {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}
    x = jnp.asarray(rng.normal(size=(30, D)), jnp.float32)

    def loss(p: Any, x: jax.Array) -> jax.Array:
        h = jnp.tanh(jnp.einsum("bd,edh->beh", x, p["wi"]) + p["b"])
        return fo.losses.gaussian(jnp.einsum("beh,ehd->bed", h, p["wo"]), jnp.zeros((30, E, D)))

    axes = fo.infer_axes(loss, params, x)
    assert axes == {"wi": fo.MatrixAxes(1, 2, 0, bias="b"), "wo": OUT, "b": None}
    tx = fo.scale_by_muon(axes=axes, polynomial=fo.polar_express(8), scale=1.0)
    grads = jax.grad(loss)(params, x)
    step = jax.jit(tx.update)(grads, tx.init(params), params)[0]["wi"]
    for U, G in zip(step, grads["wi"], strict=True):
        u, _, v = np.linalg.svd(np.asarray(G, np.float64), full_matrices=False)
        np.testing.assert_allclose(U, u @ v, atol=0.02)
    kind = fo.KroneckerFactors()
    joint = fo.infer_axes(loss, params, x, statistics=kind)
    assert joint["wi"] == fo.MatrixAxes(1, (0, 2), bias="b")
    tx = fo.scale_by_kfac(axes=joint)
    stats = jax.jit(fo.value_and_grad(loss, kind))(params, x)[2]
    jax.jit(tx.update)(grads, tx.init(params), params, statistics=stats)
