"""A result that nobody measured, for what reads results."""

from typing import Any

from benchmarks.results import Column, result, spread, table

ENVIRONMENT = {
    "date": "2030-01-02",
    "platform": "cpu",
    "device": "cpu",
    "devices": 1,
    "cpu": "Abacus",
    "cores": 2,
    "load": 0.5,
    "python": "3.11.0",
    "versions": {"jax": "1.2.3"},
    "flags": {},
}
COLUMNS = {
    "label": Column("optimizer"),
    "ms": Column("step, ms", ".1f", spread=True),
    "saved": Column("saved", ".0%"),
    "state": Column("state"),
}


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
        environment=ENVIRONMENT,
        settings={"width": 8, "data": "none"},
        seeds=(0, 1),
    )
    return {**found, **changes}
