"""Shampoo against a float64 reference, and where it is another method exactly."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisher_optax as fo
from tests.comparisons import types
from tests.grouped import grouped
from tests.optimizers.test_soap import gradients, trajectory, tree_run
from tests.reference.shampoo import Shampoo

OPTIONS = {
    "defaults": {},
    "half": {"exponent": -0.5, "precondition_frequency": 3},
    "quarter-alone": {"grafting": None, "precondition_frequency": 3},
    "half-alone": {"exponent": -0.5, "grafting": None, "precondition_frequency": 2, "eps": 1e-3},
    "any-exponent": {"exponent": -0.3, "precondition_frequency": 2},
    "sum": {"accumulate": "sum", "precondition_frequency": 2},
    "traced": {"exponent": -0.5, "grafting": None, "trace_scaling": True, "precondition_frequency": 2},
    "rmsprop": {"grafting": "rmsprop", "precondition_frequency": 2},
    "sgd-decay": {"grafting": "sgd", "weight_decay": 0.3, "precondition_frequency": 2},
    "blocks": {"block_size": 3, "precondition_frequency": 2},
    "half-blocks-alone": {"exponent": -0.5, "grafting": None, "block_size": 3, "precondition_frequency": 2},
    "late-start": {"start_preconditioning_step": 7, "precondition_frequency": 2},
    "late-start-alone": {"start_preconditioning_step": 7, "precondition_frequency": 2, "grafting": None},
    "betas": {"b1": 0.5, "b2": 0.8, "precondition_frequency": 4},
}


def shampoo(learning_rate: float, **options: Any) -> optax.GradientTransformationExtraArgs:
    return fo.shampoo(learning_rate, **grouped(factor_dtype=jnp.float64, **options))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.usefixtures("x64")
def test_the_reference(options: dict[str, Any]) -> None:
    """20 steps of a 4 x 5 matrix in float64, to 1e-9."""
    grads, W = gradients((4, 5), steps=20), np.ones((4, 5))
    method = Shampoo(W, 1e-2, **options)
    wanted = np.stack([method.step(G) for G in grads])
    np.testing.assert_allclose(trajectory(shampoo(1e-2, **options), W, grads), wanted, atol=1e-9)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
@pytest.mark.parametrize("exponent", [-0.25, -0.5])
@pytest.mark.usefixtures("x64")
def test_one_side(shape: tuple[int, int], exponent: float) -> None:
    """The shorter side alone, in either orientation: twice the exponent of the original, once -1/2."""
    grads, W = gradients(shape, steps=20), np.ones(shape)
    options = {"sides": "shorter", "exponent": exponent, "precondition_frequency": 2, "grafting": None}
    method = Shampoo(W, 1e-2, **options)
    wanted = np.stack([method.step(G) for G in grads])
    np.testing.assert_allclose(trajectory(shampoo(1e-2, **options), W, grads), wanted, atol=1e-9)


@pytest.mark.parametrize("root", ["eigh", "newton", "polynomial"])
@pytest.mark.usefixtures("x64")
def test_without_memory_it_is_the_polar_factor(root: str) -> None:
    """b2 = 0 and exponent -1/4: (G Gᵀ)^-1/4 G (GᵀG)^-1/4 = U Vᵀ, what Muon's iteration aims at."""
    G = np.random.default_rng(0).normal(size=(6, 6))
    U, _, V = np.linalg.svd(G)
    tx = fo.scale_by_shampoo(
        0.0,
        0.0,
        1e-14,
        grafting=None,
        precondition_frequency=1,
        refresh=fo.Refresh(decomposition=root),
        storage=fo.Storage(factor_dtype=jnp.float64),
    )
    params = {"kernel": jnp.asarray(G)}
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"], U @ V, atol=1e-6)


def test_exponent_zero_is_momentum() -> None:
    """Without grafting, exactly `optax.sgd`'s steps."""
    grads = [{"kernel": jnp.asarray(G, jnp.float32)} for G in gradients((4, 5), steps=20)]
    params = {"kernel": jnp.ones((4, 5))}
    tx = fo.shampoo(0.1, b1=0.9, exponent=0.0, grafting=None, start_preconditioning_step=0)
    ours, wanted = (tree_run(t, params, grads) for t in (tx, optax.sgd(0.1, momentum=0.9)))
    for a, b in zip(ours, wanted, strict=True):
        np.testing.assert_array_equal(a["kernel"], b["kernel"])


@pytest.mark.parametrize(
    ("grafting", "graft"),
    [("adam", optax.scale_by_adam(0.9, 0.99)), ("rmsprop", optax.scale_by_rms()), ("sgd", optax.identity())],
)
def test_before_the_start_it_is_the_graft(grafting: str, graft: optax.GradientTransformation) -> None:
    """Parameters and losses over 20 steps, bit for bit (outside jit, which rounds fused sums once); then they part."""
    target = jnp.asarray(gradients((4, 5), steps=1)[0], jnp.float32)

    def run(tx: optax.GradientTransformation, steps: int) -> tuple[Any, list[Any]]:
        params, losses = {"kernel": jnp.zeros((4, 5))}, []
        state = tx.init(params)

        loss_and_grads = jax.jit(jax.value_and_grad(lambda p: jnp.sum((p["kernel"] - target) ** 2)))
        for _ in range(steps):
            loss, grads = loss_and_grads(params)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            losses.append(loss)
        return params["kernel"], losses

    ours = fo.shampoo(0.01, grafting=grafting, start_preconditioning_step=21, precondition_frequency=5)
    plain = optax.chain(graft, optax.scale_by_learning_rate(0.01))
    (W, losses), (wanted, wanted_losses) = run(ours, 20), run(plain, 20)
    np.testing.assert_array_equal(W, wanted)
    np.testing.assert_array_equal(losses, wanted_losses)
    assert not np.allclose(run(ours, 21)[0], run(plain, 21)[0], rtol=1e-4)


@pytest.mark.parametrize("root", ["eigh", "newton", "polynomial"])
def test_a_failed_root_keeps_the_last_good_one(root: str) -> None:
    """A factor made NaN: the step goes on with the old root, and `fo.health` counts both sides' failures."""
    tx = fo.shampoo(
        0.1,
        grafting=None,
        precondition_frequency=1,
        refresh=fo.Refresh(decomposition=root),
        storage=fo.Storage(factor_dtype=jnp.float32),
    )
    params = {"kernel": jnp.asarray(gradients((4, 5), steps=1)[0], jnp.float32)}
    state = tx.init(params)
    update = jax.jit(tx.update)
    for _ in range(2):
        _, state = update(params, state, params)
    clean, _ = update(params, state, params)

    def spoil(path: Any, x: Any) -> Any:
        return x.at[0, 0, 1].set(jnp.nan) if "factors" in jax.tree_util.keystr(path) and x.ndim == 3 else x

    updates, state = update(params, jax.tree_util.tree_map_with_path(spoil, state), params)
    assert fo.health(state).failures == 2
    # One more refresh of the same average would have moved the root a little.
    moved = jnp.linalg.norm(updates["kernel"] - clean["kernel"])
    assert 0 < float(moved) < 0.01 * float(jnp.linalg.norm(clean["kernel"]))


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-15, 1.0, 1e15, 1e30])
@pytest.mark.parametrize("make", [fo.shampoo, fo.dykaf, fo.kl_soap, fo.kl_shampoo])
def test_any_gradient(make: Any, scale: float) -> None:
    """Zero, huge, tiny and rank-one gradients: parameters stay finite; 1e30, whose squares overflow, is skipped."""
    params = {"kernel": jnp.ones((4, 5))}
    tx = make(0.1, precondition_frequency=2)
    state, step = tx.init(params), jax.jit(tx.update)
    grads = [*gradients((4, 5), steps=3), *(np.outer(np.arange(4), np.arange(5)) for _ in range(3))]
    for G in grads:
        updates, state = step({"kernel": jnp.asarray(scale * G, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((params, state)))
    assert int(fo.health(state).skipped) == (len(grads) if scale == 1e30 else 0)


def test_grafting_is_per_matrix() -> None:
    """Of a stacked leaf each matrix gets its own norm, a bias its whole one; a zero direction stays zero."""
    axes = {"kernel": fo.MatrixAxes((1,), (2,), (0,)), "bias": None}
    tx = fo.graft(optax.scale(-3.0), optax.scale_by_rms(), axes=axes)
    params = {"kernel": jnp.ones((3, 4, 5)), "bias": jnp.ones(4)}
    grads = {"kernel": jnp.asarray(gradients((4, 5), steps=3), jnp.float32).at[1].set(0), "bias": jnp.arange(4.0)}
    updates, _ = tx.update(grads, tx.init(params), params)
    wanted, _ = optax.scale_by_rms().update(grads, optax.scale_by_rms().init(params))
    for i in range(3):
        np.testing.assert_allclose(
            jnp.linalg.norm(updates["kernel"][i]), jnp.linalg.norm(wanted["kernel"][i]), rtol=1e-5
        )
    assert not updates["kernel"][1].any()
    np.testing.assert_allclose(jnp.linalg.norm(updates["bias"]), jnp.linalg.norm(wanted["bias"]), rtol=1e-5)
    cosine = (
        jnp.sum(updates["bias"] * -grads["bias"]) / jnp.linalg.norm(updates["bias"]) / jnp.linalg.norm(grads["bias"])
    )
    np.testing.assert_allclose(cosine, 1, rtol=1e-5)


def test_arguments_are_checked() -> None:
    wrong: tuple[tuple[dict[str, Any], type[Exception], str], ...] = (
        ({"exponent": -2}, ValueError, "exponent"),
        ({"exponent": -0.3, "root": "newton"}, ValueError, "newton"),
        ({"exponent": -1 / 3, "root": "polynomial"}, ValueError, "polynomial"),
        ({"root": "cholesky"}, ValueError, "method"),
        ({"grafting": "lion"}, ValueError, "grafting"),
        ({"grafting": 3}, TypeError, "grafting"),
        ({"accumulate": "median"}, ValueError, "accumulate"),
        ({"refresh": "adaptive"}, ValueError, "refresh"),
        ({"start_preconditioning_step": -1}, ValueError, "start_preconditioning_step"),
        ({"b2": 1.5}, ValueError, "b2"),
    )
    for options, error, words in wrong:
        with pytest.raises(error, match=words):
            fo.shampoo(0.1, **grouped(**options))


def test_momentum_before_the_first_root_keeps_half_precision_under_a_float32_decay() -> None:
    params = {"kernel": jnp.ones((4, 3), jnp.bfloat16), "scale": jnp.ones(3)}
    tx = fo.shampoo(0.1, b1=jnp.float32(0.9), grafting=None)
    state = jax.eval_shape(tx.init, params)
    assert types(jax.eval_shape(tx.update, params, state, params)) == types((params, state))
