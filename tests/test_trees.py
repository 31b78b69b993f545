"""Trees that come from outside: told from functions, and what their leaves may be."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisher_optax as fo
from fisher_optax.matrices.axes import arrays, is_function
from tests.callable_trees import Module, NnxModule, module_of

compression = fo.compression


def decays(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.ndim > 1, tree)


@pytest.mark.parametrize(
    "function",
    [decays, functools.partial(decays), jax.tree_util.Partial(decays), Module(f=jnp.tanh)],
    ids=["function", "partial", "Partial", "module of functions"],
)
def test_what_has_nothing_but_functions_for_leaves_is_a_function(function: Any) -> None:
    assert is_function(function)


@pytest.mark.parametrize(
    "tree",
    [Module(a=True), Module(a=None), NnxModule(a=1.0), {"a": decays}, None, 0.5],
    ids=["bool", "empty", "nnx", "dictionary", "None", "number"],
)
def test_what_has_other_leaves_or_cannot_be_called_is_a_tree(tree: Any) -> None:
    assert not is_function(tree)


def test_numbers_become_arrays_and_arrays_stay() -> None:
    given = {"a": 1.5, "b": 2, "c": True, "d": np.float64(1), "e": jnp.ones(2, jnp.bfloat16), "f": np.ones(2, np.int8)}
    made = arrays(given)
    assert [str(made[name].dtype) for name in "abcdef"] == ["float32", "int32", "bool", "float32", "bfloat16", "int8"]
    assert not any(x.weak_type for x in made.values())
    assert made["e"] is given["e"]
    eighth = jax.ShapeDtypeStruct((2, 3), jnp.float8_e4m3fn)
    assert arrays(eighth) == jax.ShapeDtypeStruct((2, 3), jnp.float32)
    assert arrays(jnp.ones(2, jnp.float8_e5m2)).dtype == jnp.float32


@pytest.mark.parametrize("leaf", ["words", jnp.tanh], ids=["text", "function"])
def test_a_leaf_that_is_no_number_is_named(leaf: Any) -> None:
    """An Equinox model that was not filtered, say."""
    model = {"layers": [{"kernel": jnp.ones((2, 3))}], "activation": leaf}
    grad_fn = fo.value_and_grad(lambda p: jnp.sum(p["layers"][0]["kernel"]))
    for use in (fo.muon(0.1).init, lambda model: fo.report(fo.muon(0.1), model), grad_fn):
        with pytest.raises(TypeError, match=r"'activation' is \w+, no array and no number: .*eqx.filter"):
            use(model)


def test_the_gradient_of_an_integer_is_named() -> None:
    params = {"w": jnp.ones((2, 3)), "step": jnp.asarray(3)}
    grads = jax.grad(lambda p: jnp.sum(p["w"]) * p["step"], allow_int=True)(params)
    tx = fo.muon(0.1)
    with pytest.raises(TypeError, match=r"the gradient of 'step' is float0, .*optax.masked"):
        tx.update(grads, tx.init(params), params)
    masked = optax.masked(tx, {"w": True, "step": False})
    assert np.any(masked.update(grads, masked.init(params), params)[0]["w"])


@pytest.mark.parametrize("node", [Module, NnxModule])
def test_helpers_take_a_tree_that_could_be_called(node: type) -> None:
    """As the dictionary of its names: reports, labels, checks, warm starts, pruning."""
    plain = {"l": {"kernel": jnp.arange(12.0).reshape(4, 3), "bias": jnp.ones(3)}}
    model = module_of(plain, node)
    tx = fo.soap(0.1, mask=jax.tree.map(lambda x: x.ndim > 1, model))
    assert fo.report(tx, model) == fo.report(fo.soap(0.1), plain)
    assert jax.tree.leaves(fo.label_params(model)) == jax.tree.leaves(fo.label_params(plain))
    fo.check_state(tx, tx.init(model), model)
    started = fo.from_adam(tx, optax.adamw(0.1).init(model), model)
    fo.check_state(tx, started, model)
    optax.partition({"matrix": tx, "other": tx}, fo.label_params).init(model)
    stays = jax.tree.map(lambda x: x > 5 if x.ndim > 1 else None, model)
    prune = jax.tree.map(lambda x: x.ndim > 1, model)
    for wrapped in (
        compression.keep_masks(optax.sgd(0.1), stays),
        compression.movement(optax.sgd(0.1), 0.5, score_learning_rate=1.0, prune=prune),
        compression.gradual(optax.sgd(0.1), 0.5, every=1, prune=prune),
    ):
        updates, _ = wrapped.update(model, wrapped.init(model), model)
        assert jax.tree.structure(updates) == jax.tree.structure(model)


@pytest.mark.parametrize("node", [Module, NnxModule])
def test_capture_takes_a_tree_that_could_be_called(node: type) -> None:
    model = module_of({"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}, node)

    def loss(model: Any, x: jax.Array) -> jax.Array:
        bias, kernel = jax.tree.leaves(model)
        return fo.losses.gaussian(x @ kernel + bias, jnp.zeros((4, 2)))

    x = jnp.ones((4, 3))
    assert [row.use for row in fo.report(loss, model, x).rows] == ["bias of kernel", "dense"]
    _, grads, stats = fo.value_and_grad(loss)(model, x)
    assert jax.tree.structure(grads) == jax.tree.structure(model)
    tx = fo.kfac(0.1, axes=fo.infer_axes(loss, model, x))
    updates, _ = tx.update(grads, tx.init(model), model, statistics=stats)
    assert jax.tree.structure(updates) == jax.tree.structure(model)


def test_the_diagonal_takes_a_tree_that_could_be_called() -> None:
    """Two Fishers of one model are of the same groups, and axes may be a tree."""
    plain = {"w": jnp.ones((3, 2))}

    def seen(model: Any, axes: Any) -> Any:
        loss = lambda p, xy: fo.losses.softmax_cross_entropy(xy[0] @ jax.tree.leaves(p)[0], xy[1])  # noqa: E731
        batch = (jnp.arange(12.0).reshape(4, 3), jnp.asarray([0, 1, 1, 0]))
        return fo.fisher.diagonal(loss, model, [batch, batch], groups="rows", axes=axes)

    fisher, wanted = seen(module_of(plain), Module(w=fo.MatrixAxes(1, 0))), seen(plain, {"w": fo.MatrixAxes(1, 0)})
    assert wanted.mean["w"].shape == (3,)
    np.testing.assert_array_equal(fisher.mean.fields["w"], wanted.mean["w"])
    assert fisher.merge(fisher).n == 2 * wanted.n
