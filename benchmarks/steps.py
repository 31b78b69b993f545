"""Steps of methods that refresh every `PERIOD` steps: what their times are summed up to."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.flops import FlopCount
from benchmarks.results import spread

PERIOD = 10  # steps between refreshes, of every method that has them
WARM_UP = 2  # steps that are not counted: the first starts the bases
RATE = 1e-3


def flops_between_refreshes(count: FlopCount) -> int:
    """Where nothing is ever refreshed, or every step factorises, this is the costliest step."""
    between = count.most_without_factorisations
    return count.most if between is None else between


def flops_of_a_refresh(count: FlopCount) -> int:
    """The costliest step; where bases follow without an eigendecomposition, which then is the first one's, another."""
    later = count.costliest(without=("eigh",))
    return later.products if later is not None and later.factorisations else count.most


def mean_flops(count: FlopCount, between: int | None = None) -> float:
    """Of a step, refreshes spread over all; ``between`` of those that refresh nothing, where that is known better."""
    between = flops_between_refreshes(count) if between is None else between
    return between + (flops_of_a_refresh(count) - between) / PERIOD


def by_repeat(seconds: Sequence[float]) -> list[list[float]]:
    """Milliseconds, `PERIOD` steps a list: each holds every refresh once."""
    return [[1e3 * s for s in seconds[i : i + PERIOD]] for i in range(0, len(seconds), PERIOD)]


def means(seconds: Sequence[float]) -> list[float]:
    """Milliseconds a step, refreshes spread over all, one a repeat."""
    return [statistics.mean(repeat) for repeat in by_repeat(seconds)]


def medians(seconds: Sequence[float]) -> list[float]:
    """Milliseconds of the usual step, one a repeat."""
    return [statistics.median(repeat) for repeat in by_repeat(seconds)]


def slowest(seconds: Sequence[float]) -> list[float]:
    """Milliseconds of the slowest step, one a repeat."""
    return [max(repeat) for repeat in by_repeat(seconds)]


def ratio(mine: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
    """Of the medians; low and high are of the ratios of each repeat."""
    of_repeats = spread([a / b for a, b in zip(mine, others, strict=True)])
    return {**of_repeats, "median": statistics.median(mine) / statistics.median(others)}


def where(found: Mapping[str, Any]) -> str:
    """The machine of a result, in a few words for a title."""
    machine = found["machine"]
    return f"{machine['cores']} CPU cores" if machine["platform"] == "cpu" else machine["device"]
