"""Steps to the validation loss that AdamW ends with: SOAP and Muon, SOAP's smaller states, and other JAX packages.

The 808k-parameter character GPT of `experiments.train_gpt` on the Python standard library's sources: context 64, batch
16, 300 steps, warm-up and cosine, the same for all; what the others leave alone gets the AdamW of AdamW's own row. The
final validation loss decides on a rate; where that is at an end of the grid, the grid is extended.
"""

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from benchmarks import harness
from benchmarks.catalogue import listed
from benchmarks.results import Cells, columns, table
from benchmarks.training import comparison
from experiments import peers, train_gpt
from experiments.compare_report import Entry
from experiments.comparison import Runs, Task
from experiments.gpt_config import Config
from experiments.steps_to_target import KFAC_JAX, LABELS, register, train
from experiments.text import load_corpus

PROMISES = {"soap": 0.55, "muon": 0.65}  # the share of AdamW's steps that the project promises
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
    told = {name: {"why": peers.NOTES[name]} for name in methods if peers.NOTES.get(name)}
    gone = {name: {"why": reason} for name, reason in absent.items()}
    titles = {"notes": ("How other packages were run", told), "absent": ("Not measured", gone)}
    return {key: table(title, columns("why: why"), rows) for key, (title, rows) in titles.items()}


draw = comparison.draw
