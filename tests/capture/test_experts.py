"""Ragged products: each expert's statistics are those of its rows alone, as if it were a layer of its own."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import fisher_optax as fo
from fisher_optax.capture.kinds.squares import PositionSquares
from tests.capture.capture_models import assert_near, captured, unseen, watched
from tests.capture.expert_models import (
    ENDS,
    PARAMS,
    ROWS,
    SIZES,
    WRITTEN,
    E,
    M,
    X,
    assert_experts,
    by_expert,
    drawn,
    experts,
    general,
    loss,
    masked,
    routed,
    stored,
)
from tests.reference.curvature import factors

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize("name", WRITTEN)
def test_each_expert_has_the_factors_of_its_rows(name: str) -> None:
    """However the product is written; an expert without rows has zeros, and rows of nobody count nowhere."""
    product, order = WRITTEN[name]
    params = {key: jnp.asarray(stored(W, order)) for key, W in PARAMS.items()}
    stats, inputs = (
        captured(functools.partial(loss, product), params, X, SIZES, kind=kind) for kind in (None, fo.InputGram())
    )
    a, delta = watched(functools.partial(loss, experts), PARAMS, X, SIZES)
    for key, W in PARAMS.items():
        left, right = (np.asarray(side).reshape(E, *side.shape[-2:]) for side in (stats[key].left, stats[key].right))
        assert_experts(fo.statistics.LayerFactors(left, right, None, 0), by_expert(a[key], delta[key], ROWS))
        assert_near(inputs[key].left, stats[key].left)
        assert inputs[key].weight.tolist() == stats[key].weight.tolist()
        assert np.asarray(stats[key].weight).ravel().tolist() == SIZES.tolist()
        assert stats[key].divisor == ROWS
        axes = stats[key].axes
        assert np.transpose(params[key], axes.batch + axes.inputs + axes.outputs).shape[-2:] == W.shape[-2:]


def test_default_normaliser_is_the_rows_of_all_experts() -> None:
    square = lambda params, x, sizes, see: jnp.sum(see("w", x, experts(x, params, sizes)) ** 2) / SIZES.sum()  # noqa: E731
    a, delta = watched(square, PARAMS["up"], X, SIZES)
    stats = captured(square, PARAMS["up"], X, SIZES)
    assert_experts(stats, by_expert(a["w"], delta["w"], SIZES.sum()))
    assert stats.divisor == SIZES.sum()
    assert_experts(captured(square, PARAMS["up"], X, SIZES, normalizer=7), by_expert(a["w"], delta["w"], 7))


def test_layers_of_experts_in_a_loop_and_in_an_ensemble() -> None:
    """A scanned stack of experts; one model's sizes of another's under `jax.vmap`."""
    stack = {"w": drawn(3, E, M, M), "sizes": np.stack([SIZES, SIZES[::-1], SIZES])}

    def scanned(W: Any, x: Any, see: Any) -> Any:
        del see
        step = lambda x, layer: (jnp.tanh(experts(x, *layer)), ())  # noqa: E731
        return jnp.mean(jax.lax.scan(step, x, (W, jnp.asarray(stack["sizes"])))[0] ** 2)

    def unrolled(W: Any, x: Any, see: Any) -> Any:
        for i, sizes in enumerate(stack["sizes"]):
            x = jnp.tanh(see(str(i), x, experts(x, W[i], jnp.asarray(sizes))))
        return jnp.mean(x**2)

    found = captured(scanned, jnp.asarray(stack["w"]), X, normalizer=ROWS)
    each = captured(unrolled, jnp.asarray(stack["w"]), X, normalizer=ROWS)
    assert found.weight.tolist() == stack["sizes"].tolist()
    mapped = lambda W, x, see: jnp.sum(jax.vmap(experts)(jnp.stack([x] * 3), W, jnp.asarray(stack["sizes"])) ** 2)  # noqa: E731
    apart = lambda W, x, see: sum(jnp.sum(experts(x, w, s) ** 2) for w, s in zip(W, stack["sizes"], strict=True))  # noqa: E731
    pairs = [(found, each)]
    pairs += [(captured(mapped, jnp.asarray(stack["w"]), X), captured(apart, jnp.asarray(stack["w"]), X))]
    for x, y in pairs:
        assert_near(x.left, y.left)
        assert_near(x.right, y.right)
        assert x.weight.tolist() == y.weight.tolist() == stack["sizes"].tolist()


def test_positions_beside_the_ragged_axis() -> None:
    """Rows may be whole sequences, along whichever axis they are sorted."""
    x = drawn(2, ROWS, M)
    along = lambda W, x, see: jnp.mean(general(x, W, SIZES, dot=((2,), (1,)), ragged=1) ** 2)  # noqa: E731
    flat = lambda W, x, see: jnp.mean(experts(x, W, 2 * SIZES) ** 2)  # noqa: E731
    found = captured(along, jnp.asarray(PARAMS["up"]), x)
    wanted = captured(flat, jnp.asarray(PARAMS["up"]), x.swapaxes(0, 1).reshape(-1, M))
    assert_near(found.left, wanted.left)
    assert_near(found.right, wanted.right)
    assert found.weight.tolist() == wanted.weight.tolist() == (2 * SIZES).tolist()


@pytest.mark.parametrize("fisher", ["empirical", "true"])
def test_a_mixture_of_experts_is_its_experts_on_their_tokens(fisher: str) -> None:
    params = {"router": drawn(M, E), **PARAMS}
    tokens = jnp.asarray(drawn(9, M))
    stats = captured(routed, jax.tree.map(jnp.asarray, params), tokens, fisher=fisher)
    a, delta = watched(masked, params, tokens)
    for e in range(E):
        sent = np.asarray(a[f"sent{e}"]) > 0
        for key in PARAMS:
            left, right = factors(a[f"{key}{e}"][sent], delta[f"{key}{e}"][sent], 9)
            assert_near(stats[key].left[e], left)
            if fisher == "empirical":
                assert_near(stats[key].right[e], right)
        assert stats["up"].weight[e] == sent.sum()
    if fisher == "true":
        plain = {"router": jnp.asarray(params["router"])} | {
            f"{key}{e}": jnp.asarray(W[e]) for key, W in PARAMS.items() for e in range(E)
        }
        joined = lambda p: {"router": p["router"]} | {key: [p[f"{key}{e}"] for e in range(E)] for key in PARAMS}  # noqa: E731
        dense = captured(lambda p, x, see: masked(joined(p), x, see), plain, tokens, fisher=fisher)
        for key in PARAMS:
            for e in range(E):
                assert_near(stats[key].right[e], dense[f"{key}{e}"].right)


def test_devices_and_micro_batches_add_up_by_expert() -> None:
    """Each device, or batch, sorts its own tokens; experts get unlike shares of them."""
    params = jax.tree.map(jnp.asarray, {"router": drawn(M, E), **PARAMS})
    tokens = jnp.asarray(drawn(8, M))
    whole = captured(routed, params, tokens)
    first, second = (captured(routed, params, part) for part in (tokens[:2], tokens[2:]))
    assert 0 in first["up"].weight
    assert 0 not in whole["up"].weight
    total = fo.accumulate_statistics(first, second)
    mesh = jax.make_mesh((2,), ("d",), (AxisType.Auto,), devices=jax.devices()[:2])
    mean = lambda p, x: jax.lax.pmean(routed(p, x, unseen), "d")  # noqa: E731
    per_device = lambda p, x: fo.value_and_grad(mean)(p, x)[2]  # noqa: E731
    split = jax.jit(jax.shard_map(per_device, mesh=mesh, in_specs=(P(), P("d")), out_specs=P()))(params, tokens)
    own = lambda p, x: fo.all_reduce_statistics(fo.value_and_grad(lambda p, x: routed(p, x, unseen))(p, x)[2], "d")  # noqa: E731
    mapped = jax.shard_map(own, mesh=mesh, in_specs=(P(), P("d")), out_specs=P(), check_vma=False)
    reduced = jax.jit(mapped)(params, tokens)
    for key in PARAMS:
        for found in (total[key], split[key], reduced[key]):
            assert_near(found.left, whole[key].left)
            assert_near(found.right, whole[key].right)
            assert found.weight.tolist() == whole[key].weight.tolist()


def test_squares_are_those_of_each_experts_rows() -> None:
    """In each expert's own bases (EKFAC), and in none: the Fisher's diagonal by positions."""
    turned = {key: [np.linalg.qr(drawn(E, d, d))[0] for d in W.shape[1:]] for key, W in PARAMS.items()}
    Basis = type("Basis", (tuple,), {"_fields": ("left", "right")})
    bases = {key: Basis(map(jnp.asarray, pair)) for key, pair in turned.items()}
    params = jax.tree.map(jnp.asarray, PARAMS)
    plain = lambda p, x: loss(experts, p, x, SIZES, unseen)  # noqa: E731
    stats = fo.value_and_grad(plain, fo.KroneckerFactors(squares=True))(params, jnp.asarray(X), bases=bases)[2]
    summed = fo.value_and_grad(plain, PositionSquares(), normalizer=1.0)(params, jnp.asarray(X))[2]
    a, delta = watched(functools.partial(loss, experts), PARAMS, X, SIZES)
    for key in PARAMS:
        for e, end in enumerate(ENDS):
            rows = slice(end - SIZES[e], end)
            A, D = np.asarray(a[key][rows]), np.asarray(delta[key][rows])
            if SIZES[e]:
                Q_A, Q_B = (Q[e] for Q in turned[key])
                assert_near(stats[key].squares[e], ROWS * ((A @ Q_A) ** 2).T @ (D @ Q_B) ** 2)
                assert_near(summed[key].squares[e], (A**2).T @ D**2)


def test_some_rows_stand_for_all() -> None:
    """``max_examples`` looks at rows spread over all experts; of all rows it is exact."""
    kind = lambda most: fo.KroneckerFactors(max_examples=most)  # noqa: E731
    program = functools.partial(loss, experts)
    params = jax.tree.map(jnp.asarray, PARAMS)
    full = captured(program, params, X, SIZES)["up"]
    assert_near(captured(program, params, X, SIZES, kind=kind(ROWS))["up"].left, full.left)
    repeated = np.repeat(X, 50, 0)
    some = captured(program, params, repeated, 50 * SIZES, kind=kind(120))["up"]
    assert_near(some.left, full.left, 0.2)
    np.testing.assert_allclose(some.weight, 50 * SIZES, atol=10)
