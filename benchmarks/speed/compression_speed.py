"""How long pruning a matrix takes: SparseGPT against the same algorithm in NumPy, exact OBS, choosing the k least.

NumPy's has the authors' structure: a loop over inputs in blocks of 128, all outputs at once, and one matrix product a
block. Both include the factorisation of H, in float32, and take turns; compiling is timed apart. OpenBLAS has one
thread here, since more would be in XLA's way even when idle; NumPy is also timed alone with all of them, and ours is
compared with the faster.
"""

import argparse
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import scipy.linalg
from threadpoolctl import threadpool_limits

import fisher_optax as fo
from benchmarks import harness, results
from benchmarks.catalogue import positive
from benchmarks.results import Column
from fisher_optax.compression.matrix.masks import keep_largest

BLOCK, DAMPING = 128, 0.01
SPARSEGPT, OBS, SHARES = (768, 3072), (512, 128), (0.5, 0.8)  # inputs x outputs, shares of weights that OBS removes


def problem(inputs: int, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights, and the second moment of 4 correlated examples an input."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((4 * inputs, inputs)) @ (
        rng.standard_normal((inputs, inputs)) / inputs**0.5 + 0.3 * np.eye(inputs)
    )
    return rng.standard_normal((inputs, outputs)).astype(np.float32), (X.T @ X / len(X)).astype(np.float32)


def in_numpy(W: np.ndarray, H: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """SparseGPT, the mask of each output chosen by block."""
    W, stays, m = W.copy(), np.ones(W.shape, bool), len(W)
    H_d = H + np.float32(DAMPING * np.trace(H) / m) * np.eye(m, dtype=H.dtype)
    L_inverse = scipy.linalg.solve_triangular(np.linalg.cholesky(H_d[::-1, ::-1]), np.eye(m, dtype=H.dtype), lower=True)
    U = np.ascontiguousarray(L_inverse[::-1, ::-1])
    for i1 in range(0, m, BLOCK):
        i2 = min(i1 + BLOCK, m)
        w, u, E = W[i1:i2], U[i1:i2, i1:i2], np.zeros((i2 - i1, W.shape[1]), W.dtype)
        k = int(np.ceil(share * i2) - np.ceil(share * i1))
        order = np.argpartition(w**2 / np.diag(u)[:, None] ** 2, k - 1, axis=0)
        np.put_along_axis(stays[i1:i2], order[:k], False, 0)
        for i in range(i2 - i1):
            E[i] = np.where(stays[i1 + i], 0, w[i] / u[i, i])
            w[i:] -= u[i, i:, None] * E[i]
        W[i2:] -= U[i1:i2, i2:].T @ E
    return np.where(stays, W, 0), stays


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


def selection(rounds: int, shape: tuple[int, int] = SPARSEGPT) -> dict[str, Any]:
    """Which of all weights of a matrix are the smaller half: bit by bit, and by a stable sort."""
    scores, k = jnp.abs(jnp.asarray(problem(*shape)[0])).ravel(), shape[0] * shape[1] // 2
    ranks = lambda x: jnp.zeros(x.size, jnp.int32).at[jnp.argsort(x, stable=True)].set(jnp.arange(x.size))  # noqa: E731
    programs = {
        "bits": harness.compile_program(lambda x: keep_largest(x, k), scores),
        "sort": harness.compile_program(lambda x: ranks(x) >= k, scores),
    }
    runs = {name: lambda _, p=program: p.run(scores) for name, program in programs.items()}
    seconds = harness.interleaved(runs, rounds, lambda _: None, "selection")
    same = bool(jnp.all(programs["bits"].run(scores) == programs["sort"].run(scores)))
    return {"seconds": seconds, "same": same}


def obs(rounds: int, shape: tuple[int, int] = OBS) -> list[dict[str, Any]]:
    """Seconds, and the loss as a share of SparseGPT's."""
    W, H = map(jnp.asarray, problem(*shape))
    rows = []
    for share in SHARES:
        programs = {
            "obs": harness.compile_program(lambda W, H, s=share: fo.compression.obs(W, H, s, DAMPING), W, H),
            "sparsegpt": harness.compile_program(
                lambda W, H, s=share: fo.compression.sparsegpt(W, H, s, BLOCK, DAMPING), W, H
            ),
        }
        # The runs that come first are not timed.
        errors = {name: fo.compression.output_error(W, p.run(W, H).weights, H) for name, p in programs.items()}
        runs = {name: lambda _, p=program: p.run(W, H) for name, program in programs.items()}
        seconds = harness.interleaved(runs, rounds, lambda _: None, f"OBS {share}")
        loss = float(errors["obs"] / errors["sparsegpt"])
        rows.append({"share": share, "seconds": seconds, "compile_s": programs["obs"].compile_s, "loss": loss})
    return rows


def tables(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Of what `sparsegpt`, `obs` and `selection` found, by their names."""
    greedy, choice = measured["sparsegpt"], measured["selection"]
    seconds = {**greedy["seconds"], **choice["seconds"]}
    ms = {name: results.spread([1e3 * s for s in times]) for name, times in seconds.items()}
    faster = min(ms["numpy"]["median"], ms["numpy_threads"]["median"])
    ours = {key: greedy[key] for key in ("trace_s", "compile_s", "difference", "other_masks")}
    of_sparsegpt = {
        "ours": {"label": "`fo.compression.sparsegpt`", "share": ms["ours"]["median"] / faster, **ours},
        "numpy": {"label": "the same in NumPy, one thread"},
        "numpy_threads": {"label": "... alone, all threads"},
    }
    of_selection = {
        "bits": {"label": "bit by bit", "same": "yes" if choice["same"] else "no"},
        "sort": {"label": "stable sort", "ratio": ms["sort"]["median"] / ms["bits"]["median"]},
    }
    for rows in (of_sparsegpt, of_selection):
        for name, row in rows.items():
            row["ms"] = ms[name]
    of_obs = {}
    for row in measured["obs"]:
        s, theirs = (results.spread(row["seconds"][name]) for name in ("obs", "sparsegpt"))
        cells = {"s": s, "compile_s": row["compile_s"], "loss": row["loss"]}
        of_obs[f"{row['share']:.0%}"] = cells | {"ratio": s["median"] / theirs["median"]}
    half, whole = (f"{m} inputs x {n} outputs" for m, n in (SPARSEGPT, OBS))
    count = f"{SPARSEGPT[0] * SPARSEGPT[1]:,}"
    return {
        "sparsegpt": results.table(f"SparseGPT, half of {half}", SPARSEGPT_COLUMNS, of_sparsegpt),
        "obs": results.table(f"Exact OBS, {whole}, by the share removed", OBS_COLUMNS, of_obs),
        "selection": results.table(f"The smaller half of {count} scores", SELECTION_COLUMNS, of_selection),
    }


SPARSEGPT_COLUMNS = {
    "label": Column("program"),
    "ms": Column("ms", spread=True),
    "share": Column("share of the faster NumPy's time", ".2f"),
    "trace_s": Column("trace, s", ".2f"),
    "compile_s": Column("compile, s", ".2f"),
    "difference": Column("relative difference from NumPy's weights", ".1e"),
    "other_masks": Column("weights that one alone removed", "d"),
}
OBS_COLUMNS = {
    "s": Column("s", ".2g", spread=True),
    "ratio": Column("times SparseGPT's time", ".2g"),
    "compile_s": Column("compile, s", ".2f"),
    "loss": Column("loss, share of SparseGPT's", ".2f"),
}
SELECTION_COLUMNS = {
    "label": Column("program"),
    "ms": Column("ms", spread=True),
    "ratio": Column("times bit by bit", ".0f"),
    "same": Column("same as the sort's"),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=positive, default=15, help="of SparseGPT and NumPy; of the others a third")


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    rounds, few = options.rounds, max(1, options.rounds // 3)
    with threadpool_limits(1, "blas"):
        measured = {"selection": selection(few), "obs": obs(few), "sparsegpt": sparsegpt(rounds)}
    counts = {"rounds": rounds, "rounds_obs": few, "rounds_selection": few, "block": BLOCK, "damping": DAMPING}
    yield results.result(
        f"compression_speed_{harness.environment()['platform']}",
        "Time to prune one matrix and to choose the smaller half of its weights, float32.",
        options.command,
        tables(measured),
        settings=counts,
    )


def draw(found: dict[str, Any]) -> None:
    """Its tables say it all."""
