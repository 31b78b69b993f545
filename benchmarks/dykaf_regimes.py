"""DyKAF in pre-training and in fine-tuning: validation losses beside SOAP, Muon and AdamW, with and without rank one.

Both regimes train the 808k-parameter GPT of `experiments.train_gpt` on tiny Shakespeare for 300 steps, a third of an
epoch; seeds share their batches. Pre-training begins with random parameters: these are runs of `figure3`, used again.
Fine-tuning begins with what AdamW reached in 1,000 steps on the Python standard library's sources, reads Shakespeare in
the symbols of that run, and tries a smaller rate besides. In both, a method's rate is the one tried with the lowest
final validation loss on the first seed, and that loss is what methods are compared by. (`figure3` shows training losses
and chooses by them; where its choice differs, the runs that this one needs are made and kept in the same file.)

Differences are of runs with the same seed, and count where `run_tables.beyond_spread` says so.

Source: Yudin et al. 2025 (arXiv 2511.06477), Figure 3: unlike in fine-tuning, a rank-one second moment degrades
pre-training.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from benchmarks import dykaf_picture, figure3, harness, run_tables
from benchmarks.results import Cell, Column, result, table
from experiments import train_gpt
from experiments.compare_options import PRESETS
from experiments.compare_report import Entry, entry
from experiments.comparison import Runs, Task
from experiments.gpt_config import Config
from experiments.text import Corpus, load_corpus
from experiments.trained_gpt import Params, digest, load_start

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHODS: tuple[str, ...] = ("adamw", "muon", "soap", "dykaf", "dykaf_rank1")
REFERENCE = "soap"  # what DyKAF is with other factors
REGIMES: tuple[str, ...] = ("pre-training", "fine-tuning")
PAPER = {"pre-training": "rank one is worse", "fine-tuning": "rank one is better"}
BASE = PRESETS["cpu"]
START = Config(optimizer="adamw")  # of fine-tuning
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


class Given(NamedTuple):
    """What fine-tuning has to go on with."""

    corpus: Corpus
    params: Params
    sha256: str  # of both


def add_options(parser: argparse.ArgumentParser) -> None:
    kept = run_tables.KEPT
    parser.add_argument("--runs", type=Path, default=kept, help="folder of runs to go on with (default: %(default)s)")
    parser.add_argument("--pretraining", type=Path, help=f"file of figure3's runs (default: {kept_by_figure3(kept)})")
    parser.add_argument("--seeds", type=int, default=3, help="rates are tried on the first (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=BASE.steps, help="of each run (default: %(default)s)")
    parser.add_argument(
        "--start-steps", type=int, default=START.steps, help="of the run that fine-tuning begins with (%(default)s)"
    )


def kept_by_figure3(folder: Path) -> Path:
    return folder / f"figure3_{figure3.NAMES['cpu']}.json"


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    environment, base = harness.environment(), BASE
    if options.steps != base.steps:
        base = dataclasses.replace(base, steps=options.steps, eval_every=max(1, options.steps // 10))
    own_loss, given = make_start(options.runs / "dykaf_start", options.start_steps, base)
    corpus = load_corpus(base.data, base.vocab, base.context)
    runs = {}
    for regime, data, train, path in (
        ("pre-training", corpus, train_gpt.train, options.pretraining or kept_by_figure3(options.runs)),
        ("fine-tuning", given, fine_tune, options.runs / "dykaf_finetuning.json"),
    ):
        runs[regime] = Runs(path, Task(base, data, train, "val_loss", dict.fromkeys(METHODS, RATES[regime])))
        print(regime, flush=True)
        runs[regime].make(range(options.seeds))
    yield describe(runs, own_loss, environment, options)


def make_start(folder: Path, steps: int, base: Config) -> tuple[float, Given]:
    """The validation loss, on its own text, of the run that fine-tuning begins with, and what it then goes on with."""
    wanted, whole = dataclasses.asdict(dataclasses.replace(START, steps=steps)), folder / "config.json"
    config, own, run, _ = train_gpt.prepare(wanted, folder, resume=whole.exists(), overwrite=False)
    print(f"the start of fine-tuning: {config.data}, {steps} steps", flush=True)
    rows = train_gpt.train(config, own, run, progress=True)
    run.checkpoints.close()
    start, characters = load_start(folder)
    corpus = load_corpus(base.data, base.vocab, base.context, characters)
    both = f"{corpus.sha256} after {digest(*jax.tree.leaves(start.params))}"
    return rows[-1]["val_loss"], Given(corpus, start.params, both)


def fine_tune(config: Config, given: Given) -> list[dict[str, Any]]:
    return train_gpt.train(config, given.corpus, start=given.params)


def describe(
    runs: Mapping[str, Runs], own_loss: float, environment: Mapping[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    found = {regime: {name: entry(runs[regime], name) for name in METHODS} for regime in REGIMES}
    tables = {regime: methods_table(regime, found[regime]) for regime in REGIMES}
    tables["rank1"] = rank1_table(found)
    tables["regimes"] = regimes_table(found, own_loss)
    for regime in REGIMES:
        title = f"{regime.capitalize()}: final validation loss by rate, first seed"
        tables[f"{regime}-grid"] = run_tables.grid_table(runs[regime], METHODS, title)
    shared = argparse.Namespace(**{**vars(options), "pretraining": None})  # a file of this machine's
    return result(
        "dykaf_regimes",
        "DyKAF on a character GPT and tiny Shakespeare, from random parameters and from those of a GPT trained on the "
        "Python standard library's sources: validation losses, with the full second moment and with one of rank one.",
        run_tables.command("dykaf_regimes", shared, add_options),
        tables,
        environment=environment,
        settings={
            **run_tables.setting_of(runs["pre-training"]),
            "rate": "lowest final validation loss on the first seed",
            "start of fine-tuning": f"{START.data}, {START.optimizer}, {options.start_steps} steps, seed {START.seed}",
        },
        seeds=range(options.seeds),
        details={"curves": {regime: run_tables.curves(found[regime]) for regime in REGIMES}},
    )


def by_seed(one: Entry, other: Entry) -> dict[int, float]:
    """Final validation losses of ``one`` less those of ``other``, where neither diverged."""
    ends = [dict(zip(x["seeds"], x.get("val_loss", []), strict=True)) for x in (one, other)]
    return {seed: ends[0][seed] - ends[1][seed] for seed in ends[0] if seed in ends[1]}


def verdict(differences: Sequence[float], below: str, above: str) -> str | None:
    """``below`` or ``above`` 0, if beyond the spread; None: of one difference nothing can be said."""
    match run_tables.beyond_spread(differences):
        case None:
            return None
        case False:
            return "within the spread"
        case True:
            return below if statistics.median(differences) < 0 else above


def loss_cell(one: Entry, key: str) -> Cell:
    return "diverged" if one["diverged"] else run_tables.cell(one[key])


def methods_table(regime: str, found: Mapping[str, Entry]) -> dict[str, Any]:
    rows: dict[str, Mapping[str, Cell]] = {}
    for name, one in found.items():
        cells = {key: loss_cell(one, key) for key in ("val_loss", "train_loss")}
        if name != REFERENCE:
            differences = list(by_seed(one, found[REFERENCE]).values())
            cells |= {"over_soap": run_tables.cell(differences), "verdict": verdict(differences, "lower", "higher")}
        rows[name] = {"label": one["label"], "rate": one["rate"], **cells}
    return table(f"{regime.capitalize()}: final losses in nats per character", COLUMNS, rows)


def rank1_table(found: Mapping[str, Mapping[str, Entry]]) -> dict[str, Any]:
    """What DyKAF gains by a second moment of rank one, seed by seed."""
    rows: dict[str, Mapping[str, Cell]] = {}
    for regime, methods in found.items():
        full, rank1 = methods["dykaf"], methods["dykaf_rank1"]
        gains = by_seed(full, rank1)
        said = verdict(list(gains.values()), "rank one is worse", "rank one is better")
        rows[regime] = {
            "full": loss_cell(full, "val_loss"),
            "rank1": loss_cell(rank1, "val_loss"),
            "gain": run_tables.cell(list(gains.values())),
            **{f"seed_{seed}": gain for seed, gain in gains.items()},
            "verdict": said,
            "paper": PAPER[regime],
            "agrees": "yes" if said == PAPER[regime] else "no" if said in PAPER.values() else "undecided",
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


def regimes_table(found: Mapping[str, Mapping[str, Entry]], own_loss: float) -> dict[str, Any]:
    columns = {
        "initial": Column("validation loss before the first step", ".3f", spread=True),
        "own": Column("of the start on its own text", ".3f"),
        "gap": Column("DyKAF's less AdamW's final validation loss", "+.3f", spread=True),
    }
    rows: dict[str, dict[str, Cell]] = {}
    for regime, methods in found.items():
        first = [losses[0] for losses in methods["adamw"]["curves"].get("val_loss", [])]
        gap = list(by_seed(methods["dykaf"], methods["adamw"]).values())
        # What fine-tuning begins with does not depend on the seed.
        initial = first[0] if len(set(first)) == 1 else run_tables.cell(first)
        rows[regime] = {"initial": initial, "gap": run_tables.cell(gap)}
    rows["fine-tuning"]["own"] = own_loss
    return table("What each regime begins with, in nats per character", columns, rows)


def draw(found: dict[str, Any]) -> "Figure | None":
    return dykaf_picture.picture(found["details"]["curves"])
