"""The optimizer's share of a whole training step of a GPT, for AdamW, Muon and SOAP.

    python -m benchmarks train_step --preset gpt2

A step is the mean gradient over all tokens of a batch, accumulated over micro-batches in a compiled loop, and one
update. Both are timed apart, the updates of all optimizers in turns, with what they carry donated; a repeat is ten
updates, so that SOAP's refresh is in each, and a few gradients. The share is the mean update's in the sum of both.
The preset ``small`` is for a CPU; ``gpt2`` is GPT-2's 124M parameters and half a million tokens a step, for an
accelerator, with activations and Muon's products in bfloat16.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import fisher_optax as fo
from benchmarks import harness
from benchmarks.results import Column, result, spread, table
from benchmarks.steps import PERIOD, RATE, WARM_UP, means, ratio, where
from experiments.models.gpt import GPT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GRADIENTS = 3  # timed a repeat


class Preset(NamedTuple):
    """A GPT, and what it sees in a step."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    context: int
    micro_batch: int  # windows in one backward pass
    micro_batches: int
    dtype: str  # of the model's computation; parameters and gradients are float32

    @property
    def tokens(self) -> int:
        """Of one step."""
        return self.micro_batches * self.micro_batch * self.context

    @property
    def model(self) -> GPT:
        shape = (self.vocabulary, self.context, self.layers, self.width, self.heads)
        return GPT(*shape, dtype=jnp.dtype(self.dtype))


PRESETS = {
    "small": Preset(6, 384, 6, 65, 256, micro_batch=16, micro_batches=4, dtype="float32"),
    "gpt2": Preset(12, 768, 12, 50_304, 1024, micro_batch=16, micro_batches=32, dtype="bfloat16"),
}
OPTIMIZERS: dict[str, tuple[str, Callable[[Any], optax.GradientTransformation]]] = {
    "adamw": ("`optax.adamw`", lambda dtype: optax.adamw(RATE)),
    "fo_muon": ("`fo.muon`", lambda dtype: fo.muon(RATE, dtype=dtype)),
    "fo_soap": ("`fo.soap`, every 10", lambda dtype: fo.soap(RATE, precondition_frequency=PERIOD)),
}
PROMISES = {"fo_muon": 0.03, "fo_soap": 0.12}  # of GPT-2's step on a GPU, at most
MS = Column("", ".3g", spread=True)
COLUMNS = {
    "label": Column("optimizer"),
    "gradient_ms": MS._replace(title="gradient, ms"),
    "update_ms": MS._replace(title="update, mean of ten, ms"),
    "whole_ms": MS._replace(title="both, ms"),
    "share": Column("update's share", ".1%", spread=True),
    "over_adamw": Column("both, over AdamW's", ".3f", spread=True),
    "promised": Column("at most", ".0%"),
    "holds": Column("holds"),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=[*PRESETS], default="small")
    parser.add_argument("--repeats", type=int, default=3, help="tens of updates that are timed (default: %(default)s)")


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    if options.repeats < 1:
        raise SystemExit(f"--repeats must be at least 1; got {options.repeats}")
    preset, surroundings = PRESETS[options.preset], harness.environment()
    params = jax.jit(lambda key: preset.model.init(key, jnp.zeros((1, preset.context), jnp.int32))["params"])
    start = jax.block_until_ready(params(jax.random.key(0)))
    tokens = jax.random.randint(
        jax.random.key(1), (preset.micro_batches, preset.micro_batch, preset.context + 1), 0, preset.vocabulary
    )
    gradient = harness.compile_program(make_gradient(preset), start, tokens).run
    grads = jax.block_until_ready(gradient(start, tokens))
    updates = {name: Update(make(jnp.dtype(preset.dtype)), grads, start) for name, (_, make) in OPTIMIZERS.items()}
    harness.interleaved(updates, WARM_UP, lambda i: grads, f"{options.preset}: warm-up")
    gradients, times = [], {name: [] for name in updates}
    for repeat in range(options.repeats):
        said = f"{options.preset}: repeat {repeat + 1} of {options.repeats},"
        passes = harness.interleaved(
            {"": lambda i: gradient(start, tokens)}, GRADIENTS, lambda i: i, f"{said} gradient"
        )
        gradients.append(1e3 * statistics.median(passes[""]))
        for name, seconds in harness.interleaved(updates, PERIOD, lambda i: grads, f"{said} update").items():
            times[name] += seconds
    promised = PROMISES if options.preset == "gpt2" and surroundings["platform"] == "gpu" else {}
    yield result(
        f"train_step_{options.preset}_{surroundings['platform']}",
        f"A training step of a GPT of {harness.nbytes(start) / 4e6:.3g}M parameters on {preset.tokens:,} tokens",
        f"python -m benchmarks train_step --preset {options.preset}",
        {"steps": table("The optimizer's share", COLUMNS, described(gradients, times, promised))},
        environment=surroundings,
        settings={**preset._asdict(), "tokens": preset.tokens, "repeats": options.repeats, "updates_a_repeat": PERIOD},
    )


def make_gradient(preset: Preset) -> Callable[[Any, Any], Any]:
    """The gradient of the mean loss over all micro-batches, summed up in float32 by a loop."""

    def loss(params: Any, windows: Any) -> Any:
        logits = jnp.asarray(preset.model.apply({"params": params}, windows[:, :-1]))
        return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()

    def gradient(params: Any, tokens: Any) -> Any:
        def add(total: Any, windows: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, jax.grad(loss)(params, windows)), None

        total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), tokens)
        return jax.tree.map(lambda x: x / len(tokens), total)

    return gradient


class Update:
    """An optimizer's update, compiled, with the parameters and the state it has reached."""

    def __init__(self, tx: optax.GradientTransformation, grads: Any, params: Any):
        def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
            updates, state = tx.update(grads, state, params)
            return state, optax.apply_updates(params, updates)

        self.params = jax.tree.map(jnp.copy, params)
        self.state = jax.tree.map(jnp.copy, tx.init(params))  # no buffer twice, or it could not be donated
        self.run = harness.compile_program(update, grads, self.state, self.params, donate=(1, 2)).run

    def __call__(self, grads: Any) -> Any:
        self.state, self.params = self.run(grads, self.state, self.params)
        return self.params, self.state


def described(
    gradients: list[float], times: Mapping[str, list[float]], promised: Mapping[str, float]
) -> dict[str, dict[str, Any]]:
    """The table's rows, from milliseconds of a gradient, one a repeat, and seconds of each update."""
    whole = {name: [g + u for g, u in zip(gradients, means(times[name]), strict=True)] for name in times}
    rows = {}
    for name, seconds in times.items():
        share = ratio(means(seconds), whole[name])
        rows[name] = {
            "label": OPTIMIZERS[name][0],
            "gradient_ms": spread(gradients),
            "update_ms": spread(means(seconds)),
            "whole_ms": spread(whole[name]),
            "share": share,
            "over_adamw": ratio(whole[name], whole["adamw"]),
            "promised": promised.get(name),
            "holds": share["median"] <= promised[name] if name in promised else None,
        }
    return rows


def draw(found: Mapping[str, Any]) -> "Figure":
    """Stacked bars: gradient and update."""
    from matplotlib.figure import Figure

    rows, settings = found["tables"]["steps"]["rows"].values(), found["settings"]
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axes, labels = figure.subplots(), [row["label"].replace("`", "") for row in rows]
    gradients, updates = ([row[key]["median"] for row in rows] for key in ("gradient_ms", "update_ms"))
    axes.barh(labels, gradients, color="0.75", label="gradient")
    axes.barh(labels, updates, left=gradients, color="C0", label="update, refreshes spread over all")
    for i, (row, end) in enumerate(zip(rows, map(sum, zip(gradients, updates, strict=True)), strict=True)):
        axes.annotate(f"{row['share']['median']:.1%}", (end, i), (4, 0), textcoords="offset points", va="center")
    axes.set(xlabel="ms", xlim=(0, 1.15 * max(map(sum, zip(gradients, updates, strict=True)))))
    axes.invert_yaxis()
    axes.set_title(f"A training step on {settings['tokens']:,} tokens, {where(found)}")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure
