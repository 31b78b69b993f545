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
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from matplotlib.figure import Figure

from benchmarks import harness
from benchmarks.catalogue import listed
from benchmarks.results import Cells, Column, filled, result, spread, table
from benchmarks.training import tables
from experiments import periods, train_gpt
from experiments.compare_options import PRESETS
from experiments.compare_report import Entry, entries, picture
from experiments.comparison import Runs, Task
from experiments.gpt_config import DTYPES
from experiments.optimizers import METHODS as KNOWN
from experiments.text import load_corpus

NAMES = {"cpu": "reduced", "shakespeare-char": "full"}  # of the results
RATES = {"cpu": (2e-3, 4e-3, 8e-3, 1.6e-2), "shakespeare-char": (5e-4, 1e-3, 2e-3, 4e-3)}  # 3 times the width
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
METHODS = ["adamw", "muon", "soap", "kfac_soap", "shampoo_half", "shampoo", "kfac"]
METHODS += ["dykaf", "dykaf_rank1", "kl_soap", "frog"]
COLUMNS = {
    "label": Column("method"),
    "rate": Column("rate"),
    "train_loss": tables.LOSSES["train_loss"],
    "val_loss": tables.LOSSES["val_loss"],
    "to_adamw": Column("of AdamW's steps to its final loss", ".2f", spread=True),
    "step_ms": Column("step, ms", ".1f", spread=True),
    "seconds": Column("all steps, s", ".0f"),
    "time_to_adamw": Column("of AdamW's time to its final loss", ".2f"),
    "post": Column("training loss in the post", ".4f"),
    "over_post": Column("ours / the post's", ".2f"),
}
ORDERS = {
    "difference": Column("difference here, nats", ".3f", spread=True),
    "same": Column("same order here"),
    "beyond": Column("beyond the spread of the seeds"),
    "post": Column("difference in the post, nats", ".4f"),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=list(PRESETS), default="cpu")
    parser.add_argument("--methods", type=listed(KNOWN), default=METHODS, help=f"default: {','.join(METHODS)}")
    parser.add_argument("--rates", type=listed(of=float), help="the same for all (default: four, by the preset)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the computation; bfloat16 suits a GPU")
    parser.add_argument("--steps", type=int, help="(default: the preset's)")
    parser.add_argument("--rounds", type=int, default=7, help="of timing, a period of each method in each")
    tables.add_run_options(parser)


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    base = dataclasses.replace(PRESETS[options.preset], dtype=options.dtype)
    if options.steps:
        base = dataclasses.replace(base, steps=options.steps, eval_every=max(1, options.steps // 10))
    corpus = load_corpus(base.data, base.vocab, base.context)
    rates = dict.fromkeys(options.methods, options.rates or RATES[options.preset])
    path = options.runs or tables.KEPT / f"figure3_{NAMES[options.preset]}.json"
    runs = Runs(path, Task(base, corpus, train_gpt.train, "train_loss", rates))
    runs.make(range(options.seeds))
    found = entries(runs, options.methods)
    yield describe(runs, found, {}, options)
    trainers = {
        name: periods.of_gpt(dataclasses.replace(base, optimizer=name, lr=found[name]["rate"]), corpus)
        for name in found
    }
    for train in trainers.values():
        jax.block_until_ready(train(None))
    seconds = harness.interleaved(trainers, options.rounds, lambda _: (), "timing, round")
    times = {name: [1e3 * s / base.refresh for s in of_one] for name, of_one in seconds.items()}
    yield describe(runs, found, times, options)


def describe(
    runs: Runs, found: Mapping[str, Entry], times: Mapping[str, Sequence[float]], options: argparse.Namespace
) -> dict[str, Any]:
    """The result; ``times`` are milliseconds of a step by method and round, or not there yet."""
    steps, preset = runs.task.base.steps, options.preset
    step_ms = {name: statistics.median(of) for name, of in times.items()}
    rows = {name: row(name, one, times.get(name), step_ms, steps, preset) for name, one in found.items()}
    drawn = tables.curves(found)
    for name, ms in step_ms.items():
        drawn[name]["seconds"] = [1e-3 * ms * step for step in drawn[name]["steps"]]
    title = "The post's order of final training losses, neighbour by neighbour: how much lower the second ends"
    pairs = orders(found)
    return result(
        f"figure3_{NAMES[preset]}_{harness.environment()['platform']}",
        f"Optimizers on a character GPT and tiny Shakespeare, the {NAMES[preset]} setting of a post's Figure 3: losses "
        "over steps and over time.",
        options.command,
        {
            "methods": table(tables.at_best(steps, options.seeds), filled(COLUMNS, rows), rows),
            "grid": tables.grid_table(runs, list(found), "Final training loss by rate, first seed"),
            **({"orders": table(title, ORDERS, pairs)} if pairs else {}),
        },
        settings=tables.setting_of(runs),
        seeds=range(options.seeds),
        details={"curves": drawn},
    )


def row(
    name: str, one: Entry, times: Sequence[float] | None, step_ms: Mapping[str, float], steps: int, preset: str
) -> Cells:
    shares = one.get("to_adamw", [])
    cells = tables.method_cells(one, ("train_loss", "val_loss")) | {"to_adamw": tables.cell(shares)}
    if times:
        cells |= {"step_ms": spread(times), "seconds": 1e-3 * steps * step_ms[name]}
        if "adamw" in step_ms:
            over = step_ms[name] / step_ms["adamw"]
            cells["time_to_adamw"] = tables.cell([None if share is None else share * over for share in shares])
    if name in POST:
        cells["post"] = POST[name]
        if preset == "shakespeare-char" and one.get("train_loss"):
            cells["over_post"] = statistics.median(one["train_loss"]) / POST[name]
    return cells


def orders(found: Mapping[str, Entry]) -> dict[str, Cells]:
    """For each pair of neighbours in the post's order: by how much the second ends lower here, seed by seed.

    Beyond the spread is a median larger than the distance between the least and the most of the seeds.
    """
    rows: dict[str, Cells] = {}
    for upper, lower in itertools.pairwise(name for name in POST if name in found):
        if by_seed := [*tables.by_seed(found[upper], found[lower], "train_loss").values()]:
            beyond = tables.beyond_spread(by_seed)
            rows[f"{upper} over {lower}"] = {
                "difference": spread(by_seed),
                "same": "yes" if statistics.median(by_seed) > 0 else "no",
                "beyond": None if beyond is None else "yes" if beyond else "no",
                "post": POST[upper] - POST[lower],
            }
    return rows


def draw(found: dict[str, Any]) -> Figure:
    setting, many = found["settings"], len(found["seeds"])
    seeds = f": medians and ranges of {many} seeds" if many > 1 else ""
    title = f"Character GPT, {setting['layers']} layers, {setting['width']} wide, on tiny Shakespeare{seeds}"
    return picture(found["details"]["curves"], title)
