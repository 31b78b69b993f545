"""A GPT that goes on with another text: from what AdamW reached on the Python standard library's sources."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax

from experiments import train_gpt
from experiments.gpt_config import Config
from experiments.text import Corpus, load_corpus
from experiments.trained_gpt import Params, digest, load_start

START = Config(optimizer="adamw")


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
