"""What lower precision of an accelerator's products costs SOAP, and its refresh by products, emulated on a CPU.

`experiments.emulated_precision` says what is emulated. "Refresh by products" is
``fo.Refresh(decomposition="cholesky")``, what a TPU does. Losses are of the 808k character GPT of
`experiments.train_gpt` after 300 steps at one rate, of float32 and of the refresh by products on several seeds.
"Apart" is of a matrix of side 8 under gradients whose covariances have well-separated eigenvalues, and change: after
100 steps with a refresh every 10, the distance from the run in float32 by QR, as a part of the way that one has moved.
It is also given for the gradients of SOAP's golden trajectories, random ones, whose close eigenvalues the rounds of a
first basis by products leave mixed.
"""

import argparse
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax.numpy as jnp
from matplotlib.figure import Figure

from benchmarks import pictures
from benchmarks.results import columns, ends, result, spread, table
from benchmarks.training import comparison
from experiments import optimizers, train_gpt
from experiments.comparison import Runs, Task
from experiments.emulated_precision import RATE, WAYS, apart, emulated, golden
from experiments.gpt_config import Config
from experiments.text import load_corpus

LABELS = {"highest": "float32, by QR", "cholesky": "refresh by products"}
COLUMNS = columns(
    "label: products; val_loss: validation loss after 300 steps | .3f ±; apart: apart after 100 steps | .1e ±;"
    "golden: apart on the golden trajectories' gradients | .1e ±"
)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=300)
    comparison.add_run_options(parser)


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    base = Config(steps=options.steps, eval_every=max(1, options.steps // 10), eval_batches=10)
    corpus = load_corpus(base.data, base.vocab, base.context)
    names = {name: f"soap_{name}" for name in WAYS}
    for name, how in WAYS.items():
        optimizers.METHODS[names[name]] = optimizers.Method(functools.partial(optimizers.soap, **how), RATE)
    task = Task(base, corpus, train_gpt.train, "val_loss", dict.fromkeys(names.values(), (RATE,)))
    rows, runs = {}, Runs(options.runs or comparison.KEPT / "precision.json", task)
    with mock.patch.object(jnp, "matmul", emulated):
        runs.make(range(1))
        runs.task = task._replace(rates={names[name]: (RATE,) for name in LABELS})
        runs.make(range(options.seeds))
        for name in WAYS:
            label = LABELS.get(name, name.replace("cholesky_", "refresh by products, ").replace("_", " "))
            losses = [runs.final(run) for run in runs.of(names[name])]
            of_seeds = {"val_loss": spread(losses), "apart": spread(apart(name, 3)), "golden": spread(golden(name))}
            rows[name] = {"label": label, **of_seeds}
    yield result(
        "precision",
        "What lower precision of an accelerator's products costs SOAP, and its refresh by products, emulated on a CPU.",
        options.command,
        {"precision": table("SOAP by the precision of its products", COLUMNS, rows)},
        settings=comparison.setting_of(runs),
        seeds=range(options.seeds),
    )


def draw(found: dict[str, Any]) -> Figure:
    rows = found["tables"]["precision"]["rows"]
    moved = {name: row | {"apart": row["apart"] if row["apart"]["median"] else None} for name, row in rows.items()}
    figure = pictures.bars(
        "SOAP by the precision of its products, emulated",
        pictures.Bars(rows, "val_loss", "validation loss"),
        pictures.Bars(moved, "apart", "apart, of the way moved", log=True),
    )
    losses = [end for row in rows.values() for end in ends(row["val_loss"])]
    figure.axes[0].set_xlim(min(losses) - 0.01, max(losses) + 0.01)
    return figure
