"""Divided leaves: every method does with the parts of a leaf what it does with leaves that are these parts."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisher_optax as fo
from fisher_optax.matrices.blocks import divide, from_matrices, matrix_shapes, to_matrices, unite
from fisher_optax.statistics import Samples
from tests.grouped import grouped

D, SIZES = 6, (6, 3, 3)  # queries, keys and values of two groups
QKV = fo.MatrixAxes(0, 1, parts={1: SIZES})
CUTS = np.cumsum(SIZES)[:-1].tolist()
STEPS = 4


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def apart(kernel: jax.Array) -> dict[str, jax.Array]:
    return dict(zip("qkv", jnp.split(kernel, CUTS, axis=1), strict=True))


METHODS: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "muon": lambda axes: fo.muon(0.1, scale="shape", axes=axes),
    "normuon": lambda axes: optax.chain(
        fo.scale_by_muon(axes=axes), fo.scale_by_normuon(axes=axes), optax.scale_by_learning_rate(0.1)
    ),
    "soap": lambda axes: fo.soap(0.1, precondition_frequency=2, axes=axes),
    "soap-blocks": lambda axes: fo.soap(0.1, precondition_frequency=2, **grouped(block_size=4), axes=axes),
    "shampoo": lambda axes: fo.shampoo(0.1, precondition_frequency=2, axes=axes),
    "dykaf": lambda axes: fo.dykaf(0.1, precondition_frequency=2, init="identity", axes=axes),
    "kl_soap": lambda axes: fo.kl_soap(0.1, precondition_frequency=2, axes=axes),
    "graft": lambda axes: optax.chain(
        fo.graft(fo.scale_by_muon(axes=axes), optax.scale_by_adam(), axes=axes), optax.scale_by_learning_rate(0.1)
    ),
}


def trajectory(tx: optax.GradientTransformation, params: Any, gradients: list[Any]) -> Any:
    state, update = tx.init(params), jax.jit(tx.update)
    for g in gradients:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("name", METHODS)
def test_parts_are_treated_as_leaves_of_their_own(name: str) -> None:
    params, grads = normal(0, D, 12), [normal(i, D, 12) for i in range(1, STEPS + 1)]
    whole = trajectory(METHODS[name]({"qkv": QKV}), {"qkv": params}, [{"qkv": g} for g in grads])
    axes = dict.fromkeys("qkv", fo.MatrixAxes(0, 1))
    parts = trajectory(METHODS[name](axes), apart(params), list(map(apart, grads)))
    undivided = trajectory(METHODS[name]({"qkv": QKV.whole}), {"qkv": params}, [{"qkv": g} for g in grads])
    np.testing.assert_allclose(whole["qkv"], jnp.concatenate([parts[k] for k in "qkv"], 1), rtol=2e-5, atol=2e-5)
    assert np.max(np.abs(whole["qkv"] - undivided["qkv"])) > 1e-2


def fused(params: Any, x: jax.Array) -> jax.Array:
    z = x @ params["qkv"]["kernel"] + params["qkv"]["bias"]
    return fo.losses.gaussian(jnp.tanh(z) @ params["out"]["kernel"], jnp.ones((len(x), 2)))


def separate(params: Any, x: jax.Array) -> jax.Array:
    z = jnp.concatenate([x @ params[k]["kernel"] + params[k]["bias"] for k in "qkv"], -1)
    return fo.losses.gaussian(jnp.tanh(z) @ params["out"]["kernel"], jnp.ones((len(x), 2)))


def separated(params: Any) -> Any:
    qkv, out = params["qkv"], params["out"]
    kernels, biases = apart(qkv["kernel"]), apart(qkv["bias"][None])
    return {"out": out, **{k: {"kernel": kernels[k], "bias": biases[k][0]} for k in "qkv"}}


@pytest.mark.parametrize(
    "make",
    [
        lambda axes: fo.kfac(
            0.05, damping=0.1, precondition_frequency=1, **grouped(decomposition="inverse"), axes=axes
        ),
        lambda axes: fo.kfac(0.05, damping=0.1, precondition_frequency=1, axes=axes),
        lambda axes: fo.kfac(0.05, damping=0.1, precondition_frequency=1, grafting="adam", axes=axes),
        lambda axes: fo.kfac_soap(0.05, precondition_frequency=2, axes=axes),
    ],
    ids=["kfac", "inverse", "grafted", "kfac_soap"],
)
def test_statistics_of_a_layer_are_those_of_its_parts(make: Callable[[Any], Any]) -> None:
    """K-FAC on one product with three parts is K-FAC on three products, biases included."""
    params = {"qkv": {"kernel": 0.5 * normal(0, 4, 12), "bias": normal(1, 12)}, "out": {"kernel": normal(2, 12, 2)}}
    x = normal(3, 32, 4)

    def trained(loss: Any, params: Any, axes: Any) -> Any:
        tx = make(axes)
        grad, state = jax.jit(fo.value_and_grad(loss, fo.KroneckerFactors())), tx.init(params)
        update = jax.jit(tx.update)
        for _ in range(STEPS):
            _, grads, statistics = grad(params, x)
            updates, state = update(grads, state, params, statistics=statistics)
            params = optax.apply_updates(params, updates)
        return params

    dense, none = fo.MatrixAxes(0, 1), None
    divided = {"qkv": {"kernel": QKV, "bias": none}, "out": {"kernel": dense}}
    three = {"out": {"kernel": dense}, **{k: {"kernel": dense, "bias": none} for k in "qkv"}}
    one, other = separated(trained(fused, params, divided)), trained(separate, separated(params), three)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), one, other)


BOTH = fo.MatrixAxes(0, 1, parts={0: (2, 2, 2), 1: SIZES})
ROWS = (slice(0, 2), slice(2, 4), slice(4, 6))


@pytest.mark.parametrize("divided", [QKV, BOTH], ids=["outputs", "both"])
def test_ekfac_on_parts_is_ekfac_on_leaves_of_their_own(divided: fo.MatrixAxes) -> None:
    """Squares are taken in the bases of the parts, which stand on the diagonal of the layer's."""
    params = {"qkv": {"kernel": 0.5 * normal(0, D, 12), "bias": normal(1, 12)}}
    x, y = normal(3, 64, D), normal(4, 64, 12)
    rows = ROWS if divided is BOTH else (slice(0, D),)

    def split(tree: Any) -> Any:
        kernels = {f"{k}{i}": part[r] for k, part in apart(tree["kernel"]).items() for i, r in enumerate(rows)}
        last, biases = len(rows) - 1, apart(tree["bias"][None])
        return {
            name: {"kernel": W} | ({"bias": biases[name[0]][0]} if name.endswith(str(last)) else {})
            for name, W in kernels.items()
        }

    def separate(params: Any, x: jax.Array) -> jax.Array:
        def product(name: str, r: slice) -> jax.Array:
            leaf = params[name]
            z = x[:, r] @ leaf["kernel"]
            return z + leaf["bias"] if "bias" in leaf else z

        z = [functools.reduce(jnp.add, [product(f"{k}{i}", r) for i, r in enumerate(rows)]) for k in "qkv"]
        return fo.losses.gaussian(jnp.concatenate(z, -1), y)

    def whole(params: Any, x: jax.Array) -> jax.Array:
        return fo.losses.gaussian(x @ params["qkv"]["kernel"] + params["qkv"]["bias"], y)

    def trained(loss: Any, params: Any, axes: Any) -> Any:
        tx = fo.ekfac(0.05, damping=0.1, precondition_frequency=2, axes=axes)
        grad, state = jax.jit(fo.value_and_grad(loss, fo.KroneckerFactors(squares=True))), tx.init(params)
        update = jax.jit(tx.update)
        for _ in range(STEPS):
            _, grads, statistics = grad(params, x, bases=fo.eigenbases(state, params, axes))
            updates, state = update(grads, state, params, statistics=statistics)
            params = optax.apply_updates(params, updates)
        return params

    start = split(params["qkv"])
    axes = {
        name: {"kernel": fo.MatrixAxes(0, 1)} | ({"bias": None} if "bias" in leaf else {})
        for name, leaf in start.items()
    }
    one = split(trained(whole, params, {"qkv": {"kernel": divided, "bias": None}})["qkv"])
    other = trained(separate, start, axes)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), one, other)


@pytest.mark.parametrize("make", [fo.frog, fo.kfrog], ids=["frog", "kfrog"])
@pytest.mark.parametrize("divided", [QKV, BOTH], ids=["outputs", "both"])
def test_frog_on_parts_is_frog_on_leaves_of_their_own(make: Callable[..., Any], divided: fo.MatrixAxes) -> None:
    """From the samples of the layer: some of its inputs, and of the gradients at its outputs."""
    r = 8
    samples = Samples(normal(1, r, D), normal(2, r, 12), jnp.asarray(1.0), axes=fo.MatrixAxes(0, 1))
    kernel, grads = normal(3, D, 12), normal(4, D, 12)
    tx, alone = make(0.1, axes={"w": divided}), make(0.1, axes={"w": fo.MatrixAxes(0, 1)})
    update, _ = jax.jit(tx.update)({"w": grads}, tx.init({"w": kernel}), {"w": kernel}, statistics={"w": samples})
    of_part = jax.jit(alone.update)
    rows = ROWS if divided is BOTH else (slice(0, D),)
    starts = np.cumsum((0, *SIZES))
    for a, b in itertools.pairwise(starts):
        for span in rows:
            own = Samples(samples.inputs[:, span], samples.gradients[:, a:b], samples.weight, axes=fo.MatrixAxes(0, 1))
            W, G = kernel[span, a:b], grads[span, a:b]
            step, _ = of_part({"w": G}, alone.init({"w": W}), {"w": W}, statistics={"w": own})
            np.testing.assert_allclose(update["w"][span, a:b], step["w"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("axes", "shape", "matrices"),
    [
        (fo.MatrixAxes(0, 1, parts={1: 3}), (6, 12), [(3, 6, 4)]),
        (fo.MatrixAxes(0, 1, parts={-1: (6, 3, 3), 0: (4, 2)}), (6, 12), [(1, 4, 6), (2, 4, 3), (1, 2, 6), (2, 2, 3)]),
        (fo.MatrixAxes((1,), (2, 3), 0, parts={2: (2, 1, 1)}), (2, 6, 4, 3), [(2, 6, 6), (4, 6, 3)]),
        (fo.MatrixAxes(1, 0, parts={1: (5, 7)}), (6, 12), [(1, 5, 6), (1, 7, 6)]),
        (fo.MatrixAxes(0, 1, parts={1: (12,)}), (6, 12), [(1, 6, 12)]),
    ],
    ids=["heads", "both", "inner", "out_in", "one"],
)
def test_a_leaf_is_its_parts(axes: fo.MatrixAxes, shape: tuple[int, ...], matrices: list[tuple[int, ...]]) -> None:
    axes, x = axes.resolve("w", shape), jnp.arange(np.prod(shape)).reshape(shape)
    assert matrix_shapes(shape, axes) == matrices
    np.testing.assert_array_equal(unite(divide(x, axes), shape, axes), x)
    for block_size in (None, 2):
        pieces = to_matrices(x, axes, block_size)
        assert [piece.shape for piece in pieces] == matrix_shapes(shape, axes, block_size)
        np.testing.assert_array_equal(from_matrices(pieces, shape, axes, block_size), x)


@pytest.mark.parametrize(
    ("parts", "error", "says"),
    [
        ({1: 5}, ValueError, "axis 1, whose length is 12: parts=5 do not make that up"),
        ({1: (5, 6)}, ValueError, "do not make that up"),
        ({1: (12, 0)}, ValueError, "do not make that up"),
        ({1: ()}, ValueError, "do not make that up"),
        ({2: 2}, ValueError, "divides axis 2, which is neither among inputs nor outputs"),
        (3, TypeError, "wanted numbers or sizes of parts by axis, as {1: 3}"),
        ({1: 1.5}, TypeError, "wanted numbers"),
    ],
    ids=str,
)
def test_parts_that_do_not_fit_are_refused(parts: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error) as found:
        fo.muon(0.1, axes={"w": fo.MatrixAxes(0, 1, parts=parts)}).init({"w": jnp.ones((6, 12))})
    assert says in str(found.value)


def test_what_takes_whole_layers_says_so() -> None:
    params = {"head": {"kernel": jnp.ones((4, 6))}}
    axes = {"head": {"kernel": fo.MatrixAxes(0, 1, parts={1: 2})}}
    with pytest.raises(ValueError, match=r"parts=.*a softmax's Fisher is of whole heads: leave parts= out"):
        fo.kfac(0.1, head="true", axes=axes).init(params)
    inner = {"head": {"kernel": fo.MatrixAxes(0, (1, 2), parts={2: 2})}}
    with pytest.raises(ValueError, match="parts have to follow one another along the side"):
        fo.kfac(0.1, axes=inner).init({"head": {"kernel": jnp.ones((4, 3, 2))}})


def test_bases_of_parts_without_a_whole_one_are_refused() -> None:
    params, axes = {"qkv": jnp.ones((4, 12))}, {"qkv": fo.MatrixAxes(0, 1, parts={1: (8, 4)})}
    for make in (fo.soap, fo.kfac):
        state = make(0.1, max_precond_dim=6, axes=axes).init(params)
        with pytest.raises(ValueError, match=r"a side of length 8.*has no whole basis.*raise it, or leave parts= out"):
            fo.eigenbases(state, params, axes)


def test_a_report_lists_the_parts() -> None:
    params = {"qkv": jnp.ones((D, 12))}
    (row,) = fo.report(fo.soap(0.1, axes={"qkv": QKV}), params).rows
    assert row.matrices == ((1, 6, 6), (2, 6, 3))
    assert "parts={1: (6, 3, 3)}" in repr(row.axes)


def test_a_start_from_adam_is_that_of_the_parts() -> None:
    kernel, grads = normal(0, D, 12), normal(1, D, 12)

    def started(params: Any, axes: Any, cut: Any) -> Any:
        adam, soap = optax.adam(0.1), fo.soap(0.1, precondition_frequency=2, axes=axes)
        _, state = adam.update(cut(grads), adam.init(params), params)
        return soap.update(cut(grads), fo.from_adam(soap, state, params), params)[0]

    whole = started({"qkv": kernel}, {"qkv": QKV}, lambda g: {"qkv": g})
    parts = started(apart(kernel), dict.fromkeys("qkv", fo.MatrixAxes(0, 1)), apart)
    np.testing.assert_allclose(whole["qkv"], jnp.concatenate([parts[k] for k in "qkv"], 1), rtol=2e-5, atol=2e-5)
