"""How long pruning a matrix takes: SparseGPT against the same algorithm in NumPy, exact OBS, choosing the k least.

    python -m benchmarks.compression_speed

NumPy's has the authors' structure: a loop over inputs in blocks of 128, all outputs at once, and one matrix product a
block. Both include the factorisation of H, in float32, and take turns; compiling is timed apart. OpenBLAS has one
thread here, since more would be in XLA's way even when idle; NumPy is also timed alone with all of them, and ours is
compared with the faster. Writes ``results/compression_speed_cpu.json``.
"""

import argparse
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from threadpoolctl import threadpool_limits

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fisher_optax as fo
from benchmarks import harness
from fisher_optax.compression.masks import keep_largest

BLOCK, DAMPING = 128, 0.01
SPARSEGPT, OBS = (768, 3072), (512, 128)  # inputs x outputs


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


def sparsegpt(rounds: int) -> dict[str, Any]:
    """Seconds at 50 %, and how far the two results are apart."""
    W, H = problem(*SPARSEGPT)
    program = harness.compile_program(lambda W, H: fo.compression.sparsegpt(W, H, 0.5, BLOCK, DAMPING), W, H)
    ours, theirs = program.run(W, H), in_numpy(W, H, 0.5)
    runs = {"ours": lambda _: program.run(W, H), "NumPy": lambda _: in_numpy(W, H, 0.5)}
    times = harness.interleaved(runs, rounds, lambda _: None, "SparseGPT")
    seconds = {name: statistics.median(t) for name, t in times.items()}
    with threadpool_limits(os.cpu_count(), "blas"):
        alone = harness.interleaved({"NumPy": runs["NumPy"]}, rounds, lambda _: None, "NumPy alone")
    seconds["NumPy alone, all threads"] = statistics.median(alone["NumPy"])
    return {
        "inputs x outputs": SPARSEGPT,
        "seconds": seconds,
        "ours / NumPy": seconds["ours"] / min(x for name, x in seconds.items() if name != "ours"),
        "least seconds": {name: min(t) for name, t in times.items()},
        "trace_s": program.trace_s,
        "compile_s": program.compile_s,
        "weights that one alone removed": int(np.sum(np.asarray(ours.mask) != theirs[1])),
        "relative difference": float(np.linalg.norm(ours.weights - theirs[0]) / np.linalg.norm(theirs[0])),
    }


def selection(rounds: int) -> dict[str, Any]:
    """Which of all weights of a matrix are the smaller half: bit by bit, and by a stable sort."""
    scores, k = jnp.abs(jnp.asarray(problem(*SPARSEGPT)[0])).ravel(), SPARSEGPT[0] * SPARSEGPT[1] // 2
    ranks = lambda x: jnp.zeros(x.size, jnp.int32).at[jnp.argsort(x, stable=True)].set(jnp.arange(x.size))  # noqa: E731
    programs = {
        "bit by bit": harness.compile_program(lambda x: keep_largest(x, k), scores),
        "sorting": harness.compile_program(lambda x: ranks(x) >= k, scores),
    }
    runs = {name: lambda _, p=program: p.run(scores) for name, program in programs.items()}
    times = harness.interleaved(runs, rounds, lambda _: None, "selection")
    same = bool(jnp.all(programs["bit by bit"].run(scores) == programs["sorting"].run(scores)))
    return {"scores": scores.size, "seconds": {name: statistics.median(t) for name, t in times.items()}, "same": same}


def obs(rounds: int) -> list[dict[str, Any]]:
    """Seconds, and the loss as a share of SparseGPT's."""
    W, H = problem(*OBS)
    rows = []
    for share in (0.5, 0.8):
        program = harness.compile_program(lambda W, H, s=share: fo.compression.obs(W, H, s, DAMPING), W, H)
        times = harness.interleaved({"obs": lambda _, p=program: p.run(W, H)}, rounds, lambda _: None, f"OBS {share}")
        exact, greedy = program.run(W, H), fo.compression.sparsegpt(W, H, share, BLOCK, DAMPING)
        losses = [fo.compression.output_error(W, x, H) for x in (exact.weights, greedy.weights)]
        row = {"share": share, "seconds": statistics.median(times["obs"]), "compile_s": program.compile_s}
        rows.append({"inputs x outputs": OBS, **row, "loss / SparseGPT's": float(losses[0] / losses[1])})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=harness.RESULTS)
    args = parser.parse_args()
    results: dict[str, Any] = {"environment": harness.environment()}
    with threadpool_limits(1, "blas"):
        few = max(1, args.rounds // 3)
        results |= {"selection": selection(few), "obs": obs(few), "sparsegpt": sparsegpt(args.rounds)}
    print(results["selection"])
    print(results["sparsegpt"])
    print(harness.table(results["obs"], {key: key for key in results["obs"][0]}))
    name = f"compression_speed_{jax.devices()[0].platform}"
    print("written:", harness.write_results(name, results, args.out))


if __name__ == "__main__":
    main()
