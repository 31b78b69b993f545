"""The rows of a Fisher, some examples at a time: the same as all at once, whatever weights, labels and losses."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_optax as fo
from fisher_optax.fisher.operators import approximations
from fisher_optax.fisher.operators.approximations import approximate, dense
from tests.reference.curvature import relative

D = 12  # parameters of the embedding, the first leaf


def net(p: Any, tokens: Any) -> Any:
    return jnp.tanh(p["embedding"][tokens] @ p["kernel"])


def loss(p: Any, tokens: Any, y: Any, w: Any) -> Any:
    return fo.losses.softmax_cross_entropy(net(p, tokens), y, w)


def two_losses(p: Any, tokens: Any, y: Any, w: Any) -> Any:
    return loss(p, tokens, y, w) + 0.1 * fo.losses.gaussian(net(p, tokens), jnp.zeros((*y.shape, 3)))


def setting() -> tuple[Any, Any, Any, Any]:
    """An embedding and a layer; five sequences of two positions, with labels and weights; one sequence has none."""
    rng = np.random.default_rng(2)
    params = {"embedding": rng.normal(size=(4, 3)), "kernel": rng.normal(size=(3, 3))}
    w = np.array([[1.0, 2.0], [0.0, 1.0], [1.0, 0.0], [0.0, 0.0], [2.0, 1.0]])
    return params, rng.integers(0, 4, (5, 2)), rng.integers(0, 3, (5, 2)), w


def in_blocks(F: Any) -> np.ndarray:
    """Without what is between the leaves."""
    F = np.array(F)
    F[:D, D:] = F[D:, :D] = 0
    return F


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("method", ("block_diagonal", "kfac", "dykaf"))
def test_a_few_examples_at_a_time_give_the_same(method: str) -> None:
    """In chunks of 2 of 5: kept rows and entries, statistics of layers, and the order that DyKAF depends on."""
    found = approximate(method, loss, *setting(), batch_size=2).dense()
    assert relative(found, approximate(method, loss, *setting()).dense()) < 1e-12


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("options", ({"fisher": "empirical"}, {"temperature": 2.0}), ids=str)
def test_examples_weigh_what_they_do_in_the_mean(options: dict[str, Any]) -> None:
    """Of two losses, one of them weighted: against the operator of all examples together."""
    F = fo.fisher.operator(two_losses, *setting(), **options).dense()
    assert relative(dense(two_losses, *setting(), batch_size=2, **options), F) < 1e-12
    if "temperature" in options:
        A = approximate("block_diagonal", two_losses, *setting(), batch_size=5, **options)
        assert relative(A.dense(), in_blocks(F)) < 1e-12


@pytest.mark.usefixtures("x64")
def test_drawn_labels_depend_on_the_key_alone() -> None:
    """Not on the size of the chunks; without chunks, they are those of the operator."""
    options: dict[str, Any] = {"fisher": "mc", "n_samples": 3, "key": jax.random.key(0)}
    draw = lambda size, seed: dense(  # noqa: E731
        loss, *setting(), batch_size=size, **options | {"key": jax.random.key(seed)}
    )
    F = draw(2, 0)
    assert relative(F, draw(2, 1)) > 0.01
    blocks = approximate("block_diagonal", loss, *setting(), batch_size=5, **options).dense()
    assert relative(blocks, in_blocks(F)) < 1e-12
    assert relative(draw(None, 0), fo.fisher.operator(loss, *setting(), **options).dense()) < 1e-12


def linear(W: Any, x: Any, y: Any) -> Any:
    return fo.losses.gaussian(x @ W, y)


def of_pairs(W: Any, x: Any, y: Any) -> Any:
    return linear(W, (x[:, None] - x).reshape(-1, 4), jnp.repeat(y, len(y), 0))


def linear_setting(seed: int = 0) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(seed)
    return tuple(np.float32(rng.normal(size=shape)) for shape in ((4, 2), (3, 4), (3, 2)))


def test_another_batch_compiles_nothing() -> None:
    def compiled_after(seed: int) -> int:
        approximate("diagonal", linear, *linear_setting(seed))
        return approximations._forms._cache_size()

    assert compiled_after(0) == compiled_after(1)


@pytest.mark.parametrize(
    ("method", "options", "kind", "message"),
    (
        ("tnt", {}, ValueError, r"method must be one of 'block_diagonal', .*'nearest'; got 'tnt'"),
        ("shampoo", {"sweeps": 2}, TypeError, "'shampoo' has no option 'sweeps'; it has trace_scaled"),
        ("soap", {"ridge": 1.0}, TypeError, "'soap' has no option 'ridge'; it has none"),
        ("kl", {"ridge": -1.0}, ValueError, "kl: ridge must be at least 0"),
        ("dykaf", {"sweeps": 0}, ValueError, "dykaf: sweeps must be an integer of at least 1; got 0"),
        ("kfac", {"mode": "sum"}, ValueError, "mode must be 'expand' or 'reduce'; got 'sum'"),
        ("ekfac", {"temperature": 2.0}, ValueError, r"ekfac: its factors are .* got temperature=2\.0"),
        ("soap", {"fisher": "ggn"}, ValueError, "rows are those of 'true', 'mc', 'empirical'; got fisher='ggn'"),
        ("soap", {"fisher": "mc"}, ValueError, r"pass key=jax\.random\.key"),
        ("soap", {"batch_size": 0}, ValueError, "batch_size must be an integer of at least 1; got 0"),
    ),
)
def test_a_wrong_argument_is_named(method: str, options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        approximate(method, linear, *linear_setting(), **options)


def test_a_loss_that_is_no_mean_over_examples_is_refused() -> None:
    W, x, y = linear_setting()
    with pytest.raises(ValueError, match=r"leading axis of its leaves.*got shapes \[\(3, 4\), \(3, 2\), \(\)\]"):
        dense(lambda W, x, y, s: s * linear(W, x, y), W, x, y, 1.0)
    with pytest.raises(ValueError, match="of 3 it has 9 positions, of one 1"):
        dense(of_pairs, W, x, y)
    assert dense(of_pairs, W, x, y, batch_size=None).shape == (8, 8)
