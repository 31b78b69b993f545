"""A result that nobody measured, for what reads results; and cells of results by their paths."""

from collections.abc import Mapping
from typing import Any

from benchmarks.results import columns, middle, result, spread, table

MACHINE = {"platform": "cpu", "device": "cpu", "devices": 1, "cpu": "Abacus", "cores": 2, "load": 0.5}
MACHINE |= {"python": "3.11.0", "flags": {}}
COLUMNS = columns("label: optimizer; ms: step, ms | .1f ±; saved: saved | .0%; state: state")


def made_up(
    name: str = "step_time_cpu", times: tuple[float, ...] = (72.0, 74.0, 79.0), **changes: Any
) -> dict[str, Any]:
    """Two rows, of which the second has no time."""
    rows = {
        "fo_soap": {"label": "`fo.soap` | every 10", "ms": spread(times), "saved": -0.0512, "state": 1234.5},
        "adamw": {"label": None, "ms": None, "saved": 0.125, "state": "none"},
    }
    found = result(
        name,
        "Steps that nobody timed.",
        "python -m benchmarks step_time --tree none",
        {"steps": table("Steps", COLUMNS, rows)},
        settings={"width": 8, "data": "none"},
        seeds=(0, 1),
    )
    return {**found, "date": "2030-01-02", "machine": MACHINE, "versions": {"jax": "1.2.3"}, **changes}


def lookup(found: Mapping[str, Any], path: str) -> Any:
    """The number, or text, at ``table/row/column`` or ``table/row/column/low``; of a spread, the median.

    Raises:
        KeyError: there is none; the message lists what there is at the first part that is missing.
    """
    place: Any = {key: part["rows"] for key, part in found["tables"].items()}
    for part in path.split("/"):
        if not isinstance(place, Mapping) or part not in place:
            there = ", ".join(place) if isinstance(place, Mapping) else repr(place)
            raise KeyError(f"{found['name']} has no {part!r} of {path!r}; there is {there}")
        place = place[part]
    return middle(place)
