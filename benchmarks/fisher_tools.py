"""What the documents say of the Fisher tools in numbers: solves of a softmax head, intervals, batches, costs.

    python -m benchmarks.fisher_tools

Solves are compared in float32 with dense float64 ones from the same logits; intervals are simulated; costs are of the
10.7M-parameter GPT, counted from its program. Writes ``results/fisher_tools.json``.
"""

import argparse
import resource
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import fisher_optax as fo  # noqa: E402
from benchmarks import harness  # noqa: E402
from benchmarks.flops import count_matmul_flops  # noqa: E402
from fisher_optax.fisher import diagonals, head_solve  # noqa: E402
from fisher_optax.fisher.squares import Labels  # noqa: E402
from models.gpt import GPT  # noqa: E402
from tests.reference import softmax_head as oracle  # noqa: E402

VOCABULARY, TOKENS = 2000, 256
DAMPINGS = (1e-1, 1e-2, 1e-4, 1e-6, 1e-8)  # of the mean of p̄
TEXTS = 40  # of a simulated collection


def logits(kind: str) -> np.ndarray:
    """Of flat, moderate and certain predictions, and of tokens that know four disjoint sets of words."""
    z = np.random.default_rng(0).standard_normal((TOKENS, VOCABULARY))
    if kind == "four vocabularies":
        return np.where(np.arange(TOKENS)[:, None] % 4 != np.arange(VOCABULARY) % 4, -np.inf, z).astype(np.float32)
    return (float(kind.split()[-1]) * z).astype(np.float32)


@jax.jit
def as_it_stands(P: Any, Y: Any, λ: Any) -> Any:
    """Woodbury's identity for ``diag(p̄) - U Uᵀ + λ``, the all-ones direction left in."""
    U, d = P.T / len(P) ** 0.5, jnp.mean(P, 0) + λ
    S = jnp.eye(len(P)) - head_solve.matmul(U.T / d, U)
    inner = jnp.linalg.solve(S, head_solve.matmul(U.T, Y / d[:, None]))
    return (Y + head_solve.matmul(U, inner)) / d[:, None]


@jax.jit
def deflated(P: Any, Y: Any, λ: Any) -> Any:
    """The same orthogonally to all ones."""
    mean = jnp.mean(P, 0)
    return head_solve.by_woodbury(mean, (P - mean) / len(P) ** 0.5, Y, λ)


def solves() -> list[dict[str, Any]]:
    """Relative errors for right sides whose columns sum to 0."""
    Y = np.round(np.random.default_rng(1).standard_normal((VOCABULARY, 4)) * 4096) / 4096
    Y[-1] -= Y.sum(0)
    rows = []
    for kind in tqdm(("deviation 0", "deviation 3", "deviation 10", "four vocabularies"), "solves"):
        z = logits(kind)
        P = oracle.softmax(z)
        G, head = oracle.laplacian(P, np.ones(TOKENS)), fo.fisher.SoftmaxHead.from_logits(z)
        for damping in DAMPINGS:
            λ = float(np.float32(damping / VOCABULARY))
            wanted, y = oracle.solve(G, Y, λ), Y.astype(np.float32)
            p = P.astype(np.float32)
            found = {
                "as it stands": as_it_stands(p, y, λ),
                "deflated": deflated(p, y, λ),
                "ours": head.solve(y, λ, True),
            }
            errors = {name: float(np.linalg.norm(x - wanted) / np.linalg.norm(wanted)) for name, x in found.items()}
            condition = oracle.condition(P, np.ones(TOKENS), λ)
            rows.append({"logits": kind, "damping / mean": damping, "condition": condition, **errors})
    return rows


def whole_vocabulary() -> dict[str, Any]:
    """One solve as large as GPT-2's head: 50,257 words, 1,024 tokens, 768 features."""
    V, T, H = 50_257, 1024, 768
    z, Y = jnp.asarray(np.random.default_rng(0).standard_normal((T, V)), jnp.float32), jnp.ones((V, H)).at[::2].set(-1)

    @jax.jit
    def solve(z: Any, Y: Any) -> Any:
        return fo.fisher.SoftmaxHead.from_logits(z).solve(Y, 1e-3 / V)

    memory = solve.lower(z, Y).compile().memory_analysis()
    began = time.perf_counter()
    finite = bool(jnp.all(jnp.isfinite(solve(z, Y))))
    sizes = {name: getattr(memory, f"{name}_size_in_bytes") / 2**20 for name in ("temp", "argument", "output")}
    seconds, peak = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {"mib": sizes, "seconds": seconds, "peak_rss_mib": peak, "finite": finite}


def coverage(collections: int = 4000) -> dict[str, float]:
    """How often nominal 95 % intervals hold the truth: texts of 5 to 60 tokens that go together within a text."""
    rng = np.random.default_rng(1)
    n = rng.integers(5, 61, (collections, TEXTS))
    topic, cross = rng.normal(size=n.shape), rng.normal(size=n.shape) / np.sqrt(n)
    x, truth = 0.25 * topic**2 + topic * cross + rng.chisquare(n) / n, 1.25  # mean square of 0.5 topic + noise

    @jax.jit
    @jax.vmap
    def summary(x: Any, w: Any) -> Any:
        fisher = fo.fisher.DiagonalFisher.zeros(jnp.zeros([])).update(x, w)
        return fisher.mean, fisher.variance(), fisher.standard_error(), fisher.n_eff

    mean, variance, error, n_eff = map(np.asarray, summary(jnp.asarray(x, jnp.float32), jnp.asarray(n, jnp.float32)))
    half = {
        "texts as draws, n_eff, Student": scipy.stats.t.ppf(0.975, n_eff - 1) * error,
        "tokens as draws": 1.96 * np.sqrt(variance / n.sum(1)),
        "1.96 standard deviations of one draw": 1.96 * np.sqrt(variance),
    }
    return {name: float(np.mean(np.abs(mean - truth) <= h)) for name, h in half.items()}


def batches() -> list[dict[str, float]]:
    """The mean of squares of single examples' gradients, and the square of their mean gradient, by the batch's size;
    gradients are independent with variance 1.
    """
    g = jnp.asarray(np.random.default_rng(0).standard_normal((1024, 256)), jnp.float32)
    loss = lambda p, x: jnp.vdot(p, x)  # noqa: E731
    rows = []
    for size in (64, 256, 1024):
        fisher = fo.fisher.diagonal(loss, jnp.zeros(256), [g[:size]])
        of_mean = jnp.mean(jnp.square(jax.grad(lambda p, s=size: jnp.mean(g[:s] @ p))(jnp.zeros(256))))
        rows.append({"examples": size, "mean of squares": float(fisher.mean.mean()), "square of mean": float(of_mean)})
    return rows


def costs(batch: int = 4, context: int = 64) -> dict[str, float]:
    """Flops of each unit as a multiple of one gradient of the batch's mean loss; "token" has a pass a token."""
    model = GPT(vocabulary=65, context=256, layers=6, width=384, heads=6)

    def example_loss(params: Any, tokens: Any) -> Any:
        return fo.losses.softmax_cross_entropy(model.apply({"params": params}, tokens[None, :-1])[0], tokens[1:])

    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 256), jnp.int32))["params"]
    tokens = jax.ShapeDtypeStruct((batch, context + 1), jnp.int32)
    mean_loss = lambda p, t: jnp.mean(jax.vmap(example_loss, (None, 0))(p, t))  # noqa: E731
    gradient, found = count_matmul_flops(jax.jit(jax.grad(mean_loss)), params, tokens).most, {}
    for unit in ("position", "sequence", "token"):
        rule = diagonals.Settings(example_loss, unit, Labels(), None, None, batch)
        state = jax.eval_shape(lambda p, t, r=rule: diagonals._start(r, p, t, None), params, tokens)
        step = lambda *args, r=rule: diagonals._step(r, *args, None)  # noqa: E731
        found[unit] = count_matmul_flops(jax.jit(step), state, params, tokens).most / gradient
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=harness.RESULTS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="unit='position' sees")
    results: dict[str, Any] = {"environment": harness.environment(), "whole_vocabulary": whole_vocabulary()}
    results |= {"solves": solves(), "coverage": coverage(), "batches": batches(), "costs": costs()}
    columns = ("logits", "damping / mean", "condition", "as it stands", "deflated", "ours")
    print(harness.table(results["solves"], dict(zip(columns, columns, strict=True))))
    for name in ("whole_vocabulary", "coverage", "batches", "costs"):
        print(name, results[name])
    print("written:", harness.write_results("fisher_tools", results, args.out))


if __name__ == "__main__":
    main()
