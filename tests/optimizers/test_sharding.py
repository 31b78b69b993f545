"""Eight devices give what one gives, whatever the layout; where the state lives never changes."""

import collections
import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fisher_optax as fo
from tests.comparisons import assert_close, assert_finite, assert_same_bits, assert_updates_close
from tests.grouped import grouped
from tests.optimizers_table import SHAPES, SOME, STATES, Row, build, each, run, updater

# A kernel (8, 8) and a bias in every layout of a 2-D mesh.
LAYOUTS = {
    "both": {"kernel": P("data", "model"), "bias": P("model")},
    "columns": {"kernel": P(None, "model"), "bias": P("model")},
    "replicated": {"kernel": P(None, None), "bias": P(None)},
    "rows": {"kernel": P("data", None), "bias": P(None)},
}
STEPS = 4
ROUNDING = 1e-4  # of the update's norm: eight devices add in another order, and small entries of the basis magnify that


def values(seed: int) -> dict[str, Any]:
    """NumPy arrays, on no device yet: matrices with well-separated singular values, so that no basis is arbitrary."""
    rng = np.random.default_rng(seed)
    U, V = (np.linalg.qr(np.random.default_rng(i).normal(size=(8, 8)))[0] for i in range(2))

    def layer() -> dict[str, np.ndarray]:
        core = np.diag(np.linspace(1, 3, 8)) @ (np.eye(8) + 0.1 * rng.normal(size=(8, 8)))
        leaves = {"kernel": U @ core @ V.T, "bias": rng.normal(size=8)}
        return {name: x.astype(np.float32) for name, x in leaves.items()}

    return {name: layer() for name in LAYOUTS}


@contextlib.contextmanager
def in_mesh(kind: AxisType) -> Iterator[jax.sharding.Mesh]:
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    with jax.set_mesh(mesh):
        yield mesh


def on_meshes(auto: Sequence[Row], explicit: Sequence[Row]) -> Any:
    """Run a test once a row on a mesh of each kind."""
    cases = [(AxisType.Auto, row) for row in auto] + [(AxisType.Explicit, row) for row in explicit]
    names = [f"{kind.name.lower()}-{row.name}" for kind, row in cases]
    return pytest.mark.parametrize(("kind", "row"), cases, ids=names)


def placed(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, LAYOUTS)


def typeof(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): jax.typeof(x) for path, x in jax.tree.leaves_with_path(tree)}


@on_meshes(STATES, SOME)
def test_eight_devices_equal_one(kind: AxisType, row: Row) -> None:
    """Jitted, and where types say how arrays are spread eager too, every layout at once; state types hold from `init`
    on, and parameters stay where they were.
    """
    tx = build(row)
    update = jax.jit(updater(tx, **row.update_kwargs))
    gradients = [values(seed) for seed in range(10, 10 + STEPS)]
    with jax.set_mesh(jax.make_mesh((1,), ("alone",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])):
        params = jax.tree.map(jnp.asarray, values(1))
        alone = run(update, tx.init(params), params, gradients)

    with in_mesh(kind) as mesh:
        params, grads = placed(values(1), mesh), [placed(g, mesh) for g in gradients]
        state = tx.init(params)
        jitted = run(update, state, params, grads)
        explicit = kind is AxisType.Explicit
        # The first step, and one that renews bases.
        starts = ((0, state, params), (2, *jitted[1][1:])) if explicit else ()
        step = updater(tx, **row.update_kwargs)
        eager = [point for i, *start in starts for point in run(step, *start, grads[i : i + 1])]
        for points, wanted in ((jitted, alone), (eager, alone[::2])):
            assert_updates_close(points, wanted, max(row.tolerance, ROUNDING))
        for point in jitted + eager:
            assert typeof(point.state) == typeof(state)
            assert typeof(point.params) == typeof(params)
        assert typeof(jax.jit(tx.init)(params)) == typeof(state)


@on_meshes(SHAPES, SHAPES)
def test_state_of_sharded_shapes_is_the_state_of_sharded_arrays(kind: AxisType, row: Row) -> None:
    tx = build(row)
    with in_mesh(kind) as mesh:
        params = placed(values(1), mesh)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
        from_shapes, from_arrays = tx.init(shapes), tx.init(params)
    assert typeof(from_shapes) == typeof(from_arrays)
    if not row.keeps_norms:  # a shape has no norm: the first one that an update sees counts
        assert_same_bits(from_shapes, from_arrays)


@each()
def test_state_is_spread_like_its_parameter(row: Row) -> None:
    """Where both sides of a matrix are sharded, no device holds all of anything of its size."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    params = {"kernel": jax.device_put(values(1)["both"]["kernel"], NamedSharding(mesh, P("data", "model")))}
    for path, x in jax.tree.leaves_with_path(build(row).init(params)):
        if x.shape[-2:] == (8, 8):
            assert not x.sharding.is_fully_replicated, jax.tree_util.keystr(path)


@each(SOME)
def test_a_side_over_more_devices_than_a_block_has_rows(row: Row) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    tx, kernel = build(row), values(1)["rows"]["kernel"]
    params = {"kernel": jax.device_put(kernel, NamedSharding(mesh, P("data", None)))}
    points = run(jax.jit(updater(tx, **row.update_kwargs)), tx.init(params), params, [params, params])
    assert_finite(points)


SHARED = {"soap": fo.soap, "shampoo": fo.shampoo, "muon": fo.muon}


def stack_of(count: int, seed: int) -> dict[str, Any]:
    return {f"layer_{i}": {"kernel": values(seed)["both"]["kernel"] + 0.1 * i} for i in range(count)}


@pytest.mark.parametrize(
    ("method", "count", "kind"),
    [
        ("soap", 4, AxisType.Auto),
        ("soap", 3, AxisType.Auto),
        ("soap", 3, AxisType.Explicit),
        ("shampoo", 3, AxisType.Auto),
        ("muon", 3, AxisType.Auto),
    ],
)
def test_matrices_shared_out_over_a_mesh_axis(method: str, count: int, kind: AxisType) -> None:
    """Four devices, four matrices or one too few: the updates of one device, and each stack's state in equal parts from
    `init` on.
    """

    def make(**words: Any) -> Any:
        options = words if method == "muon" else grouped(precondition_frequency=2, **words)
        return SHARED[method](1e-2, **options)

    params, gradients = stack_of(count, 1), [stack_of(count, seed) for seed in range(10, 10 + STEPS)]
    tx = make()
    alone = run(jax.jit(updater(tx)), tx.init(params), params, gradients)
    tx = make(mesh_axis="data")
    with in_mesh(kind) as mesh:
        everywhere = NamedSharding(mesh, P())
        params, gradients = jax.device_put((params, gradients), everywhere)
        state = tx.init(params)
        points = run(jax.jit(updater(tx)), state, params, gradients)
        stacked = [x for x in jax.tree.leaves(points[-1].state) if x.ndim == 3 and not x.sharding.is_fully_replicated]
        assert typeof(jax.jit(tx.init)(params)) == typeof(points[-1].state) == typeof(state)
    assert_updates_close(points, alone, ROUNDING)
    for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(points[-1].state), strict=True):
        assert before.sharding.is_equivalent_to(after.sharding, before.ndim)  # else the next step compiles anew
    assert len(stacked) == {"soap": 6, "shampoo": 5, "muon": 0}[method]  # factors, bases, moments
    assert all(x.shape == (4, 8, 8) and x.addressable_shards[0].data.shape == (1, 8, 8) for x in stacked)


@pytest.mark.parametrize(("spec", "wanted"), [(P(), {"all-gather": 2}), (P("data", None), {"all-to-all": 4})])
def test_only_gradients_and_directions_travel(spec: P, wanted: dict[str, int]) -> None:
    """Of matrices of two shapes that every device holds, one gather of each stack's directions; of matrices in parts,
    an exchange before and one after. Their number does not grow with that of the leaves.
    """
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    shapes = {f"layer_{i}": {"kernel": (8, 8) if i % 2 else (8, 16)} for i in range(12)}
    with jax.set_mesh(mesh):
        params = jax.tree.map(
            lambda s: jax.device_put(jnp.ones(s), NamedSharding(mesh, spec)), shapes, is_leaf=lambda x: type(x) is tuple
        )
        tx = fo.soap(1e-2, storage=fo.Storage(mesh_axis="data"))
        text = jax.jit(tx.update).lower(params, tx.init(params), params).compile().as_text() or ""
    found = collections.Counter(re.findall(r" (all-[a-z-]+|collective-permute|reduce-scatter)\(", text))
    del found["all-reduce"]  # of scalars: are all finite, how many failed
    assert found == wanted


def test_adams_state_fits_matrices_that_are_shared_out() -> None:
    params = stack_of(3, 1)
    adam = optax.scale_by_adam().init(params)
    wanted = fo.from_adam(fo.soap(1e-2), adam, params)
    with in_mesh(AxisType.Auto):
        tx = fo.soap(1e-2, storage=fo.Storage(mesh_axis="data"))
        shared = fo.from_adam(tx, adam, params)
        updates, _ = jax.jit(tx.update)(params, shared, params)
    assert_close(updates, jax.jit(fo.soap(1e-2).update)(params, wanted, params)[0], ROUNDING)
