"""What K-FAC may be given: statistics missing, wrong, not finite, of several batches; parameters of any form."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisher_optax as fo
from tests.grouped import grouped

RNG = np.random.default_rng(0)
X, Y = jnp.asarray(RNG.normal(size=(12, 4)), jnp.float32), jnp.asarray(RNG.normal(size=(12, 3)), jnp.float32)


def params() -> dict[str, Any]:
    return {"first": {"kernel": jnp.eye(4), "bias": jnp.zeros(4)}, "second": {"kernel": jnp.ones((4, 3)) / 4}}


def loss(p: Any, x: Any = X, y: Any = Y) -> Any:
    return fo.losses.gaussian(jnp.tanh(x @ p["first"]["kernel"] + p["first"]["bias"]) @ p["second"]["kernel"], y)


GRAD = jax.jit(fo.value_and_grad(loss))


@pytest.mark.parametrize("make", [fo.kfac, fo.ekfac, fo.kfac_soap], ids=lambda make: make.__name__)
def test_forgetting_statistics_says_how_to_get_them(make: Any) -> None:
    tx, p = make(0.1), params()
    with pytest.raises(TypeError, match=r"update needs statistics=.*fo\.value_and_grad.*KroneckerFactors"):
        tx.update(p, tx.init(p), p)


def test_statistics_of_the_wrong_kind() -> None:
    tx, p = fo.kfac(0.1), params()
    _, grads, stats = fo.value_and_grad(loss, fo.LayerSamples(4))(p)
    with pytest.raises(TypeError, match=r"'first/kernel' are Samples, wanted LayerFactors"):
        tx.update(grads, tx.init(p), p, statistics=stats)
    _, grads, stats = fo.value_and_grad(loss, fo.InputGram())(p)
    with pytest.raises(ValueError, match="right statistics of 'first/kernel' are nothing; wanted a 4 x 4 matrix"):
        tx.update(grads, tx.init(p), p, statistics=stats)
    with pytest.raises(ValueError, match=r"fo\.ekfac: statistics of 'first/kernel' have no squares"):
        fo.ekfac(0.1).update(grads, fo.ekfac(0.1).init(p), p, statistics=GRAD(p)[2])


def test_statistics_of_another_tree() -> None:
    tx, p = fo.kfac(0.1), params()
    _, grads, stats = GRAD(p)
    with pytest.raises(ValueError, match=r"no statistics for 'second/kernel' \(1 of 2 layers.*infer_axes"):
        tx.update(grads, tx.init(p), p, statistics=stats | {"second": {"kernel": None}})
    wrong = stats | {"second": {"kernel": stats["first"]["kernel"]}}
    with pytest.raises(ValueError, match="right statistics of 'second/kernel' are"):
        tx.update(grads, tx.init(p), p, statistics=wrong)
    with pytest.raises(ValueError, match="longer than 3"):
        fo.kfac(0.1, max_precond_dim=3).update(grads, fo.kfac(0.1, max_precond_dim=3).init(p), p, statistics=stats)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exponent": -2.0}, "exponent must lie between -1 and 0"),
        ({"decomposition": "lu"}, "decomposition must be one of 'auto', 'eigh', 'qr', 'cholesky', 'inverse'"),
        ({"damping": -1.0}, "damping must be at least 0"),
        ({"momentum": 1.0}, "momentum must be at least 0 and below 1"),
        ({"grafting": "lion"}, "grafting must be one of"),
        ({"decomposition": "inverse", "refresh": "adaptive"}, "needs an eigenbasis"),
    ],
    ids=str,
)
def test_errors_at_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fo.kfac(0.1, **grouped(**options))


def test_rows_that_are_not_finite_skip_the_step() -> None:
    """Also where there are as many rows as columns, and none on the diagonal."""
    p = {"w": jnp.ones((6, 3))}
    loss = lambda p, x: fo.losses.gaussian(x @ p["w"], jnp.zeros((9, 3)))  # noqa: E731
    kind = fo.KroneckerFactors(max_dim=5, rank=6)
    _, grads, stats = fo.value_and_grad(loss, kind)(p, jnp.ones((9, 6)))
    rows = stats["w"].left.rows
    assert rows.shape == (6, 6)
    bad = dataclasses.replace(stats["w"], left=stats["w"].left._replace(rows=rows.at[0, 1].set(jnp.nan)))
    tx = fo.kfac(0.1, max_precond_dim=5, storage=fo.Storage(rank=6))
    _, state = jax.jit(tx.update)(grads, tx.init(p), p, statistics={"w": bad})
    assert fo.health(state).skipped == 1


def test_a_side_too_long_for_a_matrix_is_reported() -> None:
    """By the capture, which samples rows, and by the optimizer, which keeps some; EKFAC needs all and says so."""
    p = {"dense": {"kernel": jnp.ones((50, 3)), "bias": jnp.ones(3)}}
    loss = lambda p, x: fo.losses.gaussian(x @ p["dense"]["kernel"] + p["dense"]["bias"], jnp.zeros((20, 3)))  # noqa: E731
    captured = fo.report(loss, p, jnp.ones((20, 50)), statistics=fo.KroneckerFactors(max_dim=40, rank=8))
    assert captured.rows[1].reason == "51 > max_dim=40: 8 sampled rows"
    kept = fo.report(fo.kfac(0.1, max_precond_dim=40, storage=fo.Storage(rank=8)), p)
    assert kept.rows[1].reason == "Dense kernel; 50 > max_precond_dim=40: 8 rows"
    alone = fo.report(fo.soap(0.1, max_precond_dim=40), p)
    assert alone.rows[1].reason == "Dense kernel; 50 > max_precond_dim=40: as it is"
    with pytest.raises(ValueError, match=r"'dense/kernel' is 51 x 3.*raise max_precond_dim"):
        fo.ekfac(0.1, max_precond_dim=40).init(p)


def test_axes_must_be_in_the_order_of_statistics() -> None:
    p = {"w": jnp.ones((2, 3, 4))}
    with pytest.raises(ValueError, match="ascending order"):
        fo.kfac(0.1, axes={"w": fo.MatrixAxes((1, 0), 2)}).init(p)


@pytest.mark.parametrize("side", ["left", "right"])
def test_statistics_that_are_not_finite_skip_the_step_and_are_counted(side: str) -> None:
    tx, p = fo.kfac(0.1), params()
    _, grads, stats = GRAD(p)
    update = jax.jit(tx.update)
    state = update(grads, tx.init(p), p, statistics=stats)[1]
    kernel = stats["first"]["kernel"]
    spoiled = dataclasses.replace(kernel, **{side: getattr(kernel, side).at[0, 0].set(jnp.nan)})
    bad = stats | {"first": stats["first"] | {"kernel": spoiled}}
    updates, after = update(grads, state, p, statistics=bad)
    assert not any(bool(jnp.any(u)) for u in jax.tree.leaves(updates))
    assert (fo.health(after).skipped, fo.health(after).steps) == (1, 1)
    assert not any(bool(jnp.isnan(x).any()) for x in jax.tree.leaves(after))
    np.testing.assert_array_equal(
        *(s.inner.inner_states["matrix"].inner_state[0].inner.matrices["5x4"].factors.left for s in (state, after))
    )


def test_nan_activations_are_a_skipped_step() -> None:
    """A NaN in the data reaches gradients and statistics, and no parameter."""
    tx, p = fo.kfac(0.1), params()
    _, grads, stats = GRAD(p, X.at[0, 0].set(jnp.nan))
    updates, state = jax.jit(tx.update)(grads, tx.init(p), p, statistics=stats)
    assert not any(bool(jnp.any(u)) for u in jax.tree.leaves(updates))
    assert fo.health(state).skipped == 1


def test_plain_tuples_by_inferred_axes() -> None:
    """Names tell nothing here; the axes read off the program join each weight with its bias, as names do elsewhere."""
    p = params() | {"second": {"kernel": jnp.ones((4, 3)) / 4}}
    plain = [(p["first"]["kernel"], p["first"]["bias"]), (p["second"]["kernel"],)]

    def plain_loss(q: Any) -> Any:
        (W, b), (V,) = q
        return loss({"first": {"kernel": W, "bias": b}, "second": {"kernel": V}})

    axes = fo.infer_axes(plain_loss, plain)
    assert axes == [(fo.MatrixAxes(0, 1, bias="0/1"), None), (fo.MatrixAxes(0, 1, head=True),)]
    tx, named = fo.kfac(0.1, axes=axes), fo.kfac(0.1)
    _, grads, stats = jax.jit(fo.value_and_grad(plain_loss))(plain)
    updates = jax.jit(tx.update)(grads, tx.init(plain), plain, statistics=stats)[0]
    _, grads, stats = GRAD(p)
    wanted = jax.jit(named.update)(grads, named.init(p), p, statistics=stats)[0]
    np.testing.assert_allclose(updates[0][0], wanted["first"]["kernel"], rtol=1e-4)
    np.testing.assert_allclose(updates[0][1], wanted["first"]["bias"], rtol=1e-4, atol=1e-7)


def test_what_is_not_captured_goes_to_the_fallback() -> None:
    """A grouped convolution has no statistics; with inferred axes it is the fallback's, and the report says so."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.Conv(4, (2, 2), feature_group_count=2, name="grouped")(x)
            return nn.Dense(3, name="dense")(x.reshape(len(x), -1))

    model, x = Model(), jnp.ones((5, 3, 3, 2))
    p = model.init(jax.random.key(0), x)["params"]

    def of_model(p: Any, x: Any) -> Any:
        return fo.losses.softmax_cross_entropy(model.apply({"params": p}, x), jnp.zeros(5, int))

    _, grads, stats = jax.jit(fo.value_and_grad(of_model))(p, x)
    with pytest.raises(ValueError, match="no statistics for 'grouped/kernel'"):
        fo.kfac(0.1).update(grads, fo.kfac(0.1).init(p), p, statistics=stats)
    tx = fo.kfac(0.1, axes=fo.infer_axes(of_model, p, x))
    jax.jit(tx.update)(grads, tx.init(p), p, statistics=stats)
    methods = {row.path: row.method for row in fo.report(tx, p).rows}
    assert methods == {
        "dense/bias": "kfac", "dense/kernel": "kfac", "grouped/bias": "fallback", "grouped/kernel": "fallback",
    }  # fmt: skip
    [row] = [row for row in fo.report(of_model, p, x).rows if row.path == "grouped/kernel"]
    assert row.statistics == ()
    assert row.reason
    with pytest.raises(ValueError, match="grouped/kernel"):
        fo.value_and_grad(of_model, strict=True)(p, x)


def test_a_kernel_without_its_bias() -> None:
    """Where the bias is masked away, the kernel's own part of the factors is used."""
    p = params()
    tx = optax.masked(fo.kfac(0.1), {"first": {"kernel": True, "bias": False}, "second": {"kernel": True}})
    _, grads, stats = GRAD(p)
    updates = jax.jit(tx.update)(grads, tx.init(p), p, statistics=stats)[0]
    kernel = stats["first"]["kernel"]
    F = np.kron(kernel.left[:-1, :-1], kernel.right) + 1e-3 * np.eye(16)
    wanted = -0.1 * np.linalg.solve(F, np.ravel(grads["first"]["kernel"]))
    np.testing.assert_allclose(updates["first"]["kernel"].ravel(), wanted, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(updates["first"]["bias"], grads["first"]["bias"])


def test_micro_batches_with_multisteps() -> None:
    """Gradients accumulate in `optax.MultiSteps`, statistics in `fo.accumulate_statistics`: one step of the whole."""
    p = params()
    whole, tx = fo.kfac(0.1), optax.MultiSteps(fo.kfac(0.1), 3)
    _, grads, stats = GRAD(p)
    wanted = jax.jit(whole.update)(grads, whole.init(p), p, statistics=stats)[0]
    state, total, update = tx.init(p), None, jax.jit(tx.update)
    for part in range(3):
        x, y = X[4 * part : 4 * part + 4], Y[4 * part : 4 * part + 4]
        _, grads, stats = GRAD(p, x, y)
        total = fo.accumulate_statistics(total, stats)
        updates, state = update(grads, state, p, statistics=total)
    assert float(total["first"]["kernel"].weight) == 12
    for u, w in zip(jax.tree.leaves(updates), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(u, w, rtol=2e-3, atol=1e-5)
    with pytest.raises(ValueError, match="the two trees differ"):
        fo.accumulate_statistics(total, {"other": total})


def test_flaxs_train_state() -> None:
    p = params()
    state = fo.TrainState.create(apply_fn=loss, params=p, tx=fo.kfac(0.1))
    _, grads, stats = GRAD(p)
    step = jax.jit(lambda state, **given: state.apply_gradients(**given))
    after = step(state, grads=grads, statistics=stats)
    assert int(after.step) == 1
    assert loss(after.params) < loss(p)
    again = step(after, grads=grads)
    assert fo.health(again.opt_state).steps == 2


def test_bases_of_another_state() -> None:
    p = params()
    with pytest.raises(ValueError, match="has no bases of 5 x 4 matrices"):
        fo.eigenbases(optax.adam(1e-3).init(p), p)
    with pytest.raises(ValueError, match="has no bases"):
        fo.eigenbases(fo.ekfac(0.1, storage=fo.Storage(block_size=2)).init(p), p)


def test_bases_of_other_layers_of_one_shape() -> None:
    """Each basis is its own layer's only where the axes choose the layers that the state was made for."""
    q = {"a": jnp.ones((4, 4)), "b": jnp.ones((4, 4)), "stack": jnp.ones((9, 4, 4))}
    of = {"a": fo.MatrixAxes(0, 1), "b": None, "stack": None}
    state = fo.ekfac(0.1, axes=of).init(q)
    assert fo.eigenbases(state, q, of)["b"] is None
    with pytest.raises(ValueError, match="bases of 1 matrices of shape 4x4, and these params and axes have 2"):
        fo.eigenbases(state, q)
    with pytest.raises(ValueError, match="bases of 1 matrices of shape 4x4, and these params and axes have 0"):
        fo.eigenbases(state, q, dict.fromkeys(q))
    more = of | {"stack": fo.MatrixAxes(1, 2, 0)}
    with pytest.raises(ValueError, match="bases of 10 matrices of shape 4x4, and these params and axes have 1"):
        fo.eigenbases(fo.ekfac(0.1, axes=more).init(q), q, of)
