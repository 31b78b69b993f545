"""The losses of the package against their formulas, and what dividing and masking do to statistics."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fisher_optax import capture
from tests.capture.capture_models import assert_factors, assert_near, captured, normal, watched

losses = capture.losses
WEIGHTS = np.array([1.0, 0.0, 2.0, 0.5])


def by_hand(name: str, z: Any, y: Any) -> np.ndarray:
    """Each example's loss in float64."""
    z, y = np.asarray(z, np.float64), np.asarray(y, np.float64)
    if name == "gaussian":
        return ((z - y) ** 2).sum(-1) / 2
    if name == "sigmoid_cross_entropy":
        p = 1 / (1 + np.exp(-z))
        return -(y * np.log(p) + (1 - y) * np.log(1 - p)).sum(-1)
    return -(y * (z - np.log(np.exp(z).sum(-1, keepdims=True)))).sum(-1)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["softmax_cross_entropy", "sigmoid_cross_entropy", "gaussian"])
def test_losses_are_weighted_means(name: str) -> None:
    z, y = normal(0, 4, 3), jax.nn.softmax(normal(1, 4, 3))
    each, loss = by_hand(name, z, y), getattr(losses, name)
    assert_near(loss(z, y), each.mean(), 1e-13)
    assert_near(loss(z, y, WEIGHTS), np.average(each, weights=WEIGHTS), 1e-13)
    assert loss(z, y, jnp.zeros(4)) == 0
    sequences = loss(z.reshape(2, 2, 3), y.reshape(2, 2, 3), jnp.array([0, 1]))
    assert_near(sequences, each[2:].mean(), 1e-13)


@pytest.mark.usefixtures("x64")
def test_class_numbers_are_one_hot_labels() -> None:
    z, y = normal(0, 2, 4, 3), jnp.array([[0, 2, 1, 1], [2, 2, 0, 1]])
    assert_near(losses.softmax_cross_entropy(z, y), losses.softmax_cross_entropy(z, jax.nn.one_hot(y, 3)), 1e-14)


@pytest.mark.parametrize("name", ["softmax_cross_entropy", "sigmoid_cross_entropy", "gaussian"])
def test_half_precision_logits_are_computed_in_float32(name: str) -> None:
    z, y = jax.random.normal(jax.random.key(0), (4, 3), jnp.bfloat16), jnp.ones((4, 3))
    loss = getattr(losses, name)
    assert loss(z, y).dtype == jnp.float32
    assert loss(z, y) == loss(z.astype(jnp.float32), y)


@pytest.mark.parametrize("name", ["softmax_cross_entropy", "sigmoid_cross_entropy", "gaussian"])
def test_label_of_an_example_left_out_may_be_anything(name: str) -> None:
    """NaN or a class that is none: neither the value nor any gradient sees it."""
    z, y = jax.random.normal(jax.random.key(0), (4, 3)), jnp.full((4, 3), 0.5)
    loss = getattr(losses, name)
    value, grads = jax.value_and_grad(loss)(z, y, WEIGHTS)
    bad_value, bad_grads = jax.value_and_grad(loss)(z, y.at[1].set(jnp.nan), WEIGHTS)
    assert value == bad_value
    assert np.array_equal(grads, bad_grads)
    if name == "softmax_cross_entropy":
        numbers = lambda bad: jax.value_and_grad(loss)(z, jnp.array([0, bad, 1, 2]), WEIGHTS)  # noqa: E731
        assert jax.tree.all(jax.tree.map(np.array_equal, numbers(-100), numbers(0)))


@pytest.mark.parametrize(("labels", "weights"), [((4, 2), None), ((3,), None), ((4,), (3,)), ((4,), (4, 3))], ids=str)
def test_shapes_that_do_not_fit(labels: Any, weights: Any) -> None:
    w = None if weights is None else jnp.ones(weights)
    with pytest.raises(ValueError, match=r"fo.losses.softmax_cross_entropy: got logits \(4, 3\), labels .*wanted"):
        losses.softmax_cross_entropy(jnp.ones((4, 3)), jnp.ones(labels, int), w)
    with pytest.raises(ValueError, match=r"fo.losses.gaussian: got logits \(4, 3\), labels \(4,\)"):
        losses.gaussian(jnp.ones((4, 3)), jnp.ones(4))


def tokens_loss(reduce: Any) -> Any:
    """A loss of every position of a two-layer network: ``reduce`` of squares, one a position."""

    def loss(p: Any, x: Any, *args: Any) -> Any:
        *args, see = args
        h = jnp.tanh(see("W", x, x @ p["W"]) + p["b"])
        return reduce(jnp.sum(see("V", h, h @ p["V"]) ** 2, -1), *args)

    return loss


PARAMS = lambda: {"W": normal(0, 3, 4), "b": normal(1, 4), "V": normal(2, 4, 2)}  # noqa: E731
KEPT = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1]], bool)
REDUCTIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    # how the loss divides, and what value_and_grad is told
    "mean": (jnp.mean, {}),
    "sum": (jnp.sum, {"normalizer": 1}),
    "mean over examples": (lambda e: e.sum(1).mean(), {"normalizer": lambda x: len(x)}),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", REDUCTIONS)
def test_normalizer_undoes_the_division(name: str) -> None:
    """Whatever the loss was divided by, N times its output gradients are the examples' own."""
    reduce, options = REDUCTIONS[name]
    x, params, loss = normal(3, 4, 3, 3), PARAMS(), tokens_loss(reduce)
    stats = captured(loss, params, x, **options)
    a, delta = watched(loss, params, x)
    N = {"mean": 12, "sum": 1, "mean over examples": 4}[name]
    assert_factors(stats["W"], a["W"], delta["W"], N, True)
    assert_factors(stats["V"], a["V"], delta["V"], N)


MASKED: dict[str, tuple[Any, dict[str, Any]]] = {
    "mask= alone": (lambda e, m: jnp.sum(e * m) / jnp.sum(m), {"mask": lambda x, m: m}),
    "mask= and normalizer=": (
        lambda e, m: jnp.sum(e * m) / jnp.sum(m),
        {"mask": lambda x, m: m, "normalizer": lambda x, m: m.sum()},
    ),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("flat", [False, True])
def test_masked_positions_are_not_there(name: str, flat: bool) -> None:
    """Statistics are those of the kept positions alone; also where the model merges the axes that the mask counts."""
    reduce, options = MASKED[name]
    x, params = normal(3, 4, 3, 3), PARAMS()

    def loss(p: Any, x: Any, m: Any, see: Any) -> Any:
        x, m = (x.reshape(12, 3), m.reshape(12)) if flat else (x, m)
        return tokens_loss(reduce)(p, x, m, see)

    stats = captured(loss, params, x, jnp.asarray(KEPT), **options)
    a, delta = watched(tokens_loss(jnp.mean), params, x[KEPT])
    assert_factors(stats["W"], a["W"], delta["W"], 6, True)
    assert_factors(stats["V"], a["V"], delta["V"], 6)
    assert stats["V"].weight == 6


@pytest.mark.usefixtures("x64")
def test_zero_weights_mask_and_the_loss_knows_its_sum() -> None:
    """``fo.losses`` with weights of 0 and 1 is the loss, and the statistics, of the kept positions."""
    x, params, y = normal(3, 4, 3, 3), PARAMS(), jnp.arange(12).reshape(4, 3) % 2

    def loss(p: Any, x: Any, y: Any, *w: Any) -> Any:
        *w, see = w
        h = jnp.tanh(see("W", x, x @ p["W"]) + p["b"])
        return losses.softmax_cross_entropy(see("V", h, h @ p["V"]), y, *w)

    stats = captured(loss, params, x, y, jnp.asarray(KEPT))
    a, delta = watched(loss, params, x[KEPT], y[KEPT])
    assert_factors(stats["W"], a["W"], delta["W"], 6, True)
    assert_factors(stats["V"], a["V"], delta["V"], 6)
    weighted = captured(loss, params, x, y, 2 * jnp.asarray(KEPT))
    assert_near(weighted["W"].left, stats["W"].left)


@pytest.mark.usefixtures("x64")
def test_other_weights_count_examples_so_many_times() -> None:
    """``right`` is Σ w s sᵀ / Σ w of the scores s; inputs count alike wherever the weight is not 0."""
    W, x, y, w = normal(0, 3, 2), normal(1, 4, 3), normal(2, 4, 2), jnp.asarray(WEIGHTS)
    loss = lambda W, x, y, w: losses.gaussian(x @ W, y, w)  # noqa: E731
    stats = capture.value_and_grad(loss)(W, x, y, w)[2]
    s = np.asarray(x @ W - y)
    assert_near(stats.right, (s * WEIGHTS[:, None]).T @ s / WEIGHTS.sum())
    assert_near(stats.left, np.asarray(x)[WEIGHTS > 0].T @ np.asarray(x)[WEIGHTS > 0] / 3)


def pooled(p: Any, x: Any, see: Any) -> Any:
    """One loss for each sequence, of its mean; time may come first."""
    h = see("W", x, x @ p["W"]) + p["b"]
    pool = jnp.tanh(h.mean(1))
    return jnp.mean(jnp.sum(see("V", pool, pool @ p["V"]) ** 2, -1))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("time_first", [False, True])
def test_reduce_is_of_each_example_s_mean_input_and_summed_gradient(time_first: bool) -> None:
    """``mode="reduce"``: rows are examples, whichever axis counts them, and N is their number."""
    params, x = PARAMS(), normal(3, 4, 3, 3)

    def loss(p: Any, x: Any, see: Any) -> Any:
        return pooled(p, x, see) if not time_first else turned(p, x, see)

    def turned(p: Any, x: Any, see: Any) -> Any:
        h = (see("W", x, x @ p["W"]) + p["b"]).swapaxes(0, 1)
        pool = jnp.tanh(h.mean(1))
        return jnp.mean(jnp.sum(see("V", pool, pool @ p["V"]) ** 2, -1))

    kind, given = capture.KroneckerFactors(mode="reduce"), x.swapaxes(0, 1) if time_first else x
    stats = captured(loss, params, given, kind=kind, batch_axis=int(time_first))
    a, delta = watched(pooled, params, x)
    assert_factors(stats["W"], a["W"].mean(1), delta["W"].sum(1), 4, True)
    assert_factors(stats["V"], a["V"], delta["V"], 4)


@pytest.mark.usefixtures("x64")
def test_reduce_with_a_mask_is_over_the_kept_positions_of_each_example() -> None:
    """Examples of which nothing is kept are not there at all."""
    params, x = PARAMS(), normal(3, 4, 3, 3)

    def loss(p: Any, x: Any, m: Any, see: Any) -> Any:
        h = (see("W", x, x @ p["W"]) + p["b"]) * m[..., None]
        return jnp.mean(jnp.sum(jnp.tanh(h.sum(1)) ** 2, -1))

    stats = captured(
        loss, params, x, jnp.asarray(KEPT, float), kind=capture.KroneckerFactors(mode="reduce"), mask=lambda x, m: m > 0
    )["W"]
    a, delta = watched(loss, params, x, jnp.asarray(KEPT, float))
    rows = [i for i in range(4) if KEPT[i].any()]
    means = np.stack([np.asarray(a["W"])[i][KEPT[i]].mean(0) for i in rows])
    sums = np.stack([np.asarray(delta["W"])[i][KEPT[i]].sum(0) for i in rows])
    assert_factors(stats, means, sums, 3, True)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mode", ["expand", "reduce"])
def test_experiment_mask_of_a_convolution(mode: str) -> None:
    """A mask of examples drops all of their places, and N counts the examples that are kept."""
    W, x, m = normal(0, 2, 3, 4), normal(1, 4, 5, 3), jnp.array([1, 0, 1, 1])

    def loss(W: Any, x: Any, m: Any) -> Any:
        y = jax.lax.conv_general_dilated(x, W, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
        return jnp.sum(jnp.sum(y**2, (1, 2)) * m) / jnp.sum(m)

    kind = capture.KroneckerFactors(mode=mode)
    masked = jax.jit(capture.value_and_grad(loss, kind, mask=lambda x, m: m))(W, x, m)[2]
    alone = jax.jit(capture.value_and_grad(loss, kind))(W, x[np.array([0, 2, 3])], jnp.ones(3))[2]
    for mine, theirs in zip(jax.tree.leaves(masked), jax.tree.leaves(alone), strict=True):
        assert_near(mine, theirs)


@pytest.mark.usefixtures("x64")
def test_masks_of_time_first_batches() -> None:
    """``batch_axis=1`` with a mask of examples masks them on the second axis; one of all positions is as they are."""
    W, x, m = normal(0, 3, 2), normal(1, 5, 4, 3), jnp.array([1, 0, 1, 1])
    loss = lambda W, x, m: jnp.sum(jnp.sum((x @ W) ** 2, (0, 2)) * m) / (5 * jnp.sum(m))  # noqa: E731
    wanted = jax.jit(capture.value_and_grad(loss))(W, x[:, np.array([0, 2, 3])], jnp.ones(3))[2]
    for mask in (lambda x, m: m, lambda x, m: jnp.broadcast_to(m, (5, 4))):
        stats = jax.jit(capture.value_and_grad(loss, mask=mask, batch_axis=1))(W, x, m)[2]
        for mine, theirs in zip(jax.tree.leaves(stats), jax.tree.leaves(wanted), strict=True):
            assert_near(mine, theirs)
