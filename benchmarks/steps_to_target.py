"""Steps to the validation loss that AdamW ends with: SOAP and Muon, SOAP's smaller states, and other JAX packages.

The 808k-parameter character GPT of `experiments.train_gpt` on the Python standard library's sources: context 64, batch
16, 300 steps, warm-up and cosine, the same for all; what the others leave alone gets the AdamW of AdamW's own row. A
method's rate is the one with the lowest final validation loss on the first seed. Where that is at an end of the grid,
the grid is extended. The runs are kept in a file and never made twice.
"""

import argparse
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure

import fisher_optax as fo
from benchmarks import harness, peers, run_tables
from benchmarks.results import Cell, Column, result, table
from experiments import optimizers, train_gpt
from experiments.compare_report import Entry, draw_curves, entries
from experiments.comparison import Runs, Task
from experiments.gpt_config import Config
from experiments.text import Corpus, load_corpus

if TYPE_CHECKING:
    from experiments.run_folder import Row

RATES = {
    "adamw": (1e-3, 3e-3, 1e-2),
    "muon": (5e-3, 1e-2, 2e-2),
    "soap": (3e-3, 6e-3, 1e-2),
    "optax_muon": (1e-2, 3e-2, 6e-2),
}
PROMISES = {"soap": 0.55, "muon": 0.65}  # the share of AdamW's steps that the project promises
SMALL_RATE = 6e-3  # the smaller states are compared with the full one at one rate
SMALLER = {
    "soap_packed": {"storage": fo.Storage(packed=True)},
    "soap_bfloat16": {"storage": fo.Storage(factor_dtype=jnp.bfloat16)},
    "soap_shorter": {"storage": fo.Storage(sides="shorter")},
}
KFAC_JAX = {"kfac_jax": (1e-2, 3e-2, 1e-1)}
WITHOUT = {"kfac_jax": "; without weight decay, of which it has no decoupled one"}
WIDER = 4  # how often a grid is extended at most
LABELS = {
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
    "val_loss": run_tables.LOSSES["val_loss"],
    "to_adamw": Column("of AdamW's steps to its final loss", ".2f", spread=True),
    "promise": Column("at most, as promised", ".2f"),
    "holds": Column("holds for every seed"),
    "state": Column("state, in parameters"),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--methods", help="only these, with commas")
    parser.add_argument("--steps", type=int, default=300)
    run_tables.add_run_options(parser, seeds=3)


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    environment = harness.environment()
    base = Config(steps=options.steps, eval_every=max(1, options.steps // 20), eval_batches=10)
    corpus, (grid, absent) = load_corpus(base.data, base.vocab, base.context), register()
    if options.methods:
        grid = {name: grid[name] for name in options.methods.split(",")}
    runs = Runs(options.runs or run_tables.KEPT / "steps_to_target.json", Task(base, corpus, train, "val_loss", grid))
    make(runs, range(options.seeds))
    found = entries(runs, grid)
    yield describe(runs, found, absent, environment, options)


def register() -> tuple[dict[str, Sequence[float]], dict[str, str]]:
    """The rates to try of each method, after all have a row of `optimizers.METHODS`; why others are absent."""
    rows, absent = peers.methods()
    for name, how in SMALLER.items():
        rows[name] = optimizers.Method(functools.partial(optimizers.soap, **how), SMALL_RATE)
    optimizers.METHODS.update(rows)
    grid: dict[str, Sequence[float]] = {**RATES, **dict.fromkeys(SMALLER, (SMALL_RATE,))}
    grid |= {name: around(row.learning_rate) for name, row in rows.items() if name not in SMALLER}
    if reason := peers.absence("kfac_jax"):
        return grid, {**absent, "kfac_jax": reason}
    return {**grid, **KFAC_JAX}, absent


def around(rate: float) -> tuple[float, float, float]:
    return rate / 2, rate, rate * 2


def train(config: Config, corpus: Corpus) -> "list[Row]":
    return (peers.train_kfac_jax if config.optimizer == "kfac_jax" else train_gpt.train)(config, corpus)


def make(runs: Runs, seeds: Sequence[int]) -> None:
    """All runs; a grid of several rates is extended by a factor of two until its best rate is inside."""
    for _ in range(WIDER):
        runs.make(seeds[:1])
        wider = {name: extended(runs, name, seeds[0]) for name, rates in runs.task.rates.items() if len(rates) > 1}
        if not any(wider.values()):
            break
        runs.task = runs.task._replace(
            rates={name: [*rates, *wider.get(name, ())] for name, rates in runs.task.rates.items()}
        )
    runs.make(seeds)


def extended(runs: Runs, method: str, seed: int) -> list[float]:
    """The rate beyond the end of the grid that is the best so far, if it is one."""
    tried, best = [run["rate"] for run in runs.of(method, seed=seed)], runs.best(method)[0]["rate"]
    return [best * 2] * (best == max(tried)) + [best / 2] * (best == min(tried))


def state_ratio(method: str, symbols: int) -> float:
    """Bytes of optimizer state over bytes of parameters."""
    config = Config(optimizer=method).resolve()
    model = train_gpt.make_model(config, symbols)
    params = jax.eval_shape(lambda key: train_gpt.initial_params(model, key), jax.random.key(0))
    state = jax.eval_shape(train_gpt.make_optimizer(train_gpt.program_of(config), 1.0).init, params)
    return harness.nbytes(state) / harness.nbytes(params)


def describe(
    runs: Runs,
    found: Mapping[str, Entry],
    absent: Mapping[str, str],
    environment: Mapping[str, Any],
    options: argparse.Namespace,
) -> dict[str, Any]:
    symbols = len(runs.task.data.characters)
    labels = {name: peer.label for name, peer in peers.PEERS.items()} | LABELS
    for name, one in found.items():
        one["label"] = labels.get(name, one["label"])
    rows = {name: row(name, one, symbols) for name, one in found.items()}
    title = f"Each method at its best rate, {options.steps} steps, {options.seeds} seeds"
    tables = {
        "methods": table(title, run_tables.filled(COLUMNS, rows), rows),
        "grid": run_tables.grid_table(runs, list(found), "Final validation loss by rate, first seed"),
    }
    notes = {name: peers.NOTES[name] + WITHOUT.get(name, "") for name in found if peers.NOTES.get(name)}
    for key, title, texts in (("notes", "How other packages were run", notes), ("absent", "Not measured", absent)):
        if texts:
            told: dict[str, dict[str, Cell]] = {name: {"why": text} for name, text in texts.items()}
            tables[key] = table(title, {"why": Column("why")}, told)
    return result(
        "steps_to_target",
        "Share of AdamW's steps after which other optimizers have its final validation loss, each at its best rate.",
        run_tables.command("steps_to_target", options, add_options),
        tables,
        environment=environment,
        settings=run_tables.setting_of(runs),
        seeds=range(options.seeds),
        details={"curves": run_tables.curves(found)},
    )


def row(name: str, one: Entry, symbols: int) -> dict[str, Cell]:
    shares = one.get("to_adamw", [])
    cells: dict[str, Cell] = {
        "label": one["label"],
        "rate": one["rate"],
        "val_loss": "diverged" if one["diverged"] else run_tables.cell(one["val_loss"]),
        "to_adamw": run_tables.cell(shares),
    }
    if name not in KFAC_JAX:
        cells["state"] = state_ratio(name, symbols)
    if promise := PROMISES.get(name):
        held = all(share is not None and share <= promise for share in shares)
        cells |= {"promise": promise, "holds": "yes" if held else "no"}
    return cells


def draw(found: dict[str, Any]) -> Figure:
    shown = {name: one for name, one in found["details"]["curves"].items() if name not in SMALLER}
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    axes = figure.subplots()
    if "adamw" in shown:
        target = found["tables"]["methods"]["rows"]["adamw"]["val_loss"]
        if isinstance(target, dict):
            axes.axhline(target["median"], color="grey", linewidth=0.8, linestyle=":", label="AdamW's final loss")
    draw_curves(axes, shown, "val_loss")
    many = len(found["seeds"])
    seeds = f": medians and ranges of {many} seeds" if many > 1 else ""
    axes.set(xlabel="step")
    figure.suptitle(f"808k-parameter character GPT{seeds}")
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    return figure
