"""What is done with a direction: grafting (its size from another optimizer), KL clipping, momentum of steps."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int, PyTree

from .._arguments import injectable, require_transformation, value_at
from .._xla import select
from ..matrices.axes import MatrixAxes, parts_of
from ..matrices.blocks import divide, unite
from ..matrices.rules import resolve_axes
from ..statistics import LayerFactors
from .skip_nonfinite import Freezable, counted, freezable, in_float32, skip_nonfinite


class GraftState(NamedTuple):
    """State of `graft`."""

    count: Int[Array, ""]
    direction: PyTree
    magnitude: PyTree


@injectable
def graft(direction: object, magnitude: object, axes: PyTree = None) -> optax.GradientTransformationExtraArgs:
    """``U = D |M| / |D|`` for each matrix: where ``direction`` points, as far as ``magnitude`` goes.

    Norms are Frobenius norms of single matrices: of each matrix of a stacked leaf, and of all of a leaf that is none.
    Where D is zero, so is U.

    Args:
      direction: any transformation without a learning rate.
      magnitude: another one, or "adam" (`optax.scale_by_adam`), "rmsprop" (`optax.scale_by_rms`) or "sgd" (the
        gradient itself).
      axes: None (rules by path and shape, see `fo.report`), "strict" (an error where they leave something open),
        "out_in" (the rules for a tree that stores outputs first), a tree of `fo.MatrixAxes`, or a function of params.

    Raises:
      ValueError, TypeError: for an unknown word, or what is no transformation.

    Source: Agarwal et al. 2020 (arXiv 2002.11803).

    Example (Muon's direction with the size of Adam's step):
      >>> import optax, fisher_optax as fo
      >>> tx = optax.chain(fo.graft(fo.scale_by_muon(), "adam"), optax.scale_by_learning_rate(1e-3))
    """
    direction = require_transformation("direction", direction)
    magnitude = magnitude_of(magnitude)

    def on_axes(tree: PyTree) -> Freezable:
        return graft_on(direction, magnitude, [leaf.axes for leaf in resolve_axes(tree, axes, jnp.inexact)])

    return skip_nonfinite(
        Freezable(
            lambda params: on_axes(params).init(params),
            lambda updates, *args, **extra: on_axes(updates).update(updates, *args, **extra),
        )
    )


MAGNITUDES = {"adam": optax.scale_by_adam, "rmsprop": optax.scale_by_rms, "sgd": optax.identity}


def magnitude_of(magnitude: object) -> optax.GradientTransformation:
    """The transformation a word stands for, or the one given; in float32 at least."""
    if isinstance(magnitude, str):
        if magnitude not in MAGNITUDES:
            words = ", ".join(map(repr, MAGNITUDES))
            raise ValueError(f"grafting must be one of {words}, or an Optax transformation; got {magnitude!r}.")
        return in_float32(MAGNITUDES[magnitude]())
    return in_float32(require_transformation("grafting", magnitude))


def graft_on(
    direction: optax.GradientTransformation,
    magnitude: optax.GradientTransformation,
    axes: list[MatrixAxes | None],
    *,
    rescale: bool = True,
    start: int = 0,
) -> Freezable:
    """`graft` for leaves with these axes; the first ``start - 1`` calls take ``magnitude``'s step itself. Without
    ``rescale``, D keeps its size from then on.
    """
    direction, magnitude = freezable(direction), freezable(magnitude)

    def init(params: PyTree) -> GraftState:
        return GraftState(jnp.zeros([], jnp.int32), direction.init(params), magnitude.init(params))

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, *, accept: Bool[Array, ""] | None = None, **extra: PyTree
    ) -> tuple[PyTree, GraftState]:
        D, direction_state = direction.update(updates, state.direction, params, accept=accept, **extra)
        M, magnitude_state = magnitude.update(updates, state.magnitude, params, accept=accept, **extra)

        def leaf(d: Array, m: Array, a: MatrixAxes | None) -> Array:
            U = _resized(d, m, a) if rescale else d
            return U if start <= 1 else jnp.where(state.count + 1 < start, m.astype(U.dtype), U)

        D, treedef = jax.tree.flatten(D)
        U = [leaf(d, m, a) for d, m, a in zip(D, treedef.flatten_up_to(M), axes, strict=True)]
        return treedef.unflatten(U), GraftState(counted(accept, state.count), direction_state, magnitude_state)

    return Freezable(init, update)


def _resized(d: Array, m: Array, axes: MatrixAxes | None) -> Array:
    """``d |m| / |d|`` over each matrix."""
    if axes is not None and axes.parts:
        parts = zip(divide(d, axes), divide(m, axes), parts_of(d.shape, axes), strict=True)
        return unite([_resized(own_d, own_m, part.axes) for own_d, own_m, part in parts], d.shape, axes)
    over = tuple(range(d.ndim)) if axes is None else axes.inputs + axes.outputs

    def norm(x: Array) -> tuple[Array, Array]:
        """A size to divide by first, since squares overflow, and the norm in that unit."""
        x = jnp.abs(x)
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        unit = jnp.max(x, axis=over, keepdims=True, initial=0)
        unit = jnp.where(unit == 0, 1, unit)
        return unit, jnp.sqrt(jnp.sum(jnp.square(x / unit), axis=over, keepdims=True))

    (d_unit, d_norm), (m_unit, m_norm) = norm(d), norm(m)
    direction = d.astype(jnp.promote_types(d.dtype, jnp.float32)) / d_unit / jnp.where(d_norm == 0, 1, d_norm)
    return (direction * m_norm * m_unit).astype(d.dtype)


# The last stage on layers: no step before there was curvature, and none that changes the model's outputs too much.


class ClipState(NamedTuple):
    """State of the last stage on layers: how often it was called, and whether there were statistics yet."""

    count: Int[Array, ""]
    seen: Int[Array, ""]  # 0 or 1, as in `SkipFirstState`
    inner: PyTree


def once_seen(
    inner: optax.GradientTransformation, clip: optax.ScalarOrSchedule | None, learning_rate: optax.ScalarOrSchedule
) -> Freezable:
    """``ν U``, and 0 as long as no statistics have come."""

    tx = freezable(inner)

    def init(params: PyTree) -> ClipState:
        return ClipState(jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32), tx.init(params))

    def update(
        updates: PyTree,
        state: PyTree,
        params: PyTree = None,
        *,
        accept: Bool[Array, ""] | None = None,
        statistics: Sequence[LayerFactors] | None = None,
        **extra: PyTree,
    ) -> tuple[PyTree, ClipState]:
        G = updates
        U, new = tx.update(G, state.inner, params, accept=accept, statistics=statistics, **extra)
        had_statistics = state.seen | (statistics is not None)
        ν: Any = 1.0
        if clip is not None:
            dots = (jnp.vdot(u, g.astype(u.dtype)) for u, g in zip(jax.tree.leaves(U), jax.tree.leaves(G), strict=True))
            change = value_at(learning_rate, state.count) ** 2 * jnp.abs(sum(dots, jnp.zeros([])))
            ν = jnp.minimum(1, jnp.sqrt(value_at(clip, state.count) / jnp.where(change > 0, change, 1)))
            ν = jnp.where(change > 0, ν, 1)
        U = jax.tree.map(lambda u: jnp.where(had_statistics > 0, (ν * u).astype(u.dtype), 0), U)
        return U, ClipState(counted(accept, state.count), select(accept, had_statistics, state.seen), new)

    return Freezable(init, update)


def trace(decay: ArrayLike) -> optax.GradientTransformation:
    """`optax.trace`, whose dtype stays: a decay that is an array of float32 would make float32 of bfloat16."""
    tx = optax.trace(decay)

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, optax.TraceState]:
        _, new = tx.update(updates, state, params)
        new: PyTree = jax.tree.map(lambda m, old: m.astype(old.dtype), new, state)
        return new.trace, new

    return optax.GradientTransformation(tx.init, update)


def frozen_trace(decay: ArrayLike) -> Freezable:
    """`trace`, whose step is made of the state that is kept: XLA computes a sum that is used twice twice, and where
    only one of the two is selected, it copies the old state for the other.
    """
    tx = trace(decay)

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, *, accept: Bool[Array, ""] | None = None, **extra: PyTree
    ) -> tuple[PyTree, optax.TraceState]:
        del extra
        _, new = tx.update(updates, state, params)
        new: PyTree = select(accept, new, state)
        return new.trace, new

    return Freezable(tx.init, update)
