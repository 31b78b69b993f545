"""How near a Kronecker product follows the Fisher: DyKAF, Shampoo and KL factors against the nearest one.

The Fisher is the running mean ``F ← .95 F + .05 g gᵀ`` of 8 x 6 gradients, in three settings: independent N(0, I) (the
DyKAF paper's Figure 2), a fixed Kronecker covariance, and one whose two factors turn by .02 radians a step. Errors are
``|F - L ⊗ R| / |F|``; the bound is the best rank-one approximation of F rearranged. "Off-diagonal" is the share of |F|²
outside the diagonal in the eigenbasis of L and R: what SOAP and DyKAF ignore. Then there is the paper's Figure 1:
softmax regression at its true parameters, whose Hessian is known, from n samples. Run under `jax.enable_x64`.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fisher_optax as fo
from fisher_optax.preconditioner.contracts import Eigenpairs, Kronecker

SHAPE, DECAY, STEPS, EVERY = (8, 6), 0.95, 400, 10
SAMPLES, SAMPLES_DECAY = (30, 100, 300, 1000, 3000), 0.999
TURN = 0.02  # radians a step
SETTINGS_TOLD = {"shape": SHAPE, "decay": DECAY, "decay_hessian": SAMPLES_DECAY, "steps": STEPS, "turn": TURN}


def shampoo(decay: Any) -> Any:
    return fo.factors.outer_product(decay, kind="mean")


RULES: dict[str, Callable[[Any], Any]] = {
    "dykaf": fo.factors.projector_splitting,
    "dykaf_parallel": lambda decay: fo.factors.projector_splitting(decay, variant="parallel"),
    "shampoo_trace": shampoo,
    "shampoo_half": shampoo,
    "kl": fo.factors.kullback_leibler,
}
NEAREST = "nearest"


def root(A: np.ndarray) -> np.ndarray:
    values, Q = np.linalg.eigh(A)
    return (Q * np.sqrt(np.maximum(values, 0))) @ Q.T


def scaled(name: str, L: np.ndarray, R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The factors that the method's product is made of."""
    if name == "shampoo_trace":
        return L / np.trace(L), R
    return (root(L), root(R)) if name == "shampoo_half" else (L, R)


def nearest(F: np.ndarray, m: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Van Loan and Pitsianis: the dominant singular pair of the rearranged matrix."""
    u, s, v = np.linalg.svd(F.reshape(m, n, m, n).transpose(0, 2, 1, 3).reshape(m * m, n * n))
    return s[0] * u[:, 0].reshape(m, m), v[0].reshape(n, n)


def measures(F: np.ndarray, L: np.ndarray, R: np.ndarray) -> tuple[float, float]:
    """Relative error of ``L ⊗ R``, and the share of |F|² off the diagonal in its eigenbasis."""
    Q = np.kron(np.linalg.eigh(L)[1], np.linalg.eigh(R)[1])
    inside = np.sum(np.einsum("ij,ik,kj->j", Q, F, Q) ** 2) / np.sum(F**2)
    return float(np.linalg.norm(F - np.kron(L, R)) / np.linalg.norm(F)), float(1 - inside)


@functools.cache
def block_of(rule_of: Callable[[Any], Any], decay: float) -> tuple[Any, Any]:
    """A rule, and what it makes of a block of gradients, compiled once for all seeds and settings."""
    rule = rule_of(decay)

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

    return rule, block


def follow(rule_of: Callable[[Any], Any], decay: float, grads: np.ndarray) -> Iterator[Kronecker]:
    """The factors after every `EVERY`-th gradient; bases for a rule that needs them are renewed as often."""
    m, n = grads.shape[1:]
    rule, block = block_of(rule_of, decay)
    factors = rule.init(m, n, True, True, jnp.float64)
    basis = Eigenpairs(jnp.eye(m), jnp.eye(n), jnp.ones(m), jnp.ones(n))
    for i in range(0, len(grads), EVERY):
        factors, basis = block(factors, basis, jnp.asarray(grads[i : i + EVERY]))
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
    "independent": lambda rng: rng.normal(size=(STEPS, *SHAPE)),
    "kronecker": lambda rng: drifting(rng, 0.0),
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
    out = {NEAREST: [measures(F, *nearest(F, *SHAPE)) for F in fishers]}
    for name, rule in RULES.items():
        paths = zip(fishers, follow(rule, DECAY, grads), strict=True)
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
    out: dict[str, list[float]] = {NEAREST: [measures(H, *nearest(H, m, n))[0]] * len(SAMPLES)}
    for name, rule in RULES.items():
        at = {(i + 1) * EVERY: f for i, f in enumerate(follow(rule, SAMPLES_DECAY, grads))}
        out[name] = [measures(H, *scaled(name, *map(np.asarray, at[size][:2])))[0] for size in SAMPLES]
    return out
