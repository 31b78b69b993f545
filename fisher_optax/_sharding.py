"""Where state lives: the sharding a parameter implies, and running plain code on an Explicit mesh."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def sharding_of(x: Any) -> NamedSharding | None:
    """The named sharding of an array, tracer or ShapeDtypeStruct; None where it has none, or only the compiler will
    know it.
    """
    tracer = isinstance(x, Tracer)
    sharding = jax.typeof(x).sharding if tracer else getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.empty or (tracer and not is_explicit(sharding)):
        return None
    return sharding


def is_explicit(sharding: NamedSharding) -> bool:
    """Whether the sharding is part of the array's type."""
    return AxisType.Explicit in sharding.mesh.axis_types


def in_auto_mode(update: Callable[..., Any], updates: Any, state: Any, params: Any, extra: Any) -> Any:
    """``update(updates, state, params, extra)`` with Explicit mesh axes handed to the compiler, and results laid out as
    what they replace.
    """
    mesh = explicit_mesh((updates, state))
    if mesh is None:
        return update(updates, state, params, extra)
    leaves, treedef = jax.tree.flatten(extra)  # not only arrays
    arrays = [x if isinstance(x, jax.Array) else None for x in leaves]

    def with_arrays(updates: Any, state: Any, params: Any, arrays: list[Any]) -> Any:
        given = [x if a is None else a for x, a in zip(leaves, arrays, strict=True)]
        return update(updates, state, params, treedef.unflatten(given))

    whole = NamedSharding(mesh.abstract_mesh, PartitionSpec())
    out = jax.tree.map(
        lambda x: whole if jax.typeof(x).sharding.mesh.empty else jax.typeof(x).sharding, (updates, state)
    )
    with _entered(mesh):
        automatic: Any = jax.sharding.auto_axes(with_arrays, out_sharding=out)
        return automatic(updates, state, params, arrays)


def in_scope(tree: Any) -> Any:
    """Arrays typed by the mesh in scope: a function in `jax.sharding.auto_axes` has another than what is around it."""
    mesh = jax.sharding.get_abstract_mesh()

    def typed(x: Any) -> Any:
        there = jax.typeof(x).sharding.mesh
        return x if there.empty or there == mesh else jax.sharding.reshard(x, PartitionSpec())

    return tree if mesh.empty else jax.tree.map(typed, tree)


def automatic(f: Callable[..., Any], *args: Any) -> Any:
    """``f(*args)`` of trees of arrays, with Explicit mesh axes handed to the compiler, and all results whole on every
    device.
    """
    mesh = explicit_mesh(args)
    if mesh is None:
        return f(*args)
    axes = tuple(a for a, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind is AxisType.Explicit)
    whole = NamedSharding(mesh.abstract_mesh, PartitionSpec())
    with _entered(mesh):
        return jax.sharding.auto_axes(f, axes=axes, out_sharding=whole)(*args)


def on_mesh(init: Callable[[Any], Any], params: Any) -> Any:
    """``init(params)`` with everything, counters too, on the Explicit mesh of the parameters, so that types are the
    same before and after an update.
    """
    mesh = explicit_mesh(params)
    if mesh is None:
        return init(params)
    whole = NamedSharding(mesh, PartitionSpec())
    with _entered(mesh):
        return jax.tree.map(
            lambda x: jax.sharding.reshard(x, whole) if jax.typeof(x).sharding.mesh.empty else x, init(params)
        )


def explicit_mesh(tree: Any) -> Any:
    """The mesh of the first leaf that is laid out on an Explicit one; None where there is none."""
    for sharding in map(sharding_of, jax.tree.leaves(tree)):
        if sharding is not None and is_explicit(sharding):
            return sharding.mesh
    return None


def _entered(mesh: Any) -> Any:
    # Only a call outside jit sees a concrete mesh; constants made on the way must land on it.
    there = jax.sharding.get_abstract_mesh() == mesh.abstract_mesh or isinstance(jnp.zeros([]), Tracer)
    return contextlib.nullcontext() if there or not isinstance(mesh, jax.sharding.Mesh) else jax.set_mesh(mesh)
