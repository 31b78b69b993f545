"""What an error message advises works when it is followed."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import fisher_optax as fo

X, Y = jax.random.normal(jax.random.key(0), (4, 5, 3)), jax.random.normal(jax.random.key(1), (4, 2))
IN_A_LOOP = "used in a loop: samples do not add up, nor in a shard_map with check_vma=False"
TOO_LONG_IN_A_LOOP = "used in a loop and longer than max_dim=5, or in a shard_map with check_vma=False"


class Recurrent(nn.Module):
    """A cell in a loop, and a head."""

    cell: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> Any:
        states: Any = nn.RNN(self.cell)(x)
        return nn.Dense(2, name="readout")(states[:, -1])


def loss_of(model: Any) -> Any:
    return lambda params, x, y: fo.losses.gaussian(model.apply(params, x), y)


def step(tx: Any, kind: Any, loss: Any, params: Any) -> Any:
    """One step by the statistics of this kind; the gradients are JAX's."""

    @jax.jit
    def both(params: Any) -> Any:
        _, grads, stats = fo.value_and_grad(loss, kind, normalizer=len(X))(params, X, Y)
        return tx.update(grads, tx.init(params), params, statistics=stats)[0], grads, jax.grad(loss)(params, X, Y)

    updates, grads, wanted = both(params)
    jax.tree.map(lambda a, b: jnp.allclose(a, b, atol=1e-6) or pytest.fail("gradients differ"), grads, wanted)
    return updates


@pytest.mark.parametrize(
    ("cell", "make", "kind", "left"),
    [
        (nn.GRUCell(6), fo.frog, fo.LayerSamples(4), IN_A_LOOP),
        (nn.GRUCell(6), fo.kfac, fo.KroneckerFactors(max_dim=5), TOO_LONG_IN_A_LOOP),
        (nn.OptimizedLSTMCell(6), fo.kfac, fo.KroneckerFactors(), "no product with it was found"),
    ],
)
def test_a_layer_without_statistics_goes_to_the_fallback(cell: Any, make: Any, kind: Any, left: str) -> None:
    """By the axes that the error names, which are those of the layers that have statistics of this kind."""
    model: Any = Recurrent(cell)
    params, loss = model.init(jax.random.key(2), X), loss_of(model)
    options = {"max_precond_dim": 5} if left == TOO_LONG_IN_A_LOOP else {}
    with pytest.raises(ValueError, match=r"axes=fo\.infer_axes") as error:
        step(make(1e-2, **options), kind, loss, params)
    named = f"statistics=fo.{type(kind).__name__}(...)"
    assert str(error.value).count(named) == 1
    rows = {row.path: row.reason for row in fo.report(loss, params, X, Y, statistics=kind).rows if len(row.shape) > 1}
    assert {left} == {reason for path, reason in rows.items() if "readout" not in path}
    axes = fo.infer_axes(loss, params, X, Y, statistics=kind)
    updates = step(make(1e-2, axes=axes, **options), kind, loss, params)
    assert all(bool(jnp.isfinite(u).all()) for u in jax.tree.leaves(updates))
    method = "fallback" if make is fo.frog else make.__name__  # FROG leaves output layers there
    rows = [row for row in fo.report(make(1e-2, axes=axes, **options), params).rows if "readout" in row.path]
    assert [row.method for row in rows] == [method] * 2
    assert [row.kind for row in rows if row.axes or row.kind != "other"] == ["head"]


def test_infer_axes_refuses_what_is_no_statistics() -> None:
    with pytest.raises(TypeError, match=r"fo\.LayerSamples\(\)"):
        fo.infer_axes(lambda p: p.sum(), jnp.ones(3), statistics=fo.LayerSamples)


def test_where_nothing_is_captured_the_report_of_this_kind_says_why() -> None:
    model: Any = nn.RNN(nn.SimpleCell(6))
    loss = lambda p, x: fo.losses.gaussian(model.apply(p, x), jnp.zeros((4, 5, 6)))  # noqa: E731
    params = model.init(jax.random.key(2), X)
    with pytest.raises(ValueError, match=r"statistics=fo\.LayerSamples\(\.\.\.\)\) lists"):
        fo.value_and_grad(loss, fo.LayerSamples(4))(params, X)
    reasons = {row.reason for row in fo.report(loss, params, X, statistics=fo.LayerSamples(4)).rows}
    assert IN_A_LOOP in reasons


def test_logits_for_a_layer_that_is_no_head() -> None:
    """By either piece of advice."""

    def loss(params: Any, x: jax.Array, y: jax.Array) -> Any:
        [layer] = params.values()
        return fo.losses.softmax_cross_entropy(x @ layer["kernel"], jnp.ones((4, 5), int)) + 0 * y.sum()

    def at(name: str, kind: Any, **options: Any) -> Any:
        return step(fo.kfac(1e-2, **options), kind, loss, {name: {"kernel": jnp.ones((3, 2))}})

    logits = fo.KroneckerFactors(head_rows=4)
    for options in ({}, {"head": "true"}):
        with pytest.raises(ValueError, match=r"are logits.* called head, lm_head or logits"):
            at("readout", logits, **options)
    assert jnp.isfinite(at("lm_head", logits, head="true")["lm_head"]["kernel"]).all()
    assert jnp.isfinite(at("readout", fo.KroneckerFactors(), head="true")["readout"]["kernel"]).all()


def test_only_what_keeps_curvature_is_offered_none() -> None:
    params = {"kernel": jnp.ones((3, 2))}
    for make, offered in ((fo.kfac, True), (fo.frog, False)):
        tx = make(1e-2)
        with pytest.raises(TypeError, match="has to hand them on") as error:
            tx.update(params, tx.init(params), params)
        assert ("statistics=None means" in str(error.value)) == offered
        if offered:
            jax.eval_shape(functools.partial(tx.update, statistics=None), params, tx.init(params), params)
