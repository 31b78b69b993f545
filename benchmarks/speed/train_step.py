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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from matplotlib.figure import Figure

import fisher_optax as fo
from benchmarks import harness, pictures
from benchmarks.catalogue import positive
from benchmarks.harness import PERIOD, RATE, WARM_UP
from benchmarks.results import Column, ratio, result, spread, table
from benchmarks.steps import MS, update_stepper
from experiments.models.gpt import GPT

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
    parser.add_argument("--repeats", type=positive, default=3, help="tens of updates that are timed (%(default)s)")


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    preset, platform = PRESETS[options.preset], harness.environment()["platform"]
    params = jax.jit(lambda key: preset.model.init(key, jnp.zeros((1, preset.context), jnp.int32))["params"])
    start = jax.block_until_ready(params(jax.random.key(0)))
    windows = (preset.micro_batches, preset.micro_batch, preset.context + 1)
    tokens = jax.random.randint(jax.random.key(1), windows, 0, preset.vocabulary)
    gradient = harness.compile_program(make_gradient(preset), start, tokens).run
    grads = jax.block_until_ready(gradient(start, tokens))
    dtype = jnp.dtype(preset.dtype)
    updates = {name: update_stepper(make(dtype), start, grads) for name, (_, make) in OPTIMIZERS.items()}
    harness.interleaved(updates, WARM_UP, lambda i: grads, f"{options.preset}: warm-up")
    gradients, times = [], {name: [] for name in updates}
    for repeat in range(options.repeats):
        told = f"{options.preset}: repeat {repeat + 1} of {options.repeats},"
        passes = harness.interleaved(
            {"": lambda i: gradient(start, tokens)}, GRADIENTS, lambda i: i, f"{told} gradient"
        )
        gradients.append(1e3 * statistics.median(passes[""]))
        for name, seconds in harness.interleaved(updates, PERIOD, lambda i: grads, f"{told} update").items():
            times[name] += seconds
    promised = PROMISES if options.preset == "gpt2" and platform == "gpu" else {}
    yield result(
        f"train_step_{options.preset}_{platform}",
        f"A training step of a GPT of {harness.nbytes(start) / 4e6:.3g}M parameters on {preset.tokens:,} tokens",
        options.command,
        {"steps": table("The optimizer's share", COLUMNS, described(gradients, times, promised))},
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


def described(
    gradients: list[float], times: Mapping[str, list[float]], promised: Mapping[str, float]
) -> dict[str, dict[str, Any]]:
    """The table's rows, from milliseconds of a gradient, one a repeat, and seconds of each update."""
    updates = {name: harness.by_repeat(seconds) for name, seconds in times.items()}
    whole = {name: [g + u for g, u in zip(gradients, ms, strict=True)] for name, ms in updates.items()}
    rows = {}
    for name, ms in updates.items():
        share, most = ratio(ms, whole[name]), promised.get(name)
        rows[name] = {
            "label": OPTIMIZERS[name][0],
            "gradient_ms": spread(gradients),
            "update_ms": spread(ms),
            "whole_ms": spread(whole[name]),
            "share": share,
            "over_adamw": ratio(whole[name], whole["adamw"]),
            "promised": most,
            "holds": None if most is None else share["median"] <= most,
        }
    return rows


def draw(found: Mapping[str, Any]) -> Figure:
    rows, tokens = found["tables"]["steps"]["rows"], found["settings"]["tokens"]
    title = f"A training step on {tokens:,} tokens, {pictures.where(found)}"
    panels = [pictures.Bars(rows, "whole_ms", "gradient and mean update, ms", {"gradient_ms": "the gradient alone"})]
    return pictures.bars(title, *panels, pictures.Bars(rows, "share", "update's share"))
