"""Every estimator of the Fisher is its enumeration, whatever the weights, and however a loss is put together."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import fisher_optax as fo
from fisher_optax.capture import losses
from tests.fisher.estimator_cases import (
    CASES,
    EXAMPLES,
    TOKENS,
    WEIGHTS,
    D,
    H,
    Term,
    X,
    Y,
    case,
    enumerated,
    flat,
    labels_of,
    net,
    of_term,
    params_of,
    right_sides,
)
from tests.reference.curvature import relative

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize("fisher", ("true", "ggn", "empirical"))
@pytest.mark.parametrize(("form", "name", "weights"), CASES)
def test_operator(form: str, name: str, weights: str, fisher: str) -> None:
    if (name, fisher) == ("normal", "ggn"):
        return  # the curvature of this one depends on the labels
    p, terms, loss = case(form, name, weights)
    wanted = enumerated(p, terms, "empirical" if fisher == "empirical" else "true")
    entries = jax.jit(lambda F: (F.dense(), F @ p if fisher != "ggn" else None))  # ggn's entries are made by products
    dense, product = entries(fo.fisher.operator(loss, p, fisher=fisher))
    assert relative(dense, wanted) < 1e-10
    if product is not None:
        assert relative(flat(product), wanted @ flat(p)) < 1e-10


def one_example(name: str, times: bool = False) -> Callable[[Any, Any], Any]:
    """The loss of an example, which may have a factor of its own."""

    def loss(p: Any, example: Any) -> Any:
        x, y, *w = example
        v = 1.0 if not times else w.pop()
        return v * of_term(p, Term(1, name, x, y, w[0] if w else None))

    return loss


def batch_of(name: str, weights: str) -> tuple[Any, ...]:
    w = WEIGHTS[weights]
    return tuple(jnp.asarray(b) for b in (X, labels_of(name), w) if b is not None)


def by_sequences(p: Any, name: str, batch: Any) -> np.ndarray:
    """``Σ_e (Σ_t √w_t g_t)² / Σ w``."""
    x, y, *w = batch
    w = np.asarray(w[0], float) if w else np.ones(x.shape[:2])
    w = np.broadcast_to(w.reshape(*w.shape, *[1] * (2 - w.ndim)), x.shape[:2])
    v, unravel = ravel_pytree(p)
    total = np.zeros(v.size)

    def each(v: Any, e: int) -> Any:
        return jnp.stack(
            [of_term(unravel(v), Term(1, name, x[e, t : t + 1], y[e, t : t + 1], None)) for t in range(TOKENS)]
        )

    for e in range(EXAMPLES):
        total += np.square(np.sqrt(w[e]) @ np.asarray(jax.jacrev(each)(v, e)))
    return total / w.sum()


@pytest.mark.parametrize(("name", "weights"), [(name, weights) for form, name, weights in CASES if form == "whole"])
def test_diagonal(name: str, weights: str) -> None:
    """By tokens it is the operator's; by sequences, of the sum of scores times the roots of the weights."""
    (p, terms, _), batch = case("whole", name, weights), batch_of(name, weights)
    true, empirical = (np.diag(enumerated(p, terms, fisher)) for fisher in ("true", "empirical"))
    of = lambda **options: flat(fo.fisher.diagonal(one_example(name), p, [batch], **options).mean)  # noqa: E731
    assert relative(of(fisher="true"), true) < 1e-10
    for unit in ("token", "position"):
        assert relative(of(unit=unit), empirical) < 1e-10
    assert relative(of(unit="sequence"), by_sequences(p, name, batch)) < 1e-10


@pytest.mark.parametrize("unit", ("token", "position", "sequence"))
@pytest.mark.parametrize("weights", ("fractions", "of examples"))
def test_diagonal_of_drawn_labels(unit: str, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all tokens have one label, and so does the model."""
    name, p = "softmax_cross_entropy", params_of("softmax_cross_entropy")
    q = losses.DISTRIBUTIONS[name]
    ones = lambda key, z, τ: jnp.ones(z.shape[:-1], int)  # noqa: E731
    monkeypatch.setitem(losses.DISTRIBUTIONS, name, q._replace(sample=ones))
    x, y, w = batch_of(name, weights)
    of = lambda **options: flat(  # noqa: E731
        fo.fisher.diagonal(one_example(name), p, [(x, jnp.ones_like(y), w)], unit=unit, **options).mean
    )
    assert relative(of(fisher="mc", n_samples=3, key=jax.random.key(0)), of()) < 1e-10


@pytest.mark.parametrize("fisher", ("true", "empirical"))
def test_an_example_s_factor_is_in_its_fisher(fisher: str) -> None:
    """As class weights are written by hand; its place in the mean is that of its tokens."""
    name, v = "softmax_cross_entropy", np.array([0.5, 2.0, 0.0, 1.0, 3.0])
    p, batch = params_of(name), batch_of(name, "none")
    terms = [Term(c / EXAMPLES, name, batch[0][i], batch[1][i], None) for i, c in enumerate(v)]
    options = {"fisher": fisher, "unit": "token"}
    found = fo.fisher.diagonal(one_example(name, times=True), p, [(*batch, jnp.asarray(v))], **options)
    assert relative(flat(found.mean), np.diag(enumerated(p, terms, fisher))) < 1e-10


@pytest.mark.parametrize("fisher", ("true", "empirical"))
@pytest.mark.parametrize("weights", ("none", "booleans", "fractions", "of examples"))
def test_rows_some_examples_at_a_time(weights: str, fisher: str) -> None:
    name = "softmax_cross_entropy"
    (p, terms, _), batch = case("a_third", name, weights), batch_of(name, weights)
    loss = lambda p, *batch: of_term(p, Term(1, name, *batch[:2], batch[2] if batch[2:] else None)) / 3  # noqa: E731
    wanted = enumerated(p, terms, fisher)
    assert relative(fo.fisher.dense(loss, p, *batch, fisher=fisher, batch_size=2), wanted) < 1e-10


@pytest.mark.parametrize("batch_size", (None, 2))
@pytest.mark.parametrize("fisher", ("true", "empirical"))
@pytest.mark.parametrize("weights", ("booleans", "fractions"))
def test_approximations(weights: str, fisher: str, batch_size: int | None) -> None:
    """The exact blocks, their diagonal, and the factors of K-FAC."""
    name = "softmax_cross_entropy"
    (p, terms, _), batch = case("a_third", name, weights), batch_of(name, weights)
    loss = lambda p, *batch: of_term(p, Term(1, name, *batch)) / 3  # noqa: E731
    wanted, size = enumerated(p, terms, fisher), D * H
    of = lambda method: fo.fisher.approximate(  # noqa: E731
        method, loss, p, *batch, fisher=fisher, batch_size=batch_size
    ).dense()
    blocks = wanted.copy()
    blocks[:size, size:] = blocks[size:, :size] = 0
    assert relative(of("block_diagonal"), blocks) < 1e-10
    assert relative(of("diagonal"), np.diag(np.diag(wanted))) < 1e-10
    x = X[np.broadcast_to(WEIGHTS[weights] != 0, X.shape[:2])]
    A = {"in": x, "out": np.tanh(x @ np.asarray(p["in"]))}
    factors = right_sides(p, terms, fisher)
    kfac = np.zeros_like(wanted)
    kfac[:size, :size] = np.kron(A["in"].T @ A["in"] / len(x), factors["in"])
    kfac[size:, size:] = np.kron(A["out"].T @ A["out"] / len(x), factors["out"])
    assert relative(of("kfac"), kfac) < 1e-10


def test_approximations_of_several_losses() -> None:
    """All at once they are those of the loss as written; some examples at a time, factors are refused."""
    p, terms, loss = case("auxiliary", "softmax_cross_entropy", "fractions")
    wanted = np.diag(np.diag(enumerated(p, terms, "true")))
    assert relative(fo.fisher.approximate("diagonal", loss, p).dense(), wanted) < 1e-10

    def two(p: Any, x: Any, y: Any) -> Any:
        return of_term(p, Term(1, "softmax_cross_entropy", x, y, None)) + fo.losses.gaussian(
            net(p, x), jnp.zeros((*y.shape, 3))
        )

    with pytest.raises(ValueError, match=r"2 times.* with batch_size=None all examples"):
        fo.fisher.approximate("kfac", two, p, X, Y, fisher="empirical", batch_size=2)


def test_factors_that_no_fisher_has_are_refused() -> None:
    p, _, loss = case("whole", "softmax_cross_entropy", "none")
    for bad, message in (
        (lambda p: -loss(p), "softmax_cross_entropy is in loss_fn with the factor -1, and no share in a Fisher is"),
        (lambda p: jnp.exp(loss(p)), r"no sum of multiples of its fo\.losses"),
        (lambda p: loss(p) * jax.jit(loss)(p), r"no sum of multiples of its fo\.losses"),
    ):
        with pytest.raises(ValueError, match=message):
            fo.fisher.operator(bad, p)
        with pytest.raises(ValueError, match=message):
            fo.fisher.diagonal(lambda p, e, bad=bad: bad(p), p, [jnp.ones(3)])
        assert jnp.all(jnp.isfinite(fo.fisher.operator(bad, p, fisher="ggn").dense()))
    negative = lambda p: of_term(p, Term(1, "gaussian", X[0], X[0][:, :2], jnp.array([1.0, -1.0, 2.0])))  # noqa: E731
    with pytest.raises(ValueError, match="weights in the loss are negative"):
        fo.fisher.operator(negative, params_of("gaussian"))
