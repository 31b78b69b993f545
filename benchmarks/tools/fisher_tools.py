"""What the documents say of the Fisher tools in numbers: solves of a softmax head, intervals, batches, costs.

Solves are compared in float32 with dense float64 ones from the same logits; intervals are simulated; costs are of the
10.7M-parameter GPT, counted from its program.
"""

import argparse
import resource
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fisher_optax as fo
from benchmarks import harness, results
from benchmarks.catalogue import positive
from benchmarks.results import columns, spread, table
from experiments.fisher_simulations import COLLECTIONS, TEXTS, TOKENS, VOCABULARY, batches, coverage, solves
from experiments.flops import count_matmul_flops
from experiments.models.gpt import GPT
from fisher_optax.fisher.diagonals import diagonal as diagonals
from fisher_optax.fisher.diagonals.squares import Labels

HEAD = {"words": 50_257, "tokens": 1024, "features": 768}  # GPT-2's
UNITS = ("position", "sequence", "token")
BATCH, CONTEXT = 4, 64  # sequences, and characters in each
SOLVES = columns(
    "label: logits, λ over the mean of p̄; condition: condition of S | .2g; woodbury: Woodbury as it stands | .1e;"
    "deflated: without the direction of ones | .1e; ours: `SoftmaxHead.solve` | .1e"
)
WHOLE = columns(
    "gib: arguments, temporaries and result, GiB | .2f; peak_gib: most that the process had, GiB | .2f; s: s | .2g ±"
)
COVERAGE = columns("label: interval; holds: holds the truth | .1%")
INTERVALS = {
    "texts": "`confidence_interval`: texts as draws, Student",
    "tokens": "tokens as draws",
    "one_draw": "1.96 standard deviations of one draw",
}
BATCHES = columns(
    "mean_of_squares: mean of squares of examples' gradients | .3f; square_of_mean: square of their mean | .2g"
)


def whole_vocabulary(rounds: int) -> dict[str, Any]:
    """A row on solves as large as GPT-2's head."""
    V, T, H = HEAD.values()
    z, Y = jnp.asarray(np.random.default_rng(0).standard_normal((T, V)), jnp.float32), jnp.ones((V, H)).at[::2].set(-1)
    program = harness.compile_program(lambda z, Y: fo.fisher.SoftmaxHead.from_logits(z).solve(Y, 1e-3 / V), z, Y).run
    memory = program.memory_analysis()
    gib = sum(getattr(memory, f"{part}_size_in_bytes") for part in ("temp", "argument", "output")) / 2**30
    assert jnp.all(jnp.isfinite(program(z, Y))), "a solve with a whole vocabulary is not finite"
    seconds = harness.interleaved({"s": lambda _: program(z, Y)}, rounds, lambda _: None, "whole vocabulary")["s"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"gib": gib, "peak_gib": peak, "s": spread(seconds)}


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


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=positive, default=5, help="timed solves with a whole output layer")


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    head, of_solves, shares = whole_vocabulary(options.rounds), solves(), coverage()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="unit='position' sees")
        of_batches, of_units = batches(), {unit: {"gradients": times} for unit, times in costs().items()}
    sizes = {"vocabulary": VOCABULARY, "tokens": TOKENS, "head": HEAD, "collections": COLLECTIONS, "texts": TEXTS}
    of_head = ", ".join(f"{count:,} {what}" for what, count in HEAD.items())
    system = f"Relative error of (G + λ)⁻¹Y in float32, {VOCABULARY:,} words and {TOKENS} tokens"
    passes = f"Products of one pass of `diagonal`, {CONTEXT} characters a text, 10.7M-parameter GPT, by `unit=`"
    holds = {name: {"label": INTERVALS[name], "holds": share} for name, share in shares.items()}
    times = columns("gradients: times those of one gradient")
    yield results.result(
        "fisher_tools",
        "Errors of solves with a softmax head's Fisher, coverage of intervals, and what importances cost.",
        options.command,
        {
            "solves": table(system, SOLVES, of_solves),
            "head": table(f"Solve with a whole output layer: {of_head}", WHOLE, {"gpt2": head}),
            "coverage": table("How often a nominal 95 % interval holds the truth", COVERAGE, holds),
            "batches": table("Of gradients of variance 1, by the number of examples", BATCHES, of_batches),
            "costs": table(passes, times, of_units),
        },
        settings={**sizes, "cost_batch": BATCH, "cost_context": CONTEXT},
    )
