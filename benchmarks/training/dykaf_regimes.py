"""DyKAF in pre-training and in fine-tuning: validation losses beside SOAP, Muon and AdamW, with and without rank one.

Both regimes train the 808k-parameter GPT of `experiments.train_gpt` on tiny Shakespeare for 300 steps, a third of an
epoch; seeds share their batches. Pre-training begins with random parameters: these are runs of `figure3`, used again.
Fine-tuning begins with what AdamW reached in 1,000 steps on the Python standard library's sources, reads Shakespeare in
the symbols of that run, and tries a smaller rate besides. In both, the final validation loss decides on a rate.

A difference of runs with the same seed counts where its median is larger than the distance between the least and the
most; of three draws from one normal distribution around 0 it is so in 9 % of cases.

Source: Yudin et al. 2025 (arXiv 2511.06477), Figure 3: unlike in fine-tuning, a rank-one second moment degrades
pre-training.
"""

import argparse
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.results import Cells, columns, result, table
from benchmarks.training.comparison import KEPT, by_seed, cell, grid_table, method_cells, setting_of
from experiments import fine_tuning
from experiments.compare_report import Entry, draw_curves, entry
from experiments.comparison import Runs

COLUMNS = columns(
    "label: method; rate: rate; val_loss: validation loss | .3f ±; train_loss: training loss | .3f ±;"
    "over_soap: validation loss less SOAP's | +.3f ±; verdict: beside SOAP"
)
RANK1 = columns(
    "full: full second moment | .3f ±; rank1: of rank one | .3f ±; gain: full less rank one | +.3f ±; verdict: verdict"
)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=Path, default=KEPT, help="folder of runs to go on with (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="rates are tried on the first (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=fine_tuning.BASE.steps, help="of each run (default: %(default)s)")
    parser.add_argument("--start-steps", type=int, default=fine_tuning.START.steps, help="before (%(default)s)")


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    runs = fine_tuning.make_runs(options.runs, range(options.seeds), options.steps, options.start_steps)
    yield describe(runs, options)


def describe(runs: Mapping[str, Runs], options: argparse.Namespace) -> dict[str, Any]:
    found = {regime: {name: entry(runs[regime], name) for name in fine_tuning.METHODS} for regime in runs}
    start, told = fine_tuning.START, "final losses in nats per character"
    return result(
        "dykaf_regimes",
        "DyKAF on a character GPT and tiny Shakespeare, from random parameters and from those of a GPT trained on the "
        "Python standard library's sources: validation losses, with the full second moment and with one of rank one.",
        options.command,
        {
            **{r: table(f"{r.capitalize()}: {told}", COLUMNS, method_rows(of)) for r, of in found.items()},
            "rank1": table("DyKAF's second moment: final validation loss", RANK1, rank1_rows(found)),
            **{f"{r}-grid": grid_table(of, fine_tuning.METHODS, f"{r.title()}: by rate") for r, of in runs.items()},
        },
        settings={
            **setting_of(runs["pre-training"]),
            "rate": "lowest final validation loss on the first seed",
            "start of fine-tuning": f"{start.data}, {start.optimizer}, {options.start_steps} steps, seed {start.seed}",
        },
        seeds=range(options.seeds),
        details={"curves": found},
    )


def verdict(differences: Sequence[float], below: str, above: str) -> str | None:
    """``below`` or ``above`` 0, if beyond the spread; None: of one difference nothing can be said."""
    if len(differences) < 2:
        return None
    median = statistics.median(differences)
    if abs(median) <= max(differences) - min(differences):
        return "within the spread"
    return below if median < 0 else above


def method_rows(found: Mapping[str, Entry]) -> dict[str, Cells]:
    rows = {name: method_cells(one, ("val_loss", "train_loss")) for name, one in found.items()}
    for name in rows.keys() - {"soap"}:  # what DyKAF is with other factors
        differences = by_seed(found[name], found["soap"], "val_loss")
        rows[name] |= {"over_soap": cell(differences), "verdict": verdict(differences, "lower", "higher")}
    return rows


def rank1_rows(found: Mapping[str, Mapping[str, Entry]]) -> dict[str, Cells]:
    """What DyKAF gains by a second moment of rank one, seed by seed."""
    rows: dict[str, Cells] = {}
    for regime, methods in found.items():
        losses = [method_cells(methods[name], ("val_loss",))["val_loss"] for name in ("dykaf", "dykaf_rank1")]
        gains = by_seed(methods["dykaf"], methods["dykaf_rank1"], "val_loss")
        told = verdict(gains, "rank one is worse", "rank one is better")
        rows[regime] = {"full": losses[0], "rank1": losses[1], "gain": cell(gains), "verdict": told}
    return rows


def draw(found: dict[str, Any]) -> Figure:
    """Validation losses of both regimes, a line a method."""
    figure = Figure(figsize=(12, 5.4), layout="constrained")
    for axes, (regime, methods) in zip(figure.subplots(1, 2), found["details"]["curves"].items(), strict=True):
        draw_curves(axes, methods, "val_loss")
        axes.set(title=regime, xlabel="step")
        axes.legend(frameon=False, fontsize=9)
    figure.suptitle("Character GPT on tiny Shakespeare, from random parameters and from those of another text")
    return figure
