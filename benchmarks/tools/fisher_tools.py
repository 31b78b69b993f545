"""What the documents say of the Fisher tools in numbers: solves of a softmax head, intervals, batches, costs.

Solves are compared in float32 with dense float64 ones from the same logits; intervals are simulated; costs are of the
10.7M-parameter GPT, counted from its program.
"""

import argparse
import resource
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from tqdm import tqdm

import fisher_optax as fo
from benchmarks import harness, results
from benchmarks.catalogue import positive
from benchmarks.flops import count_matmul_flops
from benchmarks.results import Column
from experiments.models.gpt import GPT
from fisher_optax.fisher.diagonals import diagonal as diagonals
from fisher_optax.fisher.diagonals.squares import Labels
from fisher_optax.fisher.head import solve as head_solve
from tests.reference import softmax_head as oracle

VOCABULARY, TOKENS = 2000, 256
LOGITS = {"flat": "flat", "dev3": "deviation 3", "dev10": "deviation 10", "four": "four vocabularies"}
DAMPINGS = ("1e-1", "1e-2", "1e-4", "1e-6", "1e-8")  # of the mean of p̄
HEAD = {"words": 50_257, "tokens": 1024, "features": 768}  # GPT-2's
COLLECTIONS, TEXTS = 4000, 40  # that are simulated, and texts in each
EXAMPLES = (64, 256, 1024)
UNITS = ("position", "sequence", "token")
BATCH, CONTEXT = 4, 64  # sequences, and characters in each


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
            rows[f"{kind}_{damping}"] = {"condition": oracle.condition(P, np.ones(TOKENS), λ), **errors}
    return rows


def whole_vocabulary(rounds: int) -> dict[str, Any]:
    """Solves as large as GPT-2's head."""
    V, T, H = HEAD.values()
    z, Y = jnp.asarray(np.random.default_rng(0).standard_normal((T, V)), jnp.float32), jnp.ones((V, H)).at[::2].set(-1)
    program = harness.compile_program(lambda z, Y: fo.fisher.SoftmaxHead.from_logits(z).solve(Y, 1e-3 / V), z, Y)
    memory = program.run.memory_analysis()
    sizes = {name: getattr(memory, f"{name}_size_in_bytes") / 2**30 for name in ("temp", "argument", "output")}
    finite = bool(jnp.all(jnp.isfinite(program.run(z, Y))))
    seconds = harness.interleaved({"solve": lambda _: program.run(z, Y)}, rounds, lambda _: None, "whole vocabulary")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"gib": sizes, "seconds": seconds["solve"], "peak_gib": peak, "finite": finite}


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


def costs(batch: int = BATCH, context: int = CONTEXT) -> dict[str, float]:
    """Flops of each unit as a multiple of one gradient of the batch's mean loss; "token" has a pass a token."""
    model = GPT(vocabulary=65, context=256, layers=6, width=384, heads=6)

    def example_loss(params: Any, tokens: Any) -> Any:
        return fo.losses.softmax_cross_entropy(model.apply({"params": params}, tokens[None, :-1])[0], tokens[1:])

    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 256), jnp.int32))["params"]
    tokens = jax.ShapeDtypeStruct((batch, context + 1), jnp.int32)
    mean_loss = lambda p, t: jnp.mean(jax.vmap(example_loss, (None, 0))(p, t))  # noqa: E731
    gradient, found = count_matmul_flops(jax.jit(jax.grad(mean_loss)), params, tokens).most, {}
    for unit in UNITS:
        rule = diagonals.Settings(example_loss, unit, Labels(), None, None, batch)
        state = jax.eval_shape(lambda p, t, r=rule: diagonals._start(r, p, t, None), params, tokens)
        step = lambda *args, r=rule: diagonals._step(r, *args, None)  # noqa: E731
        found[unit] = count_matmul_flops(jax.jit(step), state, params, tokens).most / gradient
    return found


def tables(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Of what the functions above found, by their names."""
    head, names = measured["whole_vocabulary"], list(measured["solves"])
    labels = (f"{kind}, {damping}" for kind in LOGITS.values() for damping in DAMPINGS)
    gib = {f"{name}_gib": size for name, size in head["gib"].items()}
    row = {**gib, "gib": sum(gib.values()), "peak_gib": head["peak_gib"], "s": results.spread(head["seconds"])}
    coverage = {name: {"label": INTERVALS[name], "holds": share} for name, share in measured["coverage"].items()}
    sizes = ", ".join(f"{count:,} {what}" for what, count in HEAD.items())
    what = f"Relative error of (G + λ)⁻¹Y in float32, {VOCABULARY:,} words and {TOKENS} tokens"
    return {
        "solves": results.table(
            what,
            SOLVES,
            {name: {"label": label, **measured["solves"][name]} for name, label in zip(names, labels, strict=True)},
        ),
        "head": results.table(f"Solve with a whole output layer: {sizes}", WHOLE, {"gpt2": row}),
        "coverage": results.table("How often a nominal 95 % interval holds the truth", COVERAGE, coverage),
        "batches": results.table("Of gradients of variance 1, by the number of examples", BATCHES, measured["batches"]),
        "costs": results.table(
            f"Products of one pass of `diagonal`, {CONTEXT} characters a text, 10.7M-parameter GPT, by `unit=`",
            {"gradients": Column("times those of one gradient", ".3g")},
            {unit: {"gradients": times} for unit, times in measured["costs"].items()},
        ),
    }


SOLVES = {
    "label": Column("logits, λ over the mean of p̄"),
    "condition": Column("condition of S", ".2g"),
    "woodbury": Column("Woodbury as it stands", ".1e"),
    "deflated": Column("without the direction of ones", ".1e"),
    "ours": Column("`SoftmaxHead.solve`", ".1e"),
}
WHOLE = {
    "gib": Column("all, GiB", ".2f"),
    "argument_gib": Column("arguments, GiB", ".2f"),
    "temp_gib": Column("temporaries, GiB", ".2f"),
    "output_gib": Column("result, GiB", ".2f"),
    "peak_gib": Column("most that the process had, GiB", ".2f"),
    "s": Column("s", ".2g", spread=True),
}
INTERVALS = {
    "texts": "`confidence_interval`: texts as draws, Student",
    "tokens": "tokens as draws",
    "one_draw": "1.96 standard deviations of one draw",
}
COVERAGE = {"label": Column("interval"), "holds": Column("holds the truth", ".1%")}
BATCHES = {
    "mean_of_squares": Column("mean of squares of examples' gradients", ".3f"),
    "square_of_mean": Column("square of their mean", ".2g"),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=positive, default=5, help="timed solves with a whole output layer")


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    measured = {"whole_vocabulary": whole_vocabulary(options.rounds), "solves": solves(), "coverage": coverage()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="unit='position' sees")
        measured |= {"batches": batches(), "costs": costs()}
    sizes = {"vocabulary": VOCABULARY, "tokens": TOKENS, "head": HEAD, "collections": COLLECTIONS, "texts": TEXTS}
    yield results.result(
        "fisher_tools",
        "Errors of solves with a softmax head's Fisher, coverage of intervals, and what importances cost.",
        options.command,
        tables(measured),
        settings={**sizes, "cost_batch": BATCH, "cost_context": CONTEXT},
    )


def draw(found: dict[str, Any]) -> None:
    """Its tables say it all."""
