"""How well a step of orthogonal iteration follows factors of conditions 1e2 to 1e6, by QR and by Cholesky factors.

`experiments.following_bases` says what factors these are, and what the error is. Times are of one step, and methods
take turns.
"""

import argparse
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks import harness, pictures, results
from benchmarks.catalogue import positive
from benchmarks.results import Column, spread
from experiments.following_bases import DECAY, LAST, METHODS, STEPS, TURN, drifting, followed

SIDES, CONDITIONS, RANKS = (96, 192), (1e2, 1e4, 1e6), (None, 8, 2)  # None: twice the side
TIMED_SIDES, TIMED_CONDITION = (192, 768), 1e4
LABELS = {"qr": "QR", "cholesky": "Cholesky", "eigh": "eigh"}
TIMES = {"label": Column("method"), **{f"ms_{side}": Column(f"side {side}, ms", spread=True) for side in TIMED_SIDES}}
FOLLOWED = {
    "label": Column("side, condition, rank a step"),
    **{name: Column(label, spread=True) for name, label in LABELS.items()},
    "ratio": Column("Cholesky / QR", ".2f"),
    "failed": Column("Cholesky: failed", "d"),
}


def timed(side: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of a step of each method."""
    A, programs = jnp.asarray(drifting(side, TIMED_CONDITION, 8, 0)[-1]), {m: jax.jit(f) for m, f in METHODS.items()}
    Q = functools.reduce(lambda Q, _: programs["qr"](A, Q), range(10), jnp.eye(side))
    runs = {name: lambda Q, program=program: program(A, Q) for name, program in programs.items()}
    harness.interleaved(runs, 1, lambda _: Q)
    return harness.interleaved(runs, rounds, lambda _: Q, f"side {side}, round")


def name_of(side: int, condition: float, rank: int | None) -> str:
    """Of a row."""
    return f"{side}_1e{round(np.log10(condition))}_{rank or 'full'}"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=positive, default=3, help="how many")
    parser.add_argument("--rounds", type=positive, default=21, help="of timed steps")


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    times, rows = {side: timed(side, options.rounds) for side in TIMED_SIDES}, {}
    for side, rank, condition in tqdm([*itertools.product(SIDES, RANKS, CONDITIONS)]):
        factors = [drifting(side, condition, rank, seed) for seed in range(options.seeds)]
        found = {name: [followed(name, Ls) for Ls in factors] for name in METHODS}
        errors = {method: spread([error for error, _ in seeds]) for method, seeds in found.items()}
        ratio, failed = errors["cholesky"]["median"] / errors["qr"]["median"], sum(n for _, n in found["cholesky"])
        name = name_of(side, condition, rank)
        rows[name] = {"label": name.replace("_", ", "), **errors, "ratio": ratio, "failed": failed}
    ms = {
        name: {"label": label, **{f"ms_{side}": spread([1e3 * s for s in of[name]]) for side, of in times.items()}}
        for name, label in LABELS.items()
    }
    platform = harness.environment()["platform"]
    yield results.result(
        "orthogonal_iteration_cpu" if platform == "cpu" else "orthogonal_iteration",
        "How well a step of orthogonal iteration follows drifting factors, by condition and rank, and its time.",
        options.command,
        {
            "error": results.table("Off-diagonal mass after a step", FOLLOWED, rows),
            "time": results.table("One step", TIMES, ms),
        },
        settings={"decay": DECAY, "steps": STEPS, "last": LAST, "turn": TURN, "timed_condition": TIMED_CONDITION},
        seeds=range(options.seeds),
    )


def draw(found: dict[str, Any]) -> Figure:
    """Errors over conditions, by side and rank, in the band of the seeds."""
    figure, rows = Figure(figsize=(11, 7), layout="constrained"), found["tables"]["error"]["rows"]
    axes = figure.subplots(len(SIDES), len(RANKS), sharex=True, sharey=True)
    for ax, (side, rank) in zip(axes.flat, itertools.product(SIDES, RANKS), strict=True):
        # Two lines that often coincide: the upper one is broken.
        for name, style in (("qr", "C0-o"), ("cholesky", "C1:o")):
            cells = [rows[name_of(side, condition, rank)][name] for condition in CONDITIONS]
            pictures.line(ax, CONDITIONS, cells, style, label=LABELS[name], markersize=4)
        ax.set(xscale="log", yscale="log", title=f"side {side}, {f'rank {rank}' if rank else 'full rank'} a step")
        pictures.plain_ticks(ax)
    axes[1, 1].set_xlabel("condition of the covariance")
    axes[0, 0].set_ylabel("off-diagonal mass")
    axes[0, 0].legend(frameon=False)
    figure.suptitle(f"Bases that follow drifting factors, medians of {len(found['seeds'])} seeds")
    return figure
