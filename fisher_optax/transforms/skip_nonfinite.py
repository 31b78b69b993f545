"""Steps that are not taken: because something is not finite, or because it is the first.

One contract for refusing a step is kept by every stage of an optimizer here. A transformation that is `Freezable` takes
``update(updates, state, params, *, accept=None, **extra)``. Where ``accept``, a boolean of the program, is false, its
new state is its old one; its updates are then thrown away, by whoever refused the step. None accepts. A stage selects
between the two states where it makes the new one, in one pass over both: a conditional around all of it would keep two
copies of its state.

One bad step must not spoil a run, so every transformation of this package is wrapped once, at the outside, by
`skip_nonfinite`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jaxtyping import Array, Bool, Int, PyTree

from .._xla import branch, by_platform, in_auto_mode, materialized, on_mesh, select
from ..matrices.axes import arrays, step_dtype


class Freezable(optax.GradientTransformationExtraArgs):
    """A transformation whose `update` takes ``accept``: see the top of this file."""


def freezable(tx: optax.GradientTransformation) -> Freezable:
    """``tx`` if it is `Freezable`; else ``tx`` and a selection of its state, on a CPU in a conditional where that is
    large (`PLATFORMS`).
    """
    if isinstance(tx, Freezable):
        return tx
    inner = optax.with_extra_args_support(tx)

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, *, accept: Bool[Array, ""] | None = None, **extra: PyTree
    ) -> tuple[PyTree, PyTree]:
        def step(updates: PyTree, state: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
            return inner.update(updates, state, params, **extra)

        def skip(updates: PyTree, state: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
            return jax.tree.map(jnp.zeros_like, jax.eval_shape(step, updates, state, params)[0]), state

        def either(
            conditional: bool, accept: Bool[Array, ""], updates: PyTree, state: PyTree, params: PyTree
        ) -> tuple[PyTree, PyTree]:
            if conditional:
                return branch(accept, step, skip, updates, state, params)
            new, after = step(updates, state, params)
            return new, select(accept, after, state)

        if accept is None:
            return step(updates, state, params)
        size = sum(x.nbytes for x in jax.tree.leaves(state))
        large = lambda platform: platform.copied is not None and size > platform.copied  # noqa: E731
        return by_platform(either, large, accept, updates, state, params)

    return Freezable(inner.init, update)


def chain(*stages: optax.GradientTransformation) -> Freezable:
    """`optax.chain` of stages, each made `freezable`."""
    return Freezable(*optax.chain(*map(freezable, stages)))


def counted(accept: Bool[Array, ""] | None, count: Int[Array, ""]) -> Int[Array, ""]:
    """One call more, if it is accepted."""
    return count + (1 if accept is None else accept.astype(count.dtype))


STATE_VERSION = 1  # changes whenever a state saved by an older release can no longer be continued


class GuardState(NamedTuple):
    """State of a guarded transformation."""

    version: Int[Array, ""]  # layout of what lies below
    steps: Int[Array, ""]  # calls that were carried out
    skipped: Int[Array, ""]  # calls that were not, because a gradient (or its square) was not finite
    inner: PyTree


def skip_nonfinite(
    tx: optax.GradientTransformation, squares: Callable[[PyTree], list[bool]] | None = None
) -> optax.GradientTransformationExtraArgs:
    """Make ``tx`` skip a step whose gradient, or the statistics beside it, are not finite anywhere: the update is zero
    and no state changes but the counter.

    A gradient whose sum of squares overflows counts as one, since every second moment and every Kronecker factor entry
    is bounded by that sum. ``squares(tree)`` says for each leaf whether squares are taken of its gradient (default: of
    all). In a program, ``tx`` is called in any case, and refuses the step itself (`freezable`): a conditional would
    copy all of the state, which for K-FAC is most of a step's memory traffic.

    ``tx`` gets numbers and float8 as `arrays` has them. An update has its gradient's dtype, or for whole numbers that
    of a float, as AdamW's has.
    """
    tx = freezable(tx)

    def init(params: PyTree) -> GuardState:
        def start(params: PyTree) -> GuardState:
            steps, skipped = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32)
            return GuardState(jnp.asarray(STATE_VERSION, jnp.int32), steps, skipped, tx.init(params))

        return on_mesh(start, arrays(params))

    def update(updates: PyTree, state: PyTree, params: PyTree = None, **extra: PyTree) -> tuple[PyTree, GuardState]:
        grads = jax.tree.map(jnp.asarray, updates)
        updates, params, state = arrays(updates), arrays(params), jax.tree.map(jnp.asarray, state)
        leaves = jax.tree.leaves(updates)
        squared = squares(updates if params is None else params) if squares else [True] * len(leaves)

        def like_grads(new: PyTree) -> PyTree:
            return jax.tree.map(lambda u, g: u.astype(step_dtype(g.dtype)), new, grads)

        def step(
            updates: PyTree, state: GuardState, params: PyTree, extra: dict[str, PyTree]
        ) -> tuple[PyTree, GuardState]:
            new, inner = tx.update(updates, state.inner, params, **extra)
            return like_grads(new), state._replace(steps=state.steps + 1, inner=inner)

        def skip(updates: PyTree, state: GuardState, *_: PyTree) -> tuple[PyTree, GuardState]:
            return like_grads(jax.tree.map(jnp.zeros_like, updates)), state._replace(skipped=state.skipped + 1)

        def either(
            updates: PyTree, state: GuardState, params: PyTree, extra: dict[str, PyTree]
        ) -> tuple[PyTree, GuardState]:
            probes = finite_probes(extra.get("statistics"))
            finite = is_finite([*jax.tree.leaves(updates), *probes], [*squared, *[False] * len(probes)])
            if not isinstance(finite, Tracer):
                return (step if finite else skip)(updates, state, params, extra)
            accept = materialized(finite, state.steps)
            new, inner = tx.update(updates, state.inner, params, accept=accept, **extra)
            new = select(accept, new, jax.tree.map(jnp.zeros_like, new))
            steps = counted(accept, state.steps)
            return like_grads(new), state._replace(
                steps=steps, skipped=state.skipped + 1 - (steps - state.steps), inner=inner
            )

        return in_auto_mode(either, updates, state, params, extra)

    return optax.GradientTransformationExtraArgs(init, update)


def finite_probes(statistics: PyTree) -> list[Array]:
    """Arrays that are finite only where all of the statistics are: what a kind names as its ``finite_probes()``, else
    all of it.
    """

    def named(x: object) -> bool:
        return hasattr(x, "finite_probes")

    return jax.tree.leaves([x.finite_probes() if named(x) else x for x in jax.tree.leaves(statistics, is_leaf=named)])


def is_finite(leaves: list[Array], squared: list[bool]) -> Bool[Array, ""]:
    """Whether every leaf is finite, and so is the sum of all squares of those ``squared``; in float32 at least."""
    short, sums = [], []
    for x, s in zip(leaves, squared, strict=True):
        if s and x.ndim < 2:
            short.append(_magnitudes(x).ravel())  # biases and scales, many and small: one sum for all
        else:
            # x - x is NaN where x is not finite, and a sum, unlike a maximum, never loses a NaN; `all` takes twice the
            # time.
            sums.append(jnp.sum(jnp.square(_magnitudes(x)) if s else x - x))
    if short:
        sums.append(jnp.sum(jnp.square(jnp.concatenate(short))))
    return jnp.isfinite(functools.reduce(jnp.add, sums, jnp.zeros([])))


def _magnitudes(x: Array) -> Array:
    x = jnp.abs(x) if jnp.iscomplexobj(x) else x
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class SkipFirstState(NamedTuple):
    """State of `skip_first_call`."""

    called: Int[Array, ""]  # 0 or 1: `optax.contrib.sam` multiplies and adds states, and makes a bool an int32
    inner: PyTree


def skip_first_call(tx: optax.GradientTransformation, freeze: bool = True) -> Freezable:
    """``tx``, but the first call updates nothing and, with ``freeze``, leaves its state alone (a schedule goes on)."""
    tx = freezable(tx)

    def init(params: PyTree) -> SkipFirstState:
        return SkipFirstState(jnp.zeros([], jnp.int32), tx.init(params))

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, *, accept: Bool[Array, ""] | None = None, **extra: PyTree
    ) -> PyTree:
        called = state.called > 0
        later = called if accept is None else accept & called
        new, inner = tx.update(updates, state.inner, params, accept=later if freeze else accept, **extra)
        new = select(called, new, jax.tree.map(jnp.zeros_like, new))
        return new, SkipFirstState(select(accept, jnp.ones([], jnp.int32), state.called), inner)

    return Freezable(init, update)


def in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """``tx`` on half-precision leaves cast to float32: a second moment overflows in float16 and stands still in
    bfloat16. So are whole numbers, whose moments would change their dtype in the first step. Of tx's type.
    """
    tx = optax.with_extra_args_support(tx)

    def cast(tree: PyTree) -> PyTree:
        def cast_leaf(x: Array | jax.ShapeDtypeStruct) -> Array | jax.ShapeDtypeStruct:
            half = jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits < 32
            dtype = jnp.float32 if half else step_dtype(x.dtype)
            if dtype == x.dtype or jnp.issubdtype(x.dtype, jax.dtypes.extended):
                return x
            return (
                jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)
                if isinstance(x, jax.ShapeDtypeStruct)
                else x.astype(dtype)
            )

        return jax.tree.map(cast_leaf, tree)

    def update(updates: PyTree, state: PyTree, params: PyTree = None, **extra: PyTree) -> PyTree:
        return tx.update(cast(updates), state, cast(params), **extra)

    return type(tx)(lambda params: tx.init(cast(params)), update)
