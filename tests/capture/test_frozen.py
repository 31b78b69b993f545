"""What no gradient reaches is named where shares and importances are printed, and counts as not captured."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_optax as fo
from fisher_optax.capture.program import jaxprs
from fisher_optax.capture.program.reach import reached
from tests.comparisons import assert_same_bits

prune = functools.partial(fo.compression.prune, progress=False)
stop = jax.lax.stop_gradient


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


a, b, x = normal(0, 3), normal(1, 3), normal(2, 3)


@jax.custom_vjp
def cubed(x: Any) -> Any:
    return x**3


cubed.defvjp(lambda x: (x**3, x), lambda x, g: (3 * x**2 * g,))


def looped(a: Any, b: Any, count: int = 3) -> Any:
    """Each place of what is carried comes out after some number of steps."""
    return jax.lax.scan(lambda c, _: ((c[1], c[2], c[0] * stop(c[1])), c[0]), (a, a, b), None, count)[0][0]


PROGRAMS: dict[str, Callable[[Any, Any], Any]] = {
    "both": lambda a, b: a * b,
    "stopped": lambda a, b: a * stop(b),
    "unused": lambda a, b: a,
    "rounded": lambda a, b: a + jnp.round(b) + jnp.floor(b) + jnp.ceil(b) + jnp.sign(b),
    "by an index": lambda a, b: a[jnp.argmax(b)],
    "as an integer": lambda a, b: a * (5 + b).astype(int),
    "compared": lambda a, b: jnp.where(b > 0, a, 2 * a),
    "a constant gradient": lambda a, b: jnp.sum(a) + jnp.sum(b),
    "remat": lambda a, b: jax.checkpoint(lambda a, b: jnp.sin(a) * stop(b))(a, b),
    "own derivative": lambda a, b: cubed(a) * stop(cubed(b)),
    "relu": lambda a, b: jax.nn.relu(a) + stop(jax.nn.relu(b)),
    "one branch": lambda a, b: jax.lax.cond(x[0] < 0, lambda: stop(b), lambda: b) + a,
    "no branch": lambda a, b: jax.lax.cond(b[0] < 0, lambda: stop(b), lambda: 2.0 + stop(b)) + a,
    "scanned": lambda a, b: jax.lax.scan(lambda c, w: (jnp.sin(c) + stop(w), w), a, jnp.stack([b, b]))[0],
    "carried": looped,
    "carried for two steps": lambda a, b: looped(a, b, 2),
    "straight through": lambda a, b: a + b + stop(jnp.round(b) - b),
    "a loss": lambda a, b: fo.losses.softmax_cross_entropy(a[None] * stop(b), jnp.array([1])),
    "as labels": lambda a, b: fo.losses.softmax_cross_entropy(a[None], stop(jax.nn.softmax(b))[None]),
    "vmap": lambda a, b: jax.vmap(lambda a, b: a * stop(b))(a, b),
}


MORE = ("one branch", "carried", "carried for two steps")


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_the_gradient_reaches_is_read_off_the_program(name: str) -> None:
    """As the gradient has it, but for branches that are not taken and steps that are not run."""
    f = PROGRAMS[name]
    live = reached(jaxprs.program(jax.make_jaxpr(f)(a, b)))
    weights = jnp.cos(jnp.arange(3.0))
    gradients = jax.grad(lambda a, b: jnp.sum(f(a, b) * weights), (0, 1))(a, b)
    wanted = {i for i, g in enumerate(gradients) if np.any(g != 0)}
    assert live == wanted | (set() if name not in MORE else {0, 1})


PARAMS = {"frozen": normal(3, 4, 4), "live": {"kernel": normal(4, 4, 6), "bias": normal(5, 6)}, "norm": normal(6, 4)}
X = normal(7, 20, 4)


def model(p: Any, x: Any) -> Any:
    return jnp.tanh(x @ stop(p["frozen"])) @ p["live"]["kernel"] + p["live"]["bias"]


def loss(p: Any, x: Any) -> Any:
    return fo.losses.gaussian(model(p, x), jnp.ones((*x.shape[:-1], 6)))


def test_the_report_of_a_loss_names_them_and_counts_what_is_captured() -> None:
    found = fo.report(loss, PARAMS, X)
    rows = {row.path: row for row in found.rows}
    assert {path: row.is_frozen for path, row in rows.items()} == {
        "frozen": True, "live/bias": False, "live/kernel": False, "norm": True,
    }  # fmt: skip
    assert rows["frozen"].reason == rows["norm"].reason == "no gradient reaches it"
    assert found.share == 30 / 50
    assert "for 60%" in str(found)
    without = fo.report(loss, PARAMS, X, statistics=fo.InputGram())
    assert not any(row.is_frozen for row in without.rows)
    assert without.share == 46 / 50


@pytest.mark.parametrize("unit", ["sequence", "token", "position"])
def test_the_diagonal_names_them_with_their_share(unit: str) -> None:
    example = lambda p, x: loss(p, x[None])  # noqa: E731
    message = r"diagonal: no gradient reaches 2 leaves \(40% of the parameters\): 'frozen', 'norm'"
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        fisher = fo.fisher.diagonal(example, PARAMS, [X], unit=unit)
    texts = [str(w.message) for w in found if "diagonal:" in str(w.message)]
    assert len(texts) == 1
    with pytest.warns(UserWarning, match=message):
        warnings.warn(texts[0], stacklevel=1)
    assert not np.any(fisher.mean["frozen"])
    live = {"live": PARAMS["live"]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fo.fisher.diagonal(lambda p, x: example(PARAMS | p, x), live, [X], unit=unit)


def test_methods_that_know_gradients_prune_by_size_what_none_has_reached_and_say_so() -> None:
    """A Fisher of 0 would let all go alike, in the order in which they are stored."""
    params = {k: PARAMS[k] for k in ("frozen", "live")}
    example = lambda p, x: loss(p, x[None])  # noqa: E731
    F = {"frozen": jnp.zeros((4, 4)), "live": {"kernel": jnp.ones((4, 6)), "bias": None}}
    by_size = fo.compression.mask(jnp.abs(params["frozen"]), 0.5)
    for options, note in (
        (dict(method="fisher", fisher=F), "the Fisher is 0 of it"),
        (dict(method="obert", loss_fn=example), "no gradient has reached it"),
    ):
        with pytest.warns(UserWarning, match=f"'frozen': {note}"):
            _, masks, report = prune(model, params, [X], sparsity=0.5, **options)
        assert_same_bits(masks["frozen"], by_size)
        assert [row.note for row in report.layers] == [note, ""]
        assert note in str(report)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [row.note for row in prune(model, params, [X], "wanda").report.layers] == ["", ""]
