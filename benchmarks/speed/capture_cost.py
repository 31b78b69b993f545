"""What statistics cost: a training step with them as a multiple of the plain SGD step, on an MLP, a CNN and a GPT.

    python -m benchmarks capture_cost --model mlp --repeats 1

A step is loss, gradients, statistics and the parameters' update on a batch drawn beforehand. Rows without an optimizer
take SGD's step and keep a running mean of the statistics; the others hand them to the optimizer, whose refresh every
ten steps is timed apart and spread over the ten, which are a repeat. All rows of a model take turns. Flops are those of
matrix products, before the compiler drops what nothing reads, which is much of a Monte-Carlo pass. Memory is the
compiler's own count of a step's temporaries and results, without what is donated.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax

import fisher_optax as fo
from benchmarks import harness
from benchmarks.catalogue import listed, positive
from benchmarks.harness import PERIOD, RATE, WARM_UP
from benchmarks.results import columns, ratio, result, spread, table
from benchmarks.steps import Stepper, mean_flops, peak_bytes, times_of, zeros
from experiments.kfac_jax import NOTE, KfacJax
from experiments.models.small import MODELS, Model

BATCHES = 4  # drawn beforehand, in turns
DECAY = 0.95  # of the running mean of statistics
COLUMNS = columns(
    "label: step; step_ms: step, ms ±; refresh_ms: with a refresh, ms ±; mean_ms: mean of ten, ms ±;"
    "over_sgd: over SGD's | .2f ±; promised: at most | .2g; holds: holds; mean_gflop: mean of ten, GF;"
    "flops_over_sgd: flops over SGD's | .2f; memory_mb: memory, MB | .0f; memory_over_sgd: memory over SGD's | .2f;"
    "compile_s: compile, s | .2g; skipped: steps skipped | d"
)
# Times the plain SGD step, refreshes included, with the cheaper of the two decompositions.
PROMISES = {("mlp", "kfac_inverse"): 3.4, ("cnn", "kfac_inverse"): 2.4}
TITLES = {"mlp": "Autoencoder", "cnn": "CNN", "gpt": "GPT"}


class Row(NamedTuple):
    """A way to step: which statistics, and what becomes of them."""

    label: str
    statistics: Callable[[Model], Any] = lambda model: None  # None: plain `jax.value_and_grad`
    optimizer: Callable[..., optax.GradientTransformationExtraArgs] | None = None  # None: SGD, which ignores statistics
    options: Mapping[str, Any] = {"precondition_frequency": PERIOD}
    fisher: str = "empirical"
    extra: Callable[[Any, Any, Any], dict[str, Any]] = lambda key, state, params: {}  # more arguments of grad_fn

    def gradient(self, model: Model) -> Callable[..., Any]:
        """``(parameters, x, y)`` to the loss, gradients and perhaps statistics."""
        kind = self.statistics(model)
        return (
            jax.value_and_grad(model.loss_fn) if kind is None else fo.value_and_grad(model.loss_fn, kind, self.fisher)
        )


def factors(model: Model) -> fo.KroneckerFactors:
    return fo.KroneckerFactors()


def samples(model: Model) -> fo.LayerSamples:
    return fo.LayerSamples(64)


def bases(key: Any, state: Any, params: Any) -> dict[str, Any]:
    return {"bases": fo.eigenbases(state, params)}


INVERSE = {"precondition_frequency": PERIOD, "refresh": fo.Refresh(decomposition="inverse")}
SQUARES = fo.KroneckerFactors(squares=True)
ROWS = {
    "sgd": Row("SGD"),
    "empirical": Row("`fo.KroneckerFactors()`, empirical", factors),
    "max_examples": Row("the same, `max_examples=`", lambda m: fo.KroneckerFactors(max_examples=m.max_examples)),
    "mc": Row("the same, Monte-Carlo", factors, fisher="mc", extra=lambda key, state, params: {"fisher_key": key}),
    "layer_samples": Row("`fo.LayerSamples(64)`", samples),
    "input_gram": Row("`fo.InputGram()`", lambda model: fo.InputGram()),
    "kfac": Row("`fo.kfac`", factors, fo.kfac),
    "kfac_inverse": Row('`fo.kfac(refresh=fo.Refresh(decomposition="inverse"))`', factors, fo.kfac, INVERSE),
    "ekfac": Row("`fo.ekfac`", lambda model: SQUARES, fo.ekfac, extra=bases),
    "kfac_soap": Row("`fo.kfac_soap`", factors, fo.kfac_soap),
    "frog": Row("`fo.frog`", samples, fo.frog, {}),
    "kfrog": Row("`fo.kfrog`", samples, fo.kfrog, {}),
}
PEERS = {"kfac_jax": KfacJax}
LABELS = {name: row.label for name, row in ROWS.items()} | {"kfac_jax": "kfac-jax"}


def contender_of(model: Model, row: Row, batch: Any) -> Stepper:
    """A row compiled for a model: ``step(batch, mean of statistics, state, parameters)``."""
    tx: Any = row.optimizer(learning_rate=RATE, **row.options) if row.optimizer else optax.sgd(RATE)
    params = jax.jit(model.init)(jax.random.key(0))
    grad_fn, state, mean = row.gradient(model), tx.init(params), None

    def gradient(batch: Any, state: Any, params: Any) -> Any:
        x, y, key = batch
        return grad_fn(params, x, y, **row.extra(key, state, params))

    def step(batch: Any, mean: Any, state: Any, params: Any) -> tuple[Any, Any, Any, Any]:
        value, grads, *captured = gradient(batch, state, params)
        given = {"statistics": captured[0]} if row.optimizer else {}
        if mean is not None:
            mean = jax.tree.map(lambda old, new: DECAY * old + (1 - DECAY) * new, mean, captured[0])
        updates, state = tx.update(grads, state, params, **given)
        return mean, state, optax.apply_updates(params, updates), value

    if row.optimizer is None and row.statistics(model) is not None:
        mean = zeros(jax.eval_shape(gradient, batch, state, params)[2])
    return Stepper(step, batch, mean, state, params)


def describe(name: str, contender: Any, seconds: Sequence[float]) -> dict[str, Any]:
    """One row of the results, without its multiples of SGD. Of a peer nothing is known beside its times.

    Where nothing is ever refreshed, the mean is the usual step's: a hiccup is no part of it.
    """
    ms, refreshes = times_of(seconds), name in PEERS or ROWS[name].optimizer is not None
    cells: dict[str, Any] = {
        "label": LABELS[name],
        "step_ms": spread(ms["step"]),
        "refresh_ms": spread(ms["slowest"]) if refreshes else None,
        "mean_ms": spread(ms["mean" if refreshes else "step"]),
    }
    if name in PEERS:
        return cells
    return cells | {
        "mean_gflop": mean_flops(contender.flops) / 1e9,
        "memory_mb": peak_bytes(contender.programs[0].run) / 1e6,
        "compile_s": contender.programs[0].compile_s,
        "skipped": int(fo.health(contender.carried[1]).skipped) if refreshes else 0,
    }


def compare(model: str, rows: Mapping[str, dict[str, Any]], times: Mapping[str, Sequence[float]]) -> None:
    """Add each row's multiples of SGD, and what is promised of them."""
    ms = {key: times_of(times[key])["mean" if row["refresh_ms"] else "step"] for key, row in rows.items()}
    for key, row in rows.items():
        row["over_sgd"], sgd = ratio(ms[key], ms["sgd"]), rows["sgd"]
        if key not in PEERS:
            row["flops_over_sgd"] = row["mean_gflop"] / sgd["mean_gflop"]
            row["memory_over_sgd"] = row["memory_mb"] / sgd["memory_mb"]
        if promised := PROMISES.get((model, key)):
            row |= {"promised": promised, "holds": row["over_sgd"]["median"] <= promised}


def of_model(name: str, only: Sequence[str], repeats: int) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """The table of the model called ``name``, what it depends on, and why a peer is not in it."""
    model = MODELS[name]()
    draw = jax.jit(lambda key: (*model.draw(key), key))
    batches = [jax.block_until_ready(draw(jax.random.key(i))) for i in range(BATCHES)]
    contenders, absent = {}, {}
    for row in only:
        try:
            made = PEERS[row](model, batches[0]) if row in PEERS else contender_of(model, ROWS[row], batches[0])
            contenders[row] = made
        except Exception as error:
            if row not in PEERS:
                raise
            # A peer may fail in any way, and not take the run along.
            absent[f"{name} {row}"] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        print(f"{name}: {row}: {absent.get(f'{name} {row}', 'compiled')}", flush=True)
    times = harness.interleaved(contenders, WARM_UP + PERIOD * repeats, lambda i: batches[i % BATCHES], f"{name}: step")
    times = {key: seconds[WARM_UP:] for key, seconds in times.items()}
    rows = {key: describe(key, contender, times[key]) for key, contender in contenders.items()}
    compare(name, rows, times)
    params = jax.eval_shape(model.init, jax.random.key(0))
    count, shape = harness.nbytes(params) // 4, list(batches[0][0].shape)
    settings = {"parameters": count, "batch": shape, "max_examples": model.max_examples, "repeats": repeats}
    return table(f"{TITLES[name]}, {count / 1e6:.3g}M parameters, batch {shape[0]}", COLUMNS, rows), settings, absent


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=listed(MODELS), default=list(MODELS), help="by commas")
    parser.add_argument("--repeats", type=positive, default=3, help="tens of steps that are timed (%(default)s)")
    rows = [*ROWS, *PEERS]
    parser.add_argument("--only", type=listed(rows), default=rows, help=f"rows beside sgd, of {', '.join(rows)}")


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    tables, settings, absent = {}, {}, {}
    for name in options.model:
        with harness.compiling_anew():
            only = list(dict.fromkeys(["sgd", *options.only]))
            tables[name], settings[name], gone = of_model(name, only, options.repeats)
        absent |= {row: {"reason": reason} for row, reason in gone.items()}
        yield result(
            f"capture_cost_{harness.environment()['platform']}",
            "Training steps with curvature's statistics, and with the optimizers that use them, beside plain SGD's",
            options.command,
            {**tables, "absent": table("Left out", columns("reason: left out"), absent)},
            settings={**settings, "steps_a_repeat": PERIOD, "kfac_jax": NOTE},
        )
