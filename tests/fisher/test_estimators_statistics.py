"""Statistics of layers are of the Fisher that is enumerated, whatever the weights and factors of the losses."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

import fisher_optax as fo
from fisher_optax.capture import losses
from tests.fisher.estimator_cases import (
    CASES,
    EXAMPLES,
    MASK,
    TOKENS,
    WEIGHTS,
    H,
    Term,
    X,
    Y,
    case,
    labels_of,
    of_term,
    params_of,
    right_sides,
)
from tests.reference.curvature import relative

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture
def data_labels(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Has models draw the labels of the data: what "mc" makes of them is then what "empirical" has to be."""

    def draw(y: Any) -> None:
        for name, p in losses.DISTRIBUTIONS.items():
            monkeypatch.setitem(losses.DISTRIBUTIONS, name, p._replace(sample=lambda key, z, τ: jnp.asarray(y)))

    return draw


@pytest.mark.parametrize("fisher", ("true", "mc", "empirical"))
@pytest.mark.parametrize(("form", "name", "weights"), CASES)
def test_statistics_of_layers(form: str, name: str, weights: str, fisher: str, data_labels: Any) -> None:
    """Right sides; with labels of the model that happen to be those of the data, too."""
    p, terms, loss = case(form, name, weights)
    several = form in ("micro_batches", "auxiliary")
    if fisher == "true" and several:
        with pytest.raises(ValueError, match=r"loss_fn calls fo.losses 2 times"):
            fo.value_and_grad(loss, fisher="true")(p)
        return
    if fisher == "mc":
        data_labels(labels_of(name))
    if fisher == "mc" and several:  # whose labels are not those of one
        terms, loss = terms[:1], lambda p: terms[0].factor * of_term(p, terms[0])
        data_labels(terms[0].y)
    key = {"fisher_key": jax.random.key(0)} if fisher == "mc" else {}
    stats = jax.jit(lambda p: fo.value_and_grad(loss, fisher=fisher)(p, **key)[2])(p)
    for layer, wanted in right_sides(p, terms, "true" if fisher == "true" else "empirical").items():
        assert relative(stats[layer].right, wanted) < 1e-10


@pytest.mark.parametrize("weights", WEIGHTS)
def test_samples_of_layers(weights: str, data_labels: Any) -> None:
    """Their mean over the positions that count is the Fisher: all of them are asked for."""
    p, terms, loss = case("a_third", "softmax_cross_entropy", weights)
    data_labels(terms[0].y)
    for fisher, key in (("empirical", {}), ("mc", {"fisher_key": jax.random.key(0)})):
        grad_fn = fo.value_and_grad(loss, fo.LayerSamples(EXAMPLES * TOKENS), fisher=fisher)
        for layer, wanted in right_sides(p, terms, "empirical").items():
            x = grad_fn(p, **key)[2][layer]
            assert relative(x.gradients.T @ x.gradients / x.weight, wanted) < 1e-10


def test_weights_that_are_booleans_cost_no_further_pass() -> None:
    """Nor does a factor, a mean of mapped losses, or a normalizer of one's own."""
    p, _, plain = case("whole", "softmax_cross_entropy", "none")
    dots = lambda loss, **options: str(  # noqa: E731
        jax.make_jaxpr(lambda p: fo.value_and_grad(loss, **options)(p))(p)
    ).count("dot_general")
    least = dots(plain)
    floats = lambda p: of_term(p, Term(1, "softmax_cross_entropy", X, Y, jnp.asarray(MASK).astype(float)))  # noqa: E731
    fractions = case("whole", "softmax_cross_entropy", "fractions")[2]
    for form, weights in (("a_third", "none"), ("whole", "booleans"), ("mapped", "none")):
        assert dots(case(form, "softmax_cross_entropy", weights)[2]) == least
    assert dots(floats) == least
    assert dots(fractions, normalizer=15.0) == least
    assert dots(fractions) > least
    assert dots(case("mapped_and_weighed", "softmax_cross_entropy", "none")[2]) > least


@pytest.mark.parametrize("fisher", ("true", "empirical"))
@pytest.mark.parametrize("own", (False, True), ids=("one loss", "a loss each"))
def test_devices_of_a_shard_map_have_the_batch_s_fisher(own: bool, fisher: str) -> None:
    """With weights, and a factor, whether the losses of devices are put together or their statistics."""
    name, w = "softmax_cross_entropy", WEIGHTS["fractions"][:4] + 0.1
    p, batch = params_of(name), (jnp.asarray(X[:4]), jnp.asarray(Y[:4]), jnp.asarray(w))
    third = lambda p, *batch: of_term(p, Term(1, name, *batch)) / 3  # noqa: E731

    def together(p: Any, *batch: Any) -> Any:
        W = jnp.sum(batch[2])
        return jax.lax.psum(W * third(p, *batch), "data") / jax.lax.psum(W, "data")

    def of_device(p: Any, *batch: Any) -> Any:
        if not own:
            return fo.value_and_grad(together, fisher=fisher)(p, *batch)[2]
        p = jax.lax.pcast(p, "data", to="varying")
        return fo.all_reduce_statistics(fo.value_and_grad(third, fisher=fisher)(p, *batch)[2], "data")

    mesh, rows = jax.make_mesh((2,), ("data",), (AxisType.Auto,)), PartitionSpec("data")
    specs = (PartitionSpec(), rows, rows, rows)
    stats = jax.jit(jax.shard_map(of_device, mesh=mesh, in_specs=specs, out_specs=PartitionSpec()))(p, *batch)
    for layer, wanted in right_sides(p, [Term(1 / 3, name, *batch)], fisher).items():
        assert relative(stats[layer].right, wanted) < 1e-10


def test_rows_of_several_losses_are_refused() -> None:
    """One pass a loss would mix them; a normalizer asks for the gradients of the sum."""
    p, _, loss = case("auxiliary", "softmax_cross_entropy", "none")
    kind = fo.KroneckerFactors(max_dim=3, rank=2)
    with pytest.raises(ValueError, match=r"'in' has rows .* 2 losses of fo\.losses, .* With normalizer="):
        fo.value_and_grad(loss, kind)(p)
    assert fo.value_and_grad(loss, kind, normalizer=15.0)(p)[2]["in"].right.rows.shape == (2 * 2, H)
