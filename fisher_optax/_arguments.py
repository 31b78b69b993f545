"""The arguments of factories: checked at construction, and told hyperparameters from what shapes the program."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, ParamSpec, TypeVar, get_args

import jax
import numpy as np
import optax


def value_at(value: object, count: object) -> Any:
    """The value of a number, or of a schedule at ``count``."""
    return value(count) if callable(value) else value


def in_range(name: str, value: object, low: float, high: float = float("inf")) -> None:
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


def require_transformation(name: str, tx: object) -> optax.GradientTransformation:
    """``tx``; a TypeError unless it is an Optax transformation."""
    if not isinstance(tx, optax.GradientTransformation | optax.GradientTransformationExtraArgs):
        raise TypeError(
            f"{name} must be an optax.GradientTransformation, e.g. optax.adamw(1e-3); got {type(tx).__name__}."
        )
    return tx


def hashable(f: Callable[..., Any]) -> Callable[..., Any]:
    """``f`` as a key of compiled programs. Where it has no hash, as dataclasses with ``==``, it becomes an object
    equal to itself alone: what was compiled of an equal f is not of one that has changed since.
    """
    try:
        hash(f)
    except TypeError:
        return functools.partial(f)
    return f


def one_of(name: str, value: object, known: tuple[object, ...]) -> None:
    """A ValueError unless ``value`` is one of those."""
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}; got {value!r}.")


def whole(name: str, value: object, least: int) -> None:
    """A ValueError unless ``value`` is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}; got {value!r}.")


# The arguments of factories: which are hyperparameters, to be traced or scheduled, and which shape the program.


P = ParamSpec("P")
T = TypeVar("T")
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
    "score_learning_rate",
    "regularization",
)


def static_args(factory: Callable[..., object]) -> tuple[str, ...]:
    """The arguments of a factory that must not be traced."""
    return tuple(name for name in inspect.signature(factory).parameters if name not in TRACED)


class Fixed(NamedTuple):
    """An argument that is no hyperparameter, so wrapped that it is neither a number nor a callable."""

    value: object


class FactorySignature(inspect.Signature):
    """A factory's signature, whose `bind` fills in the defaults and returns what is not to be traced as `Fixed`.

    `optax.inject_hyperparams` binds its arguments so. It makes an array of every number, a period or a block size too,
    and calls every callable, a mask too, as a schedule.
    """

    def bind(self, /, *args: object, **kwargs: object) -> inspect.BoundArguments:
        """The arguments of a call."""
        refuse_misplaced(self, kwargs)
        bound = super().bind(*args, **kwargs)
        bound.apply_defaults()
        for name, value in bound.arguments.items():
            if name not in TRACED and (callable(value) or isinstance(value, int | float | jax.Array | np.ndarray)):
                bound.arguments[name] = Fixed(value)
        return bound


def injectable(factory: Callable[P, T]) -> Callable[P, T]:
    """Let `optax.inject_hyperparams` take a factory as it is, without ``static_args``: see `FactorySignature`."""

    make: Callable[..., T] = factory

    def unwrapped(value: object) -> object:
        return value.value if isinstance(value, Fixed) else value

    signature = inspect.signature(factory)

    @functools.wraps(factory)
    def build(*args: P.args, **kwargs: P.kwargs) -> T:
        refuse_misplaced(signature, kwargs)
        return make(*map(unwrapped, args), **{name: unwrapped(value) for name, value in kwargs.items()})

    vars(build)["__signature__"] = FactorySignature(
        [*signature.parameters.values()], return_annotation=signature.return_annotation
    )
    return build


def refuse_misplaced(signature: inspect.Signature, names: Iterable[str]) -> None:
    """A TypeError for an argument that is a field of another one: of `fo.Storage`, say, where there is ``storage``."""
    for name in names:
        if name in signature.parameters:
            continue
        for parameter in signature.parameters.values():
            for option in get_args(parameter.annotation):
                if dataclasses.is_dataclass(option) and name in {field.name for field in dataclasses.fields(option)}:
                    kind = getattr(option, "__name__", "")
                    raise TypeError(
                        f"{name}= is a field of {parameter.name}=: pass {parameter.name}=fo.{kind}({name}=...)."
                    )
