"""Time of the optimizer's step alone, on the parameters of three GPTs, against other JAX optimizers.

    python -m benchmarks step_time --tree small --repeats 1

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
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from benchmarks import harness, step_promises
from benchmarks.contenders import CONTENDERS, Contender, build
from benchmarks.results import Column, result, spread, table
from benchmarks.steps import PERIOD, WARM_UP, means, medians, ratio, slowest, where
from benchmarks.trees import TREES, make_params, random_like

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GRADIENTS = 4  # drawn beforehand, in turns: allocating them between steps would be timed as page faults in the step
SHORT = 1e-3  # seconds; below, Python's own share of a call shows
SIDES = {"cpu": 1536}  # of the square product whose rate is measured, long enough to reach it
REPEATS = {"small": 3, "deep": 3, "gpt2": 1}
# On two cores the others' first steps, an eigendecomposition of every factor, and refreshes would take half an hour.
ON_A_CPU = {"gpt2": ("adamw", "optax_muon", "fo_muon", "fo_soap")}
MS = Column("", ".3g", spread=True)
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
RATES = {"gflops": Column("GF/s", ".4g", spread=True), "shape": Column("shape")}
ABSENT = {"reason": Column("left out")}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tree", default=",".join(TREES), help="by commas (default: %(default)s)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="parameters and gradients")
    parser.add_argument("--repeats", type=int, help=f"tens of steps that are timed (default: {REPEATS})")
    parser.add_argument("--only", help=f"contenders, by commas, of {', '.join(CONTENDERS)} (default: all that fit)")


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    trees, only = options.tree.split(","), options.only.split(",") if options.only else []
    for kind, given, known in (("--tree", trees, TREES), ("--only", only, CONTENDERS)):
        if unknown := set(given) - set(known):
            raise SystemExit(f"{kind} got {', '.join(sorted(unknown))}; known are {', '.join(known)}")
    if options.repeats is not None and options.repeats < 1:
        raise SystemExit(f"--repeats must be at least 1; got {options.repeats}")
    with harness.compiling_anew():
        for name in trees:
            yield of_tree(name, options.dtype, only, options.repeats or REPEATS[name])


def of_tree(name: str, dtype: str, only: Sequence[str], repeats: int) -> dict[str, Any]:
    """The result of one tree; ``only`` empty for the contenders that fit the machine."""
    tree, surroundings = TREES[name], harness.environment()
    on_cpu = surroundings["platform"] == "cpu"
    shapes = make_params(tree, jnp.dtype(dtype))
    chosen = only or (ON_A_CPU.get(name, tuple(CONTENDERS)) if on_cpu else tuple(CONTENDERS))
    contenders, absent = build(chosen, shapes, jnp.dtype(dtype))
    absent |= {left: "by default, for its time on a CPU" for left in CONTENDERS if not only and left not in chosen}
    products = matrix_products(tree.width, dtype, SIDES.get(surroundings["platform"], 8192))
    draw = jax.jit(lambda i: random_like(shapes, i))
    drawn = [jax.block_until_ready(draw(i)) for i in range(GRADIENTS)]
    times = take_turns(products, contenders, drawn, repeats, name)
    rates = {key: [2e-9 * m * k * n / s for s in times[key]] for key, (_, (m, k, n)) in products.items()}
    exact, fast = best_rate(rates, "float32_exact"), best_rate(rates, dtype)
    rows = {
        key: describe(contender, times[key], exact if contender.exact else fast)
        for key, contender in contenders.items()
    }
    compare(rows, times)
    compiling = {key: contender.compile_s for key, contender in contenders.items()}
    promised = step_promises.promises(name, surroundings["platform"], rows, times, compiling)
    suffix = "" if dtype == "float32" else f"_{dtype}"
    return result(
        f"step_time_{name}{suffix}_{surroundings['platform']}",
        f"The optimizer's step alone on the parameters of a GPT of {tree.layers} layers, {tree.width} wide",
        f"python -m benchmarks step_time --tree {name} --dtype {dtype}" + (f" --only {','.join(only)}" if only else ""),
        {
            "steps": table("Optimizer steps", COLUMNS, rows),
            "promises": table("Promises", step_promises.COLUMNS, promised),
            "rates": table("Rates of matrix products", RATES, described_rates(rates, products)),
            "absent": table("Left out", ABSENT, {key: {"reason": reason} for key, reason in absent.items()}),
        },
        environment=surroundings,
        settings={
            **tree._asdict(),
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(shapes)),
            "dtype": dtype,
            "repeats": repeats,
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
    mean, flops = means(seconds), contender.mean_flops
    alone = contender.steps_a_call == 1 or contender.mean_flops == contender.between_flops
    floor = 1e-6 * flops / rate if flops else None
    return {
        "label": contender.row.label,
        "step_ms": spread(medians(seconds)) if alone else None,
        "slowest_ms": spread(slowest(seconds)) if alone else None,
        "mean_ms": spread(mean),
        "floor_ms": floor,
        "gemm_share": spread([floor / ms for ms in mean]) if floor else None,
        **contender.size(),
    }


def compare(rows: Mapping[str, dict[str, Any]], times: Mapping[str, Sequence[float]]) -> None:
    """Add each row's mean time over that of the two yardsticks, where they ran."""
    for yardstick in ("optax_muon", "adamw"):
        if yardstick in rows:
            for key, row in rows.items():
                row[f"over_{yardstick}"] = ratio(means(times[key]), means(times[yardstick]))


def described_rates(rates: Mapping[str, Sequence[float]], products: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: {"gflops": spread(values), "shape": " x ".join(map(str, products[key][1]))}
        for key, values in rates.items()
    }


def draw(found: Mapping[str, Any]) -> "Figure":
    """Bars of the mean of ten steps, with the usual one and the floor marked."""
    from matplotlib.figure import Figure

    rows, settings = found["tables"]["steps"]["rows"], found["settings"]
    figure = Figure(figsize=(8, 1.6 + 0.32 * len(rows)), layout="constrained")
    axes, places = figure.subplots(), range(len(rows))
    ms = [row["mean_ms"] for row in rows.values()]
    ends = [[t["median"] - t["low"] for t in ms], [t["high"] - t["median"] for t in ms]]
    labels = [row["label"].replace("`", "") for row in rows.values()]
    ours = ["C0" if name.startswith("fo_") else "0.7" for name in rows]
    axes.barh(
        places, [t["median"] for t in ms], xerr=ends, color=ours, ecolor="0.3", label="mean of ten steps, ours in blue"
    )
    for key, marker, label in (("step_ms", "o", "a step without a refresh"), ("floor_ms", "|", "floor of the mean")):
        marks = [(row[key]["median"] if isinstance(row[key], dict) else row[key], i)
                 for i, row in enumerate(rows.values()) if row.get(key)]  # fmt: skip
        x, y = zip(*marks, strict=True) if marks else ((), ())
        axes.scatter(x, y, marker=marker, color="black", s=30, zorder=3, label=label)
    axes.set(xscale="log", xlabel="ms, logarithmic", yticks=places, yticklabels=labels)
    axes.invert_yaxis()
    axes.grid(alpha=0.3, axis="x")
    size = f"{settings['parameters'] / 1e6:.3g}M parameters, {settings['dtype']}"
    axes.set_title(f"One optimizer step, {size}, {where(found)}")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure
