"""Where state lives: the sharding a parameter implies, and running plain code on an Explicit mesh."""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from .matrix_axes import MatrixAxes


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


class Layout(NamedTuple):
    """Where the matrices of a leaf live: how their rows and columns are spread over a mesh."""

    mesh: Any
    rows: Any
    columns: Any

    def of(self, kind: str, ndim: int) -> NamedSharding:
        """For a stacked ``ndim``-array of kind "matrix", "left" or "right"; a factor's rows are laid out like the side
        they belong to, its columns are whole.
        """
        sides = {"matrix": (self.rows, self.columns), "left": (self.rows, None), "right": (self.columns, None)}[kind]
        return NamedSharding(self.mesh, PartitionSpec(None, *sides) if ndim == 3 else PartitionSpec())


def matrix_layout(x: Any, axes: MatrixAxes, whole: bool) -> Layout | None:
    """The layout that leaf ``x`` implies for its matrices, None where nothing is known.

    A side that was cut into blocks (``whole=False``), or that merges axes of which another than the first is sharded,
    is not sharded.
    """
    sharding = sharding_of(x)
    if sharding is None:
        return None
    spec = tuple(sharding.spec) + (None,) * (len(x.shape) - len(sharding.spec))

    def merged(group: tuple[int, ...]) -> Any:
        return spec[group[0]] if whole and all(spec[a] is None for a in group[1:]) else None

    return Layout(sharding.mesh, merged(axes.inputs), merged(axes.outputs))


def place(state: Any, layouts: set[Layout | None]) -> Any:
    """The state of a stack, laid out over devices like the leaves it comes from, if these agree."""
    layout = layouts.pop() if len(layouts) == 1 else None
    if layout is None:
        return state

    def put(x: Any, kind: str) -> Any:
        if isinstance(x, tuple):  # rows of a side that is too long for a matrix
            return jax.tree.map(lambda y: jax.device_put(y, layout.of(kind, 0)), x)
        packed = kind != "matrix" and x.shape[-1] != x.shape[-2]
        return jax.device_put(x, layout.of(kind, 0 if packed else x.ndim))

    def sides(pair: Any) -> Any:
        """A matrix of each side, and whatever else there is."""
        if not pair:
            return pair
        left, right = (None if A is None else put(A, kind) for A, kind in zip(pair[:2], ("left", "right"), strict=True))
        return type(pair)(left, right, *jax.tree.map(lambda x: put(x, "matrix"), tuple(pair[2:])))

    return state._replace(
        factors=sides(state.factors),
        basis=sides(state.basis),
        application=jax.tree.map(lambda x: put(x, "matrix"), state.application),
    )


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


def share_out(state: Any, mesh_axis: str | None) -> Any:
    """The state of a stack as `spread` leaves it: every device holds its part, of a stack that is filled up until all
    parts are equal. As it is where no mesh with that axis is in scope.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh_axis not in mesh.axis_names:
        return state
    filled = _filled(state, mesh.shape[mesh_axis])
    return jax.tree.map(lambda x: jax.device_put(x, PartitionSpec(mesh_axis)), filled)


def spread(f: Callable[..., Any], mesh_axis: str, matrices: Any, *stacks: Any) -> Any:
    """``f(matrices, *stacks)`` with the leading axis of all arrays shared out over a mesh axis: every device does its
    part. Results are as long as ``matrices``, an array or several by name; the second, the state, is as long as it was,
    and what else there is has a part of every device.

    Raises:
      ValueError: where no mesh with that axis is in scope.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh_axis not in mesh.axis_names:
        raise ValueError(
            f"mesh_axis={mesh_axis!r} is not an axis of the mesh in scope ({mesh.axis_names}); call inside `with "
            "jax.set_mesh(mesh):`."
        )
    share = PartitionSpec(mesh_axis)
    padded = _filled((jax.tree.map(_unshared, matrices), *stacks), mesh.shape[mesh_axis])
    U, state, *rest = jax.shard_map(f, in_specs=share, out_specs=share, check_vma=False)(*padded)
    cut = lambda x, old: x[: len(old)]  # noqa: E731
    U = jax.tree.map(lambda x, old: _unshared(cut(x, old)), U, matrices)
    return U, jax.tree.map(cut, state, stacks[0]), *rest


def _filled(stacks: Any, devices: int) -> Any:
    """With zeros at the end of the leading axes, whose lengths the number of devices then divides."""
    return jax.tree.map(lambda x: jnp.pad(x, ((0, -len(x) % devices), *[(0, 0)] * (x.ndim - 1))), stacks)


def _unshared(stack: Array) -> Array:
    """A stack of leaves, or one to be cut into leaves: whole along the leading axis, the others as the leaves are.

    Left to itself, the compiler cuts what is whole on every device, and sends the parts around.
    """
    free = [PartitionSpec.UNCONSTRAINED] * (stack.ndim - 1)
    return jax.lax.with_sharding_constraint(stack, PartitionSpec(None, *free))
