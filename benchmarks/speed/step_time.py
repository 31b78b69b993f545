"""Time of the optimizer's step alone, on the parameters of three GPTs, against other JAX optimizers.

    python -m benchmarks step_time --tree gpt2

A step is ``tx.update`` and ``optax.apply_updates``, with state and parameters donated and random gradients drawn
beforehand. All contenders take turns in one run. A repeat is ten steps, so that it contains each refresh once: their
median is the usual step, their mean spreads the refreshes over all. The floor is the flops of the method's own matrix
products, without factorisations, at the best rate of a product measured in the same run.
"""

import argparse
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import harness
from benchmarks.catalogue import listed, positive
from benchmarks.harness import PERIOD, WARM_UP
from benchmarks.results import columns, ratio, result, spread, table
from benchmarks.speed.contenders import CONTENDERS, build
from benchmarks.steps import Stepper, mean_flops, ordinary, times_of
from benchmarks.trees import TREES, make_params, random_like
from experiments import peers

GRADIENTS = 4  # drawn beforehand, in turns: allocating them between steps would be timed as page faults in the step
SIDES = {"cpu": 1536}  # of the square product whose rate is measured, long enough to reach it
# On two cores the others' first steps, an eigendecomposition of every factor, and refreshes would take half an hour.
ON_A_CPU = {"gpt2": ["adamw", "optax_muon", "fo_muon", "fo_soap"]}
COLUMNS = columns(
    "label: optimizer; step_ms: step, ms ±; slowest_ms: slowest of ten, ms ±; mean_ms: mean of ten, ms ±;"
    "floor_ms: its floor, ms; gemm_share: share of the matrix rate | .0%;"
    "over_optax_muon: mean over optax.contrib.muon's | .2f ±; over_adamw: mean over AdamW's | .1f ±;"
    "compile_s: compile, s | .2g; trace_s: trace, s | .2g;"
    "state: state / parameters; step_gflop: step, GF | .4g; mean_gflop: mean of ten, GF | .4g"
)
PROMISED = columns(
    "label: optimizer; what: what; of: over that of; ratio: ratio | .2f ±; at_most: at most, as promised | .2g;"
    "holds: holds"
)


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


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tree", choices=list(TREES), default="small")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="parameters and gradients")
    parser.add_argument("--repeats", type=positive, default=3, help="tens of steps that are timed (%(default)s)")
    parser.add_argument("--only", type=listed(CONTENDERS), help=f"of {', '.join(CONTENDERS)}; default: all that fit")


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    tree, dtype, platform = TREES[options.tree], jnp.dtype(options.dtype), harness.environment()["platform"]
    shapes = make_params(tree, dtype)
    fitting = ON_A_CPU.get(options.tree, list(CONTENDERS)) if platform == "cpu" else list(CONTENDERS)
    with harness.compiling_anew():
        steppers, absent = build(options.only or fitting, shapes, dtype)
    absent |= peers.ABSENT | {name: "by default, for its time on a CPU" for name in CONTENDERS if name not in fitting}
    side = SIDES.get(platform, 8192)
    sizes = {"square": (side, side, side), "own": (tree.width, tree.width, 4 * tree.width)}
    products = {name: harness.matrix_product(*mkn, dtype=dtype) for name, mkn in sizes.items()}
    drawn = [jax.block_until_ready(jax.jit(random_like, static_argnums=1)(shapes, i)) for i in range(GRADIENTS)]
    harness.interleaved(steppers, WARM_UP, lambda i: drawn[i], f"{options.tree}: warm-up")
    turns = {**products, **steppers}
    times = harness.interleaved(
        turns, PERIOD * options.repeats, lambda i: drawn[i % GRADIENTS], f"{options.tree}: step"
    )
    rates = {name: [2e-9 * m * k * n / s for s in times[name]] for name, (m, k, n) in sizes.items()}
    best = max(statistics.median(of) for of in rates.values())
    rows = {name: describe(name, stepper, times[name], best) for name, stepper in steppers.items()}
    compare(rows, times)
    compiles = {name: [program.compile_s for program in stepper.programs] for name, stepper in steppers.items()}
    reasons = {name: {"reason": reason} for name, reason in absent.items() if not options.only or name in options.only}
    speeds = {name: {"gflops": spread(of), "shape": " x ".join(map(str, sizes[name]))} for name, of in rates.items()}
    yield result(
        f"step_time_{options.tree}{'' if options.dtype == 'float32' else '_bfloat16'}_{platform}",
        f"The optimizer's step alone on the parameters of a GPT of {tree.layers} layers, {tree.width} wide",
        options.command,
        {
            "steps": table("Optimizer steps", COLUMNS, rows),
            "promises": table("Promises", PROMISED, promises(options.tree, platform, rows, times, compiles)),
            "rates": table("Rates of matrix products", columns("gflops: GF/s | .4g ±; shape: shape"), speeds),
            "absent": table("Left out", columns("reason: left out"), reasons),
        },
        settings={
            **tree._asdict(),
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(shapes)),
            "dtype": options.dtype,
            "repeats": options.repeats,
            "steps_a_repeat": PERIOD,
        },
    )


def describe(name: str, stepper: Stepper, seconds: Sequence[float], rate: float) -> dict[str, Any]:
    """One row of the results; ``rate`` in GF/s. No floor where a loop's length is not in the program."""
    ms, flops, row = times_of(seconds), stepper.flops, CONTENDERS[name]
    between = flops.least if row.plain_refresh else ordinary(flops).products
    mean = None if flops.unread_loops else mean_flops(flops, between)
    floor, (state, params) = 1e-6 * mean / rate if mean else None, stepper.carried
    return {
        "label": row.label,
        **{f"{key}_ms": spread(values) for key, values in ms.items()},
        "floor_ms": floor,
        "gemm_share": spread([floor / x for x in ms["mean"]]) if floor else None,
        **stepper.compiling(),
        "state": harness.nbytes(state) / harness.nbytes(params),
        "step_gflop": between / 1e9,
        "mean_gflop": None if mean is None else mean / 1e9,
    }


def compare(rows: Mapping[str, dict[str, Any]], times: Mapping[str, Sequence[float]]) -> None:
    """Add each row's mean time over that of the two yardsticks, where they ran."""
    means = {name: times_of(times[name])["mean"] for name in rows}
    for yardstick in {"optax_muon", "adamw"} & rows.keys():
        for name, row in rows.items():
            row[f"over_{yardstick}"] = ratio(means[name], means[yardstick])


def promises(
    tree: str,
    platform: str,
    rows: Mapping[str, Mapping[str, Any]],
    times: Mapping[str, Sequence[float]],
    compiles: Mapping[str, Sequence[float]],
) -> dict[str, dict[str, Any]]:
    """Rows of a table, from those of the steps, all seconds a step, and all seconds of compiling."""
    found = {}
    for key, (name, what, of, bounds) in PROMISES.items():
        if not {name, of} - OWN.keys() <= rows.keys():
            continue
        if what == "compile":
            sides = tuple(zip(*zip(compiles[name], compiles[of], strict=False), strict=True))  # slow ones compile once
        else:
            ms, row = times_of(times[name]), rows[name]
            other = times_of(times[of])[what] if of not in OWN else ms["step"]
            if of == "floor":
                other = [row["floor_ms"] * row["step_gflop"] / row["mean_gflop"]] * len(other)
            sides = (ms[what], other)
        cells = {"label": CONTENDERS[name].label, "what": WHAT[what], "ratio": ratio(*sides)}
        found[key] = cells | {"of": OWN.get(of) or CONTENDERS[of].label}
        if at_most := bounds.get((tree, platform)):
            found[key] |= {"at_most": at_most, "holds": cells["ratio"]["median"] <= at_most}
    return found
