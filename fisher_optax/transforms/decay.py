"""Weight decay that Optax does not have: after the step (SOAP), and only where it agrees with the step (cautious)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int, PyTree

from .._arguments import injectable, value_at
from ..matrices.axes import floating, is_function, made
from .skip_nonfinite import Freezable, counted, freezable

Mask = PyTree | Callable[[PyTree], PyTree] | None


class DecayState(NamedTuple):
    """State of the decays: how often they were called, for schedules."""

    count: Int[Array, ""]


@injectable
def add_decay_after_step(
    learning_rate: optax.ScalarOrSchedule, weight_decay: optax.ScalarOrSchedule = 0.01, mask: Mask = None
) -> optax.GradientTransformationExtraArgs:
    """Decay the weights that the step has already moved: ``u ← u - lr wd (W + u)``. Comes last in a chain.

    A call whose update is exactly zero everywhere is a skipped one, and is left alone.

    Args:
      learning_rate: number or schedule, the same as the step's.
      weight_decay: number or schedule, per unit of learning rate.
      mask: as in `optax.adamw`: a tree of booleans, or a function of params that makes one; True decays.

    Raises:
      ValueError: in `update`, without ``params``.

    Source: the SOAP authors' code; decay before the rate, as Optax has it, misses their trajectories by 5e-4 of the
      distance moved.

    Example:
      >>> import optax, fisher_optax as fo
      >>> tx = optax.chain(fo.scale_by_soap(), optax.scale_by_learning_rate(3e-3), fo.add_decay_after_step(3e-3, 0.01))
    """

    def moved(updates: PyTree) -> Array:
        return jnp.stack([jnp.any(u != 0) for u in jax.tree.leaves(updates)] or [jnp.asarray(False)]).any()

    return decay_after_step(learning_rate, weight_decay, mask, moved)


def decay_after_step(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: optax.ScalarOrSchedule,
    mask: Mask,
    moved: Callable[[PyTree], Array | bool],
) -> optax.GradientTransformationExtraArgs:
    """`add_decay_after_step`, where ``moved(updates)`` says whether there was a step."""

    def update(updates: PyTree, state: PyTree, params: PyTree = None, **extra: PyTree) -> tuple[PyTree, DecayState]:
        del extra
        _require_params(params, "add_decay_after_step")
        shrink = value_at(learning_rate, state.count) * value_at(weight_decay, state.count)
        happened = moved(updates)

        def of_leaf(u: ArrayLike, W: ArrayLike, decays: ArrayLike) -> Array:
            u, W = floating(u), floating(W)
            decayed = u - jnp.asarray(shrink, u.dtype) * (W + u)
            return jnp.where(happened & jnp.asarray(decays), decayed, u).astype(u.dtype)

        return jax.tree.map(of_leaf, updates, params, visible(mask)(params)), DecayState(state.count + 1)

    return optax.GradientTransformationExtraArgs(_init, update)


@injectable
def add_cautious_decay(
    weight_decay: optax.ScalarOrSchedule = 0.01, mask: Mask = None
) -> optax.GradientTransformationExtraArgs:
    """Decay only the weights that the step shrinks anyway: ``u ← u + wd W [u W > 0]``. Comes before the learning rate,
    like `optax.add_decayed_weights`.

    Args:
      weight_decay: number or schedule.
      mask: as in `optax.adamw`.

    Raises:
      ValueError: in `update`, without ``params``.

    Source: Chen et al. 2025, "Cautious Weight Decay" (arXiv 2510.12402).

    Example:
      >>> import optax, fisher_optax as fo
      >>> tx = optax.chain(fo.scale_by_muon(), fo.add_cautious_decay(0.1), optax.scale_by_learning_rate(1e-2))
    """

    def update(updates: PyTree, state: PyTree, params: PyTree = None, **extra: PyTree) -> tuple[PyTree, DecayState]:
        del extra
        _require_params(params, "add_cautious_decay")
        decay = value_at(weight_decay, state.count)

        def of_leaf(u: ArrayLike, W: ArrayLike, decays: ArrayLike) -> Array:
            u, W = floating(u), floating(W)
            agrees = (jnp.sign(u) * jnp.sign(W) > 0) & jnp.asarray(decays)
            return jnp.where(agrees, u + jnp.asarray(decay, u.dtype) * W, u).astype(u.dtype)

        return jax.tree.map(of_leaf, updates, params, visible(mask)(params)), DecayState(state.count + 1)

    return optax.GradientTransformationExtraArgs(_init, update)


def decayed_weights(weight_decay: optax.ScalarOrSchedule, mask: Mask) -> optax.GradientTransformation:
    """`optax.add_decayed_weights`, which needs no parameters where the decay is 0 for good, with the same state."""
    tx = optax.add_decayed_weights(weight_decay, visible(mask))
    none = isinstance(weight_decay, int | float) and weight_decay == 0
    return optax.GradientTransformation(tx.init, lambda updates, state, params=None: (updates, state)) if none else tx


def visible(mask: Mask) -> Callable[[PyTree], PyTree]:
    """The mask as a function of params that also works where some of them are masked out."""

    def masked(params: PyTree) -> PyTree:
        if mask is None:
            return jax.tree.map(lambda _: True, params)
        hidden = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
        full = jax.tree.map(lambda m, p: jax.tree.map(lambda _: m, p), made(mask, params), params, is_leaf=hidden)
        return (
            full
            if is_function(mask)
            else jax.tree.map(lambda p, m: p if hidden(p) else m, params, full, is_leaf=hidden)
        )

    return masked


def _init(params: PyTree) -> DecayState:
    del params
    return DecayState(jnp.zeros([], jnp.int32))


def _require_params(params: PyTree, name: str) -> None:
    if params is None:
        raise ValueError(
            f"{name} decays the parameters, but update was called without them: call update(grads, state, params)."
        )


class ScheduledState(NamedTuple):
    """State of `scheduled`, where there are schedules."""

    count: Int[Array, ""]
    inner: PyTree


def scheduled(factory: Callable[..., optax.GradientTransformation], **options: optax.ScalarOrSchedule) -> Freezable:
    """An Optax transformation that takes numbers alone, with schedules evaluated at the call where there are any.

    `optax.inject_hyperparams` would keep the numbers in the state: an array that the caller still holds among them.
    """

    def now(count: Int[Array, ""] | None) -> Freezable:
        return freezable(factory(**{name: value_at(value, count) for name, value in options.items()}))

    def init(params: PyTree) -> ScheduledState:
        count = jnp.zeros([], jnp.int32)
        return ScheduledState(count, now(count).init(params))

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, *, accept: Bool[Array, ""] | None = None, **extra: PyTree
    ) -> tuple[PyTree, ScheduledState]:
        updates, inner = now(state.count).update(updates, state.inner, params, accept=accept, **extra)
        return updates, ScheduledState(counted(accept, state.count), inner)

    return Freezable(init, update) if any(map(callable, options.values())) else now(None)
