"""What this project promises of its optimizers' steps, and whether a run of `step_time` bears it out."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.contenders import CONTENDERS
from benchmarks.results import Column
from benchmarks.steps import means, medians, ratio, slowest


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
COLUMNS = {
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
    for key, promise in PROMISES.items():
        if {promise.contender, promise.of} - set(OWN) <= set(rows):
            of_both = sides(promise, rows, times, compiles)
            found[key] = {
                "label": CONTENDERS[promise.contender].label,
                "what": WHAT[promise.what],
                "of": OWN.get(promise.of) or CONTENDERS[promise.of].label,
                "ratio": ratio(*of_both),
            }
            if at_most := promise.at_most.get((tree, platform)):
                found[key] |= {"at_most": at_most, "holds": found[key]["ratio"]["median"] <= at_most}
    return found


def sides(
    promise: Promise,
    rows: Mapping[str, Mapping[str, Any]],
    times: Mapping[str, Sequence[float]],
    compiles: Mapping[str, Sequence[float]],
) -> tuple[Sequence[float], Sequence[float]]:
    """What is divided by what, of each repeat."""
    if promise.what == "compile":
        pairs = list(zip(compiles[promise.contender], compiles[promise.of], strict=False))  # slow ones compile once
        return [mine for mine, _ in pairs], [other for _, other in pairs]
    taken = {"step": medians, "mean": means, "slowest": slowest}[promise.what]
    mine = taken(times[promise.contender])
    if promise.of == "usual":
        return mine, medians(times[promise.contender])
    if promise.of == "floor":
        row = rows[promise.contender]
        return mine, [row["floor_ms"] * row["step_gflop"] / row["mean_gflop"]] * len(mine)
    return mine, taken(times[promise.of])
