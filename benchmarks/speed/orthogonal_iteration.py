"""How well a step of orthogonal iteration follows factors of conditions 1e2 to 1e6, by QR and by Cholesky factors.

Factors are the means at .95 of ``G Gᵀ``, one G a step, of a covariance with a geometric spectrum whose eigenvectors
turn; G has more columns than rows, or eight, or two, and then the factor has a condition far above the covariance's. A
basis starts at the identity and is renewed at every step. The error is the off-diagonal mass of ``D^-½ Qᵀ L Q D^-½``, D
its diagonal, by the root of the side, the mean of the last steps: small eigenvalues count as much as large ones.
"Before" is what "cholesky" was: two passes of CholeskyQR for ``(L + 1e-3 |L| I) Q``, whose shift holds back every
smaller eigenvalue. Times are of one step, and methods take turns.
"""

import argparse
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks import harness, pictures, results
from benchmarks.catalogue import positive
from benchmarks.results import Column
from fisher_optax import linalg

SIDES, CONDITIONS, RANKS = (96, 192), (1e2, 1e4, 1e6), (None, 8, 2)  # None: twice the side
DECAY, STEPS, LAST, TURN = 0.95, 120, 20, 0.01  # radians a step, of the plane that turns the most
TIMED_SIDES, TIMED_CONDITION = (192, 768), 1e4
LABELS = {"qr": "QR", "cholesky": "Cholesky", "before": "Cholesky, before", "eigh": "eigh"}


def before(A: jax.Array, Q: jax.Array) -> jax.Array:
    """ "cholesky" as it was."""

    def cholesky_qr(M: jax.Array) -> jax.Array:
        L = jax.lax.linalg.cholesky(jnp.matmul(M.T, M, precision="highest"), symmetrize_input=False)
        return jax.lax.linalg.triangular_solve(L, M, lower=True, transpose_a=True)

    P = linalg.project(A, Q)
    M = (P + 1e-3 * jnp.linalg.norm(P) * Q)[:, linalg.descending(Q, P)]
    return cholesky_qr(cholesky_qr(M / jnp.linalg.norm(M, axis=0)))


METHODS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "qr": functools.partial(linalg.orthogonal_iteration, method="qr"),
    "cholesky": functools.partial(linalg.orthogonal_iteration, method="cholesky"),
    "before": before,
    "eigh": lambda A, Q: linalg.eigenbasis(A),
}


def drifting(side: int, condition: float, rank: int | None, seed: int) -> np.ndarray:
    """The factors of all steps."""
    rng, columns = np.random.default_rng(seed), rank or 2 * side
    V = np.linalg.qr(rng.standard_normal((side, side)))[0]
    turn = rng.standard_normal((side, side))
    turn = scipy.linalg.expm(TURN * (turn - turn.T) / np.linalg.norm(turn - turn.T, 2))
    L, factors = np.zeros((side, side)), []
    for _ in range(STEPS):
        G = (V * np.geomspace(1, condition**-0.5, side)) @ rng.standard_normal((side, columns))
        L = DECAY * L + (1 - DECAY) * G @ G.T / columns
        V = turn @ V
        factors.append(L.astype(np.float32))
    return np.stack(factors)


@functools.cache
def follower(name: str) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    """The bases of all steps, and which of these gave none and kept the one before."""

    def one(Q: jax.Array, L: jax.Array) -> Any:
        kept, failed = linalg.keep_last_good(METHODS[name](L, Q), Q)
        return kept, (kept, failed)

    return jax.jit(lambda Ls: jax.lax.scan(one, jnp.eye(Ls.shape[-1]), Ls)[1])


def off_diagonal(L: np.ndarray, Q: np.ndarray) -> float:
    B = Q.T @ L @ Q
    scale = np.sqrt(np.maximum(np.diag(B), np.finfo(float).tiny))
    B /= np.outer(scale, scale)
    return float(np.linalg.norm(B - np.diag(np.diag(B))) / len(B) ** 0.5)


def followed(name: str, Ls: np.ndarray) -> dict[str, float]:
    bases, failed = map(np.asarray, follower(name)(jnp.asarray(Ls)))
    bases, Ls = bases.astype(float), Ls.astype(float)
    return {
        "error": float(np.mean([off_diagonal(L, Q) for L, Q in zip(Ls[-LAST:], bases[-LAST:], strict=True)])),
        "failed": int(failed.sum()),
        "apart": max(float(np.abs(Q.T @ Q - np.eye(len(Q))).max()) for Q in bases),
    }


def timed(side: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of a step of each method."""
    A = jnp.asarray(drifting(side, TIMED_CONDITION, 8, 0)[-1])
    step = jax.jit(METHODS["qr"])
    Q = functools.reduce(lambda Q, _: step(A, Q), range(10), jnp.eye(side))
    programs = {name: jax.jit(method) for name, method in METHODS.items()}
    runs = {name: lambda Q, program=program: program(A, Q) for name, program in programs.items()}
    harness.interleaved(runs, 1, lambda _: Q)
    return harness.interleaved(runs, rounds, lambda _: Q, f"side {side}, round")


def row(side: int, condition: float, rank: int | None) -> str:
    exponent = round(np.log10(condition))
    return f"{side}_1e{exponent}_{'full' if rank is None else rank}"


TIMES = {"label": Column("method"), **{f"ms_{side}": Column(f"side {side}, ms", spread=True) for side in TIMED_SIDES}}
FOLLOWED = {
    "label": Column("side, condition, rank a step"),
    **{name: Column(label, spread=True) for name, label in LABELS.items()},
    "ratio": Column("Cholesky / QR", ".2f"),
    "ratio_before": Column("before / QR", ".2f"),
    "failed": Column("Cholesky: failed", "d"),
    "failed_before": Column("before: failed", "d"),
    "apart": Column("Cholesky: largest entry of QᵀQ - I", ".1e"),
}


def tables(
    found: Mapping[str, Mapping[str, list[dict[str, float]]]], times: Mapping[int, Mapping[str, list[float]]]
) -> dict[str, Any]:
    """Of what `followed` found for each row, method and seed, and of seconds for each side and method."""
    rows = {}
    for name, methods in found.items():
        errors = {method: results.spread([seed["error"] for seed in seeds]) for method, seeds in methods.items()}
        rows[name] = {
            "label": name.replace("_", ", "),
            **errors,
            "ratio": errors["cholesky"]["median"] / errors["qr"]["median"],
            "ratio_before": errors["before"]["median"] / errors["qr"]["median"],
            "failed": sum(int(seed["failed"]) for seed in methods["cholesky"]),
            "failed_before": sum(int(seed["failed"]) for seed in methods["before"]),
            "apart": max(seed["apart"] for seed in methods["cholesky"]),
        }
    cells = {
        name: {"label": label}
        | {f"ms_{side}": results.spread([1e3 * s for s in seconds[name]]) for side, seconds in times.items()}
        for name, label in LABELS.items()
    }
    return {
        "error": results.table("Off-diagonal mass after a step", FOLLOWED, rows),
        "time": results.table("One step", TIMES, cells),
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=positive, default=3, help="how many")
    parser.add_argument("--rounds", type=positive, default=21, help="of timed steps")


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    times, found = {side: timed(side, options.rounds) for side in TIMED_SIDES}, {}
    for side, rank, condition in tqdm([*itertools.product(SIDES, RANKS, CONDITIONS)]):
        factors = [drifting(side, condition, rank, seed) for seed in range(options.seeds)]
        found[row(side, condition, rank)] = {name: [followed(name, Ls) for Ls in factors] for name in METHODS}
    platform = harness.environment()["platform"]
    yield results.result(
        "orthogonal_iteration_cpu" if platform == "cpu" else "orthogonal_iteration",
        "How well a step of orthogonal iteration follows drifting factors, by condition and rank, and its time.",
        options.command,
        tables(found, times),
        settings={"decay": DECAY, "steps": STEPS, "last": LAST, "turn": TURN, "timed_condition": TIMED_CONDITION},
        seeds=range(options.seeds),
    )


def draw(found: dict[str, Any]) -> Figure:
    """Errors over conditions, by side and rank, in the band of the seeds."""
    figure, rows = Figure(figsize=(11, 7), layout="constrained"), found["tables"]["error"]["rows"]
    axes = figure.subplots(len(SIDES), len(RANKS), sharex=True, sharey=True)
    for ax, (side, rank) in zip(axes.flat, itertools.product(SIDES, RANKS), strict=True):
        # Two lines that often coincide: the upper one is broken.
        for name, style in (("qr", "C0-o"), ("cholesky", "C1:o"), ("before", "C3-o")):
            cells = [rows[row(side, condition, rank)][name] for condition in CONDITIONS]
            pictures.line(ax, CONDITIONS, cells, style, label=LABELS[name], markersize=4)
        ax.set(xscale="log", yscale="log", title=f"side {side}, {f'rank {rank}' if rank else 'full rank'} a step")
        pictures.plain_ticks(ax)
    axes[1, 1].set_xlabel("condition of the covariance")
    axes[0, 0].set_ylabel("off-diagonal mass")
    axes[0, 0].legend(frameon=False)
    figure.suptitle(f"Bases that follow drifting factors, medians of {len(found['seeds'])} seeds")
    return figure
