"""Eight devices give what one gives, whatever the layout; where the state lives never changes."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.comparisons import assert_finite, assert_same_bits, assert_updates_close
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
        eager = run(updater(tx, **row.update_kwargs), state, params, grads[:2]) if explicit else []
        for points in (jitted, eager):
            assert_updates_close(points, alone, max(row.tolerance, ROUNDING))
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
