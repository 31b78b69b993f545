"""K-FAC with the softmax's own Fisher as the head's right side: against dense solves, and as an optimizer."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisher_optax as fo
from tests.reference.curvature import output_fisher, relative

T, M, V = 24, 4, 7
RNG = np.random.default_rng(0)
PARAMS = {
    "body": {"kernel": RNG.normal(size=(3, M))},
    "lm_head": {"kernel": RNG.normal(size=(M, V)), "bias": RNG.normal(size=V)},
}
BATCHES = [(RNG.normal(size=(T, 3)), RNG.integers(0, V, T), RNG.integers(0, 2, T).astype(float)) for _ in range(3)]


def hidden(params: Any, x: Any) -> Any:
    return jnp.tanh(x @ params["body"]["kernel"])


def logits(params: Any, x: Any) -> Any:
    return hidden(params, x) @ params["lm_head"]["kernel"] + params["lm_head"]["bias"]


def loss(params: Any, x: Any, y: Any, w: Any) -> Any:
    return fo.losses.softmax_cross_entropy(logits(params, x), y, w)


def arrays(tree: Any) -> Any:
    return jax.tree.map(jnp.asarray, tree)


def dense_sides(fisher: str, params: Any, x: Any, y: Any, w: Any) -> tuple[np.ndarray, np.ndarray]:
    """Means over the tokens that count, all of them."""
    a = np.hstack([np.asarray(hidden(params, x)), np.ones((T, 1))])
    z = np.asarray(logits(params, x), np.float64)
    if fisher == "true":
        B = output_fisher("softmax_cross_entropy", z)
    else:
        δ = np.exp(z) / np.exp(z).sum(-1, keepdims=True) - np.eye(V)[y]
        B = δ[:, :, None] * δ[:, None, :]
    return np.einsum("t,ti,tj->ij", w, a, a) / w.sum(), np.einsum("t,tvu->vu", w, B) / w.sum()


def solved(G: np.ndarray, A: np.ndarray, B: np.ndarray, λ: float) -> np.ndarray:
    π = np.sqrt(np.trace(A) / len(A) / (np.trace(B) / len(B)))
    left = np.linalg.inv(A + π * np.sqrt(λ) * np.eye(len(A)))
    return left @ G @ np.linalg.inv(B + np.sqrt(λ) / π * np.eye(len(B)))


def with_bias(grads: Any) -> np.ndarray:
    return np.vstack([grads["lm_head"]["kernel"], grads["lm_head"]["bias"]])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("fisher", ("true", "empirical"))
def test_steps_are_dense_solves_of_moving_averages(fisher: str) -> None:
    """With room for every token: three batches, whose averages weigh .95 less a step."""
    tx = fo.scale_by_kfac(damping=1e-2, head=fisher, storage=fo.Storage(rank=3 * T + 3))
    grad_fn = jax.jit(fo.value_and_grad(loss, fo.KroneckerFactors(head_rows=T)))
    params = arrays(PARAMS)
    state, sides = tx.init(params), []
    update = jax.jit(tx.update)
    for step, batch in enumerate(BATCHES):
        _, grads, stats = grad_fn(params, *arrays(batch))
        assert np.shape(stats["lm_head"]["kernel"].right.logits) == (T, V)
        moved, state = update(grads, state, params, statistics=stats)
        sides.append(dense_sides(fisher, params, *batch))
        share = np.array([0.95 ** (step - i) * (1 if i == 0 else 0.05) for i in range(step + 1)])
        A, B = (sum(s * side[k] for s, side in zip(share, sides, strict=True)) / share.sum() for k in (0, 1))
        assert relative(with_bias(moved), solved(with_bias(grads), A, B, 1e-2)) < 1e-6
    assert update._cache_size() == 1
    still, _ = update(grads, state, params, statistics=stats)
    assert jax.tree.structure(still) == jax.tree.structure(params)


@pytest.mark.usefixtures("x64")
def test_the_other_layers_are_as_without_a_head_apart() -> None:
    params, batch = arrays(PARAMS), arrays(BATCHES[0])
    moved = []
    for head, kind in ((None, fo.KroneckerFactors()), ("true", fo.KroneckerFactors(head_rows=T))):
        tx = fo.scale_by_kfac(damping=1e-2, head=head)
        _, grads, stats = jax.jit(fo.value_and_grad(loss, kind))(params, *batch)
        moved.append(jax.jit(tx.update)(grads, tx.init(params), params, statistics=stats)[0])
    assert relative(moved[1]["body"]["kernel"], moved[0]["body"]["kernel"]) < 1e-12
    assert relative(moved[1]["lm_head"]["kernel"], moved[0]["lm_head"]["kernel"]) > 0.05


@pytest.mark.parametrize(("fisher", "labels"), (("true", "numbers"), ("empirical", "probabilities")))
def test_it_trains_skips_bad_steps_and_stays_finite(fisher: str, labels: str) -> None:
    """In float32, with few rows, grafting and Adam's exponent on the other layers."""
    params, (x, y, w) = arrays(PARAMS), arrays(BATCHES[0])
    params = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    y = y if labels == "numbers" else jax.nn.one_hot(y, V)
    tx = fo.kfac(
        0.02,
        damping=1e-3,
        exponent=-0.5,
        grafting="adam",
        head=fisher,
        precondition_frequency=3,
        storage=fo.Storage(rank=8),
    )
    grad_fn, update = jax.jit(fo.value_and_grad(loss, fo.KroneckerFactors(head_rows=16, rank=8))), jax.jit(tx.update)
    state, values = tx.init(params), []
    for _ in range(40):
        value, grads, stats = grad_fn(params, x, y, w)
        updates, state = update(grads, state, params, statistics=stats)
        params = optax.apply_updates(params, updates)
        values.append(float(value))
    assert values[-1] < 0.5 * values[0]
    bad = jax.tree.map(lambda g: g * jnp.nan, grads)
    spoiled = jax.tree.map(lambda s: s, stats)
    kernel = spoiled["lm_head"]["kernel"]
    right = kernel.right._replace(logits=kernel.right.logits.at[0, 0].set(jnp.inf))
    spoiled["lm_head"]["kernel"] = type(kernel)(kernel.left, right, None, kernel.weight, kernel.bias)
    for given, seen in ((bad, stats), (grads, spoiled)):
        updates, after = update(given, state, params, statistics=seen)
        assert not any(np.any(u) for u in jax.tree.leaves(updates))
        for a, b in zip(jax.tree.leaves(after.inner), jax.tree.leaves(state.inner), strict=True):
            np.testing.assert_array_equal(a, b)
    updates, _ = update(grads, state, params, statistics=None)
    assert all(np.all(np.isfinite(u)) for u in jax.tree.leaves(updates))


@pytest.mark.usefixtures("x64")
def test_the_fisher_of_the_head_asks_for_no_labels() -> None:
    """ "true" is the same whatever the data say, and whatever labels the other layers' statistics are of."""
    params, (x, y, w) = arrays(PARAMS), arrays(BATCHES[0])
    found = []
    for fisher, labels, key in (("empirical", y, None), ("mc", (y + 1) % V, jax.random.key(0)), ("true", y, None)):
        kind = fo.KroneckerFactors(head_rows=T)
        seen = jax.jit(fo.value_and_grad(loss, kind, fisher=fisher))(params, x, labels, w, fisher_key=key)[2]
        found.append(fo.fisher.SoftmaxHead.from_logits(*seen["lm_head"]["kernel"].right[::2]).dense())
        assert seen["body"]["kernel"].right.shape == (M, M)
    wanted = dense_sides("true", params, *BATCHES[0])[1]
    for dense in found:
        assert relative(dense, wanted) < 1e-12


def test_micro_batches_add_up_to_the_tokens_of_both() -> None:
    params, (x, y, w) = arrays(PARAMS), arrays(BATCHES[0])
    grad_fn = jax.jit(fo.value_and_grad(loss, fo.KroneckerFactors(head_rows=T)))
    seen = [grad_fn(params, x[s], y[s], w[s])[2] for s in (slice(9), slice(9, T))]
    both = fo.accumulate_statistics(*seen)["lm_head"]["kernel"].right
    wanted = fo.fisher.SoftmaxHead.from_logits(logits(params, x), w).dense()
    assert relative(fo.fisher.SoftmaxHead.from_logits(both.logits, both.weights).dense(), wanted) < 1e-6


def test_a_report_says_what_a_head_gets() -> None:
    text = str(fo.report(fo.kfac(0.1, head="true"), arrays(PARAMS)))
    assert "true Fisher of the softmax's tokens" in text


def test_what_is_wrong_is_said() -> None:
    for options, message in (
        (dict(head="exact"), "head must be None, 'true' or 'empirical'; got 'exact'"),
        (dict(head="true", exponent=-0.5), "with exponent=-0.5 pass grafting='adam'"),
    ):
        with pytest.raises(ValueError, match=message):
            fo.kfac(0.1, **options)
    with pytest.raises(TypeError, match="unexpected keyword argument 'head'"):  # it needs a basis for every layer
        fo.ekfac(0.1, head="true")
    with pytest.raises(ValueError, match=r"head_rows= is for fo\.kfac"):
        fo.KroneckerFactors(head_rows=8, squares=True)
    with pytest.raises(ValueError, match="head_rows must be an integer of at least 1; got 0"):
        fo.KroneckerFactors(head_rows=0)
    params, batch = arrays(PARAMS), arrays(BATCHES[0])
    tx = fo.kfac(0.1, head="true")
    _, grads, stats = jax.eval_shape(fo.value_and_grad(loss), params, *batch)
    with pytest.raises(ValueError, match=r"want a 5 x 5 left side and the logits of 7 words.*head_rows=256"):
        jax.eval_shape(lambda *x: tx.update(*x[:3], statistics=x[3]), grads, tx.init(params), params, stats)
    capped = lambda p, x, y, w: fo.losses.softmax_cross_entropy(9 * jnp.tanh(logits(p, x) / 9), y, w)  # noqa: E731
    with pytest.raises(ValueError, match="no layer's are, as they come and once"):
        fo.value_and_grad(capped, fo.KroneckerFactors(head_rows=8))(params, *batch)
    with pytest.raises(ValueError, match="stands inside a remat"):
        fo.value_and_grad(jax.checkpoint(loss), fo.KroneckerFactors(head_rows=8))(params, *batch)
