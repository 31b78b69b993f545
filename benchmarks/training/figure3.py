"""Seven optimizers of a research post and four more on one character GPT: losses over steps and over time.

The post's Figure 3 trains nanoGPT's GPT on tiny Shakespeare (`shakespeare-char`, for a GPU); the preset `cpu` has the
808k-parameter GPT and 300 steps. Every method tries the same rates, and the final training loss decides.

Source: "Fisher-based Optimizers in Deep Learning", 2026 (fullfix.github.io/notes/2026/04/21/fisher-optimizers).
"""

import argparse
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

from matplotlib.figure import Figure

from benchmarks import harness
from benchmarks.catalogue import listed
from benchmarks.results import Column
from benchmarks.training import comparison
from experiments import periods, train_gpt
from experiments.compare_options import PRESETS
from experiments.compare_report import picture
from experiments.comparison import Task
from experiments.gpt_config import DTYPES
from experiments.optimizers import METHODS as KNOWN
from experiments.text import load_corpus

NAMES = {"cpu": "reduced", "shakespeare-char": "full"}  # of the results
RATES = {"cpu": (2e-3, 4e-3, 8e-3, 1.6e-2), "shakespeare-char": (5e-4, 1e-3, 2e-3, 4e-3)}  # 3 times the width
METHODS = ["adamw", "muon", "soap", "kfac_soap", "shampoo_half", "shampoo", "kfac"]
# Final training losses in the post's figure, in that order.
POST = dict(zip(METHODS, (0.6204, 0.4411, 0.3824, 0.3686, 0.4007, 0.4576, 0.6009), strict=True))
METHODS += ["dykaf", "dykaf_rank1", "kl_soap", "frog"]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=list(PRESETS), default="cpu")
    parser.add_argument("--methods", type=listed(KNOWN), default=METHODS, help=f"default: {','.join(METHODS)}")
    parser.add_argument("--rates", type=listed(of=float), help="the same for all (default: four, by the preset)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the computation; bfloat16 suits a GPU")
    parser.add_argument("--steps", type=int, help="(default: the preset's)")
    parser.add_argument("--rounds", type=int, default=7, help="of timing, a period of each method in each")
    comparison.add_run_options(parser)


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    base, name = dataclasses.replace(PRESETS[options.preset], dtype=options.dtype), NAMES[options.preset]
    if options.steps:
        base = dataclasses.replace(base, steps=options.steps, eval_every=max(1, options.steps // 10))
    corpus = load_corpus(base.data, base.vocab, base.context)
    rates = dict.fromkeys(options.methods, options.rates or RATES[options.preset])
    compared = comparison.Comparison(
        f"figure3_{name}_{harness.environment()['platform']}",
        f"Optimizers on a character GPT and tiny Shakespeare, the {name} setting of a post's Figure 3: losses over "
        "steps and over time.",
        f"Character GPT, {base.layers} layers, {base.width} wide, on tiny Shakespeare",
        Task(base, corpus, train_gpt.train, "train_loss", rates),
        ("train_loss", "val_loss"),
        {"post": Column("training loss in the post", ".4f")},
        lambda runs, method, entry, times: {"post": POST.get(method)},
        trainer=functools.partial(periods.of_gpt, corpus=corpus),
    )
    path = options.runs or comparison.KEPT / f"figure3_{name}.json"
    yield from comparison.measure(compared, path, range(options.seeds), options.command, options.rounds)


def draw(found: dict[str, Any]) -> Figure:
    """Over steps and, where steps were timed, over seconds."""
    many, details = len(found["seeds"]), found["details"]
    return picture(details["curves"], details["title"] + (f": medians and ranges of {many} seeds" if many > 1 else ""))
