"""What statistics cost: a training step with them as a multiple of the plain SGD step, on an MLP, a CNN and a GPT.

    python -m benchmarks capture_cost --model mlp --repeats 1

A step is loss, gradients, statistics and the parameters' update on a batch drawn beforehand. Rows without an optimizer
take SGD's step and keep a running mean of the statistics; the others hand them to the optimizer, whose refresh every
ten steps is timed apart and spread over the ten, which are a repeat. All rows of a model take turns in one run, each
with what it carries donated. Flops are those of matrix products, before the compiler drops what nothing reads, which is
much of a Monte-Carlo pass. Memory is the compiler's own count of a step's temporaries and results, without what is
donated.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import fisher_optax as fo
from benchmarks import harness
from benchmarks.capture_models import MODELS, Model
from benchmarks.flops import count_matmul_flops
from benchmarks.kfac_jax_step import NOTE, KfacJax
from benchmarks.results import Column, read, result, spread, table
from benchmarks.steps import PERIOD, RATE, WARM_UP, mean_flops, means, medians, ratio, slowest, where

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BATCHES = 4  # drawn beforehand, in turns
DECAY = 0.95  # of the running mean of statistics
LABELS = {
    "sgd": "SGD",
    "empirical": "`fo.KroneckerFactors()`, empirical",
    "max_examples": "the same, `max_examples=`",
    "mc": "the same, Monte-Carlo",
    "layer_samples": "`fo.LayerSamples(64)`",
    "input_gram": "`fo.InputGram()`",
    "kfac": "`fo.kfac`",
    "kfac_inverse": '`fo.kfac(refresh=fo.Refresh(decomposition="inverse"))`',
    "ekfac": "`fo.ekfac`",
    "kfac_soap": "`fo.kfac_soap`",
    "frog": "`fo.frog`",
    "kfrog": "`fo.kfrog`",
    "kfac_jax": "kfac-jax",
}
MS = Column("", ".3g", spread=True)
COLUMNS = {
    "label": Column("step"),
    "step_ms": MS._replace(title="step, ms"),
    "refresh_ms": MS._replace(title="with a refresh, ms"),
    "mean_ms": MS._replace(title="mean of ten, ms"),
    "over_sgd": Column("over SGD's", ".2f", spread=True),
    "promised": Column("at most", ".2g"),
    "holds": Column("holds"),
    "mean_gflop": Column("mean of ten, GF", ".3g"),
    "flops_over_sgd": Column("flops over SGD's", ".2f"),
    "memory_mb": Column("memory, MB", ".0f"),
    "memory_over_sgd": Column("memory over SGD's", ".2f"),
    "statistics_mb": Column("statistics, MB", ".3g"),
    "compile_s": Column("compile, s", ".2g"),
    "trace_s": Column("trace, s", ".2g"),
    "skipped": Column("steps skipped", "d"),
}


class Row(NamedTuple):
    """A way to step: which statistics, and what becomes of them."""

    statistics: Any = None  # None: plain `jax.value_and_grad`
    fisher: str = "empirical"
    optimizer: Callable[[], optax.GradientTransformationExtraArgs] | None = None  # None: SGD, which ignores statistics
    extra: Callable[[Any, Any, Any], dict[str, Any]] = lambda key, state, params: {}  # more arguments of grad_fn


ROWS: dict[str, Callable[[Model], Row]] = {
    "sgd": lambda model: Row(),
    "empirical": lambda model: Row(fo.KroneckerFactors()),
    "max_examples": lambda model: Row(fo.KroneckerFactors(max_examples=model.max_examples)),
    "mc": lambda model: Row(fo.KroneckerFactors(), "mc", extra=lambda key, state, params: {"fisher_key": key}),
    "layer_samples": lambda model: Row(fo.LayerSamples(64)),
    "input_gram": lambda model: Row(fo.InputGram()),
    "kfac": lambda model: Row(fo.KroneckerFactors(), optimizer=lambda: fo.kfac(RATE, precondition_frequency=PERIOD)),
    "kfac_inverse": lambda model: Row(
        fo.KroneckerFactors(),
        optimizer=lambda: fo.kfac(RATE, precondition_frequency=PERIOD, refresh=fo.Refresh(decomposition="inverse")),
    ),
    "ekfac": lambda model: Row(
        fo.KroneckerFactors(squares=True),
        optimizer=lambda: fo.ekfac(RATE, precondition_frequency=PERIOD),
        extra=lambda key, state, params: {"bases": fo.eigenbases(state, params)},
    ),
    "kfac_soap": lambda model: Row(
        fo.KroneckerFactors(), optimizer=lambda: fo.kfac_soap(learning_rate=RATE, precondition_frequency=PERIOD)
    ),
    "frog": lambda model: Row(fo.LayerSamples(64), optimizer=lambda: fo.frog(RATE)),
    "kfrog": lambda model: Row(fo.LayerSamples(64), optimizer=lambda: fo.kfrog(RATE)),
}
PEERS = {"kfac_jax": KfacJax}
TITLES = {"mlp": "Autoencoder", "cnn": "CNN", "gpt": "GPT"}
# Times the plain SGD step, refreshes included, with the cheaper of the two decompositions.
PROMISES = {("mlp", "kfac_inverse"): 3.4, ("cnn", "kfac_inverse"): 2.4}


def make_step(model: Model, row: Row, tx: Any) -> Callable[..., Any]:
    """``step(batch, mean, state, params)`` -> the last three anew, and the loss."""
    grad_fn = jax.value_and_grad(model.loss_fn)
    if row.statistics is not None:
        grad_fn = fo.value_and_grad(model.loss_fn, row.statistics, row.fisher)

    def step(batch: Any, mean: Any, state: Any, params: Any) -> tuple[Any, Any, Any, Any]:
        # Results in the order of the arguments: JAX hands donated buffers to results of their shape in that order.
        x, y, key = batch
        value, grads, *captured = grad_fn(params, x, y, **row.extra(key, state, params))
        given = {"statistics": captured[0]} if row.optimizer else {}
        if mean is not None:
            mean = jax.tree.map(lambda old, new: DECAY * old + (1 - DECAY) * new, mean, captured[0])
        updates, state = tx.update(grads, state, params, **given)
        return mean, state, optax.apply_updates(params, updates), value

    return step


class Contender:
    """A row compiled for a model, with what it carries from step to step."""

    def __init__(self, model: Model, row: Row, batch: Any):
        tx: Any = row.optimizer() if row.optimizer else optax.sgd(RATE)
        params = jax.jit(model.init)(jax.random.key(0))
        state = jax.tree.map(jnp.copy, tx.init(params))  # no buffer twice, or it could not be donated
        x, y, key = batch
        self.shapes = None
        if row.statistics is not None:
            grad_fn = fo.value_and_grad(model.loss_fn, row.statistics, row.fisher)
            self.shapes = jax.eval_shape(lambda p, s: grad_fn(p, x, y, **row.extra(key, s, p))[2], params, state)
        kept = None if row.optimizer else self.shapes
        self.carried = (jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), kept), state, params)
        step = make_step(model, row, tx)
        self.refreshes = row.optimizer is not None
        self.flops = count_matmul_flops(step, batch, *self.carried)
        self.program = harness.compile_program(step, batch, *self.carried, donate=(1, 2, 3))

    def __call__(self, batch: Any) -> Any:
        *self.carried, value = self.program.run(batch, *self.carried)
        return self.carried, value

    def size(self) -> dict[str, Any]:
        """What is known of it beside its times; ``skipped`` counts steps that the optimizer did not carry out."""
        return {
            "mean_gflop": mean_flops(self.flops) / 1e9,
            "memory_mb": peak_bytes(self.program.run) / 1e6,
            "statistics_mb": harness.nbytes(self.shapes) / 1e6,
            "trace_s": self.program.trace_s,
            "compile_s": self.program.compile_s,
            "skipped": int(fo.health(self.carried[1]).skipped) if self.refreshes else 0,
        }


def peak_bytes(compiled: Any) -> int:
    """What a compiled program needs beside its arguments: temporaries and those results that are not donated."""
    memory = compiled.memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes


def describe(name: str, contender: Any, seconds: Sequence[float]) -> dict[str, Any]:
    """One row of the results, without its multiples of SGD."""
    return {
        "label": LABELS[name],
        "step_ms": spread(medians(seconds)),
        "refresh_ms": spread(slowest(seconds)) if contender.refreshes else None,
        "mean_ms": spread(mean_times(contender, seconds)),
        **contender.size(),
    }


def mean_times(contender: Any, seconds: Sequence[float]) -> list[float]:
    """Milliseconds, one a repeat; where nothing is ever refreshed, the usual step's: a hiccup is no part of it."""
    return means(seconds) if contender.refreshes else medians(seconds)


def compare(
    model: str, rows: Mapping[str, dict[str, Any]], contenders: Mapping[str, Any], times: Mapping[str, Any]
) -> None:
    """Add each row's multiples of SGD, and what is promised of them."""
    of = {key: mean_times(contender, times[key]) for key, contender in contenders.items()}
    for key, row in rows.items():
        row["over_sgd"] = ratio(of[key], of["sgd"])
        for over, mine in (("flops_over_sgd", "mean_gflop"), ("memory_over_sgd", "memory_mb")):
            row[over] = row[mine] / rows["sgd"][mine] if mine in row else None
        if (model, key) in PROMISES:
            row["promised"] = PROMISES[model, key]
            row["holds"] = row["over_sgd"]["median"] <= row["promised"]


def build(name: str, model: Model, only: Sequence[str], batch: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """The contenders, compiled, and why a peer is not among them."""
    contenders, absent = {}, {}
    for row in only:
        try:
            contenders[row] = PEERS[row](model, batch) if row in PEERS else Contender(model, ROWS[row](model), batch)
        except Exception as error:
            if row not in PEERS:
                raise
            # A peer may fail in any way, and not take the run along.
            absent[row] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        print(f"{name}: {row}: {absent.get(row, 'compiled')}", flush=True)
    return contenders, absent


def of_model(name: str, only: Sequence[str], repeats: int) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """The table of the model called ``name``, what it depends on, and the peers that are not in it."""
    model = MODELS[name]()
    draw = jax.jit(lambda key: (*model.draw(key), key))
    batches = [jax.block_until_ready(draw(jax.random.key(i))) for i in range(BATCHES)]
    contenders, absent = build(name, model, only, batches[0])
    rounds = WARM_UP + PERIOD * repeats
    times = harness.interleaved(contenders, rounds, lambda i: batches[i % BATCHES], f"{name}: step")
    times = {key: seconds[WARM_UP:] for key, seconds in times.items()}
    rows = {key: describe(key, contender, times[key]) for key, contender in contenders.items()}
    compare(name, rows, contenders, times)
    parameters = harness.nbytes(jax.eval_shape(model.init, jax.random.key(0))) // 4
    shape = list(batches[0][0].shape)
    settings = {"parameters": parameters, "batch": shape, "max_examples": model.max_examples}
    title = f"{TITLES[name]}, {parameters / 1e6:.3g}M parameters, batch {shape[0]}"
    return table(title, COLUMNS, rows), settings, absent


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=",".join(MODELS), help="by commas; what was measured of others stays")
    parser.add_argument("--repeats", type=int, default=3, help="tens of steps that are timed (default: %(default)s)")
    parser.add_argument("--only", help=f"rows, by commas, beside sgd, of {', '.join([*ROWS, *PEERS])} (default: all)")


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    models = options.model.split(",")
    only = list(dict.fromkeys(["sgd", *(options.only.split(",") if options.only else [*ROWS, *PEERS])]))
    for kind, given, known in (("--model", models, MODELS), ("--only", only, [*ROWS, *PEERS])):
        if unknown := set(given) - set(known):
            raise SystemExit(f"{kind} got {', '.join(sorted(unknown))}; known are {', '.join(known)}")
    if options.repeats < 1:
        raise SystemExit(f"--repeats must be at least 1; got {options.repeats}")
    surroundings = harness.environment()
    called = f"capture_cost_{surroundings['platform']}"
    tables, settings, absent = others(options.out / f"{called}.json", models, surroundings)
    for name in models:
        with harness.compiling_anew():
            tables[name], settings[name], gone = of_model(name, only, options.repeats)
        settings[name] |= {key: surroundings[key] for key in ("date", "load")} | {"repeats": options.repeats}
        absent |= {f"{name} {row}": {"reason": reason} for row, reason in gone.items()}
        yield result(
            called,
            "Training steps with curvature's statistics, and with the optimizers that use them, beside plain SGD's",
            "python -m benchmarks capture_cost" + (f" --only {options.only}" if options.only else ""),
            {
                **{model: tables[model] for model in MODELS if model in tables},
                "absent": table("Left out", {"reason": Column("left out")}, absent),
            },
            environment=surroundings,
            settings={**settings, "steps_a_repeat": PERIOD, "kfac_jax": NOTE},
        )


def others(
    path: Path, models: Sequence[str], surroundings: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Tables, settings and missing peers of other models, from the same machine, versions and flags."""
    found = read(path) if path.exists() else {"tables": {}, "versions": None}
    same = found["versions"] == surroundings["versions"]
    same = same and all(found["machine"][key] == surroundings[key] for key in ("cpu", "cores", "device", "flags"))
    kept = [model for model in MODELS if same and model in found["tables"] and model not in models]
    absent = found["tables"]["absent"]["rows"] if kept else {}
    return (
        {model: found["tables"][model] for model in kept},
        {model: found["settings"][model] for model in kept},
        {key: row for key, row in absent.items() if key.split()[0] in kept},
    )


def draw(found: Mapping[str, Any]) -> "Figure":
    """A panel a model: each row's multiple of SGD, with low and high."""
    from matplotlib.figure import Figure

    panels = {name: part for name, part in found["tables"].items() if name in TITLES}
    figure = Figure(figsize=(4 + 2.6 * len(panels), 4.5), layout="constrained")
    names = [name for name in LABELS if any(name in part["rows"] for part in panels.values()) and name != "sgd"]
    for axes, part in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels.values(), strict=True):
        for place, over in ((i, part["rows"][n]["over_sgd"]) for i, n in enumerate(names) if n in part["rows"]):
            ends = [[over["median"] - over["low"]], [over["high"] - over["median"]]]
            axes.barh(place, over["median"], xerr=ends, color="0.7" if names[place] in PEERS else "C0", ecolor="0.3")
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set(yticks=range(len(names)), yticklabels=[LABELS[n].replace("`", "") for n in names])
        axes.set(xlabel="times SGD's step", title=part["title"].replace(", ", "\n", 1))
        axes.grid(alpha=0.3, axis="x")
    figure.get_axes()[0].invert_yaxis()
    figure.suptitle(f"Training steps with curvature, refreshes spread over ten, {where(found)}")
    return figure
