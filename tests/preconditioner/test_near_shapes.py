"""Matrices of near shapes share a stack, and nothing else about them changes."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import fisher_optax as fo
from fisher_optax.preconditioner import step as near
from fisher_optax.preconditioner.transform import PreconditionState

SHAPES = ((3, 5), (4, 4), (5, 3), (2, 6), (6, 4), (4, 4))
METHODS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "soap": lambda: fo.soap(0.1, precondition_frequency=2),
    "soap-cholesky": lambda: fo.soap(0.1, precondition_frequency=2, refresh=fo.Refresh(decomposition="cholesky")),
    "soap-eigh": lambda: fo.soap(
        0.1, precondition_frequency=2, refresh=fo.Refresh(decomposition="eigh", transport="squared")
    ),
    "soap-adaptive": lambda: fo.soap(0.1, precondition_frequency=2, refresh=fo.Refresh("adaptive", tolerance=0.1)),
    "shampoo": lambda: fo.shampoo(0.1, precondition_frequency=2),
    "shampoo-newton": lambda: fo.shampoo(0.1, refresh=fo.Refresh(decomposition="newton")),
    "dykaf": lambda: fo.dykaf(0.1, precondition_frequency=2),
    "dykaf-parallel": lambda: fo.dykaf(0.1, init="dominant_released", variant="parallel"),
}


def params_of(shapes: tuple[tuple[int, int], ...] = SHAPES) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {f"layer_{i}": {"kernel": jnp.asarray(rng.normal(size=shape))} for i, shape in enumerate(shapes)}


def gradients(params: Any, steps: int) -> list[Any]:
    """Of full rank over the steps, but for an input of the first layer that is dead."""
    rng = np.random.default_rng(1)
    draws = [jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), params) for _ in range(steps)]
    return [{**g, "layer_0": {"kernel": g["layer_0"]["kernel"].at[1].set(0)}} for g in draws]


def trained(tx: optax.GradientTransformation, steps: int = 7) -> tuple[Any, Any]:
    params = params_of()
    state, update = tx.init(params), jax.jit(tx.update)
    for g in gradients(params, steps):
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def stacks_of(state: Any) -> dict[str, Any]:
    is_state = lambda x: isinstance(x, PreconditionState)  # noqa: E731
    [found] = [x for x in jax.tree.leaves(state, is_leaf=is_state) if is_state(x)]
    return found.matrices


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every shape in a stack of its own."""
    near.near_shapes.cache_clear()
    monkeypatch.setattr(near, "SHAPES", 100)
    yield
    near.near_shapes.cache_clear()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", METHODS)
def test_steps_are_those_of_matrices_that_are_apart(name: str, request: pytest.FixtureRequest) -> None:
    together, state = trained(METHODS[name]())
    [stack] = stacks_of(state)
    assert set(near.members(stack)) == {f"{m}x{n} float64" for m, n in SHAPES}
    request.getfixturevalue("apart")
    alone, state = trained(METHODS[name]())
    assert set(stacks_of(state)) == {f"{m}x{n} float64" for m, n in SHAPES}
    start = params_of()
    for layer, leaf in together.items():
        x, wanted, old = leaf["kernel"], alone[layer]["kernel"], start[layer]["kernel"]
        assert np.linalg.norm(x - wanted) < 1e-7 * np.linalg.norm(wanted - old)


def random_shapes(seed: int) -> tuple[near.Shape, ...]:
    rng = np.random.default_rng(seed)
    sizes = {tuple(rng.integers(1, 2 ** rng.integers(2, 11), size=2).tolist()) for _ in range(rng.integers(1, 16))}
    return tuple(
        near.Shape(f"{m}x{n}", (int(rng.integers(1, 9)), m, n), rng.choice(["float32", "float64"]), m < 900)
        for m, n in sizes
    )


@pytest.mark.parametrize("seed", range(20))
def test_what_zeros_add_is_bounded(seed: int) -> None:
    shapes = random_shapes(seed)
    names = near.near_shapes(shapes)
    by_key = {shape.key: shape for shape in shapes}
    assert sorted(key for name in names for key in near.members(name)) == sorted(by_key)
    if len(shapes) <= near.SHAPES:
        assert names == tuple(by_key)
    before = after = 0
    for name in names:
        own = [by_key[key] for key in near.members(name)]
        m, n = (max(shape.stack[i] for shape in own) for i in (1, 2))
        numbers = [2 * (a * b + (a * a + b * b) * shape.factors) for shape in own for _, a, b in [shape.stack]]
        counts = [shape.stack[0] for shape in own]
        before += sum(c * k for c, k in zip(counts, numbers, strict=True))
        after += (
            sum(counts) * 2 * (m * n + (m * m + n * n) * own[0].factors) if len(own) > 1 else numbers[0] * counts[0]
        )
        assert len({shape.dtype for shape in own}) == 1
        assert len(own) == 1 or all(shape.factors for shape in own)
    assert after - before <= max(0.25 * before, 2**16)


def test_four_shapes_of_a_transformer_stay_as_they_are() -> None:
    shapes = tuple(near.Shape(f"{m}x{n}", (12, m, n), "float32", True) for m, n in ((8, 24), (8, 8), (8, 32), (32, 8)))
    assert near.near_shapes(shapes) == tuple(shape.key for shape in shapes)


@pytest.mark.parametrize(
    "tx",
    [
        fo.soap(0.1, normalize_updates=True),
        fo.soap(0.1, storage=fo.Storage(sides="shorter")),
        fo.dykaf(0.1, init="identity"),
        fo.dykaf(0.1, rank1_second_moment=True),
        fo.kl_soap(0.1),
        fo.kl_shampoo(0.1),
        fo.precondition(
            fo.factors.outer_product(0.9),
            fo.decompositions.orthogonal_iteration(),
            fo.in_eigenbasis(optax.scale_by_rms()),
        ),
    ],
    ids=["normalized", "one side", "identity", "rank one", "kl_soap", "kl_shampoo", "of one's own"],
)
def test_what_zeros_would_change_keeps_its_shapes(tx: optax.GradientTransformation) -> None:
    """Means over a side, factors that start from the identity, and inner transformations that nobody has looked at."""
    state = jax.eval_shape(tx.init, params_of())
    assert set(stacks_of(state)) == {f"{m}x{n}" for m, n in SHAPES}


def test_one_program_decomposes_for_all() -> None:
    """Twelve shapes with 23 lengths: an eigendecomposition for each of the two lengths of the stack."""
    params = {f"layer_{i}": {"kernel": jax.ShapeDtypeStruct((8 + i, 16 + 2 * i), jnp.float32)} for i in range(12)}
    tx = fo.soap(0.1)
    text = jax.jit(tx.update).lower(params, jax.eval_shape(tx.init, params), params).as_text()
    assert 1 <= text.count("lapack_ssyevd") <= 2


def test_bases_are_each_layers_own() -> None:
    """Their columns diagonalise the factors that the layer alone has."""
    params = params_of()
    tx = fo.soap(0.1, precondition_frequency=1, shampoo_beta=0.5, refresh=fo.Refresh(decomposition="eigh"))
    state, update = tx.init(params), jax.jit(tx.update)
    factors = {name: [np.zeros((d, d)) for d in leaf["kernel"].shape] for name, leaf in params.items()}
    for g in gradients(params, 5):
        _, state = update(g, state, params)
        for name, leaf in g.items():
            G = np.asarray(leaf["kernel"])
            factors[name] = [0.5 * A + 0.5 * S for A, S in zip(factors[name], (G @ G.T, G.T @ G), strict=True)]
    bases = fo.eigenbases(state, params)
    for name, sides in factors.items():
        for Q, A in zip(bases[name]["kernel"], sides, strict=True):
            assert Q.shape == A.shape
            B = Q.T @ A @ Q
            np.testing.assert_allclose(B, np.diag(np.diag(B)), atol=1e-4 * np.linalg.norm(A))
            np.testing.assert_allclose(Q.T @ Q, np.eye(len(Q)), atol=1e-5)


def test_a_start_from_adam_is_in_the_stack() -> None:
    params, adam = params_of(), optax.adam(0.1)
    adam_state, advance = adam.init(params), jax.jit(adam.update)
    for g in gradients(params, 3):
        _, adam_state = advance(g, adam_state, params)
    [stack] = stacks_of(fo.from_adam(fo.soap(0.1), adam_state, params)).values()
    # The stack holds the shapes in the order of its name, and zeros.
    wanted = sum(float(jnp.sum(jnp.abs(x))) for x in jax.tree.leaves(adam_state[0].mu))
    np.testing.assert_allclose(jnp.sum(jnp.abs(stack.application.mu)), wanted, rtol=1e-6)
    wanted = sum(float(jnp.sum(x)) for x in jax.tree.leaves(adam_state[0].nu))
    np.testing.assert_allclose(jnp.trace(stack.factors.left, axis1=1, axis2=2).sum(), wanted, rtol=1e-5)


@pytest.mark.parametrize("make", [fo.soap, fo.dykaf], ids=["soap", "dykaf"])
@pytest.mark.parametrize("dead", [0, 3])
def test_steps_after_a_start_from_adam_are_no_longer_than_adams(make: Callable[..., Any], dead: int) -> None:
    """Second moments go to the columns that continue their axes: zeros and dead inputs, which come first, take none."""
    rng = np.random.default_rng(0)
    params = {f"layer_{i}": {"kernel": jnp.zeros((16 + 2 * i, 20 - i))} for i in range(5)}
    live = jax.tree.map(lambda x: (jnp.arange(len(x)) < len(x) - dead)[:, None] * jnp.ones_like(x), params)

    def gradient() -> Any:
        return jax.tree.map(lambda x: x * jnp.asarray(rng.normal(size=x.shape), jnp.float32), live)

    adam = optax.adam(1.0, b1=0.95, b2=0.95)
    adam_state, advance = adam.init(params), jax.jit(adam.update)
    for _ in range(50):
        _, adam_state = advance(gradient(), adam_state)
    tx = make(1.0, weight_decay=0.0)
    state, update = fo.from_adam(tx, adam_state, params), jax.jit(tx.update)
    for _ in range(2):
        updates, state = update(gradient(), state, params)
    for u in jax.tree.leaves(updates):
        assert 0.1 < float(jnp.sqrt(jnp.mean(jnp.square(u[: len(u) - dead])))) < 0.5
        assert not np.any(u[len(u) - dead :])


def test_the_report_counts_the_zeros() -> None:
    params = params_of()
    for tx in (fo.soap(0.1), fo.shampoo(0.1), fo.dykaf(0.1)):
        report = fo.report(tx, params)
        state = jax.eval_shape(tx.init, params)
        held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state) if x.ndim > 1)
        counted = sum(row.state_bytes for row in report.rows)
        assert 0 <= counted - held <= 4 * 4 * len(SHAPES)  # counters
        assert "(zeros)" in str(report)
        M, N = (max(shape[i] for shape in SHAPES) for i in (0, 1))
        flops = 14 * (M**3 + N**3) // 3 + 4 * M * N * (M + N)
        assert abs(sum(row.refresh_flops for row in report.rows) - len(SHAPES) * flops) <= 2 * len(SHAPES)


@pytest.mark.usefixtures("x64")
def test_a_start_from_adam_goes_on_as_apart(request: pytest.FixtureRequest) -> None:
    params, adam = params_of(), optax.adam(0.1)
    adam_state, advance = adam.init(params), jax.jit(adam.update)
    for g in gradients(params, 4):
        _, adam_state = advance(g, adam_state, params)

    def moved() -> Any:
        tx = fo.soap(0.1, precondition_frequency=2)
        state, update, total = fo.from_adam(tx, adam_state, params), jax.jit(tx.update), []
        for g in gradients(params, 4):
            updates, state = update(g, state, params)
            total.append(updates)
        return total

    together = moved()
    request.getfixturevalue("apart")
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-9), together, moved())


def test_bases_of_other_layers_are_refused() -> None:
    """Also where as many are in the stack, of other shapes, or fewer by less than there are devices."""
    shapes = ((3, 5), (3, 5), (5, 3), (4, 4), (4, 4), (2, 6), (6, 4))
    params = params_of(shapes)
    axes = {name: {"kernel": fo.MatrixAxes(0, 1)} for name in params}
    state = fo.soap(0.1, axes=axes).init(params)
    assert fo.eigenbases(state, params, axes)["layer_0"]["kernel"].left.shape == (3, 3)
    turned = axes | {"layer_1": {"kernel": fo.MatrixAxes(1, 0)}}
    with pytest.raises(ValueError, match="bases of 2 matrices of shape 3x5, and these params and axes have 1"):
        fo.eigenbases(state, params, turned)
    for layer in ("layer_3", "layer_6"):
        fewer = {name: leaf for name, leaf in params.items() if name != layer}
        with pytest.raises(ValueError, match="Pass the params and the axes= that the optimizer was made for"):
            fo.eigenbases(state, fewer, {name: axes[name] for name in fewer})


def test_bases_are_read_on_an_explicit_mesh() -> None:
    mesh = jax.make_mesh((4,), ("x",), devices=jax.devices()[:4])
    assert "Explicit" in str(mesh.axis_types)
    with jax.set_mesh(mesh):
        params = params_of()
        tx = fo.soap(0.1, storage=fo.Storage(mesh_axis="x"))
        bases = fo.eigenbases(tx.init(params), params)
    for name, leaf in params.items():
        assert [Q.shape[0] for Q in bases[name]["kernel"]] == list(leaf["kernel"].shape)


def test_sharded_leaves_share_a_stack_that_their_mesh_may_not_divide() -> None:
    mesh = jax.make_mesh((4,), ("x",), devices=jax.devices()[:4])
    shapes = ((4, 8), (8, 8), (8, 12), (12, 10), (4, 12))
    params = {
        name: jax.device_put(leaf, NamedSharding(mesh, PartitionSpec("x", None)))
        for name, leaf in ((f"layer_{i}", jnp.ones(shape)) for i, shape in enumerate(shapes))
    }
    tx = fo.soap(0.1)
    [stack] = stacks_of(tx.init(params)).values()
    assert stack.application.mu.sharding.spec == PartitionSpec(None, "x", None)
    grads = jax.tree.map(lambda x: x * jnp.arange(x.shape[1]), params)
    update = jax.jit(tx.update)
    _, state = update(grads, tx.init(params), params)
    sharded, _ = update(grads, state, params)
    alone = jax.tree.map(np.asarray, (grads, params))
    _, state = update(alone[0], tx.init(alone[1]), alone[1])
    single, _ = update(alone[0], state, alone[1])
    for x, y in itertools.zip_longest(jax.tree.leaves(sharded), jax.tree.leaves(single)):
        np.testing.assert_allclose(x, y, atol=1e-5)
