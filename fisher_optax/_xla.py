"""What a compiler is told: choices by the platform or in Python, what is hidden from it, and where arrays live."""

import contextlib
import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextvars import ContextVar
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int, PyTree


class Platform(NamedTuple):
    """What is done in another way for another kind of device."""

    factorises: bool  # whether QR and eigh are quick to compile and to run; else products stand in for them
    symmetric_blocks: int | None  # from this size on, half of a symmetric product is made, in blocks
    rows_at_once: int | None  # of a product with more rows than that
    matrices_at_once: tuple[int, ...]  # of a stack, the first of these that divides it; or
    numbers_at_once: int | None  # as many matrices as have so many entries
    one_factorisation: bool  # whether a batch of them is a loop
    roundoff: float  # of a float32 product without a precision
    working_memory: int  # bytes of what is worked on at once
    copied: int | None  # bytes of a state above which a step is refused by a conditional; None: never


# Measured on two CPU cores: QR of side 768 takes a third of the time of shifted CholeskyQR; blocks of symmetric
# products gain from 384 on; a product of two or three matrices of side 256 or 384 runs at a higher rate than that of
# one, while whole stacks leave the caches, and so does more than 2 MB of optimal brain surgeon; jaxlib's batched
# factorisations can hang (`linalg.blocks`); where a state makes the step, as Adam's moments do, it is computed
# once for each, and where only one of the two is selected, the old state is copied for the other.
# From the compilers for v5e and H200, not from their devices: an eigh of side 768 compiles for a TPU in a minute, a QR
# of 3072 in two, a float32 product of 3072 at the highest precision in 7.4 s and by 256 rows at once in 1.5; on a GPU
# the libraries factorise one matrix after another; a conditional keeps a state twice. 2^22 entries are 16 MB, and
# enough to fill either.
_ACCELERATOR = Platform(
    factorises=False,
    symmetric_blocks=None,
    rows_at_once=None,
    matrices_at_once=(),
    numbers_at_once=2**22,
    one_factorisation=False,
    roundoff=2.0**-11,
    working_memory=2**28,
    copied=None,
)
PLATFORMS: dict[str, Platform] = {
    "cpu": Platform(
        factorises=True,
        symmetric_blocks=384,
        rows_at_once=None,
        matrices_at_once=(2, 3),
        numbers_at_once=None,
        one_factorisation=True,
        roundoff=2.0**-24,
        working_memory=2**21,
        copied=2**22,
    ),
    "gpu": _ACCELERATOR,
    "tpu": _ACCELERATOR._replace(rows_at_once=256, roundoff=2.0**-9),
}


# Those that what is being traced may be lowered for.
_AMONG: ContextVar[tuple[str, ...]] = ContextVar("among", default=tuple(PLATFORMS))


def by_platform(f: Callable[..., PyTree], setting: Callable[[Platform], Hashable], *operands: PyTree) -> PyTree:
    """``f(setting(platform), *operands)`` for the `Platform` that a program is lowered for, or where it runs.

    Args:
      f: is traced once for each setting that differs; choices within f are among the platforms that have this one.
      setting: what f needs of a platform; hashable.
    """
    among = _AMONG.get()
    settings: Mapping[str, Hashable] = {name: setting(PLATFORMS[name]) for name in among}
    leaves = jax.tree.leaves(operands)
    if len(set(settings.values())) == 1:
        return f(settings[among[0]], *operands)
    if not any(isinstance(x, Tracer) for x in leaves):
        here = next(iter(jnp.asarray(leaves[0]).devices())).platform
        return f(settings.get(here, settings[among[0]]), *operands)

    def case(value: Hashable) -> Callable[..., PyTree]:
        def of_these(*operands: PyTree) -> PyTree:
            token = _AMONG.set(tuple(name for name in among if settings[name] == value))
            try:
                return f(value, *operands)
            finally:
                _AMONG.reset(token)

        return of_these

    cases = {value: case(value) for value in settings.values()}
    others = settings["gpu" if "gpu" in settings else among[0]]  # a GPU has several names
    named = {name: cases[settings[name]] for name in among if name != "gpu" and settings[name] != others}
    return jax.lax.platform_dependent(*operands, default=cases[others], **named)


def branch(choice: Array | bool, yes: Callable[..., PyTree], no: Callable[..., PyTree], *operands: PyTree) -> PyTree:
    """``yes(*operands)`` or ``no(*operands)``: `jax.lax.cond`, but calls outside `jit` compile nothing anew."""
    if isinstance(choice, Tracer):
        return jax.lax.cond(choice, yes, no, *operands)
    return (yes if choice else no)(*operands)


def select(choice: Array | None, yes: PyTree, no: PyTree) -> PyTree:
    """``yes`` (for None, too) or ``no``, two trees of one structure.

    Unlike a conditional, which copies all that it returns, this is one pass that XLA fuses with what made the arrays.
    """
    if choice is None:
        return yes
    return jax.tree.map(lambda a, b: a if a is b else jax.lax.select(choice, a, b), yes, no)


def materialized(choice: Bool[Array, ""], count: Array) -> Bool[Array, ""]:
    """``choice``, as a conditional's result: XLA computes a scalar of scalars anew in every kernel that reads it, for
    each entry. ``count`` is any counter from 0 on; the branches compare as loops do, and share their kernel.
    """
    return jax.lax.cond(choice, lambda n: n < jnp.iinfo(n.dtype).max, lambda n: n < 0, count)


def dynamic_indices(n: int, choice: Array) -> Sequence[int | Int[Array, ""]]:
    """0 to n - 1 where ``choice`` is true, as results of the program and not as constants: slices that differ by such a
    number alone become one kernel, where constants make a kernel each, to be compiled on its own.
    """
    if not isinstance(choice, Tracer):
        return range(n)
    known, other = (tuple(jnp.asarray(i * j, jnp.int32) for i in range(n)) for j in (1, 0))
    return jax.lax.cond(choice, lambda: known, lambda: other)


def sequenced_after(earlier: PyTree, values: PyTree, count: Array) -> PyTree:
    """The arrays ``values``, but not before those of ``earlier`` are there: what is made of them may then overwrite
    what these were made of, and use the memory that they no longer need. ``count`` is any counter from 0 on.
    """
    if not any(isinstance(x, Tracer) for x in jax.tree.leaves(earlier)):
        return values
    below = functools.reduce(jnp.logical_or, [x[(0,) * x.ndim].real < 0 for x in jax.tree.leaves(earlier)])
    there = below | (count >= 0)  # true, but the compiler cannot know
    return jax.tree.map(lambda x: jax.lax.select(there, x, jnp.zeros_like(x)), values)


# Where state lives: the sharding a parameter implies, and running plain code on an Explicit mesh.


def of_each(f: Callable[..., PyTree], *stacks: PyTree, batch_size: int | None = None) -> PyTree:
    """``f`` of each entry along the leading axes, all together or so many at once; one after another where f has
    ragged products, which JAX 0.10 and 0.12 do not batch (`is_of_ragged`).
    """
    try:
        if batch_size is None:
            return jax.vmap(f)(*stacks)
        return jax.lax.map(lambda xs: f(*xs), stacks, batch_size=batch_size)
    except NotImplementedError as error:
        if not is_of_ragged(error):
            raise
        return jax.lax.map(lambda xs: f(*xs), stacks)


def is_of_ragged(error: NotImplementedError) -> bool:
    """Whether it says that `jax.lax.ragged_dot` has no rule for a batch along that axis."""
    return "ragged_dot" in str(error)


def sharding_of(x: object) -> NamedSharding | None:
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


def in_auto_mode(
    update: Callable[..., PyTree], updates: PyTree, state: PyTree, params: PyTree, extra: PyTree
) -> PyTree:
    """``update(updates, state, params, extra)`` with Explicit mesh axes handed to the compiler, and results laid out as
    what they replace.
    """
    mesh = explicit_mesh((updates, state))
    if mesh is None:
        return update(updates, state, params, extra)
    leaves, treedef = jax.tree.flatten(extra)  # not only arrays
    arrays = [x if isinstance(x, jax.Array) else None for x in leaves]

    def with_arrays(updates: PyTree, state: PyTree, params: PyTree, arrays: list[Array | None]) -> PyTree:
        values = [x if a is None else a for x, a in zip(leaves, arrays, strict=True)]
        return update(updates, state, params, treedef.unflatten(values))

    whole = NamedSharding(mesh.abstract_mesh, PartitionSpec())
    out = jax.tree.map(
        lambda x: whole if jax.typeof(x).sharding.mesh.empty else jax.typeof(x).sharding, (updates, state)
    )
    with _entered(mesh):
        automatic: Callable[..., PyTree] = jax.sharding.auto_axes(with_arrays, out_sharding=out)
        return automatic(updates, state, params, arrays)


def in_scope(tree: PyTree) -> PyTree:
    """Arrays typed by the mesh in scope: a function in `jax.sharding.auto_axes` has another than what is around it."""
    mesh = jax.sharding.get_abstract_mesh()

    def typed(x: Array) -> Array:
        there = jax.typeof(x).sharding.mesh
        return x if there.empty or there == mesh else jax.sharding.reshard(x, PartitionSpec())

    return tree if mesh.empty else jax.tree.map(typed, tree)


def automatic(f: Callable[..., PyTree], *args: PyTree) -> PyTree:
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


def on_mesh(init: Callable[[PyTree], PyTree], params: PyTree) -> PyTree:
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


def explicit_mesh(tree: PyTree) -> Mesh | AbstractMesh | None:
    """The mesh of the first leaf that is laid out on an Explicit one; None where there is none."""
    for sharding in map(sharding_of, jax.tree.leaves(tree)):
        if sharding is not None and is_explicit(sharding):
            return sharding.mesh
    return None


def _entered(mesh: Mesh | AbstractMesh) -> contextlib.AbstractContextManager[object]:
    # Only a call outside jit sees a concrete mesh; constants made on the way must land on it.
    there = jax.sharding.get_abstract_mesh() == mesh.abstract_mesh or isinstance(jnp.zeros([]), Tracer)
    return contextlib.nullcontext() if there or not isinstance(mesh, jax.sharding.Mesh) else jax.set_mesh(mesh)
