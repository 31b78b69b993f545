"""What the laws compare: trees of arrays, leaf by leaf."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.optimizers_table import Point


def assert_close(actual: Any, wanted: Any, tolerance: float) -> None:
    """Every leaf within ``tolerance`` of the wanted leaf's norm."""
    assert jax.tree.structure(actual) == jax.tree.structure(wanted)
    for (path, x), y in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(wanted), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        error, norm = np.linalg.norm(x - y), np.linalg.norm(y)
        assert error <= tolerance * norm, f"{jax.tree_util.keystr(path)}: off by {error} of {norm}"


def assert_updates_close(points: list[Point], wanted: Sequence[Point], tolerance: float) -> None:
    """The updates of ``points`` are those of the first steps of ``wanted``."""
    for point, reference in zip(points, wanted[: len(points)], strict=True):
        assert_close(point.updates, reference.updates, tolerance)


def assert_same_bits(actual: Any, wanted: Any) -> None:
    """Every leaf equal, with equal dtype; a NaN equals nothing."""
    assert jax.tree.structure(actual) == jax.tree.structure(wanted)
    for (path, x), y in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(wanted), strict=True):
        assert x.dtype == y.dtype, jax.tree_util.keystr(path)
        assert np.array_equal(x, y), jax.tree_util.keystr(path)


def assert_finite(tree: Any) -> None:
    for path, x in jax.tree.leaves_with_path(tree):
        assert bool(jnp.isfinite(x).all()), jax.tree_util.keystr(path)


def assert_own_buffers(state: Any, *others: Any) -> None:
    """No two leaves of the state share memory, nor one of them with the other trees: all of it may be donated."""
    first: dict[int, str] = {}
    for name, tree in [*zip(map(str, range(len(others))), others, strict=True), ("state", state)]:
        for path, x in jax.tree.leaves_with_path(tree):
            for shard in x.addressable_shards if isinstance(x, jax.Array) and x.size else ():
                place = name + jax.tree_util.keystr(path)
                taken = first.setdefault(shard.data.unsafe_buffer_pointer(), place)
                assert taken == place or name != "state", f"{place} is {taken}"


def types(tree: Any) -> Any:
    """Shape, dtype and weakness of every leaf, by path."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path): (x.shape, x.dtype, getattr(x, "weak_type", False)) for path, x in leaves}
