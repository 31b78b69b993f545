"""Seven optimizers of a research post and four more on one character GPT: losses over steps and over time.

The post's Figure 3 trains nanoGPT's GPT on tiny Shakespeare (`shakespeare-char`, for a GPU); the preset `cpu` has the
808k-parameter GPT and 300 steps. Every method tries the same rates on the first seed and runs at the best of them, by
the final training loss, on the other seeds. The runs are kept in a file and never made twice. A step's time is measured
apart from them: all methods train in turns, whole periods between refreshes, after all are compiled.

Source: "Fisher-based Optimizers in Deep Learning", 2026 (fullfix.github.io/notes/2026/04/21/fisher-optimizers).
"""

import argparse
import dataclasses
import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from benchmarks import harness, run_tables
from benchmarks.results import Cell, Column, result, spread, table
from experiments import train_gpt
from experiments.compare_options import PRESETS
from experiments.compare_report import Entry, entries, picture
from experiments.comparison import Runs, Task
from experiments.gpt_config import DTYPES, Config
from experiments.text import Corpus, load_corpus

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = {"cpu": "reduced", "shakespeare-char": "full"}  # of the results
RATES = {"cpu": (2e-3, 4e-3, 8e-3, 1.6e-2), "shakespeare-char": (5e-4, 1e-3, 2e-3, 4e-3)}  # 3 times the width
METHODS = (
    *("adamw", "muon", "soap", "kfac_soap", "shampoo_half", "shampoo", "kfac"),
    *("dykaf", "dykaf_rank1", "kl_soap", "frog"),
)
# Final training losses in the post's figure, the highest first.
POST = {
    "adamw": 0.6204,
    "kfac": 0.6009,
    "shampoo": 0.4576,
    "muon": 0.4411,
    "shampoo_half": 0.4007,
    "soap": 0.3824,
    "kfac_soap": 0.3686,
}
COLUMNS = {
    "label": Column("method"),
    "rate": Column("rate"),
    "train_loss": run_tables.LOSSES["train_loss"],
    "val_loss": run_tables.LOSSES["val_loss"],
    "to_adamw": Column("of AdamW's steps to its final loss", ".2f", spread=True),
    "step_ms": Column("step, ms", ".1f", spread=True),
    "seconds": Column("all steps, s", ".0f"),
    "time_to_adamw": Column("of AdamW's time to its final loss", ".2f"),
    "post": Column("training loss in the post", ".4f"),
    "over_post": Column("ours / the post's", ".2f"),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=list(PRESETS), default="cpu")
    everything = ",".join(METHODS)
    parser.add_argument(
        "--methods", type=run_tables.method_names, default=everything, help="with commas (default: %(default)s)"
    )
    parser.add_argument(
        "--rates", type=run_tables.numbers, help="the same for all, with commas (default: four, by the preset)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the computation; bfloat16 suits a GPU")
    parser.add_argument("--steps", type=int, help="(default: the preset's)")
    parser.add_argument("--rounds", type=int, default=7, help="of timing, a period of each method in each")
    run_tables.add_run_options(parser, seeds=3)


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    environment, methods = harness.environment(), options.methods
    base = dataclasses.replace(PRESETS[options.preset], dtype=options.dtype)
    if options.steps:
        base = dataclasses.replace(base, steps=options.steps, eval_every=max(1, options.steps // 10))
    rates = options.rates or RATES[options.preset]
    corpus = load_corpus(base.data, base.vocab, base.context)
    task = Task(base, corpus, train_gpt.train, "train_loss", dict.fromkeys(methods, rates))
    runs = Runs(options.runs or run_tables.KEPT / f"figure3_{NAMES[options.preset]}.json", task)
    runs.make(range(options.seeds))
    found = entries(runs, methods)
    yield describe(runs, found, {}, environment, options)
    yield describe(runs, found, step_times(base, corpus, found, options.rounds), environment, options)


def step_times(base: Config, corpus: Corpus, found: Mapping[str, Entry], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of a training step, statistics and evenly shared refreshes included, by method and round."""
    trainers = {
        name: trainer(dataclasses.replace(base, optimizer=name, lr=found[name]["rate"]), corpus) for name in found
    }
    for train in trainers.values():
        jax.block_until_ready(train(None))
    seconds = harness.interleaved(trainers, rounds, lambda _: (), "timing, round")
    return {name: [1e3 * s / base.refresh for s in times] for name, times in seconds.items()}


def trainer(config: Config, corpus: Corpus) -> Callable[[Any], Any]:
    """A function that trains on for one period between refreshes; the first call compiles."""
    config = config.resolve()
    program, model = train_gpt.program_of(config), train_gpt.make_model(config, len(corpus.characters))
    init_key, run_key = jax.random.split(jax.random.key(config.seed))
    params = train_gpt.initial_params(model, init_key)
    state = train_gpt.State(params, train_gpt.initial_moments(program, params), jnp.int32(0), run_key)
    text, peak, stops = (
        jnp.asarray(corpus.train),
        jnp.float32(config.lr),
        itertools.count(config.refresh, config.refresh),
    )

    def train(_: Any) -> Any:
        nonlocal state
        state, loss = train_gpt.advance(program, model, state, text, jnp.int32(next(stops)), peak)
        return loss

    return train


def describe(
    runs: Runs,
    found: Mapping[str, Entry],
    times: Mapping[str, Sequence[float]],
    environment: Mapping[str, Any],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """The result; ``times`` are by method, or not there yet."""
    step_ms = {name: statistics.median(of) for name, of in times.items()}
    steps, preset = runs.task.base.steps, options.preset
    rows = {name: row(name, one, times.get(name), step_ms, steps, preset) for name, one in found.items()}
    seeds = f"{options.seeds} seed{'s' * (options.seeds > 1)}"
    tables = {
        "methods": table(
            f"Each method at its best rate, {steps} steps, {seeds}", run_tables.filled(COLUMNS, rows), rows
        ),
        "grid": run_tables.grid_table(runs, list(found), "Final training loss by rate, first seed"),
    }
    if pairs := orders(found):
        tables["orders"] = pairs
    drawn = run_tables.curves(found)
    for name, ms in step_ms.items():
        drawn[name]["seconds"] = [1e-3 * ms * step for step in drawn[name]["steps"]]
    return result(
        f"figure3_{NAMES[preset]}_{environment['platform']}",
        f"Optimizers on a character GPT and tiny Shakespeare, the {NAMES[preset]} setting of a post's Figure 3: losses "
        "over steps and over time.",
        run_tables.command("figure3", options, add_options),
        tables,
        environment=environment,
        settings=run_tables.setting_of(runs),
        seeds=range(options.seeds),
        details={"curves": drawn},
    )


def row(
    name: str, one: Entry, times: Sequence[float] | None, step_ms: Mapping[str, float], steps: int, preset: str
) -> dict[str, Cell]:
    cells: dict[str, Cell] = {
        "label": one["label"],
        "rate": one["rate"],
        **run_tables.loss_cells(one, ("train_loss", "val_loss")),
    }
    shares = one.get("to_adamw", [])
    cells["to_adamw"] = run_tables.cell(shares)
    if times:
        cells |= {"step_ms": spread(times), "seconds": 1e-3 * steps * step_ms[name]}
        if "adamw" in step_ms:
            ratio = step_ms[name] / step_ms["adamw"]
            cells["time_to_adamw"] = run_tables.cell([None if share is None else share * ratio for share in shares])
    if name in POST:
        cells["post"] = POST[name]
        if preset == "shakespeare-char" and one.get("train_loss"):
            cells["over_post"] = statistics.median(one["train_loss"]) / POST[name]
    return cells


def orders(found: Mapping[str, Entry]) -> dict[str, Any] | None:
    """For each pair of neighbours in the post's order: by how much the second ends lower here, seed by seed.

    Beyond the spread is a median larger than the distance between the least and the most of the seeds.
    """
    columns = {
        "difference": Column("difference here, nats", ".3f", spread=True),
        "same": Column("same order here"),
        "beyond": Column("beyond the spread of the seeds"),
        "post": Column("difference in the post, nats", ".4f"),
    }
    rows: dict[str, Mapping[str, Cell]] = {}
    for upper, lower in itertools.pairwise(name for name in POST if name in found):
        ends = [dict(zip(found[n]["seeds"], found[n].get("train_loss", []), strict=True)) for n in (upper, lower)]
        if by_seed := [ends[0][seed] - ends[1][seed] for seed in ends[0].keys() & ends[1].keys()]:
            same = statistics.median(by_seed) > 0
            beyond = run_tables.beyond_spread(by_seed)
            rows[f"{upper} over {lower}"] = {
                "difference": spread(by_seed),
                "same": "yes" if same else "no",
                "beyond": None if beyond is None else "yes" if beyond else "no",
                "post": POST[upper] - POST[lower],
            }
    title = "The post's order of final training losses, neighbour by neighbour: how much lower the second ends"
    return table(title, columns, rows) if rows else None


def draw(found: dict[str, Any]) -> "Figure | None":
    setting, many = found["settings"], len(found["seeds"])
    seeds = f": medians and ranges of {many} seeds" if many > 1 else ""
    title = f"Character GPT, {setting['layers']} layers, {setting['width']} wide, on tiny Shakespeare{seeds}"
    return picture(found["details"]["curves"], title)
