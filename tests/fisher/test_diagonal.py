"""Squares of single examples' gradients: equal to computing them one by one, for every unit and kind of label."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import fisher_optax as fo
from tests.reference.curvature import relative
from tests.reference.diagonal import of_sequence, of_tokens, token_gradients, weighted

SEQUENCES, LENGTH, WIDTH, CLASSES = 9, 5, 3, 4
RNG = np.random.default_rng(0)
pytestmark = pytest.mark.usefixtures("x64")


@functools.cache
def setting() -> tuple[Any, Any]:
    """Parameters of a small network, and sequences of unequal length: inputs, labels and weights."""
    normal = lambda *shape: jnp.asarray(RNG.normal(size=shape))  # noqa: E731
    params = {"in": {"kernel": normal(WIDTH, WIDTH), "bias": normal(WIDTH)}, "out": normal(WIDTH, CLASSES)}
    lengths = RNG.integers(1, LENGTH + 1, SEQUENCES)
    real = jnp.asarray(np.arange(LENGTH) < lengths[:, None], jnp.float64)
    labels = jnp.asarray(RNG.integers(0, CLASSES, (SEQUENCES, LENGTH)))
    return params, (normal(SEQUENCES, LENGTH, WIDTH), labels, real)


def logits(params: Any, x: Any, mixing: bool = False) -> Any:
    """Of each token by itself; with ``mixing``, of the mean of what came before, as attention has it."""
    h = jnp.tanh(x @ params["in"]["kernel"] + params["in"]["bias"])
    h = jnp.cumsum(h, -2) / jnp.arange(1, h.shape[-2] + 1)[:, None] if mixing else h
    return h @ params["out"]


def loss(params: Any, example: Any, mixing: bool = False) -> Any:
    x, y, w = example
    return fo.losses.softmax_cross_entropy(logits(params, x, mixing), y, w)


def token_losses(params: Any, example: Any, mixing: bool = False) -> Any:
    """The losses of tokens and their weights."""
    x, y, w = example
    return -jnp.take_along_axis(jax.nn.log_softmax(logits(params, x, mixing)), y[:, None], -1)[:, 0], w


mixing_loss = functools.partial(loss, mixing=True)


def one_by_one(unit: str, mixing: bool = False, labels: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """Rows of squares, and weights."""
    params, (x, y, w) = setting()
    flat, unravel = ravel_pytree(params)
    y = y if labels is None else labels
    of = {"sequence": of_sequence, "token": of_tokens}[unit]

    @jax.jit
    def gradients(flat: Any, *example: Any) -> Any:
        return jax.jacrev(lambda v: token_losses(unravel(v), example, mixing)[0])(flat)

    rows = [of(np.asarray(gradients(flat, x[i], y[i], w[i])), np.asarray(w[i])) for i in range(SEQUENCES)]
    return np.array(rows), np.asarray(w.sum(-1))


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def cut(size: int, batch: Any = None) -> list[Any]:
    """The sequences in batches of that size."""
    batch = setting()[1] if batch is None else batch
    return [jax.tree.map(lambda x, i=i: x[i : i + size], batch) for i in range(0, len(batch[0]), size)]


@pytest.mark.parametrize("given", (loss, token_losses), ids=("fo.losses", "token losses"))
@pytest.mark.parametrize("unit", ("sequence", "token"))
def test_squares_are_those_of_single_examples(unit: str, given: Any) -> None:
    """Mean, variance and effective number, where sequences differ in length."""
    x, w = one_by_one(unit)
    fisher = fo.fisher.diagonal(given, setting()[0], cut(4), unit=unit, microbatch=3)
    mean, variance, n = weighted(x, w)
    assert relative(flat(fisher.mean), mean) < 1e-12
    assert relative(flat(fisher.variance()), variance) < 1e-10
    assert float(fisher.n_eff) == pytest.approx(n, rel=1e-6)
    assert (int(fisher.n), float(fisher.w), int(fisher.batches)) == (SEQUENCES, w.sum(), 3)


@pytest.mark.parametrize("unit", ("sequence", "token", "position"))
def test_how_batches_are_cut_changes_nothing(unit: str) -> None:
    """Of the mean; nor of the error where single sequences are what is counted. Labels of the model too."""
    options = dict(unit=unit, fisher="mc", key=jax.random.key(0), n_samples=2)
    many = jax.tree.map(lambda x: jnp.tile(x, (8, *[1] * (x.ndim - 1)))[:64], setting()[1])
    one, eight, all_ = (
        fo.fisher.diagonal(loss, setting()[0], cut(size, many), microbatch=m, **options)
        for size, m in ((1, 1), (8, 3), (64, 64))
    )
    for other in (one, eight):
        assert relative(flat(other.mean), flat(all_.mean)) < 1e-12
        if unit != "position":
            assert relative(flat(other.m2), flat(all_.m2)) < 1e-10


def test_values_do_not_shrink_as_the_batch_grows() -> None:
    """The square of a batch's mean gradient would, like one over its size squared where examples are alike."""
    params, batch = setting()
    alike = jax.tree.map(lambda x: jnp.repeat(x[:1], 32, 0), batch)
    means = [
        flat(fo.fisher.diagonal(loss, params, [jax.tree.map(lambda x, k=k: x[:k], alike)]).mean) for k in (1, 8, 32)
    ]
    assert relative(means[1], means[0]) < 1e-12
    assert relative(means[2], means[0]) < 1e-12


@pytest.mark.parametrize("unit", ("sequence", "token"))
def test_all_labels_at_once_are_what_samples_approach(unit: str) -> None:
    """And the two units are one there, but not with the data's labels."""
    params = setting()[0]
    true = flat(fo.fisher.diagonal(loss, params, cut(SEQUENCES), unit=unit, fisher="true").mean)
    dense = fo.fisher.operator(
        lambda p, x, y, w: fo.losses.softmax_cross_entropy(logits(p, x), y, w), params, *setting()[1]
    ).dense()
    assert relative(true, np.diag(dense)) < 1e-12
    options = dict(unit=unit, fisher="mc", n_samples=3000, key=jax.random.key(1), microbatch=SEQUENCES)
    if unit == "sequence":
        sampled = flat(fo.fisher.diagonal(loss, params, cut(SEQUENCES), **options).mean)
        assert relative(sampled, true) < 0.05
    assert relative(one_by_one("sequence")[0].mean(0), one_by_one("token")[0].mean(0)) > 0.2


def test_positions_are_tokens_where_each_feeds_its_own_loss_and_not_where_they_mix() -> None:
    params = setting()[0]
    squares = lambda f, unit: flat(fo.fisher.diagonal(f, params, cut(4), unit=unit, microbatch=4).mean)  # noqa: E731
    assert relative(squares(loss, "position"), squares(loss, "token")) < 1e-12
    position, token = squares(mixing_loss, "position"), squares(mixing_loss, "token")
    head = slice(-WIDTH * CLASSES, None)  # after the mixing, each position feeds its own token again
    assert relative(position[head], token[head]) < 1e-12
    assert relative(position[: -WIDTH * CLASSES], token[: -WIDTH * CLASSES]) > 0.1


def test_positions_are_the_diagonal_of_a_and_delta_squared() -> None:
    """Of a layer below the mixing, from its own inputs and output gradients."""
    params, (x, y, w) = setting()

    def total(shift: Any) -> Any:
        h = jnp.tanh(x @ params["in"]["kernel"] + params["in"]["bias"] + shift)
        h = jnp.cumsum(h, -2) / jnp.arange(1, LENGTH + 1)[:, None]
        log_p = jax.nn.log_softmax(h @ params["out"])
        return -jnp.sum(w * jnp.take_along_axis(log_p, y[..., None], -1)[..., 0])

    δ = np.asarray(jax.grad(total)(jnp.zeros((SEQUENCES, LENGTH, WIDTH)))).reshape(-1, WIDTH)
    a = np.asarray(x).reshape(-1, WIDTH)
    fisher = fo.fisher.diagonal(mixing_loss, params, cut(SEQUENCES), unit="position", microbatch=64).mean
    assert relative(fisher["in"]["kernel"], np.square(a).T @ np.square(δ) / w.sum()) < 1e-12
    assert relative(fisher["in"]["bias"], np.square(δ).sum(0) / w.sum()) < 1e-12


def test_tied_weights_sum_their_gradients_before_they_are_squared() -> None:
    """And the unit of positions, whose products tell only half of such a leaf, names it and leaves it out."""
    W = jnp.asarray(RNG.normal(size=(CLASSES, WIDTH)))
    tied = lambda p, e: fo.losses.softmax_cross_entropy(jnp.tanh(p["embed"][e[0]]) @ p["embed"].T, e[1])  # noqa: E731
    batch = (jnp.asarray(RNG.integers(0, CLASSES, (6, 4))), jnp.asarray(RNG.integers(0, CLASSES, (6, 4))))

    def each(v: Any, i: int) -> Any:
        log_p = jax.nn.log_softmax(jnp.tanh(v.reshape(W.shape)[batch[0][i]]) @ v.reshape(W.shape).T)
        return -jnp.take_along_axis(log_p, batch[1][i][:, None], -1)[:, 0]

    rows = [of_sequence(token_gradients(functools.partial(each, i=i), W.ravel()), np.ones(4)) for i in range(6)]
    fisher = fo.fisher.diagonal(tied, {"embed": W}, [batch])
    assert relative(fisher.mean["embed"].ravel(), np.mean(rows, 0)) < 1e-12
    both = lambda p, e: tied(p, e) + 0 * jnp.sum(e[2] @ p["other"])  # noqa: E731
    more = {"embed": W, "other": jnp.ones((2, 2))}
    with pytest.warns(UserWarning, match=r"without it stay 'embed' \(also used the other way round"):
        partial = fo.fisher.diagonal(both, more, [(*batch, jnp.ones((6, 2)))], unit="position")
    assert partial.mean["embed"] is None
    assert partial.mean["other"].shape == (2, 2)


def test_a_convolution_and_an_embedding_by_positions_are_what_tokens_are() -> None:
    """Where one location feeds one loss: kernels with a window, strides and several inputs, and looked-up rows."""
    kernel, table = jnp.asarray(RNG.normal(size=(3, 2, CLASSES))), jnp.asarray(RNG.normal(size=(7, 2)))

    def conv_loss(p: Any, example: Any) -> Any:
        tokens, y = example
        x = p["embed"][tokens] if "embed" in p else table[tokens]
        dims = ("NHC", "HIO", "NHC")
        z = jax.lax.conv_general_dilated(x[None], p["kernel"], (3,), "VALID", dimension_numbers=dims)[0]
        return fo.losses.softmax_cross_entropy(z, y)

    batch = (jnp.asarray(RNG.integers(0, 7, (4, 9))), jnp.asarray(RNG.integers(0, CLASSES, (4, 3))))
    params = {"kernel": kernel, "embed": table}
    squares = lambda batch, unit: fo.fisher.diagonal(conv_loss, params, [batch], unit=unit).mean  # noqa: E731
    token, position = (squares(batch, unit) for unit in ("token", "position"))
    assert relative(position["kernel"], token["kernel"]) < 1e-12
    # A token that a window holds twice has its gradients summed before they are squared.
    distinct = (jnp.asarray([RNG.permutation(7)[[0, 1, 2, 3, 4, 5, 6, 0, 1]] for _ in range(4)]), batch[1])
    token, position = (
        fo.fisher.diagonal(conv_loss, params, [distinct], unit=unit).mean for unit in ("token", "position")
    )
    assert relative(position["embed"], token["embed"]) < 1e-12


@dataclasses.dataclass
class Scaled:
    """A loss with an equality of its own, and so without a hash."""

    scale: Any

    def __call__(self, params: Any, example: Any) -> Any:
        return self.scale * loss(params, example)


def test_a_loss_may_be_an_object_without_a_hash() -> None:
    """And what has changed since is seen, by every tool."""
    params, batch = setting()
    scaled = Scaled(1.0)
    once = flat(fo.fisher.diagonal(scaled, params, [batch]).mean)
    scaled.scale = 3.0
    assert relative(flat(fo.fisher.diagonal(scaled, params, [batch]).mean), 3 * once) < 1e-12
    example = jax.tree.map(lambda x: x[0], batch)
    F = fo.fisher.operator(scaled, params, example).dense()
    assert relative(F, 3 * fo.fisher.operator(loss, params, example).dense()) < 1e-12
    assert relative(fo.fisher.dense(scaled, params, example, batch_size=None), F) < 1e-12


def test_axes_may_be_a_dictionary() -> None:
    """Of a layer whose outputs come first."""
    turned = lambda p, e: fo.losses.softmax_cross_entropy(e[0] @ p["W"].T, e[1])  # noqa: E731
    params, (x, y, _) = {"W": jnp.asarray(RNG.normal(size=(CLASSES, WIDTH)))}, setting()[1]
    by_rows = fo.fisher.diagonal(turned, params, [(x, y)], groups="rows", axes={"W": fo.MatrixAxes(1, 0)}).mean["W"]
    assert relative(by_rows, fo.fisher.diagonal(turned, params, [(x, y)]).mean["W"].sum(1)) < 1e-12
