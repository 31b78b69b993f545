"""DyKAF in pre-training and in fine-tuning: validation losses beside SOAP, Muon and AdamW, with and without rank one.

Both regimes train the 808k-parameter GPT of `experiments.train_gpt` on tiny Shakespeare for 300 steps, a third of an
epoch; seeds share their batches. Pre-training begins with random parameters: these are runs of `figure3`, used again.
Fine-tuning begins with what AdamW reached in 1,000 steps on the Python standard library's sources, reads Shakespeare in
the symbols of that run, and tries a smaller rate besides. In both, a method's rate is the one tried with the lowest
final validation loss on the first seed, and that loss is what methods are compared by. (`figure3` shows training losses
and chooses by them; where its choice differs, the runs that this one needs are made and kept in the same file.)

Differences are of runs with the same seed, and count where `tables.beyond_spread` says so.

Source: Yudin et al. 2025 (arXiv 2511.06477), Figure 3: unlike in fine-tuning, a rank-one second moment degrades
pre-training.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.results import Cell, Cells, Column, result, table
from benchmarks.training import figure3, tables
from experiments import fine_tuning, train_gpt
from experiments.compare_options import PRESETS
from experiments.compare_report import Entry, entry
from experiments.comparison import Runs, Task
from experiments.text import load_corpus

METHODS: tuple[str, ...] = ("adamw", "muon", "soap", "dykaf", "dykaf_rank1")
COLORS = dict(zip(METHODS, ("C0", "C1", "C4", "C3", "C2"), strict=True))
REGIMES: tuple[str, ...] = ("pre-training", "fine-tuning")
PAPER = {"pre-training": "rank one is worse", "fine-tuning": "rank one is better"}
BASE = PRESETS["cpu"]
RATES: dict[str, tuple[float, ...]] = {
    "pre-training": figure3.RATES["cpu"],
    "fine-tuning": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
}
LOSS = Column("validation loss", ".3f", spread=True)
COLUMNS = {
    "label": Column("method"),
    "rate": Column("rate"),
    "val_loss": LOSS,
    "train_loss": LOSS._replace(title="training loss"),
    "over_soap": Column("validation loss less SOAP's", "+.3f", spread=True),
    "verdict": Column("beside SOAP"),
}
REGIME = {
    "initial": Column("validation loss before the first step", ".3f", spread=True),
    "own": Column("of the start on its own text", ".3f"),
    "gap": Column("DyKAF's less AdamW's final validation loss", "+.3f", spread=True),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=Path, default=tables.KEPT, help="folder of runs to go on with (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="rates are tried on the first (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=BASE.steps, help="of each run (default: %(default)s)")
    parser.add_argument("--start-steps", type=int, default=fine_tuning.START.steps, help="before (%(default)s)")


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    base = BASE
    if options.steps != base.steps:
        base = dataclasses.replace(base, steps=options.steps, eval_every=max(1, options.steps // 10))
    own_loss, given = fine_tuning.make_start(options.runs / "dykaf_start", options.start_steps, base)
    corpus, runs = load_corpus(base.data, base.vocab, base.context), dict[str, Runs]()
    for regime, data, train, name in (
        ("pre-training", corpus, train_gpt.train, f"figure3_{figure3.NAMES['cpu']}"),
        ("fine-tuning", given, fine_tuning.fine_tune, "dykaf_finetuning"),
    ):
        task = Task(base, data, train, "val_loss", dict.fromkeys(METHODS, RATES[regime]))
        runs[regime] = Runs(options.runs / f"{name}.json", task)
        print(regime, flush=True)
        runs[regime].make(range(options.seeds))
    yield describe(runs, own_loss, options)


def describe(runs: Mapping[str, Runs], own_loss: float, options: argparse.Namespace) -> dict[str, Any]:
    found = {regime: {name: entry(runs[regime], name) for name in METHODS} for regime in REGIMES}
    losses = "final losses in nats per character"
    grids = {
        f"{regime}-grid": tables.grid_table(
            runs[regime], METHODS, f"{regime.capitalize()}: final validation loss by rate, first seed"
        )
        for regime in REGIMES
    }
    start = fine_tuning.START
    return result(
        "dykaf_regimes",
        "DyKAF on a character GPT and tiny Shakespeare, from random parameters and from those of a GPT trained on the "
        "Python standard library's sources: validation losses, with the full second moment and with one of rank one.",
        options.command,
        {
            **{r: table(f"{r.capitalize()}: {losses}", COLUMNS, method_rows(found[r])) for r in REGIMES},
            "rank1": rank1_table(found),
            "regimes": table("What each regime begins with, in nats per character", REGIME, regimes(found, own_loss)),
            **grids,
        },
        settings={
            **tables.setting_of(runs["pre-training"]),
            "rate": "lowest final validation loss on the first seed",
            "start of fine-tuning": f"{start.data}, {start.optimizer}, {options.start_steps} steps, seed {start.seed}",
        },
        seeds=range(options.seeds),
        details={"curves": {regime: tables.curves(found[regime]) for regime in REGIMES}},
    )


def less(one: Entry, other: Entry) -> dict[int, float]:
    """Final validation losses of ``one`` less those of ``other``, by seed."""
    return tables.by_seed(one, other, "val_loss")


def verdict(differences: Sequence[float], below: str, above: str) -> str | None:
    """``below`` or ``above`` 0, if beyond the spread; None: of one difference nothing can be said."""
    beyond = tables.beyond_spread(differences)
    if not beyond:
        return None if beyond is None else "within the spread"
    return below if statistics.median(differences) < 0 else above


def loss_cell(one: Entry, key: str) -> Cell:
    return "diverged" if one["diverged"] else tables.cell(one[key])


def method_rows(found: Mapping[str, Entry]) -> dict[str, Cells]:
    rows: dict[str, Cells] = {}
    for name, one in found.items():
        losses = {key: loss_cell(one, key) for key in ("val_loss", "train_loss")}
        rows[name] = {"label": one["label"], "rate": one["rate"], **losses}
        if name != "soap":  # what DyKAF is with other factors
            differences = [*less(one, found["soap"]).values()]
            rows[name] |= {"over_soap": tables.cell(differences), "verdict": verdict(differences, "lower", "higher")}
    return rows


def rank1_table(found: Mapping[str, Mapping[str, Entry]]) -> dict[str, Any]:
    """What DyKAF gains by a second moment of rank one, seed by seed."""
    rows: dict[str, Cells] = {}
    for regime, methods in found.items():
        gains = less(methods["dykaf"], methods["dykaf_rank1"])
        told = verdict([*gains.values()], "rank one is worse", "rank one is better")
        rows[regime] = {
            "full": loss_cell(methods["dykaf"], "val_loss"),
            "rank1": loss_cell(methods["dykaf_rank1"], "val_loss"),
            "gain": tables.cell([*gains.values()]),
            **{f"seed_{seed}": gain for seed, gain in gains.items()},
            "verdict": told,
            "paper": PAPER[regime],
            "agrees": "yes" if told == PAPER[regime] else "no" if told in PAPER.values() else "undecided",
        }
    seeds = sorted({key for row in rows.values() for key in row if key.startswith("seed_")})
    columns = {
        "full": LOSS._replace(title="full second moment"),
        "rank1": LOSS._replace(title="of rank one"),
        "gain": Column("full less rank one", "+.3f", spread=True),
        **{key: Column(key.replace("_", " "), "+.3f") for key in seeds},
        "verdict": Column("here"),
        "paper": Column("in the paper"),
        "agrees": Column("agrees"),
    }
    return table("DyKAF's second moment: final validation loss in nats per character", columns, rows)


def regimes(found: Mapping[str, Mapping[str, Entry]], own_loss: float) -> dict[str, Cells]:
    rows: dict[str, Cells] = {}
    for regime, methods in found.items():
        first = [losses[0] for losses in methods["adamw"]["curves"].get("val_loss", [])]
        # What fine-tuning begins with does not depend on the seed.
        initial = first[0] if len(set(first)) == 1 else tables.cell(first)
        rows[regime] = {"initial": initial, "gap": tables.cell([*less(methods["dykaf"], methods["adamw"]).values()])}
    rows["fine-tuning"]["own"] = own_loss
    return rows


def draw(found: dict[str, Any]) -> Figure:
    """Above the losses, below their differences to SOAP's of the same seed: medians over the seeds, and the range of
    DyKAF's two.
    """
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    panels, regimes = figure.subplots(2, 2, sharex="col", height_ratios=(3, 2)), found["details"]["curves"]
    for (above, below), (regime, methods) in zip(panels.T, regimes.items(), strict=True):
        losses = {
            name: dict(zip(one["seeds"], map(np.array, one["curves"]["val_loss"]), strict=True))
            for name, one in methods.items()
            if one["curves"]
        }
        soap = losses.get("soap", {})
        for name, of_seeds in losses.items():
            draw_line(above, name, methods[name], [*of_seeds.values()])
            if apart := [y - soap[seed] for seed, y in of_seeds.items() if seed in soap]:
                draw_line(below, name, methods[name], apart)
        # The first losses are far above all others.
        for axes in (above, below):
            ends = np.concatenate([y[len(y) // 4 :] for y in (line.get_ydata() for line in axes.get_lines())])
            axes.set_ylim(ends.min() - 0.02, ends.max() + 0.02)
        above.set_title(regime)
        below.set_xlabel("step")
    panels[0, 0].set_ylabel("validation loss (nats per character)")
    panels[1, 0].set_ylabel("less SOAP's (nats per character)")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle("Character GPT on tiny Shakespeare, from random parameters and from those of another text")
    return figure


def draw_line(axes: Axes, name: str, one: Entry, values: Sequence[np.ndarray]) -> None:
    bold, color, y = name.startswith("dykaf"), COLORS[name], np.array(values)
    axes.plot(one["steps"], np.median(y, 0), color=color, label=one["label"], linewidth=2.6 if bold else 1.2)
    if bold:
        axes.fill_between(one["steps"], y.min(0), y.max(0), color=color, alpha=0.15, linewidth=0)
    axes.grid(alpha=0.3)
