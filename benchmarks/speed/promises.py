"""What this project promises of its optimizers' steps, and whether a run of `step_time` bears it out."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.results import Column, ratio
from benchmarks.speed.contenders import CONTENDERS
from benchmarks.steps import times_of


class Promise(NamedTuple):
    """A ratio that is shown wherever both sides ran, and judged on some trees and platforms."""

    contender: str
    what: str  # "step" (without a refresh), "mean" (of ten steps), "slowest" (of ten) or "compile"
    of: str  # a contender, for the same of it; or "floor" or "usual", of its own step
    at_most: Mapping[tuple[str, str], float]


# On a CPU the products that both SOAPs need leave no room for half the time.
PROMISES = {
    "muon_step": Promise("fo_muon", "step", "optax_muon", {("small", "cpu"): 0.4, ("gpt2", "gpu"): 0.5}),
    "muon_compile": Promise("fo_muon", "compile", "optax_muon", {("deep", "cpu"): 0.6}),
    "soap_step": Promise("fo_soap", "step", "floor", {("small", "cpu"): 1.4}),
    "soap_mean": Promise("fo_soap", "mean", "soap_plain", {("gpt2", "gpu"): 0.5}),
    "soap_compile": Promise("fo_soap", "compile", "optax_muon", {("deep", "cpu"): 1.1}),
    "staggered_slowest": Promise("fo_soap_staggered", "slowest", "usual", {("small", "cpu"): 1.5}),
}
WHAT = {"step": "step", "mean": "mean of ten steps", "slowest": "slowest of ten steps", "compile": "compile"}
OWN = {"floor": "its matrix products at the matrix rate", "usual": "its own step"}
PROMISED = {
    "label": Column("optimizer"),
    "what": Column("what"),
    "of": Column("over that of"),
    "ratio": Column("ratio", ".2f", spread=True),
    "at_most": Column("at most, as promised", ".2g"),
    "holds": Column("holds"),
}


def promises(
    tree: str,
    platform: str,
    rows: Mapping[str, Mapping[str, Any]],
    times: Mapping[str, Sequence[float]],
    compiles: Mapping[str, Sequence[float]],
) -> dict[str, dict[str, Any]]:
    """Rows of the table, from those of the steps, all seconds a step, and all seconds of compiling."""
    found = {}
    for key, (contender, what, of, bounds) in PROMISES.items():
        if not {contender, of} - set(OWN) <= set(rows):
            continue
        if what == "compile":
            pairs = list(zip(compiles[contender], compiles[of], strict=False))  # slow ones compile once
            sides = [[pair[i] for pair in pairs] for i in range(2)]
        else:
            ms, row = times_of(times[contender])[what], rows[contender]
            if of == "floor":
                other = [row["floor_ms"] * row["step_gflop"] / row["mean_gflop"]] * len(ms)
            else:
                other = times_of(times[contender])["step"] if of == "usual" else times_of(times[of])[what]
            sides = [ms, other]
        cells = {"label": CONTENDERS[contender].label, "what": WHAT[what], "ratio": ratio(*sides)}
        found[key] = cells | {"of": OWN.get(of) or CONTENDERS[of].label}
        if at_most := bounds.get((tree, platform)):
            found[key] |= {"at_most": at_most, "holds": cells["ratio"]["median"] <= at_most}
    return found
