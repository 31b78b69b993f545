"""Time of the optimizer's step alone, on the parameters of three GPTs, against other JAX optimizers.

    python -m benchmarks step_time --tree gpt2

A step is ``tx.update`` and ``optax.apply_updates``, with state and parameters donated and random gradients drawn
beforehand. All contenders take turns in one run. A repeat is ten steps, so that it contains each refresh once: their
median is the usual step, their mean spreads the refreshes over all. Where a step takes less than a millisecond, ten are
timed as one program. The floor is the flops of the method's own matrix products, without factorisations, at the best
rate of a product measured in the same run: in float32's own arithmetic, or in the parameters' type with whatever the
hardware does for it, as the method asks.
"""

import argparse
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure

from benchmarks import harness, pictures
from benchmarks.catalogue import listed, positive
from benchmarks.harness import PERIOD, WARM_UP
from benchmarks.results import Column, ratio, result, spread, table
from benchmarks.speed.contenders import CONTENDERS, Contender, build
from benchmarks.speed.promises import PROMISED, promises
from benchmarks.steps import MS, times_of
from benchmarks.trees import TREES, make_params, random_like
from experiments import peers

GRADIENTS = 4  # drawn beforehand, in turns: allocating them between steps would be timed as page faults in the step
SHORT = 1e-3  # seconds; below, Python's own share of a call shows
SIDES = {"cpu": 1536}  # of the square product whose rate is measured, long enough to reach it
# On two cores the others' first steps, an eigendecomposition of every factor, and refreshes would take half an hour.
ON_A_CPU = {"gpt2": ["adamw", "optax_muon", "fo_muon", "fo_soap"]}
COLUMNS = {
    "label": Column("optimizer"),
    "step_ms": MS._replace(title="step, ms"),
    "slowest_ms": MS._replace(title="slowest of ten, ms"),
    "mean_ms": MS._replace(title="mean of ten, ms"),
    "floor_ms": Column("its floor, ms"),
    "gemm_share": Column("share of the matrix rate", ".0%"),
    "over_optax_muon": Column("mean over optax.contrib.muon's", ".2f", spread=True),
    "over_adamw": Column("mean over AdamW's", ".1f", spread=True),
    "compile_s": Column("compile, s", ".2g"),
    "trace_s": Column("trace, s", ".2g"),
    "stablehlo_lines": Column("lines of StableHLO", "d"),
    "hlo_lines": Column("of HLO", "d"),
    "state": Column("state / parameters", ".3g"),
    "step_gflop": Column("step, GF", ".4g"),
    "mean_gflop": Column("mean of ten, GF", ".4g"),
    "note": Column("run with"),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tree", choices=list(TREES), default="small")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="parameters and gradients")
    parser.add_argument("--repeats", type=positive, default=3, help="tens of steps that are timed (%(default)s)")
    parser.add_argument("--only", type=listed(CONTENDERS), help=f"of {', '.join(CONTENDERS)}; default: all that fit")


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    tree, dtype, platform = TREES[options.tree], options.dtype, harness.environment()["platform"]
    shapes = make_params(tree, jnp.dtype(dtype))
    fitting = ON_A_CPU.get(options.tree, list(CONTENDERS)) if platform == "cpu" else list(CONTENDERS)
    with harness.compiling_anew():
        contenders, absent = build(options.only or fitting, shapes, jnp.dtype(dtype))
        absent |= peers.ABSENT | {
            name: "by default, for its time on a CPU" for name in CONTENDERS if not options.only and name not in fitting
        }
        products = matrix_products(tree.width, dtype, SIDES.get(platform, 8192))
        draw = jax.jit(lambda i: random_like(shapes, i))
        drawn = [jax.block_until_ready(draw(i)) for i in range(GRADIENTS)]
        times = take_turns(products, contenders, drawn, options.repeats, options.tree)
    rates = {key: [2e-9 * m * k * n / s for s in times[key]] for key, (_, (m, k, n)) in products.items()}
    exact, fast = best_rate(rates, "float32_exact"), best_rate(rates, dtype)
    rows = {key: describe(one, times[key], exact if one.exact else fast) for key, one in contenders.items()}
    compare(rows, times)
    compiles = {key: [program.compile_s for program in one.alone.programs] for key, one in contenders.items()}
    judged = promises(options.tree, platform, rows, times, compiles)
    sizes = {key: {"gflops": spread(r), "shape": " x ".join(map(str, products[key][1]))} for key, r in rates.items()}
    reasons = {key: {"reason": reason} for key, reason in absent.items()}
    suffix = "" if dtype == "float32" else f"_{dtype}"
    yield result(
        f"step_time_{options.tree}{suffix}_{platform}",
        f"The optimizer's step alone on the parameters of a GPT of {tree.layers} layers, {tree.width} wide",
        options.command,
        {
            "steps": table("Optimizer steps", COLUMNS, rows),
            "promises": table("Promises", PROMISED, judged),
            "rates": table(
                "Rates of matrix products",
                {"gflops": Column("GF/s", ".4g", spread=True), "shape": Column("shape")},
                sizes,
            ),
            "absent": table("Left out", {"reason": Column("left out")}, reasons),
        },
        settings={
            **tree._asdict(),
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(shapes)),
            "dtype": dtype,
            "repeats": options.repeats,
            "steps_a_repeat": PERIOD,
        },
    )


def matrix_products(width: int, dtype: str, side: int) -> dict[str, Any]:
    """Products whose rates are measured, by name: what runs one, and its sizes."""
    shapes = {"square": (side, side, side), "own": (width, width, 4 * width)}
    kinds = {"float32_exact": (jnp.float32, "highest"), dtype: (jnp.dtype(dtype), None)}
    return {
        f"{kind}_{key}": (harness.matrix_product(*mkn, dtype=given, precision=precision), mkn)
        for kind, (given, precision) in kinds.items()
        for key, mkn in shapes.items()
    }


def best_rate(rates: Mapping[str, Sequence[float]], kind: str) -> float:
    """GF/s, the better median of the two shapes."""
    return max(statistics.median(rates[f"{kind}_{shape}"]) for shape in ("square", "own"))


def take_turns(
    products: Mapping[str, Any], contenders: Mapping[str, Contender], drawn: Sequence[Any], repeats: int, progress: str
) -> dict[str, list[float]]:
    """Seconds a step of each contender, and a product of each kind, without the warm-up."""

    def give(i: int) -> Any:
        return drawn[i % len(drawn)]

    warm = harness.interleaved(contenders, WARM_UP, give, f"{progress}: warm-up")
    for key, contender in contenders.items():
        if warm[key][-1] < SHORT:
            contender.join_steps()
            contender(give(0))
    runs = {**{key: run for key, (run, _) in products.items()}, **contenders}
    times = harness.interleaved(runs, PERIOD * repeats, give, f"{progress}: step")
    steps = {key: contender.steps_a_call for key, contender in contenders.items()}
    return {key: [s / steps.get(key, 1) for s in seconds] for key, seconds in times.items()}


def describe(contender: Contender, seconds: Sequence[float], rate: float) -> dict[str, Any]:
    """One row of the results; ``rate`` in GF/s."""
    ms, flops = times_of(seconds), contender.mean_flops
    alone = contender.steps_a_call == 1 or flops == contender.between_flops
    floor = 1e-6 * flops / rate if flops else None
    return {
        "label": contender.row.label,
        "step_ms": spread(ms["step"]) if alone else None,
        "slowest_ms": spread(ms["slowest"]) if alone else None,
        "mean_ms": spread(ms["mean"]),
        "floor_ms": floor,
        "gemm_share": spread([floor / mean for mean in ms["mean"]]) if floor else None,
        **contender.size(),
    }


def compare(rows: Mapping[str, dict[str, Any]], times: Mapping[str, Sequence[float]]) -> None:
    """Add each row's mean time over that of the two yardsticks, where they ran."""
    for yardstick in ("optax_muon", "adamw"):
        if yardstick in rows:
            for key, row in rows.items():
                row[f"over_{yardstick}"] = ratio(times_of(times[key])["mean"], times_of(times[yardstick])["mean"])


def draw(found: Mapping[str, Any]) -> Figure:
    rows, settings = found["tables"]["steps"]["rows"], found["settings"]
    marks = {"floor_ms": "floor of the mean", "step_ms": "a step without a refresh"}
    title = f"{settings['parameters'] / 1e6:.3g}M parameters, {settings['dtype']}, {pictures.where(found)}"
    panel = pictures.Bars(rows, "mean_ms", "mean of ten steps, ms", marks, True, lambda name: name.startswith("fo_"))
    return pictures.bars(f"One optimizer step, {title}", panel)
