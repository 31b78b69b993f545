"""How long pruning a matrix takes: SparseGPT against the same algorithm in NumPy, exact OBS, choosing the k least.

NumPy's has the authors' structure: a loop over inputs in blocks of 128, all outputs at once, and one matrix product a
block. Both include the factorisation of H, in float32, and take turns; compiling is timed apart. OpenBLAS has one
thread here, since more would be in XLA's way even when idle; NumPy is also timed alone with all of them, and ours is
compared with the faster.
"""

import argparse
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from threadpoolctl import threadpool_limits

import fisher_optax as fo
from benchmarks import harness
from benchmarks.catalogue import positive
from benchmarks.results import columns, result, spread, table
from experiments.sparsegpt_numpy import BLOCK, DAMPING, in_numpy, problem
from fisher_optax.compression.matrix.masks import keep_largest

SPARSEGPT, OBS, SHARES = (768, 3072), (512, 128), (0.5, 0.8)  # inputs x outputs, shares of weights that OBS removes


SPARSEGPT_COLUMNS = columns(
    "label: program; ms: ms ±; share: share of the faster NumPy's time | .2f; trace_s: trace, s | .2f;"
    "compile_s: compile, s | .2f; difference: relative difference from NumPy's weights | .1e;"
    "other_masks: weights that one alone removed | d"
)
OBS_COLUMNS = columns(
    "s: s | .2g ±; ratio: times SparseGPT's time | .2g; compile_s: compile, s | .2f;"
    "loss: loss, share of SparseGPT's | .2f"
)
SELECTION_COLUMNS = columns("label: program; ms: ms ±; ratio: times bit by bit | .0f; same: same as the sort's")


def sparsegpt(rounds: int, shape: tuple[int, int] = SPARSEGPT) -> dict[str, Any]:
    """Seconds at 50 %, and how far the two results are apart."""
    W, H = problem(*shape)
    given = jnp.asarray(W), jnp.asarray(H)
    program = harness.compile_program(lambda W, H: fo.compression.sparsegpt(W, H, 0.5, BLOCK, DAMPING), *given)
    ours, theirs = program.run(*given), in_numpy(W, H, 0.5)
    runs = {"ours": lambda _: program.run(*given), "numpy": lambda _: in_numpy(W, H, 0.5)}
    seconds = harness.interleaved(runs, rounds, lambda _: None, "SparseGPT")
    with threadpool_limits(os.cpu_count(), "blas"):
        alone = harness.interleaved({"numpy_threads": runs["numpy"]}, rounds, lambda _: None, "NumPy alone")
    return {
        "seconds": {**seconds, **alone},
        "trace_s": program.trace_s,
        "compile_s": program.compile_s,
        "other_masks": int(np.sum(np.asarray(ours.mask) != theirs[1])),
        "difference": float(np.linalg.norm(ours.weights - theirs[0]) / np.linalg.norm(theirs[0])),
    }


def selection(rounds: int, shape: tuple[int, int] = SPARSEGPT) -> dict[str, dict[str, Any]]:
    """Which of all weights of a matrix are the smaller half: bit by bit, and by a stable sort."""
    scores, k = jnp.abs(jnp.asarray(problem(*shape)[0])).ravel(), shape[0] * shape[1] // 2
    ranks = lambda x: jnp.zeros(x.size, jnp.int32).at[jnp.argsort(x, stable=True)].set(jnp.arange(x.size))  # noqa: E731
    programs = {
        "bits": harness.compile_program(lambda x: keep_largest(x, k), scores),
        "sort": harness.compile_program(lambda x: ranks(x) >= k, scores),
    }
    runs = {name: lambda _, p=program: p.run(scores) for name, program in programs.items()}
    times = harness.interleaved(runs, rounds, lambda _: None, "selection")
    bits, sort = (spread([1e3 * s for s in times[name]]) for name in ("bits", "sort"))
    same = bool(jnp.all(programs["bits"].run(scores) == programs["sort"].run(scores)))
    return {
        "bits": {"label": "bit by bit", "ms": bits, "same": "yes" if same else "no"},
        "sort": {"label": "stable sort", "ms": sort, "ratio": sort["median"] / bits["median"]},
    }


def obs(rounds: int, shape: tuple[int, int] = OBS) -> dict[str, dict[str, Any]]:
    """Rows by the share removed: seconds, and the loss as a share of SparseGPT's."""
    W, H = map(jnp.asarray, problem(*shape))
    rows = {}
    for share in SHARES:
        makers = {
            "obs": lambda W, H, s=share: fo.compression.obs(W, H, s, DAMPING),
            "sparsegpt": lambda W, H, s=share: fo.compression.sparsegpt(W, H, s, BLOCK, DAMPING),
        }
        programs = {name: harness.compile_program(make, W, H) for name, make in makers.items()}
        # The runs that come first are not timed.
        errors = {name: float(fo.compression.output_error(W, p.run(W, H).weights, H)) for name, p in programs.items()}
        runs = {name: lambda _, p=program: p.run(W, H) for name, program in programs.items()}
        s, theirs = map(spread, harness.interleaved(runs, rounds, lambda _: None, f"OBS {share}").values())
        times = {"s": s, "ratio": s["median"] / theirs["median"], "compile_s": programs["obs"].compile_s}
        rows[f"{share:.0%}"] = times | {"loss": errors["obs"] / errors["sparsegpt"]}
    return rows


def sparsegpt_rows(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Of what `sparsegpt` found; the share is of the faster NumPy's time."""
    ms = {name: {"ms": spread([1e3 * s for s in seconds])} for name, seconds in found["seconds"].items()}
    faster = min(ms[name]["ms"]["median"] for name in ("numpy", "numpy_threads"))
    share = ms["ours"]["ms"]["median"] / faster
    ours = {key: value for key, value in found.items() if key != "seconds"}
    return {
        "ours": {"label": "`fo.compression.sparsegpt`", **ms["ours"], "share": share, **ours},
        "numpy": {"label": "the same in NumPy, one thread", **ms["numpy"]},
        "numpy_threads": {"label": "... alone, all threads", **ms["numpy_threads"]},
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=positive, default=15, help="of SparseGPT and NumPy; of the others a third")


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    rounds, few = options.rounds, max(1, options.rounds // 3)
    with threadpool_limits(1, "blas"):
        choice, of_obs, greedy = selection(few), obs(few), sparsegpt_rows(sparsegpt(rounds))
    half, whole = (f"{m} inputs x {n} outputs" for m, n in (SPARSEGPT, OBS))
    counts = {"rounds": rounds, "rounds_obs": few, "rounds_selection": few, "block": BLOCK, "damping": DAMPING}
    yield result(
        f"compression_speed_{harness.environment()['platform']}",
        "Time to prune one matrix and to choose the smaller half of its weights, float32.",
        options.command,
        {
            "sparsegpt": table(f"SparseGPT, half of {half}", SPARSEGPT_COLUMNS, greedy),
            "obs": table(f"Exact OBS, {whole}, by the share removed", OBS_COLUMNS, of_obs),
            "selection": table(f"The smaller half of {math.prod(SPARSEGPT):,} scores", SELECTION_COLUMNS, choice),
        },
        settings=counts,
    )
