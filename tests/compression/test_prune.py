"""Pruning whole models: each layer on what the model before it gives, and what is said of it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_optax as fo
from tests.comparisons import assert_same_bits
from tests.compression.compression_models import BATCHES, TOKENS, WIDTH, Unrolled, X, dense, mlp, moment, scanned

prune = functools.partial(fo.compression.prune, progress=False)
owl = functools.partial(fo.compression.owl, progress=False)


@pytest.mark.parametrize("sequential", [True, False])
def test_each_layer_is_pruned_on_what_the_model_before_it_gives(sequential: bool) -> None:
    """By hand: the second layer's inputs come from the first as pruned, or as it was. Errors are of those inputs."""
    apply_fn, params = mlp()
    before = jax.tree.map(np.copy, params)
    pruned, masks, report = prune(apply_fn, params, BATCHES, "wanda", 0.5, sequential=sequential)
    W1, mask1 = fo.compression.wanda(params["first"]["kernel"], jnp.asarray(moment(X), jnp.float32), 0.5)
    first = {**params["first"], "kernel": W1} if sequential else params["first"]
    H2 = moment(np.maximum(dense(first, X), 0))
    W2, mask2 = fo.compression.wanda(params["second"]["kernel"], jnp.asarray(H2, jnp.float32), 0.5)
    assert_same_bits((pruned["first"]["kernel"], pruned["second"]["kernel"]), (W1, W2))
    assert_same_bits((masks["first"]["kernel"], masks["second"]["kernel"]), (mask1, mask2))
    assert masks["head"] == masks["first"] | {"kernel": None} == {"kernel": None, "bias": None}
    assert_same_bits(
        (params, pruned["head"], pruned["first"]["bias"]), (before, params["head"], params["first"]["bias"])
    )
    Δ = np.asarray(W2 - params["second"]["kernel"], np.float64)
    W = np.asarray(params["second"]["kernel"], np.float64)
    row = report.layers[1]
    np.testing.assert_allclose(row.error, np.trace(Δ.T @ H2 @ Δ) / 2, rtol=1e-4)
    np.testing.assert_allclose(row.relative_error, np.trace(Δ.T @ H2 @ Δ) / np.trace(W.T @ H2 @ W), rtol=1e-4)
    assert (row.name, row.shape, row.size, row.removed, row.sparsity) == ("second/kernel", (8, WIDTH), 48, 24, 0.5)
    assert report.error == sum(layer.error for layer in report.layers)
    assert "second/kernel" in str(report)


def test_a_scanned_stack_is_pruned_as_the_blocks_it_stands_for() -> None:
    apply_fn, params = scanned()
    inner = params["params"]
    blocks = {f"block_{i}": jax.tree.map(lambda x, i=i: x[i], inner["blocks"]) for i in range(3)}
    apart = {"params": {name: inner[name] for name in ("embed", "conv", "head")} | blocks}
    whole = prune(apply_fn, params, [TOKENS], "sparsegpt", 0.5)
    each = prune(Unrolled().apply, apart, [TOKENS], "sparsegpt", 0.5)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    for i in range(3):
        got = jax.tree.map(lambda x, i=i: x[i], whole.params["params"]["blocks"])
        jax.tree.map(close, got, each.params["params"][f"block_{i}"])
    assert [row.removed for row in whole.report.layers] == [row.removed for row in each.report.layers]


def test_obs_errs_least_then_sparsegpt_then_wanda() -> None:
    """On the inputs of the model as given, so that all have the same."""
    apply_fn, params = mlp()
    errors = [
        prune(apply_fn, params, BATCHES, method, 0.5, sequential=False).report.error
        for method in ("obs", "sparsegpt", "wanda")
    ]
    assert errors == sorted(errors)
    assert errors[0] < 0.8 * errors[2]


def test_patterns_shares_by_layer_and_over_all_layers() -> None:
    apply_fn, params = mlp()
    assert prune(apply_fn, params, [X], "obs", "2:4").report.sparsity == 0.5
    given = {"first/kernel": 0.25, "second/kernel": "1:4"}
    assert [row.sparsity for row in prune(apply_fn, params, [X], "wanda", given).report.layers] == [0.25, 0.75]
    _, masks, report = prune(apply_fn, params, [X], "magnitude", 0.4, scope="global", sequential=False)
    scores = {name: {"kernel": jnp.abs(params[name]["kernel"])} for name in ("first", "second")}
    assert_same_bits(
        {name: {"kernel": masks[name]["kernel"]} for name in scores}, fo.compression.global_masks(scores, 0.4)
    )
    assert sum(row.removed for row in report.layers) == 32


def test_dead_inputs_and_raised_damping_are_reported() -> None:
    """A single input that never varies makes H of rank one: nothing is replaced in silence."""
    apply_fn, params = mlp()
    x = jnp.ones((5, 4)).at[:, 2].set(0.0)
    with pytest.warns(UserWarning, match="'first/kernel'.*not positive definite at damping 0.*raised"):
        _, _, report = prune(apply_fn, params, [x], "sparsegpt", 0.5, damping=0.0, layers="first")
    assert report.layers[0].dead == 1
    assert report.layers[0].damping is not None
    assert report.layers[0].damping > 0


def test_fisher_and_obert_take_what_they_need() -> None:
    apply_fn, params = mlp()

    def loss(params: Any, x: Any) -> Any:
        return jnp.sum(jnp.square(apply_fn(params, x[None])))

    F = fo.fisher.diagonal(loss, params, BATCHES)
    pruned, _, report = prune(apply_fn, params, BATCHES, "fisher", 0.5, fisher=F, layers="first")
    wanted = fo.compression.fisher(params["first"]["kernel"], F.mean["first"]["kernel"], 0.5)
    assert_same_bits(pruned["first"]["kernel"], wanted.weights)
    assert report.layers[0].removed == 16
    upper = F.confidence_interval(0.95)[1]
    threshold = float(jnp.median(upper["first"]["kernel"] * params["first"]["kernel"] ** 2)) / 4
    gated = dict(fisher=F, upper=upper, threshold=threshold, layers="first")
    removed = prune(apply_fn, params, BATCHES, "fisher", 0.5, **gated).report.layers[0].removed
    certain = upper["first"]["kernel"] * params["first"]["kernel"] ** 2 / 2 < threshold
    assert removed == int(certain.sum()) < 16
    g = jax.vmap(jax.grad(loss), (None, 0))(params, X)["first"]["kernel"]
    pruned = prune(apply_fn, params, BATCHES, "obert", 0.5, loss_fn=loss, layers="first", block=8).params
    wanted = fo.compression.obert(params["first"]["kernel"], g, 0.5, block=8)
    np.testing.assert_allclose(pruned["first"]["kernel"], wanted.weights, rtol=1e-3, atol=1e-5)


def test_a_method_is_one_registered_function() -> None:
    """It sees each layer's matrix, H and its own options, and may say which damping it took."""
    seen = []

    def random_rows(W: Any, H: Any, sparsity: Any, seed: int = 0) -> Any:
        seen.append((W.shape, H.shape, sparsity, seed))
        stays = fo.compression.mask(jax.random.uniform(jax.random.key(seed), W.shape), sparsity)
        return jnp.where(stays, W, 0), stays

    fo.compression.register("random rows", random_rows)
    report = prune(*mlp(), [X], "random rows", 0.25, seed=3).report
    assert seen == [((4, 8), (4, 4), 0.25, 3), ((8, WIDTH), (8, 8), 0.25, 3)]
    assert report.sparsity == 0.25
    with pytest.raises(ValueError, match="there is a method 'random rows' already"):
        fo.compression.register("random rows", random_rows)
    with pytest.raises(TypeError, match="random rows has no option 'sed'; it has seed"):
        prune(*mlp(), [X], "random rows", 0.25, sed=3)


@pytest.mark.parametrize("method", ["magnitude", "fisher"])
@pytest.mark.parametrize("batches", [[], [jax.ShapeDtypeStruct(X.shape, X.dtype)], [X * jnp.nan]], ids=str)
def test_methods_without_data_take_none(method: str, batches: Any) -> None:
    """The same weights go; errors are unknown, and the order of layers plays no part."""
    apply_fn, params = mlp()
    known = dict(fisher=jax.tree.map(jnp.square, params)) if method == "fisher" else {}
    for scope in (None, "global"):
        wanted = prune(apply_fn, params, [X], method, 0.5, scope=scope, **known)
        pruned, masks, report = prune(apply_fn, params, batches, method, 0.5, scope=scope, **known)
        assert_same_bits((pruned, masks), (wanted.params, wanted.masks))
        assert [row.removed for row in report.layers] == [row.removed for row in wanted.report.layers]
        assert np.isnan([report.error, *(row.relative_error for row in report.layers)]).all()
        assert "nan" not in str(report)
        assert wanted.report.error > 0


def test_what_cannot_be_told_without_a_batch_is_named() -> None:
    params = {"experts": jnp.ones((3, 4, 2)), "up": jnp.arange(8.0).reshape(4, 2)}
    with pytest.warns(UserWarning, match="'experts', ambiguous 3-D leaf.*Pass one batch"):
        pruned = prune(lambda p, x: x, params, [], "magnitude", 0.5)
    assert [row.name for row in pruned.report.layers] == ["up"]
    with pytest.raises(ValueError, match="layers='down' is no layer of this model"):
        prune(lambda p, x: x, params, [], "magnitude", 0.5, layers="down")


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "obs"])
def test_a_layer_without_inputs_is_said_and_keeps_its_largest_weights(method: str) -> None:
    """Of a stack, the matrix that no data reach: outputs on them do not change, so its error is 0."""
    W = jax.random.normal(jax.random.key(0), (3, 4, 4))

    def apply_fn(p: Any, x: Any) -> Any:
        def step(x: Any, operands: Any) -> Any:
            i, W = operands
            return jax.lax.cond(i == 1, lambda x: x, lambda x: jnp.tanh(x @ W), x), ()

        return jax.lax.scan(step, x, (jnp.arange(3), p["w"]))[0]

    with pytest.warns(UserWarning, match=r"'w\[1\]': no input has reached it"):
        _, masks, report = prune(apply_fn, {"w": W}, [X], method, 0.5)
    assert_same_bits(masks["w"][1], fo.compression.mask(jnp.abs(W[1]), 0.5, scope="output"))
    row = {row.name: row for row in report.layers}["w[1]"]
    assert (row.error, row.relative_error, row.dead) == (0.0, 0.0, 4)


ERRORS = [
    (dict(method="random"), ValueError, "method must be one of .*'sparsegpt'.*got 'random'"),
    (dict(sparsity=1.0), ValueError, "at least 0 and below 1"),
    (dict(sparsity="4:3"), ValueError, "sparsity must be"),
    (dict(sparsity="3:6"), ValueError, "'first/kernel': 3:6 needs inputs in groups of 6; this kernel has 4"),
    (dict(sparsity={"first/kernel": 0.5}), ValueError, "lacks 'second/kernel'"),
    (dict(layers=["third"]), ValueError, "layers='third' is no layer of this model. It has 'first/kernel'"),
    (dict(layers="first/bias"), ValueError, "'first/bias' is used as bias of first/kernel"),
    (dict(layers=lambda path: False), ValueError, "no layer to prune"),
    (dict(batches=iter([X])), TypeError, "batches is read once a layer: pass a list"),
    (dict(batches=[]), ValueError, "batches is empty"),
    (dict(batches=[X, X.at[3, 1].set(jnp.nan)]), ValueError, "inputs of 'first/kernel' are not finite"),
    (dict(scope="global"), ValueError, "pass sequential=False"),
    (dict(scope="global", sequential=False, method="obs"), ValueError, "obs has no scores"),
    (dict(method="obert"), ValueError, "obert needs gradients: pass loss_fn"),
    (dict(method="fisher"), ValueError, "fisher needs fisher="),
    (dict(upper=1.0), ValueError, "upper= must be a tree like params"),
    (dict(method="fisher", fisher={"first": jnp.ones(3)}), ValueError, "fisher= must be a tree like params"),
]


@pytest.mark.parametrize(("given", "error", "message"), ERRORS, ids=lambda x: str(x)[:30] if isinstance(x, str) else "")
def test_what_is_wrong_is_said(given: dict[str, Any], error: type[Exception], message: str) -> None:
    apply_fn, params = mlp()
    with pytest.raises(error, match=message):
        prune(apply_fn, params, **{"batches": [X], "method": "wanda", **given})


def test_weights_that_are_not_finite_are_named() -> None:
    apply_fn, params = mlp()
    bad = params | {"second": params["second"] | {"kernel": params["second"]["kernel"].at[1, 2].set(jnp.nan)}}
    with pytest.raises(ValueError, match="sparsegpt on 'second/kernel': 1 of 48 entries of the weights are not finite"):
        prune(apply_fn, bad, [X])
