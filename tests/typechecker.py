"""Beartype as jaxtyping's type checker, each signature checked by one piece of code however often it is defined."""

from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin

from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray

# An int is a float, as it is to every type checker.
decorate = beartype(conf=BeartypeConf(is_pep484_tower=True))
checked: dict[Any, Callable[..., Any]] = {}


def spelled(annotation: Any) -> Any:
    """What annotations that mean the same have in common: jaxtyping makes a class each time one is evaluated."""
    if isinstance(annotation, type) and issubclass(annotation, AbstractArray):
        return AbstractArray, annotation.dtype, annotation.array_type, annotation.dim_str
    if isinstance(annotation, list):  # of a callable's arguments
        return tuple(map(spelled, annotation))
    origin = get_origin(annotation)
    return annotation if origin in (None, Literal) else (origin, *map(spelled, get_args(annotation)))


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with arguments and result checked.

    jaxtyping passes functions that return what they are passed, made anew from the signature whenever a ``def`` is
    run. Functions inside functions are defined at each call, and beartype takes longer to write and compile a check
    than the function to be traced: equal signatures share it. It is written at the first call, for a run of tests calls
    a part of the package.
    """
    written: list[Callable[..., Any]] = []

    def checking(*args: Any, **kwargs: Any) -> Any:
        if not written:
            written.append(shared(function))
        return written[0](*args, **kwargs)

    return checking


def shared(function: Callable[..., Any]) -> Callable[..., Any]:
    """The check of all functions that have this one's signature."""
    optional = len(function.__defaults__ or ()), *(function.__kwdefaults__ or ())
    annotations = tuple((name, spelled(annotation)) for name, annotation in function.__annotations__.items())
    signature = (function.__module__, function.__qualname__, function.__code__, optional, annotations)
    try:
        if signature not in checked:
            checked[signature] = decorate(function)
        return checked[signature]
    except TypeError:  # an annotation without a hash
        return decorate(function)
