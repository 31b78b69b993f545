"""A `DiagonalFisher` as a statistic: merging, devices, decay, intervals, saving, going on, and what is contained."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import scipy.stats
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import fisher_optax as fo
from tests.reference.curvature import relative
from tests.reference.diagonal import interval, weighted

RNG = np.random.default_rng(0)


def seen(x: Any, w: Any) -> Any:
    return fo.fisher.DiagonalFisher.zeros(jnp.zeros(x.shape[1:])).update(jnp.asarray(x), jnp.asarray(w))


def assert_same(a: Any, b: Any, tolerance: float) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("x64")
def test_merging_is_associative_commutative_and_as_if_seen_at_once() -> None:
    x, w = RNG.normal(size=(12, 3)) ** 2, RNG.integers(0, 5, 12).astype(float)
    parts = [seen(x[s], w[s]) for s in (slice(0, 2), slice(2, 7), slice(7, 12))]
    a, b, c = parts
    whole = seen(x, w)
    for merged in (a.merge(b).merge(c), a.merge(b.merge(c)), c.merge(a).merge(b)):
        assert_same(merged, whole, 1e-12)
    nothing = fo.fisher.DiagonalFisher.zeros(jnp.zeros(3))
    assert_same(nothing.merge(whole), whole, 0)
    assert_same(whole.merge(nothing), whole, 0)
    mean, variance, n = weighted(x[w > 0], w[w > 0])
    assert relative(whole.mean, mean) < 1e-12
    assert relative(whole.variance(), variance) < 1e-12
    assert float(whole.n_eff) == pytest.approx(n)
    assert int(whole.n) == np.sum(w > 0)


@pytest.mark.usefixtures("x64")
def test_all_reduce_over_eight_devices_is_merge() -> None:
    x, w = RNG.normal(size=(16, 3)) ** 2, RNG.integers(1, 5, 16).astype(float)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def one(x: Any, w: Any) -> Any:
        return fo.fisher.DiagonalFisher.zeros(jnp.zeros(3)).update(x, w).all_reduce("data")

    reduced = jax.jit(jax.shard_map(one, mesh=mesh, in_specs=P("data"), out_specs=P()))(jnp.asarray(x), jnp.asarray(w))
    assert_same(reduced, seen(x, w), 1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("types", (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit))
@pytest.mark.parametrize("unit", ("sequence", "token", "position"))
def test_batches_spread_over_eight_devices_give_what_one_gives(unit: str, types: jax.sharding.AxisType) -> None:
    """And work stays spread: nothing of the batch's size is gathered."""
    W, batch = jnp.asarray(RNG.normal(size=(3, 4))), (RNG.normal(size=(32, 5, 3)), RNG.integers(0, 4, (32, 5)))
    loss = lambda W, e: fo.losses.softmax_cross_entropy(e[0] @ W, e[1])  # noqa: E731
    mesh = jax.make_mesh((8,), ("data",), axis_types=(types,))
    spread = jax.device_put(batch, NamedSharding(mesh, P("data")))
    alone, together = (fo.fisher.diagonal(loss, W, [b], unit=unit, microbatch=16) for b in (batch, spread))
    assert_same(together, alone, 1e-12)


@pytest.mark.usefixtures("x64")
def test_decay_is_a_moving_average_that_corrects_its_start() -> None:
    """Weights γ^age: n_eff is that of the weights, and the mean of equal numbers is that number from the first on."""
    x, γ = RNG.normal(size=(30, 2)) ** 2, 0.9
    fisher = fo.fisher.DiagonalFisher.zeros(jnp.zeros(2))
    for row in x:
        fisher = fisher.decay(γ).update(jnp.asarray(row)[None], jnp.ones(1))
    mean, variance, n = weighted(x, γ ** np.arange(29, -1, -1))
    assert relative(fisher.mean, mean) < 1e-12
    assert relative(fisher.variance(), variance) < 1e-12
    assert float(fisher.n_eff) == pytest.approx(n)
    with pytest.raises(ValueError, match=r"decay takes a factor in \(0, 1\]; got 1\.5"):
        fisher.decay(1.5)


@pytest.mark.usefixtures("x64")
def test_intervals_are_students_of_weighted_means() -> None:
    x, w = RNG.normal(size=(6, 3)) ** 2, RNG.integers(1, 5, 6).astype(float)
    for level in (0.5, 0.95):
        for ours, wanted in zip(seen(x, w).confidence_interval(level), interval(x, w, level), strict=True):
            np.testing.assert_allclose(ours, wanted, rtol=1e-10)
    assert float(seen(x * [1, 1, 1e-9], w).confidence_interval(0.9999)[0][2]) == 0
    lower, upper = seen(x[:1], w[:1]).confidence_interval()
    assert np.all(np.asarray(lower) == 0)
    assert np.all(np.isinf(upper))
    with pytest.raises(ValueError, match=r"level must lie between 0 and 1, as 0\.95; got 95"):
        seen(x, w).confidence_interval(95)


def test_nominal_95_percent_intervals_cover_as_often() -> None:
    """1,000 simulated collections of 40 texts of 5 to 60 tokens, whose tokens go together; counting tokens as draws
    would cover far less.
    """
    rng = np.random.default_rng(1)
    lengths = rng.integers(5, 61, (1000, 40))
    topic = rng.normal(size=(1000, 40, 1))  # shared by the tokens of a text
    # The mean over a text's tokens of squared gradients 0.5 topic + noise: its expectation is .25 + 1.
    noise = rng.chisquare(lengths)[..., None] / lengths[..., None]
    cross = rng.normal(size=(1000, 40, 1)) / np.sqrt(lengths)[..., None]
    x, truth = 0.25 * topic**2 + topic * cross + noise, 1.25

    @jax.jit
    @jax.vmap
    def mean_and_error(x: Any, w: Any) -> Any:
        fisher = fo.fisher.DiagonalFisher.zeros(jnp.zeros(1)).update(x, w)
        return fisher.mean[0], fisher.standard_error()[0], fisher.n_eff

    mean, error, n_eff = map(np.asarray, mean_and_error(jnp.asarray(x, jnp.float32), jnp.asarray(lengths, jnp.float32)))
    half = scipy.stats.t.ppf(0.975, n_eff - 1) * error
    assert 0.90 <= np.mean(np.abs(mean - truth) <= half) <= 0.97
    naive = 1.96 * error * np.sqrt(n_eff / lengths.sum(1))
    assert np.mean(np.abs(mean - truth) <= naive) < 0.6


def test_what_is_not_finite_or_no_class_is_skipped_and_counted() -> None:
    W = jnp.ones((3, 4))
    loss = lambda W, e: fo.losses.softmax_cross_entropy(e[0] @ W, e[1], e[2])  # noqa: E731
    x, y, w = RNG.normal(size=(6, 5, 3)), RNG.integers(0, 4, (6, 5)), np.ones((6, 5))
    good = [0, 2, 5]
    x[1, 2, 0] = np.nan  # a bad input
    x[3] = 1e30  # squares that overflow
    y[4, 1] = 4  # no class
    y[5, 1], w[5, 1] = -1, 0  # padding
    batch = (jnp.asarray(x, jnp.float32), jnp.asarray(y), jnp.asarray(w, jnp.float32))
    for unit in ("sequence", "token"):
        fisher = fo.fisher.diagonal(loss, W, [batch], unit=unit)
        wanted = fo.fisher.diagonal(loss, W, [jax.tree.map(lambda a: a[jnp.asarray(good)], batch)], unit=unit)
        assert (int(fisher.n), int(fisher.skipped), float(fisher.w)) == (3, 3, 14)
        assert_same(fisher.mean, wanted.mean, 1e-6)
    masked = (*batch[:2], 0 * batch[2])
    with pytest.raises(ValueError, match=r"no example counted: . were not finite"):
        fo.fisher.diagonal(loss, W, [masked])


def test_a_run_goes_on_where_it_was_interrupted_bit_for_bit(tmp_path: Any) -> None:
    """From what Orbax saved; labels are drawn by the example's place, whatever was read before."""
    W = jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32)
    loss = lambda W, e: fo.losses.softmax_cross_entropy(e @ W, jnp.zeros(5, int))  # noqa: E731
    batches = [jnp.asarray(RNG.normal(size=(4, 5, 3)), jnp.float32) for _ in range(4)]
    options = dict(fisher="mc", key=jax.random.key(3), groups="rows")
    whole = fo.fisher.diagonal(loss, W, batches, **options)

    def interrupted(fisher: Any) -> None:
        with ocp.StandardCheckpointer() as saver:
            saver.save(tmp_path / str(int(fisher.batches)), fisher)
        if fisher.batches == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fo.fisher.diagonal(loss, W, batches, on_batch=interrupted, **options)
    with ocp.StandardCheckpointer() as saver:
        saved = saver.restore(tmp_path / "2", jax.eval_shape(lambda: fo.fisher.DiagonalFisher.zeros(jnp.zeros(4))))
    read: list[int] = []
    again = fo.fisher.diagonal(
        loss,
        W,
        batches,
        resume=saved,
        progress=lambda it: it,
        on_batch=lambda f: read.append(int(f.batches)),
        **options,
    )
    assert read == [3, 4]
    for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(whole), strict=True):
        assert np.array_equal(x, y)


def test_on_the_host_in_half_the_memory() -> None:
    """Rows of very different size keep 11 bits each, where plain float16 would flush them."""
    rows = np.exp(RNG.normal(size=(4, 8))) * np.array([1e-30, 1e-12, 1, 1e20])[:, None]
    fisher = seen(np.stack([rows, 2 * rows]).astype(np.float32), np.ones(2, np.float32))
    half = fo.fisher.to_host(fisher, half=True)
    assert half.mean.values.dtype == np.float16
    back = fo.fisher.to_device(half)
    np.testing.assert_allclose(back.mean, fisher.mean, rtol=2**-11)
    assert np.all(np.asarray(fisher.mean[:2]).astype(np.float16) == 0)
    assert_same(fo.fisher.to_device(fo.fisher.to_host(fisher)), fisher, 0)
    empty = fo.fisher.DiagonalFisher.zeros({"a": jnp.zeros((0,)), "b": jnp.zeros(()), "c": jnp.zeros((2, 3))})
    assert_same(fo.fisher.to_device(fo.fisher.to_host(empty, half=True)), empty, 0)


def test_what_is_wrong_is_said() -> None:
    W, batch = jnp.ones((3, 4)), (jnp.ones((2, 5, 3)), jnp.zeros((2, 5), int))
    loss = lambda W, e: fo.losses.softmax_cross_entropy(e[0] @ W, e[1])  # noqa: E731
    diagonal = fo.fisher.diagonal
    for options, message in (
        (dict(unit="batch"), "unit must be one of 'sequence', 'token', 'position'; got 'batch'"),
        (dict(fisher="ggn"), "fisher must be one of 'true', 'mc', 'empirical'; got 'ggn'"),
        (dict(fisher="mc"), "pass key=jax"),
        (dict(unit="position", fisher="true"), "fisher must be 'mc' or 'empirical'"),
        (dict(temperature=0), "temperature must be a number above 0; got 0"),
        (dict(microbatch=0), "microbatch must be an integer of at least 1; got 0"),
        (
            dict(groups="columns"),
            "groups must be one of 'parameter', 'rows', 'heads', 'tensor', 'blocks', or a function",
        ),
        (dict(groups="heads"), "no attention kernel with an axis of heads"),
    ):
        with pytest.raises(ValueError, match=message):
            diagonal(loss, W, [batch], **options)
    with pytest.raises(ValueError, match="diagonal got no batches"):
        diagonal(loss, W, iter(()))
    with pytest.raises(ValueError, match="every array must have the examples along its first axis"):
        diagonal(loss, W, [(batch[0], batch[1][:1])])
    with pytest.raises(ValueError, match="batch 0 has no examples"):
        diagonal(loss, W, [jax.tree.map(lambda x: x[:0], batch)])
    with pytest.raises(TypeError, match=r"returned shapes \(5, 4\)"):
        diagonal(lambda W, e: e[0] @ W, W, [batch])
    with pytest.raises(ValueError, match="fisher='true' needs the model's distribution"):
        diagonal(lambda W, e: jnp.sum(e[0] @ W), W, [batch], fisher="true")
    with pytest.raises(ValueError, match=r"one call of fo\.losses; example_loss_fn makes 2"):
        diagonal(lambda W, e: loss(W, e) + loss(2 * W, e), W, [batch])
    whole, rows = diagonal(loss, W, [batch]), diagonal(loss, W, [batch], groups="rows")
    with pytest.raises(ValueError, match=r"two Fishers of different groups: \(3, 4\) and \(4,\)"):
        whole.merge(rows)
    with pytest.raises(ValueError, match="two Fishers of different groups"):
        diagonal(loss, W, [batch, batch], resume=rows)
