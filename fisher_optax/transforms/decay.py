"""Weight decay: before, in or after the step, with the learning rate or without it, and only where it agrees."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int, PyTree

from .._arguments import in_range, injectable, one_of, value_at
from ..matrices.axes import floating, is_function, made
from .skip_nonfinite import Freezable, counted, freezable

Mask = PyTree | Callable[[PyTree], PyTree] | None
MODES = ("coupled", "after", "independent", "corrected", "cautious")


@dataclasses.dataclass(frozen=True)
class Decay:
    """How weights decay, for the ``weight_decay=`` of every optimizer here. With a step ``u`` at the rate lr:

        coupled       W ← W - lr (u + wd W)                  Optax's AdamW
        after         W ← W - lr u;   W ← W - lr wd W        the SOAP authors
        independent   W ← W - lr u - wd (lr / peak) W        the AdamW paper: wd is the share lost at the peak
        corrected     W ← W - lr (u + wd (lr / peak) W)      AdamC: for weights that a normalisation comes after
        cautious      W ← W - lr (u + wd W [u W > 0])        only what the step shrinks anyway

    A number in the place of it is "after" for the matrices of SOAP and its relatives, and "coupled" for all else.

    Args:
      weight_decay: wd, number or schedule.
      mode: one of these.
      peak_learning_rate: what "independent" and "corrected" divide the rate by. None: the rate, where that is a number;
        of a schedule the largest value cannot be known.

    Raises:
      ValueError: at construction, for another mode, or a number below 0; of the optimizer, where the peak is missing.

    Sources: Loshchilov and Hutter 2019 (arXiv 1711.05101); AdamC: Defazio 2025 (arXiv 2506.02285); cautious: Chen et
      al. 2025 (arXiv 2510.12402).

    Example:
      >>> import optax, fisher_optax as fo
      >>> rate = optax.cosine_decay_schedule(3e-3, 1000)
      >>> tx = fo.muon(rate, weight_decay=fo.Decay(0.1, "corrected", peak_learning_rate=3e-3))
    """

    weight_decay: optax.ScalarOrSchedule = 0.01
    mode: str = "coupled"
    peak_learning_rate: float | None = None

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        in_range("weight_decay", self.weight_decay, 0)
        one_of("mode", self.mode, MODES)
        if self.peak_learning_rate is not None:
            in_range("peak_learning_rate", self.peak_learning_rate, 0)

    @property
    def needs_peak(self) -> bool:
        """Whether the optimizer's rate has to be a number."""
        return self.mode in ("independent", "corrected") and self.peak_learning_rate is None

    def at(self, learning_rate: optax.ScalarOrSchedule, count: Int[Array, ""]) -> Array | float:
        """The share of the weights that a call takes away, where it takes any."""
        rate, decay = value_at(learning_rate, count), value_at(self.weight_decay, count)
        peak = learning_rate if self.peak_learning_rate is None else self.peak_learning_rate
        if self.mode == "independent":
            return decay * rate / peak
        return rate * decay * (rate / peak) if self.mode == "corrected" else rate * decay


WeightDecay: TypeAlias = optax.ScalarOrSchedule | Decay


def check_decay(learning_rate: optax.ScalarOrSchedule, weight_decay: WeightDecay) -> None:
    """A ValueError for what is out of range, or lacks the peak of a learning rate."""
    in_range("learning_rate", learning_rate, 0)
    if not isinstance(weight_decay, Decay):
        in_range("weight_decay", weight_decay, 0)
    elif weight_decay.needs_peak and not isinstance(learning_rate, int | float):
        raise ValueError(
            f"weight decay {weight_decay.mode!r} is in units of the largest learning rate, which a schedule or an "
            "array does not tell: pass fo.Decay(..., peak_learning_rate=...)."
        )


def stages(
    learning_rate: optax.ScalarOrSchedule, weight_decay: WeightDecay, mask: Mask
) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """Rate and decay, after a direction: of a number Optax's own."""
    rate = optax.scale_by_learning_rate(learning_rate)
    if isinstance(weight_decay, Decay):
        return rate, decayed_step(learning_rate, weight_decay, mask, lambda updates: True)
    return decayed_weights(weight_decay, mask), rate


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

    return add_decay(learning_rate, Decay(weight_decay, "after"), mask)


def add_decay(
    learning_rate: optax.ScalarOrSchedule, weight_decay: WeightDecay = 0.01, mask: Mask = None
) -> optax.GradientTransformationExtraArgs:
    """`fo.Decay` as a stage of a chain, the last one: it gets the whole step, rate and sign included.

    A call whose update is exactly zero everywhere is a skipped one, and is left alone.

    Args:
      learning_rate: number or schedule, the same as the step's.
      weight_decay: an `fo.Decay`; a number, or a schedule, is "coupled".
      mask: as in `optax.adamw`: a tree of booleans, or a function of params that makes one; True decays.

    Raises:
      ValueError: at construction, as `fo.Decay` says; in `update`, without ``params``.

    Example (the AdamW paper's decay, with Adam of Optax):
      >>> import optax, fisher_optax as fo
      >>> decay = fo.add_decay(3e-3, fo.Decay(1e-4, "independent"))
      >>> tx = optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(3e-3), decay)
    """
    check_decay(learning_rate, weight_decay)

    def moved(updates: PyTree) -> Array:
        return jnp.stack([jnp.any(u != 0) for u in jax.tree.leaves(updates)] or [jnp.asarray(False)]).any()

    decay = weight_decay if isinstance(weight_decay, Decay) else Decay(weight_decay)
    return decayed_step(learning_rate, decay, mask, moved)


def decayed_step(
    learning_rate: optax.ScalarOrSchedule, decay: Decay, mask: Mask, moved: Callable[[PyTree], Array | bool]
) -> optax.GradientTransformationExtraArgs:
    """`add_decay`, where ``moved(updates)`` says whether there was a step."""

    def update(updates: PyTree, state: PyTree, params: PyTree = None, **extra: PyTree) -> tuple[PyTree, DecayState]:
        del extra
        _require_params(params, "add_decay_after_step" if decay.mode == "after" else "add_decay")
        share, happened = decay.at(learning_rate, state.count), moved(updates)

        def of_leaf(u: ArrayLike, W: ArrayLike, decays: ArrayLike) -> Array:
            u, W = floating(u), floating(W)
            shrinks = happened & jnp.asarray(decays)
            if decay.mode == "cautious":
                shrinks = shrinks & (jnp.sign(u) * jnp.sign(W) < 0)
            decayed = u - jnp.asarray(share, u.dtype) * (W + u if decay.mode == "after" else W)
            return jnp.where(shrinks, decayed, u).astype(u.dtype)

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
