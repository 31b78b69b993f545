"""The words of test cases, one by one, as the optimizers take them: in a `fo.Refresh` and a `fo.Storage`."""

from typing import Any

import fisher_optax as fo

REFRESH = {
    "refresh": "when",
    "adaptive_tolerance": "tolerance",
    "decomposition": "decomposition",
    "root": "decomposition",
    "transport": "transport",
    "first_step": "first_step",
    "before_step": "before_step",
}
STORAGE = ("factor_dtype", "packed", "momentum_dtype", "sides", "block_size", "rank", "mesh_axis")


def grouped(**words: Any) -> dict[str, Any]:
    """The same options, those that belong together in one object."""
    refresh = {REFRESH[name]: words.pop(name) for name in REFRESH if name in words}
    storage = {name: words.pop(name) for name in STORAGE if name in words}
    if words.pop("trace_scaling", False):
        words["accumulate"] = "scaled_mean"
    if refresh:
        words["refresh"] = fo.Refresh(**refresh)
    if storage:
        words["storage"] = fo.Storage(**storage)
    return words
