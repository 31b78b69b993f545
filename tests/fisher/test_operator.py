"""Fisher matrices as operators: each equals its dense construction from enumerated labels or by autodiff."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import fisher_optax as fo
from fisher_optax.fisher.operators import matrix
from tests.reference.curvature import output_fisher, relative

LOSSES = ("softmax_cross_entropy", "sigmoid_cross_entropy", "gaussian")
N, D, H, C = 7, 3, 4, 3


def net(params: Any, x: Any) -> Any:
    return jnp.tanh(x @ params["in"]["kernel"] + params["in"]["bias"]) @ params["out"]


def setting(name: str, weighted: bool = False) -> tuple[Any, Any, tuple[Any, ...]]:
    """A loss, parameters and a batch, in float64."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape))  # noqa: E731
    params = {"in": {"kernel": normal(D, H), "bias": normal(H)}, "out": normal(H, C)}
    y = jnp.asarray(rng.integers(0, C, N)) if name.startswith("soft") else jnp.asarray(rng.uniform(size=(N, C)))
    w = jnp.asarray(rng.integers(0, 3, N), float) if weighted else jnp.ones(N)
    return lambda p, x, y, w: getattr(fo.losses, name)(net(p, x), y, w), params, (normal(N, D), y, w)


def jacobian(params: Any, x: Any) -> np.ndarray:
    flat, unravel = ravel_pytree(params)
    return np.asarray(jax.jacrev(lambda v: net(unravel(v), x))(flat))


def enumerated(name: str, params: Any, x: Any, w: Any) -> np.ndarray:
    """``Σ w_i J_iᵀ F_i J_i / Σ w`` with F_i from all labels."""
    J, F = jacobian(params, x), output_fisher(name, net(params, x))
    return np.einsum("i,iap,iab,ibq->pq", np.asarray(w) / np.sum(w), J, F, J)


def tree_of(v: Any, params: Any) -> Any:
    return ravel_pytree(params)[1](jnp.asarray(v))


def assert_is(F: Any, wanted: Any, params: Any, tolerance: float = 1e-10) -> None:
    """As entries, in products with trees, and by rows where there are some."""
    assert relative(F.dense(), wanted) < tolerance
    v = np.random.default_rng(1).normal(size=len(wanted))
    assert relative(ravel_pytree(jax.jit(lambda F, v: F @ v)(F, tree_of(v, params)))[0], wanted @ v) < tolerance
    if F.has_rows:
        R = np.asarray(F.rows())
        assert relative(R.T @ R, wanted) < tolerance


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("weighted", (False, True))
@pytest.mark.parametrize("name", LOSSES)
def test_true_is_the_sum_over_all_labels(name: str, weighted: bool) -> None:
    loss, params, batch = setting(name, weighted)
    wanted = enumerated(name, params, batch[0], batch[2])
    assert_is(fo.fisher.operator(loss, params, *batch), wanted, params)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", LOSSES)
def test_ggn_of_a_likelihood_is_its_fisher_and_both_scale_with_the_loss(name: str) -> None:
    loss, params, batch = setting(name, weighted=True)
    wanted = enumerated(name, params, batch[0], batch[2])
    assert_is(fo.fisher.operator(loss, params, *batch, fisher="ggn"), wanted, params)
    twice = lambda *args: 2 * loss(*args) + jnp.sum(jnp.square(args[0]["out"]))  # noqa: E731
    assert_is(fo.fisher.operator(twice, params, *batch, fisher="ggn"), 2 * wanted, params)
    assert_is(fo.fisher.operator(twice, params, *batch), 2 * wanted, params)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", LOSSES)
def test_empirical_is_the_mean_of_outer_products_of_each_examples_own_gradient(name: str) -> None:
    loss, params, (x, y, w) = setting(name, weighted=True)
    flat, unravel = ravel_pytree(params)
    each = [jax.grad(lambda v, i=i: loss(unravel(v), x[i : i + 1], y[i : i + 1], jnp.ones(1)))(flat) for i in range(N)]
    wanted = np.einsum("i,ip,iq->pq", np.asarray(w) / np.sum(w), np.array(each), np.array(each))
    assert_is(fo.fisher.operator(loss, params, x, y, w, fisher="empirical"), wanted, params)


@pytest.mark.usefixtures("x64")
def test_hessian_is_the_second_derivative() -> None:
    loss, params, batch = setting("softmax_cross_entropy", weighted=True)
    flat, unravel = ravel_pytree(params)
    wanted = np.asarray(jax.hessian(lambda v: loss(unravel(v), *batch))(flat))
    assert_is(fo.fisher.operator(loss, params, *batch, fisher="hessian"), wanted, params)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("name", "temperature"), list(zip(LOSSES, (2.0, 0.5, 1.0), strict=True)))
def test_sampled_labels_approach_the_sum_over_labels(name: str, temperature: float) -> None:
    """Both at any temperature; with K draws the error is about 1 / sqrt(K)."""
    loss, params, batch = setting(name)
    true = fo.fisher.operator(loss, params, *batch, temperature=temperature).dense()
    draw = lambda K, seed: fo.fisher.operator(  # noqa: E731
        loss, params, *batch, fisher="mc", n_samples=K, temperature=temperature, key=jax.random.key(seed)
    )
    sampled = draw(3, 0)
    assert_is(sampled, np.asarray(sampled.dense()), params)
    assert relative(draw(16_000, 1).dense(), true) < 0.02
    assert relative(draw(1, 2).dense(), true) > 0.1


@pytest.mark.usefixtures("x64")
def test_temperature_weighs_labels_by_the_flattened_model() -> None:
    """Of a softmax: scores at temperature 1, labels at τ."""
    loss, params, batch = setting("softmax_cross_entropy")
    J, z = jacobian(params, batch[0]), np.asarray(net(params, batch[0]))
    p, warm = (np.exp(z / τ) / np.exp(z / τ).sum(-1, keepdims=True) for τ in (1, 3))
    scores = p[:, None] - np.eye(C)
    wanted = np.einsum("iap,iy,iya,iyb,ibq->pq", J, warm, scores, scores, J) / N
    assert_is(fo.fisher.operator(loss, params, *batch, temperature=3.0), wanted, params)


@pytest.mark.usefixtures("x64")
def test_several_losses_add_up_and_calls_and_remat_are_entered() -> None:
    _, params, (x, y, w) = setting("softmax_cross_entropy")

    @jax.checkpoint
    def both(params: Any, x: Any, y: Any) -> Any:
        z = jax.jit(net)(params, x)
        return fo.losses.softmax_cross_entropy(z, y) + fo.losses.gaussian(z, jnp.zeros_like(z))

    wanted = sum(enumerated(name, params, x, w) for name in ("softmax_cross_entropy", "gaussian"))
    assert_is(fo.fisher.operator(both, params, x, y), wanted, params)
    assert_is(fo.fisher.operator(both, params, x, y, fisher="ggn"), wanted, params)


@pytest.mark.usefixtures("x64")
def test_masked_positions_count_for_nothing_whatever_stands_there() -> None:
    loss, params, (x, y, _) = setting("softmax_cross_entropy")
    w = jnp.ones(N).at[2].set(0)
    keep = jnp.arange(N) != 2
    wanted = enumerated("softmax_cross_entropy", params, x[keep], jnp.ones(N - 1))
    for fisher in ("true", "ggn"):
        assert_is(fo.fisher.operator(loss, params, x, y.at[2].set(-1), w, fisher=fisher), wanted, params)
    seen = fo.fisher.operator(loss, params, x, y.at[2].set(-1), w, fisher="empirical").dense()
    assert (
        relative(fo.fisher.operator(loss, params, x[keep], y[keep], w[keep], fisher="empirical").dense(), seen) < 1e-12
    )


@pytest.mark.usefixtures("x64")
def test_a_block_is_cut_from_the_diagonal_with_rows_or_products() -> None:
    loss, params, batch = setting("gaussian")
    F = fo.fisher.operator(loss, params, *batch)
    whole = np.asarray(F.dense())
    inside = F.block("in")
    assert inside.paths == ("in/bias", "in/kernel")
    assert relative(inside.dense(), whole[: H + D * H, : H + D * H]) < 1e-12
    by_products = fo.fisher.operator(loss, params, *batch, fisher="ggn").block(["out"])
    assert relative(by_products.dense(), whole[-H * C :, -H * C :]) < 1e-10
    assert relative(F.block(["in", "out"]).dense(), whole) < 1e-12


def test_an_operator_is_an_argument_not_a_constant() -> None:
    """Of another batch of the same shape nothing is compiled, neither to make it nor to use it."""
    loss, params, batch = setting("softmax_cross_entropy")
    product, before = jax.jit(lambda F, v: F @ v), matrix._weights_and_labels._cache_size()
    for scale in (1.0, 2.0):
        F = fo.fisher.operator(loss, params, scale * batch[0], *batch[1:])
        product(F, params)
    assert product._cache_size() == 1
    assert matrix._weights_and_labels._cache_size() == before + 1


def test_what_is_wrong_is_said() -> None:
    loss, params, (x, y, w) = setting("softmax_cross_entropy")
    F = fo.fisher.operator(loss, params, x, y, w)

    def looped(params: Any, *batch: Any) -> Any:
        return jax.lax.map(lambda xy: loss(params, *xy, jnp.ones(1)), [a[:, None] for a in batch]).mean()

    with pytest.raises(ValueError, match=r"fisher must be one of .*'hessian'; got 'fim'"):
        fo.fisher.operator(loss, params, x, y, w, fisher="fim")
    with pytest.raises(ValueError, match=r"pass key=jax\.random\.key"):
        fo.fisher.operator(loss, params, x, y, w, fisher="mc")
    with pytest.raises(ValueError, match="key is for 'mc' only; this is 'true'"):
        fo.fisher.operator(loss, params, x, y, w, key=jax.random.key(0))
    with pytest.raises(ValueError, match="temperature is of labels from the model"):
        fo.fisher.operator(loss, params, x, y, w, fisher="ggn", temperature=2.0)
    with pytest.raises(ValueError, match="n_samples must be an integer of at least 1"):
        fo.fisher.operator(loss, params, x, y, w, fisher="mc", key=jax.random.key(0), n_samples=0)
    with pytest.raises(ValueError, match="labels are classes 0 to 2; got 3"):
        fo.fisher.operator(loss, params, x, y.at[1].set(3), w)
    with pytest.raises(ValueError, match="every weight in the loss is 0"):
        fo.fisher.operator(loss, params, x, y, 0 * w)
    with pytest.raises(ValueError, match="none was found in loss_fn"):
        fo.fisher.operator(lambda p, x: jnp.sum(net(p, x)), params, x)
    with pytest.raises(ValueError, match="inside a scan"):
        fo.fisher.operator(looped, params, x, y)
    with pytest.raises(ValueError, match="a tree like the parameters is wanted"):
        F @ params["in"]
    with pytest.raises(ValueError, match=r"'out' has shape \(3, 4\); wanted the parameter's, \(4, 3\)"):
        F @ {**params, "out": params["out"].T}
    with pytest.raises(ValueError, match="no leaf below 'head'; there are 'in/bias'"):
        F.block("head")
    with pytest.raises(ValueError, match="ggn is no sum of outer products"):
        fo.fisher.operator(loss, params, x, y, w, fisher="ggn").rows()
    with pytest.raises(ValueError, match="a tree of 28 numbers needs a 28 x 28 matrix"):
        fo.fisher.Operator.from_dense(jnp.eye(3), params)


@pytest.mark.usefixtures("x64")
def test_an_explicit_mesh_gives_the_matrix_of_one_device() -> None:
    """A batch spread over devices: products, entries and rows."""
    loss, params, batch = setting("softmax_cross_entropy")
    wanted = fo.fisher.operator(loss, params, *batch).dense()
    mesh = jax.make_mesh((N,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        params = jax.device_put(params, jax.sharding.PartitionSpec())
        spread = jax.device_put(batch, jax.sharding.PartitionSpec("data"))
        assert_is(fo.fisher.operator(loss, params, *spread), np.asarray(wanted), params)
