"""A GPT that goes on with another text: from what AdamW reached on the Python standard library's sources."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from experiments import train_gpt
from experiments.compare_options import PRESETS
from experiments.comparison import Runs, Task
from experiments.gpt_config import Config
from experiments.text import Corpus, load_corpus
from experiments.trained_gpt import Params, digest, load_start

START = Config(optimizer="adamw")
BASE = PRESETS["cpu"]
METHODS = ("adamw", "muon", "soap", "dykaf", "dykaf_rank1")
RATES: dict[str, tuple[float, ...]] = {
    "pre-training": (2e-3, 4e-3, 8e-3, 1.6e-2),
    "fine-tuning": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
}


class Given(NamedTuple):
    """What fine-tuning has to go on with."""

    corpus: Corpus
    params: Params
    sha256: str  # of both


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


def make_runs(folder: Path, seeds: Sequence[int], steps: int, start_steps: int) -> dict[str, Runs]:
    """Those of both regimes, in files in ``folder``; those of pre-training are `benchmarks.training.figure3`'s, too."""
    base = BASE
    if steps != base.steps:
        base = dataclasses.replace(base, steps=steps, eval_every=max(1, steps // 10))
    _, given = make_start(folder / "dykaf_start", start_steps, base)
    corpus, runs = load_corpus(base.data, base.vocab, base.context), dict[str, Runs]()
    for regime, data, train, name in (
        ("pre-training", corpus, train_gpt.train, "figure3_reduced"),
        ("fine-tuning", given, fine_tune, "dykaf_finetuning"),
    ):
        task = Task(base, data, train, "val_loss", dict.fromkeys(METHODS, RATES[regime]))
        runs[regime] = Runs(folder / f"{name}.json", task)
        print(regime, flush=True)
        runs[regime].make(seeds)
    return runs
