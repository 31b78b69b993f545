"""Errors at construction rather than at step 1,000."""

from typing import Any


def value_at(value: Any, count: Any) -> Any:
    """The value of a number, or of a schedule at ``count``."""
    return value(count) if callable(value) else value


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


def one_of(name: str, value: Any, known: tuple[Any, ...]) -> None:
    """A ValueError unless ``value`` is one of those."""
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}; got {value!r}.")


def whole(name: str, value: Any, least: int) -> None:
    """A ValueError unless ``value`` is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}; got {value!r}.")
