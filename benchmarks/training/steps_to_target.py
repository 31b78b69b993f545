"""Steps to the validation loss that AdamW ends with: SOAP and Muon, SOAP's smaller states, and other JAX packages.

The 808k-parameter character GPT of `experiments.train_gpt` on the Python standard library's sources: context 64, batch
16, 300 steps, warm-up and cosine, the same for all; what the others leave alone gets the AdamW of AdamW's own row. A
method's rate is the one with the lowest final validation loss on the first seed. Where that is at an end of the grid,
the grid is extended. The runs are kept in a file and never made twice.
"""

import argparse
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure

import fisher_optax as fo
from benchmarks import harness
from benchmarks.catalogue import listed
from benchmarks.results import Cells, Column, filled, middle, result, table
from benchmarks.training import tables
from experiments import optimizers, peers, train_gpt
from experiments.compare_report import Entry, entries
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
    "soap_packed": fo.Storage(packed=True),
    "soap_bfloat16": fo.Storage(factor_dtype=jnp.bfloat16),
    "soap_shorter": fo.Storage(sides="shorter"),
}
KFAC_JAX = {"kfac_jax": (1e-2, 3e-2, 1e-1)}
WITHOUT = {"kfac_jax": "; without weight decay, of which it has no decoupled one"}
LABELS = {name: peer.label for name, peer in peers.PEERS.items()} | {
    "muon": "`fo.muon`",
    "soap": "`fo.soap`",
    "optax_muon": "`optax.contrib.muon`",
    "soap_packed": "`fo.soap(storage=fo.Storage(packed=True))`",
    "soap_bfloat16": "`fo.soap(storage=fo.Storage(factor_dtype=jnp.bfloat16))`",
    "soap_shorter": '`fo.soap(storage=fo.Storage(sides="shorter"))`',
    "kfac_jax": "K-FAC (kfac-jax)",
}
COLUMNS = {
    "label": Column("method"),
    "rate": Column("rate"),
    "val_loss": tables.LOSSES["val_loss"],
    "to_adamw": Column("of AdamW's steps to its final loss", ".2f", spread=True),
    "promise": Column("at most, as promised", ".2f"),
    "holds": Column("holds for every seed"),
    "state": Column("state, in parameters"),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--methods", type=listed(), help="only these")
    parser.add_argument("--steps", type=int, default=300)
    tables.add_run_options(parser)


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    base = Config(steps=options.steps, eval_every=max(1, options.steps // 20), eval_batches=10)
    corpus, (grid, absent) = load_corpus(base.data, base.vocab, base.context), register()
    grid = {name: grid[name] for name in options.methods or grid}
    runs = Runs(options.runs or tables.KEPT / "steps_to_target.json", Task(base, corpus, train, "val_loss", grid))
    runs.make_inside(range(options.seeds))
    yield describe(runs, entries(runs, grid), absent, options)


def register() -> tuple[dict[str, Sequence[float]], dict[str, str]]:
    """The rates to try of each method, after all have a row of `optimizers.METHODS`; why others are absent."""
    rows, absent = peers.methods()
    grid: dict[str, Sequence[float]] = {**RATES, **dict.fromkeys(SMALLER, (SMALL_RATE,))}
    grid |= {name: (row.learning_rate / 2, row.learning_rate, row.learning_rate * 2) for name, row in rows.items()}
    for name, storage in SMALLER.items():
        rows[name] = optimizers.Method(functools.partial(optimizers.soap, storage=storage), SMALL_RATE)
    optimizers.METHODS.update(rows)
    if reason := peers.absence("kfac_jax"):
        return grid, {**absent, "kfac_jax": reason}
    return {**grid, **KFAC_JAX}, absent


def train(config: Config, corpus: Corpus) -> list[dict[str, Any]]:
    return (train_kfac_jax if config.optimizer == "kfac_jax" else train_gpt.train)(config, corpus)


def state_ratio(method: str, symbols: int) -> float:
    """Bytes of optimizer state over bytes of parameters."""
    config = Config(optimizer=method).resolve()
    model = train_gpt.make_model(config, symbols)
    params = jax.eval_shape(lambda key: train_gpt.initial_params(model, key), jax.random.key(0))
    state = jax.eval_shape(train_gpt.make_optimizer(train_gpt.program_of(config), 1.0).init, params)
    return harness.nbytes(state) / harness.nbytes(params)


def describe(
    runs: Runs, found: Mapping[str, Entry], absent: Mapping[str, str], options: argparse.Namespace
) -> dict[str, Any]:
    rows: dict[str, Cells] = {}
    for name, one in found.items():
        one["label"] = LABELS.get(name, one["label"])
        shares = one.get("to_adamw", [])
        rows[name] = tables.method_cells(one, ("val_loss",)) | {"to_adamw": tables.cell(shares)}
        if name not in KFAC_JAX:
            rows[name]["state"] = state_ratio(name, len(runs.task.data.characters))
        if promise := PROMISES.get(name):
            held = all(share is not None and share <= promise for share in shares)
            rows[name] |= {"promise": promise, "holds": "yes" if held else "no"}
    parts = {
        "methods": table(tables.at_best(options.steps, options.seeds), filled(COLUMNS, rows), rows),
        "grid": tables.grid_table(runs, list(found), "Final validation loss by rate, first seed"),
    }
    notes = {name: peers.NOTES[name] + WITHOUT.get(name, "") for name in found if peers.NOTES.get(name)}
    for key, title, texts in (("notes", "How other packages were run", notes), ("absent", "Not measured", absent)):
        if texts:
            parts[key] = table(title, {"why": Column("why")}, {name: {"why": text} for name, text in texts.items()})
    return result(
        "steps_to_target",
        "Share of AdamW's steps after which other optimizers have its final validation loss, each at its best rate.",
        options.command,
        parts,
        settings=tables.setting_of(runs),
        seeds=range(options.seeds),
        details={"curves": tables.curves(found)},
    )


def draw(found: dict[str, Any]) -> Figure:
    shown = {name: one for name, one in found["details"]["curves"].items() if name not in SMALLER}
    target = middle(found["tables"]["methods"]["rows"].get("adamw", {}).get("val_loss"))

    def mark(axes: Any) -> None:
        if isinstance(target, float):
            axes.axhline(target, color="grey", linewidth=0.8, linestyle=":", label="AdamW's final loss")

    title = "808k-parameter character GPT"
    return tables.curves_figure(shown, "val_loss", title, len(found["seeds"]), mark)
