"""Simulations of the Fisher tools: solves of a softmax head in float32, intervals, batches of examples."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from tqdm import tqdm

import fisher_optax as fo
from fisher_optax.fisher.head import solve as head_solve
from tests.reference import softmax_head as oracle

VOCABULARY, TOKENS = 2000, 256
LOGITS = {"flat": "flat", "dev3": "deviation 3", "dev10": "deviation 10", "four": "four vocabularies"}
DAMPINGS = ("1e-1", "1e-2", "1e-4", "1e-6", "1e-8")  # of the mean of p̄
COLLECTIONS, TEXTS = 4000, 40  # that are simulated, and texts in each
EXAMPLES = (64, 256, 1024)


def logits(kind: str) -> np.ndarray:
    """Of flat, moderate and certain predictions, and of tokens that know four disjoint sets of words."""
    z = np.random.default_rng(0).standard_normal((TOKENS, VOCABULARY))
    if kind == "four":
        return np.where(np.arange(TOKENS)[:, None] % 4 != np.arange(VOCABULARY) % 4, -np.inf, z).astype(np.float32)
    return ({"flat": 0, "dev3": 3, "dev10": 10}[kind] * z).astype(np.float32)


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


def solves() -> dict[str, dict[str, Any]]:
    """Relative errors for right sides whose columns sum to 0, by kind of logits and damping."""
    Y = np.round(np.random.default_rng(1).standard_normal((VOCABULARY, 4)) * 4096) / 4096
    Y[-1] -= Y.sum(0)
    rows = {}
    for kind in tqdm(LOGITS, "solves"):
        z = logits(kind)
        P = oracle.softmax(z)
        G, head = oracle.laplacian(P, np.ones(TOKENS)), fo.fisher.SoftmaxHead.from_logits(z)
        for damping in DAMPINGS:
            λ = float(np.float32(float(damping) / VOCABULARY))
            wanted, y = oracle.solve(G, Y, λ), Y.astype(np.float32)
            p = P.astype(np.float32)
            found = {"woodbury": as_it_stands(p, y, λ), "deflated": deflated(p, y, λ), "ours": head.solve(y, λ, True)}
            errors = {name: float(np.linalg.norm(x - wanted) / np.linalg.norm(wanted)) for name, x in found.items()}
            label = f"{LOGITS[kind]}, {damping}"
            rows[f"{kind}_{damping}"] = {"label": label, "condition": oracle.condition(P, np.ones(TOKENS), λ), **errors}
    return rows


def coverage(collections: int = COLLECTIONS) -> dict[str, float]:
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
        "texts": scipy.stats.t.ppf(0.975, n_eff - 1) * error,
        "tokens": 1.96 * np.sqrt(variance / n.sum(1)),
        "one_draw": 1.96 * np.sqrt(variance),
    }
    return {name: float(np.mean(np.abs(mean - truth) <= h)) for name, h in half.items()}


def batches() -> dict[str, dict[str, float]]:
    """The mean of squares of single examples' gradients, and the square of their mean gradient, by the batch's size;
    gradients are independent with variance 1.
    """
    g = jnp.asarray(np.random.default_rng(0).standard_normal((1024, 256)), jnp.float32)
    loss = lambda p, x: jnp.vdot(p, x)  # noqa: E731
    rows = {}
    for size in EXAMPLES:
        fisher = fo.fisher.diagonal(loss, jnp.zeros(256), [g[:size]])
        of_mean = jnp.mean(jnp.square(jax.grad(lambda p, s=size: jnp.mean(g[:s] @ p))(jnp.zeros(256))))
        rows[str(size)] = {"mean_of_squares": float(fisher.mean.mean()), "square_of_mean": float(of_mean)}
    return rows
