"""One bad step must not spoil a run: skip it whole, count it, and carry on.

Every transformation of this package is wrapped once, at the outside, by `skip_nonfinite`.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jaxtyping import Array, Bool, Int

from .. import linalg
from .._xla import in_auto_mode, materialized, on_mesh, select
from ..matrices.axes import arrays, step_dtype
from ..statistics import LayerFactors
from .freeze import counted, freezable

STATE_VERSION = 1  # changes whenever a state saved by an older release can no longer be continued


class GuardState(NamedTuple):
    """State of a guarded transformation."""

    version: Int[Array, ""]  # layout of what lies below
    steps: Int[Array, ""]  # calls that were carried out
    skipped: Int[Array, ""]  # calls that were not, because a gradient (or its square) was not finite
    inner: Any


def skip_nonfinite(
    tx: optax.GradientTransformation, squares: Callable[[Any], list[bool]] | None = None
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

    def init(params: optax.Params) -> GuardState:
        def start(params: Any) -> GuardState:
            steps, skipped = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32)
            return GuardState(jnp.asarray(STATE_VERSION, jnp.int32), steps, skipped, tx.init(params))

        return on_mesh(start, arrays(params))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[Any, GuardState]:
        grads = jax.tree.map(jnp.asarray, updates)
        updates, params, state = arrays(updates), arrays(params), jax.tree.map(jnp.asarray, state)
        leaves = jax.tree.leaves(updates)
        squared = squares(updates if params is None else params) if squares else [True] * len(leaves)

        def like_grads(new: Any) -> Any:
            return jax.tree.map(lambda u, g: u.astype(step_dtype(g.dtype)), new, grads)

        def step(updates: Any, state: GuardState, params: Any, extra: dict[str, Any]) -> tuple[Any, GuardState]:
            new, inner = tx.update(updates, state.inner, params, **extra)
            return like_grads(new), state._replace(steps=state.steps + 1, inner=inner)

        def skip(updates: Any, state: GuardState, *_: Any) -> tuple[Any, GuardState]:
            return like_grads(jax.tree.map(jnp.zeros_like, updates)), state._replace(skipped=state.skipped + 1)

        def either(updates: Any, state: GuardState, params: Any, extra: dict[str, Any]) -> tuple[Any, GuardState]:
            seen = list(_finite_probes(extra.get("statistics")))
            finite = is_finite([*jax.tree.leaves(updates), *seen], [*squared, *[False] * len(seen)])
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


def _finite_probes(statistics: Any) -> Iterator[Array]:
    """Arrays that are finite only where all of the statistics are: of a second moment, its diagonal."""
    for x in jax.tree.leaves(statistics, is_leaf=lambda x: isinstance(x, LayerFactors)):
        if not isinstance(x, LayerFactors):
            yield x
            continue
        yield from jax.tree.leaves((x.squares, x.weight))
        for side in (x.left, x.right):
            yield from [_diagonal(side)] if hasattr(side, "ndim") else jax.tree.leaves(side)


def _diagonal(side: Array) -> Array:
    """Of each square matrix of a stack; all of the diagonal that an embedding's side is."""
    square = side.ndim > 1 and side.shape[-2] == side.shape[-1]
    return linalg.diagonal(side) if square else side


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
