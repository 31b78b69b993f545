"""Steps to the validation loss that AdamW ends with: SOAP and Muon, SOAP's smaller states, and other JAX packages.

The 808k-parameter character GPT of `experiments.train_gpt` on the Python standard library's sources: context 64, batch
16, 300 steps, warm-up and cosine, the same for all; what the others leave alone gets the AdamW of AdamW's own row. The
final validation loss decides on a rate; where that is at an end of the grid, the grid is extended.
"""

import argparse
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import fisher_optax as fo
from benchmarks import harness
from benchmarks.catalogue import listed
from benchmarks.results import Cells, columns, table
from benchmarks.training import comparison
from experiments import optimizers, peers, train_gpt
from experiments.compare_report import Entry
from experiments.comparison import Runs, Task
from experiments.gpt_config import Config
from experiments.kfac_jax import train_kfac_jax
from experiments.text import Corpus, load_corpus

RATES = {
    "adamw": (1e-3, 3e-3, 1e-2),
    "muon": (5e-3, 1e-2, 2e-2),
    "soap": (3e-3, 6e-3, 1e-2),
    "optax_muon": (1e-2, 3e-2, 6e-2),
}
PROMISES = {"soap": 0.55, "muon": 0.65}  # the share of AdamW's steps that the project promises
SMALL_RATE = 6e-3  # the smaller states are compared with the full one at one rate
SMALLER = {
    "soap_packed": ("packed=True", fo.Storage(packed=True)),
    "soap_bfloat16": ("factor_dtype=jnp.bfloat16", fo.Storage(factor_dtype=jnp.bfloat16)),
    "soap_shorter": ('sides="shorter"', fo.Storage(sides="shorter")),
}
KFAC_JAX = {"kfac_jax": (1e-2, 3e-2, 1e-1)}
LABELS = {name: peer.label for name, peer in peers.PEERS.items()} | {
    **{name: f"`fo.soap(storage=fo.Storage({how}))`" for name, (how, _) in SMALLER.items()},
    "muon": "`fo.muon`",
    "soap": "`fo.soap`",
    "optax_muon": "`optax.contrib.muon`",
    "kfac_jax": "K-FAC (kfac-jax)",
}
COLUMNS = columns("promise: at most, as promised | .2f; holds: holds for every seed; state: state, in parameters")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--methods", type=listed(), help="only these")
    parser.add_argument("--steps", type=int, default=300)
    comparison.add_run_options(parser)


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    grid, absent = register()
    base = Config(steps=options.steps, eval_every=max(1, options.steps // 20), eval_batches=10)
    rates = {name: grid[name] for name in options.methods or grid}
    compared = comparison.Comparison(
        "steps_to_target",
        "Share of AdamW's steps after which others have its final validation loss, each at its best rate.",
        "808k-parameter character GPT",
        Task(base, load_corpus(base.data, base.vocab, base.context), train, "val_loss", rates),
        ("val_loss",),
        COLUMNS,
        lambda runs, name, entry, times: row(runs, name, entry),
        lambda runs, found, times: notes([*found], absent),
        LABELS,
        inside=True,
    )
    path = options.runs or comparison.KEPT / "steps_to_target.json"
    yield from comparison.measure(compared, path, range(options.seeds), options.command)


def register() -> tuple[dict[str, Sequence[float]], dict[str, str]]:
    """The rates to try of each method, after all have a row of `optimizers.METHODS`; why others are absent."""
    rows, absent = peers.methods()
    grid: dict[str, Sequence[float]] = {**RATES, **dict.fromkeys(SMALLER, (SMALL_RATE,))}
    grid |= {name: (row.learning_rate / 2, row.learning_rate, row.learning_rate * 2) for name, row in rows.items()}
    for name, (_, storage) in SMALLER.items():
        rows[name] = optimizers.Method(functools.partial(optimizers.soap, storage=storage), SMALL_RATE)
    optimizers.METHODS.update(rows)
    if reason := peers.absence("kfac_jax"):
        return grid, {**absent, "kfac_jax": reason}
    return {**grid, **KFAC_JAX}, absent


def train(config: Config, corpus: Corpus) -> list[dict[str, Any]]:
    return (train_kfac_jax if config.optimizer == "kfac_jax" else train_gpt.train)(config, corpus)


def row(runs: Runs, name: str, entry: Entry) -> Cells:
    """Whether what is promised holds, and the optimizer's bytes over the parameters'."""
    shares, promise = entry.get("to_adamw", []), PROMISES.get(name)
    cells: Cells = {"state": state_ratio(name, len(runs.task.data.characters)) if name not in KFAC_JAX else None}
    if promise:
        held = all(share is not None and share <= promise for share in shares)
        cells |= {"promise": promise, "holds": "yes" if held else "no"}
    return cells


def state_ratio(method: str, symbols: int) -> float:
    config = Config(optimizer=method).resolve()
    model = train_gpt.make_model(config, symbols)
    params = jax.eval_shape(lambda key: train_gpt.initial_params(model, key), jax.random.key(0))
    state = jax.eval_shape(train_gpt.make_optimizer(train_gpt.program_of(config), 1.0).init, params)
    return harness.nbytes(state) / harness.nbytes(params)


def notes(methods: Sequence[str], absent: dict[str, str]) -> dict[str, Any]:
    """Tables of how other packages were run, and which were not."""
    told, why = {name: peers.NOTES[name] for name in methods if peers.NOTES.get(name)}, columns("why: why")
    named = {"notes": ("How other packages were run", told), "absent": ("Not measured", absent)}
    return {
        key: table(title, why, {name: {"why": text} for name, text in texts.items()})
        for key, (title, texts) in named.items()
    }


draw = comparison.draw
