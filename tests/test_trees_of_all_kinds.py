"""Integers, booleans and random states among the parameters change nothing, and come out of every tool as they were."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisher_optax as fo
from tests.comparisons import assert_same_bits

REST = {"step": jnp.array(3, jnp.int32), "scaled": jnp.array([True, False]), "key": jax.random.key(0)}
OTHER_REST = {"step": jnp.array(7, jnp.int32), "scaled": jnp.array([False, True]), "key": jax.random.key(5)}
TEXTS, NEXT = jnp.array([[0, 1, 2], [3, 4, 5]]), jnp.array([[1, 2, 3], [4, 5, 6]])


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


FLOATS = {
    "embedding": normal(0, 7, 4),
    "up": {"kernel": normal(1, 4, 4), "bias": normal(2, 4)},
    "head": normal(3, 4, 7),
}
TUNED = jax.tree.map(lambda x: x + 0.1 * jnp.sin(9 * x), FLOATS)
PARAMS = FLOATS | REST
MASKS = {"embedding": None, "up": {"kernel": FLOATS["up"]["kernel"] > 0, "bias": None}, "head": None}


def logits(p: Any, tokens: Any) -> Any:
    """Of a whole tree, or of the floats alone with the same rest."""
    p = REST | p
    h = jnp.tanh(p["embedding"][tokens] @ p["up"]["kernel"] + p["up"]["bias"]) * jnp.where(p["scaled"][0], p["step"], 1)
    return (h + 0.1 * jax.random.normal(p["key"], h.shape)) @ p["head"]


def loss(p: Any, tokens: Any, labels: Any) -> Any:
    return fo.losses.softmax_cross_entropy(logits(p, tokens), labels)


def example_loss(p: Any, example: Any) -> Any:
    return loss(p, *example)


def operator(params: Any, fisher: str = "true") -> Any:
    return fo.fisher.operator(
        loss, params, TEXTS, NEXT, fisher=fisher, key=jax.random.key(1) if fisher == "mc" else None
    )


def diagonal(params: Any, **options: Any) -> Any:
    return fo.fisher.diagonal(example_loss, params, [(TEXTS, NEXT)], **options)


def pruned(params: Any, *batches: Any, method: str, **options: Any) -> Any:
    return fo.compression.prune(logits, params, list(batches), method, 0.5, progress=False, **options)


def trained(tx: optax.GradientTransformation, params: Any) -> Any:
    """Three steps, of which `optax.masked` keeps what is no floating point."""
    tx = optax.masked(tx, jax.tree.map(lambda x: jnp.issubdtype(x.dtype, jnp.inexact), params))
    state = tx.init(params)
    for _ in range(3):
        own = {k: x for k, x in params.items() if k not in REST}
        g = jax.grad(lambda own, p=params: loss(p | own, TEXTS, NEXT))(own)
        updates, state = tx.update(g | {k: x for k, x in params.items() if k in REST}, state, params)
        params = params | optax.apply_updates(own, {k: updates[k] for k in own})
    return params


def vector(params: Any) -> Any:
    tuned = TUNED | (OTHER_REST if "step" in params else {})
    return fo.compression.task_vector(params, tuned)


def tuned(params: Any) -> Any:
    return TUNED | (OTHER_REST if "step" in params else {})


compression, fisher, geometry = fo.compression, fo.fisher, fo.fisher.geometry
SQUARES = jax.tree.map(jnp.square, FLOATS), jax.tree.map(jnp.cosh, FLOATS)
EVERYTHING: dict[str, Callable[[Any], Any]] = {
    "prune": lambda p: pruned(p, TEXTS, method="sparsegpt").params,
    "prune without data": lambda p: pruned(p, method="magnitude").params,
    "prune by a Fisher": lambda p: pruned(p, method="fisher", fisher=diagonal(p)).params,
    "prune by gradients": lambda p: pruned(p, TEXTS, method="obert", loss_fn=lambda p, x: jnp.sum(logits(p, x))).params,
    "owl": lambda p: compression.owl(logits, p, [TEXTS], 0.5, progress=False),
    "merge": lambda p: compression.merge([p, tuned(p)], SQUARES).params,
    "merge, Fishers by diagonal": lambda p: compression.merge([p, tuned(p)], [diagonal(p), diagonal(p | TUNED)]).params,
    "merge, operators": lambda p: compression.merge([p, tuned(p)], [operator(p), operator(p)], iterations=5).params,
    "task arithmetic": lambda p: compression.add_task_vectors(p, [vector(p), vector(p)], scale=0.5),
    "task arithmetic with Fishers": lambda p: compression.add_task_vectors(p, [vector(p)] * 2, fishers=SQUARES),
    "ties": lambda p: compression.ties(p, [vector(p), compression.dare(jax.random.key(3), vector(p), 0.5)]),
    "dare": lambda p: compression.dare(jax.random.key(3), p, 0.5),
    "keep_masks": lambda p: trained(compression.keep_masks(optax.adam(0.1), MASKS), p),
    "movement": lambda p: trained(compression.movement(optax.sgd(0.1), 0.5, score_learning_rate=1.0), p),
    "gradual": lambda p: trained(compression.gradual(optax.sgd(0.1), 0.5, every=2), p),
    "remove_tokens by names": lambda p: compression.remove_tokens(p, [2]).params,
    "remove_tokens by the program": lambda p: compression.remove_tokens(p, [2], apply_fn=logits, batch=TEXTS).params,
    "operator on a whole tree": lambda p: operator(p) @ p,
    "natural gradient": lambda p: geometry.natural_gradient(operator(p), p, 0.1),
}
WITHOUT_REST: dict[str, Callable[[Any], Any]] = {
    **{f"operator {k}": lambda p, k=k: operator(p, k).dense() for k in ("true", "mc", "empirical", "ggn", "hessian")},
    **{
        f"approximate {k}": lambda p, k=k: fisher.approximate(k, loss, p, TEXTS, NEXT).dense()
        for k in ("kfac", "ekfac", "shampoo", "diagonal")
    },
    "dense": lambda p: fisher.dense(loss, p, TEXTS, NEXT),
    "rows": lambda p: operator(p, "empirical").rows(),
    "block": lambda p: operator(p).block("up").dense(),
    "spectrum": lambda p: fisher.spectrum(operator(p), 3).eigenvalues,
    "density": lambda p: fisher.density(operator(p)),
    "block_spectra": lambda p: list(fisher.block_spectra(operator(p, "empirical")).values()),
    "effective_rank": lambda p: fisher.effective_rank(fisher.spectrum(operator(p), 3).eigenvalues),
    "compare": lambda p: fisher.compare(operator(p), operator(FLOATS)),
    "rank": lambda p: geometry.rank(operator(p)),
    "null_directions": lambda p: geometry.null_directions(operator(p)),
    "inner_product": lambda p: geometry.inner_product(operator(p), p, p),
    "kl_quadratic": lambda p: geometry.kl_quadratic(operator(p), p),
    **{
        f"diagonal {k}": lambda p, k=k: jax.tree.leaves(diagonal(p, unit=k).mean)
        for k in ("sequence", "token", "position")
    },
    **{
        f"diagonal by {k}": lambda p, k=k: jax.tree.leaves(diagonal(p, groups=k).mean)
        for k in ("rows", "tensor", "blocks")
    },
    "ewc_penalty": lambda p: fisher.ewc_penalty(diagonal(p), p)(tuned(p)),
    "masks": lambda p: jax.tree.leaves(pruned(p, TEXTS, method="wanda").masks),
    "fallbacks": lambda p: jax.tree.leaves(compression.merge([p, tuned(p)], SQUARES).fallbacks),
    "infer_axes": lambda p: jax.tree.leaves(fo.infer_axes(loss, p, TEXTS, NEXT)),
    "report": lambda p: [row[:6] for row in fo.report(loss, p, TEXTS, NEXT).rows if row.path not in REST],
}


def assert_passed(tree: Any) -> None:
    for name, x in REST.items():
        assert tree[name].dtype == x.dtype, name
        same = jax.random.key_data if name == "key" else np.asarray
        np.testing.assert_array_equal(same(tree[name]), same(x), err_msg=name)


@pytest.mark.parametrize("name", EVERYTHING)
def test_they_come_out_as_they_were(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        whole, alone = EVERYTHING[name](PARAMS), EVERYTHING[name](FLOATS)
    if name != "owl":
        assert_passed(whole)
        whole = {k: x for k, x in whole.items() if k not in REST}
    if "tokens" not in name:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), whole, alone)
    else:
        assert_same_bits(whole, alone)


@pytest.mark.parametrize("name", WITHOUT_REST)
def test_they_have_no_part_in_what_is_of_floats(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        whole, alone = (jax.tree.leaves(WITHOUT_REST[name](p)) for p in (PARAMS, FLOATS))
    assert len(whole) == len(alone)
    for a, b in zip(whole, alone, strict=True):
        if isinstance(b, fo.MatrixAxes | str):
            assert a == b
        else:
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_what_differs_between_models_is_of_the_first_and_kinds_that_differ_are_an_error() -> None:
    merged = fo.compression.merge([PARAMS | OTHER_REST, TUNED | REST], SQUARES).params
    assert int(merged["step"]) == 7
    lacking = {k: x for k, x in (TUNED | REST).items() if k != "step"}
    assert_passed(fo.compression.merge([PARAMS, lacking], SQUARES).params)
    kinds = "merge: 'step' is int32 in models.0., float32 in models.1.: give trees of one model"
    with pytest.raises(TypeError, match=kinds):
        fo.compression.merge([PARAMS, TUNED | REST | {"step": jnp.ones(())}], SQUARES)
    with pytest.raises(ValueError, match=r"models\[0\] has 'head', which models\[1\] lacks"):
        fo.compression.merge([PARAMS, {k: x for k, x in (TUNED | REST).items() if k != "head"}], SQUARES)
    with pytest.raises(TypeError, match="'step' of base is complex64; wanted real"):
        fo.compression.task_vector(*[FLOATS | {"step": jnp.ones((), jnp.complex64)}] * 2)


def test_a_log_density_takes_numbers_that_are_no_floats_for_a_mistake() -> None:
    """Its parameters are numbers that a user writes down, and 3 may be meant as 3.0."""
    for of in (geometry.score, geometry.information):
        with pytest.raises(TypeError, match=r"\['step'\] is int32.*close over what is no parameter"):
            of(lambda p, x: -jnp.sum(jnp.square(logits(p, x))), PARAMS, TEXTS)


def test_a_pruner_says_of_whole_gradients_what_to_do() -> None:
    """As every optimizer of the package does."""
    tx = fo.compression.keep_masks(optax.sgd(0.1), MASKS | dict.fromkeys(REST))
    floats = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), REST)
    with pytest.raises(TypeError, match=r"the gradient of 'key' is float0.*as by optax.masked"):
        tx.update(FLOATS | floats, tx.init(PARAMS), PARAMS)


def test_the_report_of_a_loss_lists_them() -> None:
    rows = {row.path: row for row in fo.report(loss, PARAMS, TEXTS, NEXT).rows}
    assert list(rows) == ["embedding", "head", "key", "scaled", "step", "up/bias", "up/kernel"]
    assert (rows["step"].use, rows["step"].reason, rows["scaled"].use) == ("int32", "no floating point", "bool")
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (PARAMS, TEXTS, NEXT))
    assert fo.infer_axes(loss, *shapes) == fo.infer_axes(loss, PARAMS, TEXTS, NEXT)
