"""Errors at construction rather than at step 1,000."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

# What `optax.inject_hyperparams` may trace; everything else shapes the program.
TRACED = (
    "learning_rate",
    "b1",
    "b2",
    "eps",
    "weight_decay",
    "shampoo_beta",
    "beta",
    "momentum",
    "damping",
    "curvature_decay",
    "kl_clip",
)


def at(value: Any, count: Any) -> Any:
    """The value of a number, or of a schedule at ``count``."""
    return value(count) if callable(value) else value


class ScheduledState(NamedTuple):
    """State of `scheduled`, where there are schedules."""

    count: Int[Array, ""]
    inner: Any


def scheduled(factory: Callable[..., Any], **options: Any) -> optax.GradientTransformationExtraArgs:
    """An Optax transformation that takes numbers alone, with schedules evaluated at the call where there are any.

    `optax.inject_hyperparams` would keep the numbers in the state: an array that the caller still holds among them.
    """

    def now(count: Any) -> optax.GradientTransformationExtraArgs:
        return optax.with_extra_args_support(factory(**{name: at(value, count) for name, value in options.items()}))

    def init(params: Any) -> ScheduledState:
        count = jnp.zeros([], jnp.int32)
        return ScheduledState(count, now(count).init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, ScheduledState]:
        updates, inner = now(state.count).update(updates, state.inner, params, **extra)
        return updates, ScheduledState(state.count + 1, inner)

    return optax.GradientTransformationExtraArgs(init, update) if any(map(callable, options.values())) else now(None)


def static_args(factory: Callable[..., Any]) -> tuple[str, ...]:
    """The arguments of a factory that must not be traced."""
    return tuple(name for name in inspect.signature(factory).parameters if name not in TRACED)


def takes(other: Callable[..., Any], **defaults: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let a function of ``**options`` take the arguments of ``other`` too, with their defaults or the ones given here,
    and show them in its signature.
    """

    def wrap(f: Callable[..., Any]) -> Callable[..., Any]:
        theirs = inspect.signature(other).parameters.values()
        own = [p for p in inspect.signature(f).parameters.values() if p.kind is p.KEYWORD_ONLY]
        shared = [p.replace(default=defaults.get(p.name, p.default)) for p in theirs]
        signature = inspect.signature(f).replace(parameters=[*shared, *own])

        @functools.wraps(f)
        def call(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return f(**bound.arguments)

        vars(call)["__signature__"] = signature
        return call

    return wrap


def in_range(name: str, value: Any, low: float, high: float = float("inf")) -> None:
    """A ValueError unless a plain number lies in ``[low, high)``; schedules and traced values pass, strings and the
    like are a TypeError.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        if isinstance(value, str | bytes | list | tuple | dict | bool):
            raise TypeError(f"{name} must be a number, an array or a schedule; got {value!r}.")
        return
    if not low <= value < high:
        raise ValueError(
            f"{name} must be at least {low}{'' if high == float('inf') else f' and below {high}'}; got {value!r}."
        )
