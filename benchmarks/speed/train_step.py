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
from typing import Any

import jax
import jax.numpy as jnp
import optax

import fisher_optax as fo
from benchmarks import harness
from benchmarks.catalogue import positive
from benchmarks.harness import PERIOD, RATE, WARM_UP
from benchmarks.results import columns, ratio, result, spread, table
from benchmarks.steps import update_stepper
from experiments.gpt_step import PRESETS, make_gradient

GRADIENTS = 3  # timed a repeat


OPTIMIZERS: dict[str, tuple[str, Callable[[Any], optax.GradientTransformation]]] = {
    "adamw": ("`optax.adamw`", lambda dtype: optax.adamw(RATE)),
    "fo_muon": ("`fo.muon`", lambda dtype: fo.muon(RATE, dtype=dtype)),
    "fo_soap": ("`fo.soap`, every 10", lambda dtype: fo.soap(RATE, precondition_frequency=PERIOD)),
}
COLUMNS = columns(
    "label: optimizer; gradient_ms: gradient, ms ±; update_ms: update, mean of ten, ms ±; whole_ms: both, ms ±;"
    "share: update's share | .1% ±; over_adamw: both, over AdamW's | .3f ±"
)


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
    yield result(
        f"train_step_{options.preset}_{platform}",
        f"A training step of a GPT of {harness.nbytes(start) / 4e6:.3g}M parameters on {preset.tokens:,} tokens",
        options.command,
        {"steps": table("The optimizer's share", COLUMNS, described(gradients, times))},
        settings={**preset._asdict(), "tokens": preset.tokens, "repeats": options.repeats, "updates_a_repeat": PERIOD},
    )


def described(gradients: list[float], times: Mapping[str, list[float]]) -> dict[str, dict[str, Any]]:
    """The table's rows, from milliseconds of a gradient, one a repeat, and seconds of each update."""
    updates = {name: harness.by_repeat(seconds) for name, seconds in times.items()}
    whole = {name: [g + u for g, u in zip(gradients, ms, strict=True)] for name, ms in updates.items()}
    return {
        name: {
            "label": OPTIMIZERS[name][0],
            "gradient_ms": spread(gradients),
            "update_ms": spread(ms),
            "whole_ms": spread(whole[name]),
            "share": ratio(ms, whole[name]),
            "over_adamw": ratio(whole[name], whole["adamw"]),
        }
        for name, ms in updates.items()
    }
