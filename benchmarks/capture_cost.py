"""What statistics cost: a training step with them as a multiple of the plain SGD step, on an MLP, a CNN and a GPT.

    python -m benchmarks.capture_cost --model all --repeats 3

A step is loss, gradients, statistics and the parameters' update on a batch drawn beforehand. Rows without an optimizer
take SGD's step and keep a running mean of the statistics; the others hand them to the optimizer, whose refresh every
ten steps is timed apart and spread over the ten. All rows of a model take turns in one run, each with what it carries
donated. Memory is the compiler's own count of a step's temporaries and results, without what is donated.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import fisher_optax as fo
from benchmarks import harness
from benchmarks.flops import count_matmul_flops
from benchmarks.kfac_jax_step import KfacJax
from benchmarks.step_time import PERIOD, RATE, WARM_UP, flops_between_refreshes, phase_medians

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from models.cnn import CNN
from models.gpt import GPT

BATCHES = 4  # drawn beforehand, in turns
DECAY = 0.95  # of the running mean of statistics
COLUMNS = {
    "name": "step",
    "step_ms": "step ms",
    "refresh_ms": "refresh",
    "mean_ms": "mean",
    "over_sgd": "/SGD",
    "promised": "at most",
    "mean_gflop": "GF",
    "flops_over_sgd": "/SGD",
    "memory_mb": "memory MB",
    "statistics_mb": "statistics",
    "compile_s": "compile s",
}


class Model(NamedTuple):
    """A network with its loss, and the means to start and to feed it."""

    init: Callable[[Any], Any]  # key -> params
    logits: Callable[[Any, Any], Any]  # (params, x) -> logits
    loss: Callable[[Any, Any], Any]  # (logits, y) -> scalar, one of `fo.losses`
    draw: Callable[[Any], tuple[Any, Any]]  # key -> (x, y)
    max_examples: int  # about a quarter of the positions of a batch; of a convolution's many, fewer

    def loss_fn(self, params: Any, x: Any, y: Any) -> Any:
        """What is trained."""
        return self.loss(self.logits(params, x), y)


def of_flax(net: nn.Module, x: Any, loss: Callable[..., Any], draw: Callable[..., Any], max_examples: int) -> Model:
    """A Flax module whose inputs are like ``x``."""
    return Model(
        lambda key: net.init(key, x)["params"],
        lambda params, x: net.apply({"params": params}, x),
        loss,
        draw,
        max_examples,
    )


class Autoencoder(nn.Module):
    """784-1000-500-250-30-250-500-1000-784 with biases, of Hinton and Salakhutdinov 2006, here with tanh."""

    widths: tuple[int, ...] = (1000, 500, 250, 30, 250, 500, 1000)

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for width in self.widths:
            x = nn.tanh(nn.Dense(width)(x))
        return nn.Dense(784)(x)


def mlp(batch: int = 500) -> Model:
    """The autoencoder on random numbers between 0 and 1."""

    def draw(key: Any) -> tuple[Any, Any]:
        x = jax.random.uniform(key, (batch, 784))
        return x, x

    return of_flax(Autoencoder(), jnp.zeros((1, 784)), fo.losses.sigmoid_cross_entropy, draw, batch // 4)


def cnn(batch: int = 256) -> Model:
    """The CNN of `examples/train_images.py` on random images of 28 x 28."""

    def draw(key: Any) -> tuple[Any, Any]:
        images, labels = jax.random.split(key)
        return jax.random.uniform(images, (batch, 28, 28, 1)), jax.random.randint(labels, (batch,), 0, 10)

    return of_flax(CNN(classes=10), jnp.zeros((1, 28, 28, 1)), fo.losses.softmax_cross_entropy, draw, 32 * batch)


def gpt(batch: int = 8, layers: int = 6, width: int = 384, heads: int = 6, context: int = 256) -> Model:
    """The character GPT of `examples/train_gpt.py`, 10.7M parameters as it stands, on random characters."""

    def draw(key: Any) -> tuple[Any, Any]:
        text = jax.random.randint(key, (batch, context + 1), 0, 65)
        return text[:, :-1], text[:, 1:]

    tokens, net = jnp.zeros((1, context), jnp.int32), GPT(65, context, layers, width, heads)
    return of_flax(net, tokens, fo.losses.softmax_cross_entropy, draw, batch * context // 4)


class Row(NamedTuple):
    """A way to step: which statistics, and what becomes of them."""

    statistics: Any = None  # None: plain `jax.value_and_grad`
    fisher: str = "empirical"
    optimizer: Callable[[], optax.GradientTransformationExtraArgs] | None = None  # None: SGD, which ignores statistics
    extra: Callable[[Any, Any, Any], dict[str, Any]] = lambda key, state, params: {}  # more arguments of grad_fn


MODELS: dict[str, Callable[[], Model]] = {"mlp": mlp, "cnn": cnn, "gpt": gpt}
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
        optimizer=lambda: fo.kfac(RATE, decomposition="inverse", precondition_frequency=PERIOD),
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
        between, most = flops_between_refreshes(self.flops), self.flops.most
        return {
            "mean_gflop": (between + (most - between) / PERIOD) / 1e9,
            "memory_mb": peak_bytes(self.program.run) / 1e6,
            "statistics_mb": harness.nbytes(self.shapes) / 1e6,
            "trace_s": self.program.trace_s,
            "compile_s": self.program.compile_s,
            "skipped": fo.health(self.carried[1]).skipped if self.refreshes else 0,
        }


def peak_bytes(compiled: Any) -> int:
    """What a compiled program needs beside its arguments: temporaries and those results that are not donated."""
    memory = compiled.memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes


def describe(name: str, contender: Any, seconds: Sequence[float]) -> dict[str, Any]:
    """One row of the results."""
    phases = phase_medians(seconds)
    step = statistics.median(phases) if contender.refreshes else 1e3 * statistics.median(seconds)
    return {
        "name": name,
        "step_ms": step,
        "refresh_ms": max(phases) if contender.refreshes else None,
        "mean_ms": statistics.mean(phases) if contender.refreshes else step,
        **contender.size(),
        "phases_ms": phases,
    }


def compare(name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Add each row's multiples of SGD, and what is promised of them."""
    sgd = next(row for row in rows if row["name"] == "sgd")
    for row in rows:
        for key, mine in (("over_sgd", "mean_ms"), ("flops_over_sgd", "mean_gflop"), ("memory_over_sgd", "memory_mb")):
            row[key] = row[mine] / sgd[mine] if mine in row else None
        row["promised"] = PROMISES.get((name, row["name"]))


def build(name: str, model: Model, only: Sequence[str], batch: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """The contenders, compiled, and why a peer is not among them."""
    contenders, absent = {}, {}
    for row in only:
        try:
            contenders[row] = PEERS[row](model, batch) if row in PEERS else Contender(model, ROWS[row](model), batch)
        except Exception as error:
            if row not in PEERS:
                raise
            absent[row] = f"{type(error).__name__}: {error}"  # a peer may fail in any way, and not take the run along
        print(f"{name}: {row}: {absent.get(row, 'compiled')}", flush=True)
    return contenders, absent


def measure(name: str, only: Sequence[str], repeats: int) -> dict[str, Any]:
    """Run every row in ``only`` on the model called ``name``."""
    surroundings, model = harness.environment(), MODELS[name]()
    draw = jax.jit(lambda key: (*model.draw(key), key))
    batches = [jax.block_until_ready(draw(jax.random.key(i))) for i in range(BATCHES)]
    contenders, absent = build(name, model, only, batches[0])
    rounds = WARM_UP + PERIOD * repeats
    times = harness.interleaved(contenders, rounds, lambda i: batches[i % BATCHES], f"{name}: step")
    rows = [describe(row, contender, times[row][WARM_UP:]) for row, contender in contenders.items()]
    compare(name, rows)
    params = jax.eval_shape(model.init, jax.random.key(0))
    return {
        "environment": surroundings,
        "model": {"name": name, "parameters": harness.nbytes(params) // 4, "max_examples": model.max_examples},
        "batch": [list(x.shape) for x in batches[0][:2]],
        "repeats": repeats,
        "rows": rows,
        "absent": absent,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Time training steps with statistics against plain SGD.")
    parser.add_argument("--model", choices=[*MODELS, "all"], default="all")
    parser.add_argument("--repeats", type=int, default=3, help="tens of steps that are timed (default: %(default)s)")
    parser.add_argument(
        "--only", default=",".join([*ROWS, *PEERS]), help="rows, by commas, beside sgd (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=harness.RESULTS, help="folder of the results (default: %(default)s)"
    )
    options = parser.parse_args()
    only = list(dict.fromkeys(["sgd", *options.only.split(",")]))
    if unknown := set(only) - {*ROWS, *PEERS}:
        parser.error(f"--only got {', '.join(sorted(unknown))}; known are {', '.join([*ROWS, *PEERS])}")
    if options.repeats < 1:
        parser.error(f"--repeats must be at least 1; got {options.repeats}")
    jax.config.update("jax_enable_compilation_cache", False)  # a program found on disk would seem to compile in no time
    for name in MODELS if options.model == "all" else [options.model]:
        results = measure(name, only, options.repeats)
        path = harness.write_results(f"capture_cost_{name}_{results['environment']['platform']}", results, options.out)
        print(f"\n{harness.table(results['rows'], COLUMNS)}\nwritten to {path}\n")


if __name__ == "__main__":
    main()
