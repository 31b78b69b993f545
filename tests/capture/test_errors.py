"""What capture refuses, and that each message says what came, what was wanted and what to do."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fisher_optax import capture
from fisher_optax.preconditioner.contracts import Eigenbasis

DIMENSIONS = ("NHC", "HIO", "NHC")
W, X, Y = jnp.ones((3, 2)), jnp.ones((4, 3)), jnp.zeros((4, 2))


def mean(W: Any, x: Any) -> Any:
    return jnp.mean(x @ W)


def squared(W: Any, x: Any, y: Any) -> Any:
    return capture.losses.gaussian(x @ W, y)


CONSTRUCTION: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "statistics": (dict(statistics="kfac"), TypeError, "statistics must be fo.KroneckerFactors.*got 'kfac'"),
    "fisher": (dict(fisher="exact"), ValueError, "fisher must be one of 'empirical', 'mc', 'true'; got 'exact'"),
    "n_samples": (dict(n_samples=0), ValueError, "n_samples must be an integer of at least 1; got 0"),
    "batch_axis": (dict(batch_axis=-1), ValueError, "batch_axis must be an integer of at least 0; got -1"),
}


@pytest.mark.parametrize("name", CONSTRUCTION)
def test_unknown_words_and_numbers_at_construction(name: str) -> None:
    options, error, message = CONSTRUCTION[name]
    with pytest.raises(error, match=message):
        capture.value_and_grad(mean, **options)


KINDS: dict[str, tuple[Any, str]] = {
    "mode": (lambda: capture.KroneckerFactors(mode="sum"), "mode must be 'expand' or 'reduce'; got 'sum'"),
    "max_examples": (lambda: capture.KroneckerFactors(max_examples=0), "max_examples must be .* got 0"),
    "max_dim": (lambda: capture.InputGram(max_dim=0), "max_dim must be an integer of at least 1; got 0"),
    "rank": (lambda: capture.KroneckerFactors(rank=True), "rank must be .* got True"),
    "size": (lambda: capture.LayerSamples(-1), "LayerSamples: size must be .* got -1"),
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_statistics_check_their_options(name: str) -> None:
    make, message = KINDS[name]
    with pytest.raises(ValueError, match=message):
        make()


LOSSES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "a vector": (lambda W, x: (x @ W).sum(1), {}, r"must return a scalar; it returned shape \(4,\)"),
    "a pair": (lambda W, x: (mean(W, x), x), {}, "must return a scalar; it returned tuple"),
    "no pair": (mean, {"has_aux": True}, "must return a pair of loss and aux; it returned"),
    "a vector and aux": (lambda W, x: (x @ W, x), {"has_aux": True}, r"a scalar, then aux; it returned shape \(4, 2\)"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_loss_that_is_no_scalar(name: str) -> None:
    loss, options, message = LOSSES[name]
    with pytest.raises(TypeError, match=message):
        capture.value_and_grad(loss, **options)(W, X)


def test_integer_parameters_are_named() -> None:
    with pytest.raises(TypeError, match="floating-point parameters; 'step' is int32"):
        capture.value_and_grad(lambda p, x: mean(p["W"], x))({"W": W, "step": jnp.int32(3)}, X)


def test_a_convolution_of_complex_numbers_is_left_out() -> None:
    """Its inputs' second moment is no real matrix, though its weights are real."""

    def loss(p: Any, x: Any) -> Any:
        z = jax.lax.conv_general_dilated(
            x[:, :, None] * 1j, p["K"].astype(complex), (1,), "SAME", dimension_numbers=DIMENSIONS
        )
        return jnp.abs(z).sum() + mean(p["W"], x)

    rows = {row.path: row for row in capture.capture_report(loss, {"K": jnp.ones((2, 1, 3)), "W": W}, X).rows}
    assert (rows["K"].reason, rows["K"].statistics) == ("a convolution of complex numbers", ())
    assert rows["W"].statistics


def test_model_without_a_layer() -> None:
    """The first matrix is named with what is done with it; without one, that is said."""
    with pytest.raises(ValueError, match=r"no layer .* captured: 'W' \(mul\): no product with it was found.*fo.report"):
        capture.value_and_grad(lambda p: jnp.sum(p["W"] * 2.0))({"W": W})
    with pytest.raises(ValueError, match="captured: it has no matrices"):
        capture.value_and_grad(lambda p: jnp.sum(p["b"] ** 2))({"b": jnp.ones(3)})


def test_strict_names_every_parameter_that_is_not_captured() -> None:
    """Vectors are no layers; a matrix in a while loop, and one that is only scaled by, are."""

    def loss(p: Any, x: Any) -> Any:
        y = jax.lax.fori_loop(0, 1, lambda _, y: y, x @ p["W"]) * p["b"]
        return jnp.mean(y * p["mask"])

    params = {"W": W, "b": jnp.ones(2), "mask": jnp.ones((4, 2))}
    with pytest.raises(ValueError, match=r"strict=True.*'mask' \(mul\): no product with it was found\.$"):
        capture.value_and_grad(loss, strict=True)(params, X)
    assert capture.value_and_grad(loss)(params, X)[2]["mask"] is None


def test_while_loop_over_a_parameter_is_named() -> None:
    loss = lambda W, x: jnp.mean(jax.lax.while_loop(lambda y: jnp.sum(y) < 1, lambda y: y + x @ W, Y))  # noqa: E731
    with pytest.raises(ValueError, match=r"\(a while loop\): no product"):
        capture.value_and_grad(loss)(W, X)


def test_keys_belong_to_drawn_labels() -> None:
    with pytest.raises(ValueError, match=r"fisher='mc' draws labels: pass grad_fn\(..., fisher_key="):
        capture.value_and_grad(squared, fisher="mc")(W, X, Y)
    for fisher in ("empirical", "true"):
        with pytest.raises(ValueError, match=rf"fisher_key is for fisher='mc' only; this is '{fisher}'"):
            capture.value_and_grad(squared, fisher=fisher)(W, X, Y, fisher_key=jax.random.key(0))


@pytest.mark.parametrize("fisher", ["mc", "true"])
def test_model_s_distribution_must_be_known(fisher: str) -> None:
    key = {"fisher_key": jax.random.key(0)} if fisher == "mc" else {}
    with pytest.raises(ValueError, match=rf"fisher='{fisher}' needs the model's distribution.*none was found"):
        capture.value_and_grad(mean, fisher=fisher)(W, X, **key)


def in_a_loop(W: Any, x: Any, y: Any) -> Any:
    """The mean over micro-batches."""
    return jnp.mean(jax.lax.scan(lambda _, xy: (None, squared(W, *xy)), None, (x[:, None], y[:, None]))[1])


def test_loss_inside_a_loop_cannot_be_counted() -> None:
    """Labels cannot be drawn there; the data's can, if the normaliser is given: then all steps are one batch."""
    with pytest.raises(ValueError, match=r"stands inside a scan, .*fisher='mc' needs it"):
        capture.value_and_grad(in_a_loop, fisher="mc")(W, X, Y, fisher_key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"stands inside a scan, .*or pass normalizer="):
        capture.value_and_grad(in_a_loop)(W, X, Y)
    x, y = jax.random.normal(jax.random.key(0), (4, 3)), jax.random.normal(jax.random.key(1), (4, 2))
    looped = capture.value_and_grad(in_a_loop, normalizer=4)(W, x, y)[2]
    at_once = capture.value_and_grad(squared)(W, x, y)[2]
    np.testing.assert_allclose(looped.left, at_once.left, rtol=1e-5)
    np.testing.assert_allclose(looped.right, at_once.right, rtol=1e-5)


def test_sums_over_passes_need_sums() -> None:
    """Neither samples nor rows can be summed over the passes of fisher="true"; drawn labels give both."""
    with pytest.raises(ValueError, match="samples do not add up; use 'mc'"):
        capture.value_and_grad(squared, capture.LayerSamples(), fisher="true")(W, X, Y)
    with pytest.raises(ValueError, match=r"rows \(max_dim=1\) do not add up; use 'mc'"):
        capture.value_and_grad(squared, capture.KroneckerFactors(max_dim=1), fisher="true")(W, X, Y)


def test_samples_of_two_losses_have_no_scale() -> None:
    two = lambda W, x, y: squared(W, x, y) + squared(W, x, y)  # noqa: E731
    with pytest.raises(ValueError, match=r"need all of the loss to be one call of fo.losses"):
        capture.value_and_grad(two, capture.LayerSamples(), fisher="mc")(W, X, Y, fisher_key=jax.random.key(0))


UNAVAILABLE: dict[str, tuple[Any, tuple[int, ...], Any, Any, str]] = {
    "embedding samples": (
        capture.LayerSamples(),
        (3, 2),
        lambda W, t: jnp.sum(W[t]),
        jnp.array([0, 1]),
        "it has counts",
    ),
    "looped rows": (
        capture.KroneckerFactors(max_dim=2),
        (3, 2),
        lambda W, x: jnp.mean(jax.lax.scan(lambda h, x: (h + x @ W, None), jnp.zeros(2), x)[0]),
        X,
        "used in a loop and longer than max_dim=2",
    ),
    "uneven stack of rows": (
        capture.KroneckerFactors(max_dim=1),
        (2, 3, 2),
        lambda W, x: jnp.mean(x @ W[0]) + jnp.mean(x[:2] @ W[1]),
        X,
        "different numbers of positions, longer than max_dim=1",
    ),
    "uneven stack of samples": (
        capture.LayerSamples(),
        (2, 3, 2),
        lambda W, x: jnp.mean(x @ W[0]) + jnp.mean(x[:2] @ W[1]),
        X,
        "different numbers of examples: samples do not stack",
    ),
    "windows that differ": (
        capture.LayerSamples(),
        (3, 2),
        lambda W, x: sum(
            jnp.mean(jax.lax.conv_general_dilated(x, W[None], (s,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")))
            for s in (1, 2)
        ),
        jnp.ones((2, 4, 3)),
        "convolutions of different geometry",
    ),
    "channels before the window": (
        capture.LayerSamples(),
        (2, 3, 2),
        lambda W, x: jnp.mean(
            jax.lax.conv_general_dilated(x, W, (1,), "VALID", dimension_numbers=("NCW", "OIW", "NCW"))
        ),
        jnp.ones((2, 3, 4)),
        "channels come before its window",
    ),
}


@pytest.mark.parametrize("name", UNAVAILABLE)
def test_statistics_that_a_layer_cannot_have(name: str) -> None:
    kind, shape, loss, x, message = UNAVAILABLE[name]
    with pytest.raises(ValueError, match=rf"no layer of this model can be captured.*{message}"):
        capture.value_and_grad(loss, kind)(jnp.ones(shape), x)


def test_squares_need_bases_that_fit() -> None:
    """None at all, and one of another size."""
    grad_fn = capture.value_and_grad(mean, capture.KroneckerFactors(squares=True))
    with pytest.raises(ValueError, match=r"squares=True\) needs bases: grad_fn\(..., bases="):
        grad_fn(W, X)
    with pytest.raises(ValueError, match=r"bases of '': left has shape \(4, 4\); wanted \(3, 3\)"):
        grad_fn(W, X, bases=Eigenbasis(jnp.eye(4), jnp.eye(2)))


def test_layer_without_a_basis_has_squares_in_its_own_axes() -> None:
    """What the optimizer leaves alone has no basis: its squares are of the gradient's entries as they are."""
    grad_fn = capture.value_and_grad(lambda p, x: mean(p["W"], x), capture.KroneckerFactors(squares=True))
    stats = grad_fn({"W": W}, X, bases={"W": None})[2]["W"]
    np.testing.assert_allclose(stats.squares, np.full((3, 2), 1 / 4), rtol=1e-6)


def test_nan_activations_reach_the_statistics_and_nothing_crashes() -> None:
    """A guard can then see them; the structure is as ever."""
    value, grads, stats = jax.jit(capture.value_and_grad(mean))(W, X.at[1, 2].set(jnp.nan))
    assert all(bool(jnp.isnan(x).any()) for x in (value, grads, stats.left))
    assert stats.left.shape == (3, 3)
    bad = capture.value_and_grad(lambda W, x: jnp.mean(jnp.log(x @ W)))(W, -X)
    assert bool(jnp.isnan(bad[0]))
