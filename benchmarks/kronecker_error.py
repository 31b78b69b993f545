"""How near a Kronecker product follows the Fisher: DyKAF, Shampoo and KL factors against the nearest one.

    python benchmarks/kronecker_error.py

The Fisher is the running mean ``F ← .95 F + .05 g gᵀ`` of 8 x 6 gradients, in three settings: independent N(0, I) (the
DyKAF paper's Figure 2), a fixed Kronecker covariance, and one whose two factors turn by .02 radians a step. Errors are
``|F - L ⊗ R| / |F|``; the bound is the best rank-one approximation of F rearranged. "Off-diagonal" is the share of |F|²
outside the diagonal in the eigenbasis of L and R: what SOAP and DyKAF ignore. The last panel is the paper's Figure 1:
softmax regression at its true parameters, whose Hessian is known, from n samples. Medians over seeds, in float64.
Writes ``results/kronecker_error.json`` and ``.png``.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import fisher_optax as fo  # noqa: E402
from benchmarks import harness  # noqa: E402
from fisher_optax.types import Eigenpairs, Kronecker  # noqa: E402

mpl.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

SHAPE, DECAY, SEEDS, STEPS, EVERY, REFRESH = (8, 6), 0.95, 5, 400, 10, 10
SAMPLES = (30, 100, 300, 1000, 3000)
TURN = 0.02  # radians a step


def shampoo(decay: Any) -> Any:
    return fo.factors.outer_product(decay, kind="mean")


RULES: dict[str, Callable[[Any], Any]] = {
    "DyKAF": fo.factors.projector_splitting,
    "DyKAF, parallel": lambda decay: fo.factors.projector_splitting(decay, variant="parallel"),
    "Shampoo, trace-scaled": shampoo,
    "Shampoo, L^½ ⊗ R^½": shampoo,
    "KL": fo.factors.kullback_leibler,
}


def root(A: np.ndarray) -> np.ndarray:
    values, Q = np.linalg.eigh(A)
    return (Q * np.sqrt(np.maximum(values, 0))) @ Q.T


def scaled(name: str, L: np.ndarray, R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The factors that the method's product is made of."""
    if name == "Shampoo, trace-scaled":
        return L / np.trace(L), R
    return (root(L), root(R)) if name == "Shampoo, L^½ ⊗ R^½" else (L, R)


def nearest(F: np.ndarray, m: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Van Loan and Pitsianis: the dominant singular pair of the rearranged matrix."""
    u, s, v = np.linalg.svd(F.reshape(m, n, m, n).transpose(0, 2, 1, 3).reshape(m * m, n * n))
    return s[0] * u[:, 0].reshape(m, m), v[0].reshape(n, n)


def measures(F: np.ndarray, L: np.ndarray, R: np.ndarray) -> tuple[float, float]:
    """Relative error of ``L ⊗ R``, and the share of |F|² off the diagonal in its eigenbasis."""
    Q = np.kron(np.linalg.eigh(L)[1], np.linalg.eigh(R)[1])
    inside = np.sum(np.einsum("ij,ik,kj->j", Q, F, Q) ** 2) / np.sum(F**2)
    return float(np.linalg.norm(F - np.kron(L, R)) / np.linalg.norm(F)), float(1 - inside)


def follow(rule: Any, grads: np.ndarray) -> Iterator[Kronecker]:
    """The factors after every `EVERY`-th gradient; bases for a rule that needs them are renewed that often too."""
    m, n = grads.shape[1:]
    factors = rule.init(m, n, True, True, jnp.float64)
    basis = Eigenpairs(jnp.eye(m), jnp.eye(n), jnp.ones(m), jnp.ones(n))

    @jax.jit
    def block(factors: Any, basis: Any, Gs: Any) -> Any:
        def one(carry: Any, G: Any) -> Any:
            factors, basis = carry
            after = basis if rule.track is None else rule.track(G, factors, basis)
            return (rule.update(G, factors, basis), after), None

        (factors, basis), _ = jax.lax.scan(one, (factors, basis), Gs)
        Q = [fo.linalg.eigenbasis(A) for A in factors[:2]]
        values = [jnp.sum(V * (A @ V), 0) for A, V in zip(factors[:2], Q, strict=True)]
        return factors, Eigenpairs(*Q, *values)

    for i in range(0, len(grads), REFRESH):
        factors, basis = block(factors, basis, jnp.asarray(grads[i : i + REFRESH]))
        if (i + REFRESH) % EVERY == 0:
            yield rule.read(factors)


def drifting(rng: np.random.Generator, turn: float) -> np.ndarray:
    """Gradients ``A_t Z B_tᵀ``, whose A and B (singular values 1 to .1) turn in a random plane of each pair of axes."""

    def side(d: int) -> Iterator[np.ndarray]:
        Q = np.linalg.qr(rng.normal(size=(d, d)))[0]
        c, s = np.cos(turn), np.sin(turn)
        step = np.kron(np.eye(d // 2), np.array([[c, -s], [s, c]]))
        mix = np.linalg.qr(rng.normal(size=(d, d)))[0]
        values = np.logspace(0, -1, d)
        while True:
            yield Q * values @ Q.T
            Q = mix @ step @ mix.T @ Q

    m, n = SHAPE
    return np.stack([A @ rng.normal(size=SHAPE) @ B.T for A, B, _ in zip(side(m), side(n), range(STEPS), strict=False)])


SETTINGS: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "independent N(0, I)": lambda rng: rng.normal(size=(STEPS, *SHAPE)),
    "Kronecker covariance": lambda rng: drifting(rng, 0.0),
    "drifting": lambda rng: drifting(rng, TURN),
}


def run_setting(make: Callable[[np.random.Generator], np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """For each method, error and off-diagonal share after every `EVERY` steps: (times, 2)."""
    grads = make(np.random.default_rng(seed))
    F, fishers = np.zeros((grads[0].size, grads[0].size)), []
    for t, G in enumerate(grads, 1):
        F = DECAY * F + (1 - DECAY) * np.outer(G, G)
        if t % EVERY == 0:
            fishers.append(F / (1 - DECAY**t))
    out = {"nearest Kronecker product": [measures(F, *nearest(F, *SHAPE)) for F in fishers]}
    for name, rule in RULES.items():
        paths = zip(fishers, follow(rule(DECAY), grads), strict=True)
        out[name] = [measures(F, *scaled(name, *map(np.asarray, f[:2]))) for F, f in paths]
    return {name: np.array(values) for name, values in out.items()}


def hessian_errors(seed: int) -> dict[str, list[float]]:
    """Softmax regression, 8 inputs and 6 classes, at the parameters that drew the labels: errors by sample size."""
    rng = np.random.default_rng(seed)
    m, n = SHAPE
    W, mixing = rng.normal(size=SHAPE), rng.normal(size=(m, m)) / m**0.5
    x = rng.normal(size=(SAMPLES[-1], m)) @ mixing
    p = np.exp(x @ W)
    p /= p.sum(1, keepdims=True)
    labels = (p.cumsum(1) > rng.uniform(size=(len(x), 1))).argmax(1)
    grads = x[:, :, None] * (p - np.eye(n)[labels])[:, None, :]
    curvature = p[:, :, None] * np.eye(n) - p[:, :, None] * p[:, None, :]
    H = np.einsum("ti,tj,tkl->ikjl", x, x, curvature).reshape(m * n, m * n) / len(x)
    out: dict[str, list[float]] = {"nearest Kronecker product": [measures(H, *nearest(H, m, n))[0]] * len(SAMPLES)}
    for name, rule in RULES.items():
        at = {(i + 1) * EVERY: f for i, f in enumerate(follow(rule(0.999), grads))}
        out[name] = [measures(H, *scaled(name, *map(np.asarray, at[size][:2])))[0] for size in SAMPLES]
    return out


def draw(results: dict[str, Any], hessian: dict[str, list[float]], path: Path) -> None:
    times = np.arange(EVERY, STEPS + 1, EVERY)
    figure, axes = plt.subplots(2, 4, figsize=(17, 7.5), layout="constrained")
    for column, (setting, methods) in enumerate(results.items()):
        for row, kind in enumerate(("error", "off_diagonal")):
            for name, values in methods.items():
                style = "k--" if name.startswith("nearest") else "-"
                axes[row, column].plot(times, values[kind], style, label=name, lw=1.4)
            axes[row, column].set(title=f"{setting}: {kind.replace('_', '-')}", xlabel="steps", yscale="log")
    for name, values in hessian.items():
        axes[0, 3].plot(SAMPLES, values, "k--" if name.startswith("nearest") else "o-", label=name, ms=4)
    axes[0, 3].set(title="Hessian of a softmax regression: error", xlabel="samples", xscale="log", yscale="log")
    axes[1, 3].axis("off")
    axes[1, 3].legend(*axes[0, 0].get_legend_handles_labels(), loc="center", frameon=False)
    for ax in axes.flat[:-1]:
        ax.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--out", type=Path, default=harness.RESULTS)
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    results: dict[str, Any] = {}
    for setting, make in SETTINGS.items():
        runs = [run_setting(make, seed) for seed in tqdm(range(args.seeds), desc=setting)]
        results[setting] = {
            name: dict(
                zip(
                    ("error", "off_diagonal"),
                    np.median([run[name] for run in runs], axis=0).T.tolist(),
                    strict=True,
                )
            )
            for name in runs[0]
        }
    runs = [hessian_errors(seed) for seed in tqdm(range(args.seeds), desc="Hessian")]
    hessian = {name: [statistics.median(v) for v in zip(*(r[name] for r in runs), strict=True)] for name in runs[0]}
    for setting, methods in results.items():
        rows = [
            {"name": name, "error": v["error"][-1], "early": v["error"][1], "off": v["off_diagonal"][-1]}
            for name, v in methods.items()
        ]
        headings = {"name": setting, "early": "error, step 20", "error": f"step {STEPS}", "off": "off-diagonal"}
        print("\n" + harness.table(rows, headings))
    payload = {"environment": harness.environment(), "decay": DECAY, "shape": SHAPE, "seeds": args.seeds}
    payload |= {"every": EVERY, "settings": results, "samples": SAMPLES, "hessian": hessian}
    print("written to", harness.write_results("kronecker_error", payload, args.out))
    draw(results, hessian, args.out / "kronecker_error.png")


if __name__ == "__main__":
    main()
