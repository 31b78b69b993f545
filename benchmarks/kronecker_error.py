"""How near a Kronecker product follows the Fisher: DyKAF, Shampoo and KL factors against the nearest one.

The Fisher is the running mean ``F ← .95 F + .05 g gᵀ`` of 8 x 6 gradients, in three settings: independent N(0, I) (the
DyKAF paper's Figure 2), a fixed Kronecker covariance, and one whose two factors turn by .02 radians a step. Errors are
``|F - L ⊗ R| / |F|``; the bound is the best rank-one approximation of F rearranged. "Off-diagonal" is the share of |F|²
outside the diagonal in the eigenbasis of L and R: what SOAP and DyKAF ignore. The last panel is the paper's Figure 1:
softmax regression at its true parameters, whose Hessian is known, from n samples. All in float64.
"""

import argparse
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from tqdm import tqdm

import fisher_optax as fo
from benchmarks import harness, results
from benchmarks.results import Column
from fisher_optax.preconditioner.contracts import Eigenpairs, Kronecker

SHAPE, DECAY, STEPS, EVERY = (8, 6), 0.95, 400, 10
SAMPLES, SAMPLES_DECAY = (30, 100, 300, 1000, 3000), 0.999
TURN = 0.02  # radians a step
EARLY = 20  # steps: an error that tables tell beside the last


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
LABELS = {
    NEAREST: "nearest Kronecker product",
    "dykaf": "DyKAF",
    "dykaf_parallel": "DyKAF, parallel",
    "shampoo_trace": "Shampoo, trace-scaled",
    "shampoo_half": "Shampoo, L^½ ⊗ R^½",
    "kl": "KL",
}


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


Measured = Mapping[str, Mapping[str, Any]]  # by setting and method: a list over seeds of what a seed gave


def tables(measured: Measured) -> dict[str, Any]:
    """Of what `run_setting` and `hessian_errors` found for each seed."""
    rows: dict[str, dict[str, Any]] = {name: {"label": label} for name, label in LABELS.items()}
    for setting in SETTINGS:
        for name, seeds in measured[setting].items():
            error, off = np.moveaxis(np.array(seeds), 2, 0)  # each (seeds, times)
            at = {setting: error[:, -1], f"{setting}_early": error[:, EARLY // EVERY - 1], f"{setting}_off": off[:, -1]}
            rows[name] |= {key: results.spread(values.tolist()) for key, values in at.items()}
    for name, seeds in measured["hessian"].items():
        cells = zip(SAMPLES, map(list, zip(*seeds, strict=True)), strict=True)
        rows[name] |= {f"hessian_{count}": results.spread(values) for count, values in cells}
    return {
        "errors": results.table("Relative error, and share of |F|² off the diagonal in the eigenbasis", ERRORS, rows),
        "dykaf": results.table(
            "DyKAF against trace-scaled Shampoo", DYKAF, {setting: gain(measured[setting]) for setting in SETTINGS}
        ),
    }


def gain(methods: Mapping[str, Any]) -> dict[str, Any]:
    """By how much DyKAF's error, and its off-diagonal share, are the lower, seed by seed; and since which step."""
    ours, theirs = (np.array(methods[name]) for name in ("dykaf", "shampoo_trace"))  # each (seeds, times, 2)
    lower = [results.spread(values.tolist()) for values in (1 - ours[:, -1] / theirs[:, -1]).T]
    nearer = np.flatnonzero(np.median(ours[..., 0], 0) < np.median(theirs[..., 0], 0))
    return {
        "lower": lower[0],
        "lower_off": lower[1],
        "first": int((nearer[0] + 1) * EVERY) if len(nearer) else None,
    }


TITLES = {"independent": "independent N(0, I)", "kronecker": "Kronecker covariance", "drifting": "drifting"}
ERRORS = {
    "label": Column("method"),
    **{
        f"{setting}{key}": Column(f"{title}: {what}", spread=True)
        for setting, title in TITLES.items()
        for key, what in (("_early", f"error at {EARLY}"), ("", f"at {STEPS}"), ("_off", "off-diagonal"))
    },
    **{f"hessian_{count}": Column(f"Hessian: error, {count} samples", spread=True) for count in SAMPLES},
}
DYKAF = {
    "lower": Column("error lower by", ".1%", spread=True),
    "lower_off": Column("off-diagonal lower by", ".1%", spread=True),
    "first": Column("first nearer at step", "d"),
}


def result_of(measured: Measured, environment: Mapping[str, Any]) -> dict[str, Any]:
    curves = {
        setting: {
            name: dict(zip(("error", "off"), np.median(seeds, 0).T.tolist(), strict=True))
            for name, seeds in measured[setting].items()
        }
        for setting in SETTINGS
    }
    return results.result(
        "kronecker_error",
        "How far Kronecker products made from single gradients are from a Fisher that is known.",
        "python -m benchmarks kronecker_error",
        tables(measured),
        environment=environment,
        settings={"shape": SHAPE, "decay": DECAY, "decay_hessian": SAMPLES_DECAY, "steps": STEPS, "turn": TURN},
        seeds=range(len(measured["hessian"][NEAREST])),
        details={"steps": list(range(EVERY, STEPS + 1, EVERY)), "medians": curves},
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, default=5, help="how many")


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    environment, measured = harness.environment(), {}
    with jax.enable_x64(True):
        for setting, of_seed in {**SETTINGS, "hessian": None}.items():
            of_seed = hessian_errors if of_seed is None else functools.partial(run_setting, of_seed)
            seeds = [of_seed(seed) for seed in tqdm(range(options.seeds), desc=setting)]
            measured[setting] = {name: [seed[name] for seed in seeds] for name in seeds[0]}
    yield result_of(measured, environment)


# Of two lines that often coincide, the upper one is broken.
STYLES = {
    NEAREST: "k--",
    "dykaf": "C0-",
    "dykaf_parallel": "C1:",
    "shampoo_trace": "C2-",
    "shampoo_half": "C3-.",
    "kl": "C4-",
}


def draw(found: dict[str, Any]) -> Figure:
    """Errors above, off-diagonal shares below, over steps; beside them the Hessian's, over samples."""
    figure = Figure(figsize=(17, 7.5), layout="constrained")
    axes = figure.subplots(2, 4)
    steps, medians = found["details"]["steps"], found["details"]["medians"]
    for column, setting in enumerate(TITLES):
        for row, (kind, what) in enumerate((("error", "relative error"), ("off", "off-diagonal share of |F|²"))):
            ax = axes[row, column]
            for name, values in medians[setting].items():
                ax.plot(steps, values[kind], STYLES[name], label=LABELS[name], lw=1.4)
            ax.set(title=TITLES[setting], xlabel="steps", ylabel=what, yscale="log")
    rows = found["tables"]["errors"]["rows"]
    for name, style in STYLES.items():
        errors = [rows[name][f"hessian_{count}"]["median"] for count in SAMPLES]
        axes[0, 3].plot(SAMPLES, errors, style, marker="" if name == NEAREST else "o", lw=1.4, ms=4)
    axes[0, 3].set(
        title="Hessian of a softmax regression", xlabel="samples", ylabel="relative error", xscale="log", yscale="log"
    )
    axes[1, 3].axis("off")
    axes[1, 3].legend(*axes[0, 0].get_legend_handles_labels(), loc="center", frameon=False)
    for ax in axes.flat[:-1]:
        ax.grid(alpha=0.3)
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_locator(NullLocator())
    figure.suptitle(f"Kronecker products against a known Fisher, medians of {len(found['seeds'])} seeds")
    return figure
