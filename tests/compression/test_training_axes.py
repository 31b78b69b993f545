"""Pruning during training asks which axis is the input where that matters, and names what it leaves dense."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisher_optax as fo

apply_updates: Any = optax.apply_updates


def stored_outputs_first(p: Any, x: Any) -> Any:
    """A loss of kernels stored outputs first, whose names and shapes do not say so, and of a head."""
    return jnp.sum(jnp.square(jnp.tanh(jnp.tanh(x @ p["q"]["w1"].T) @ p["up"]["w1"].T) @ p["head"]["w1"].T))


def outputs_first() -> Any:
    rng = np.random.default_rng(3)
    shapes = {"q": (8, 8), "up": (12, 8), "head": (4, 12)}
    return {name: {"w1": jnp.asarray(rng.normal(size=shape), jnp.float32)} for name, shape in shapes.items()}


def masks_of(state: Any) -> Any:
    (found,) = (x for x in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "masks")) if hasattr(x, "masks"))
    return found.masks


MAKE = {
    "gradual": lambda sparsity, **how: fo.compression.gradual(optax.sgd(0.1), sparsity, every=1, **how),
    "movement": lambda sparsity, **how: fo.compression.movement(
        optax.sgd(0.1), sparsity, score_learning_rate=1.0, **how
    ),
}


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_inputs_are_asked_for_where_each_output_is_pruned_by_itself(make: Any) -> None:
    """By shape alone is not enough, along inputs as the program has them it is 2 of every 4; a head stays a head."""
    params, x = outputs_first(), jnp.ones((3, 8))
    message = r": which axis of 2 leaves \(77% of the parameters\) is the input .*'up/w1' of shape .*infer_axes"
    for how in (dict(sparsity="2:4"), dict(sparsity=0.5, scope="output")):
        with pytest.raises(ValueError, match=message):
            make(**how).init(params)
    assert masks_of(make(0.5).init(params))["up"]["w1"].shape == (12, 8)
    for flat in (False, True):
        named = {f"{k}.w1": v["w1"] for k, v in params.items()} if flat else params
        nested = lambda p: {k.split(".")[0]: {"w1": v} for k, v in p.items()} if flat else p  # noqa: E731, B023
        loss = lambda p, x: stored_outputs_first(nested(p), x)  # noqa: E731, B023
        tx = make("2:4", axes=fo.infer_axes(loss, named, x))
        updates, state = tx.update(jax.grad(loss)(named, x), tx.init(named), named)
        W, masks = nested(apply_updates(named, updates)), nested(masks_of(state))
        for name in ("q", "up"):
            assert (np.count_nonzero(np.asarray(W[name]["w1"]).reshape(-1, 2, 4), -1) == 2).all()
        assert masks["head"]["w1"] is None
        head = lambda p, flat=flat: jax.tree_util.tree_map_with_path(  # noqa: E731
            lambda path, _: "head" in jax.tree_util.keystr(path), p
        )
        one = masks_of(make(0.25, axes=fo.infer_axes(loss, named, x), prune=head).init(named))
        assert [x.shape for x in jax.tree.leaves(one)] == [(4, 12)]


def test_blocks_of_obert_lie_along_known_inputs() -> None:
    with pytest.raises(ValueError, match="gradual: which axis of 2 leaves"):
        MAKE["gradual"](0.5, method="obert").init(outputs_first())


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_what_may_be_a_matrix_and_is_not_pruned_is_named_once(make: Any) -> None:
    params = {"mixed": jnp.ones((2, 3, 4)), "dense": {"kernel": jnp.ones((4, 6)), "bias": jnp.zeros(6)}}
    tx = make(0.5)
    with pytest.warns(fo.AxesWarning, match=r": 1 leaf \(44% .*'mixed' of shape \(2, 3, 4\).*infer_axes") as found:
        tx.init(params)
    assert (len(found), found[0].filename) == (1, __file__)
    tx.init(params)
    make(0.5, prune={"mixed": False, "dense": {"kernel": True, "bias": False}}).init(params)
    make(0.5, axes={"mixed": fo.MatrixAxes(1, 2, 0), "dense": {"kernel": fo.MatrixAxes(), "bias": None}}).init(params)


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_names_and_biases_tell_inputs(make: Any) -> None:
    """Of a kernel, of a matrix whose bias is as long as its outputs, and of a square weight, stored outputs first."""
    params = {
        "dense": {"kernel": jnp.arange(1.0, 33).reshape(8, 4)},
        "linear": {"w": jnp.arange(1.0, 33).reshape(8, 4), "b": jnp.zeros(4)},
        "square": {"weight": jnp.arange(1.0, 17).reshape(4, 4)},
    }
    tx = make("2:4")
    W = apply_updates(params, tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)[0])
    for kernel in (W["dense"]["kernel"], W["linear"]["w"], W["square"]["weight"].T):
        assert (np.count_nonzero(np.asarray(kernel).reshape(-1, 4, 4), 1) == 2).all()


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_each_part_of_a_divided_kernel_is_pruned_by_itself(make: Any) -> None:
    """However small its weights are beside the others'."""
    rng, sizes = np.random.default_rng(0), (6, 3, 3)
    scales = np.repeat([1.0, 10.0, 100.0], sizes)
    params = {"qkv": {"kernel": jnp.asarray(rng.normal(size=(6, 12)) * scales, jnp.float32)}}
    grads = {"qkv": {"kernel": jnp.asarray(rng.normal(size=(6, 12)) / scales, jnp.float32)}}
    for parts, left in (({1: sizes}, [18, 9, 9]), ({}, None)):
        tx = make(0.5, axes={"qkv": {"kernel": fo.MatrixAxes(0, 1, parts=parts)}})
        masks = masks_of(tx.update(grads, tx.init(params), params)[1])["qkv"]["kernel"]
        counts = [int(m.sum()) for m in np.split(np.asarray(masks), np.cumsum(sizes)[:-1], 1)]
        assert sum(counts) == 36
        assert counts == left if left else counts != [18, 9, 9]
