"""Methods that take statistics of layers beside SGD, AdamW, Muon and SOAP: losses at the best rates, by task.

`digits` is the CNN of `experiments.train_images` on scikit-learn's digits, 10 epochs; `gpt_head` the 808k-parameter GPT
of `experiments.train_gpt`, 300 steps, with an output layer of its own, for K-FAC's ways with that. The final held-out
loss decides on a rate.
"""

import argparse
from collections.abc import Iterator
from typing import Any

from benchmarks.training import comparison
from benchmarks.training.comparison import Comparison
from experiments import gpt_config, images, images_config, text, train_gpt, train_images
from experiments.comparison import Task

WHAT = ": methods with statistics of layers beside others, each at its best rate."
DIGITS, GPT_HEAD = "CNN on scikit-learn's digits", "808k-parameter character GPT with its own head"


def digits() -> Comparison:
    base = images_config.Config(epochs=10)
    rates = {
        "sgd": (0.03, 0.1, 0.3),
        "adamw": (3e-3, 9e-3, 2e-2),
        "kfrog": (1e-4, 3e-4, 1e-3),
        **dict.fromkeys(("soap", "kfac_soap", "frog"), (1e-3, 3e-3, 9e-3)),
        **dict.fromkeys(("muon", "kfac", "ekfac"), (3e-3, 1e-2, 3e-2)),
    }
    return Comparison(
        "curvature_digits",
        DIGITS + WHAT,
        DIGITS,
        Task(base, images.load_images(base.data), train_images.train, "test_loss", rates),
        ("train_loss", "test_loss", "test_accuracy"),
        tables=lambda runs, found, times: {
            "difference": comparison.difference(found, "kfac_soap", "soap", "test_loss")
        },
        labels={"kfac": "KFAC", "ekfac": "EKFAC", "sgd": "SGD"},
    )


def gpt_head() -> Comparison:
    base = gpt_config.Config(steps=300, eval_every=50, eval_batches=10, head="own")
    rates = dict.fromkeys(("kfac", "kfac_true_head", "kfac_empirical_head"), (6e-3, 1e-2)) | {"adamw": (3e-3,)}
    corpus = text.load_corpus(base.data, base.vocab, base.context)
    return Comparison(
        "curvature_gpt_head",
        GPT_HEAD + WHAT,
        GPT_HEAD,
        Task(base, corpus, train_gpt.train, "val_loss", rates),
        ("train_loss", "val_loss"),
        tables=lambda runs, found, times: {
            "difference": comparison.difference(found, "kfac_true_head", "kfac", "val_loss")
        },
    )


TASKS = {"digits": digits, "gpt_head": gpt_head}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", choices=list(TASKS), default="digits")
    comparison.add_run_options(parser)


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    path = options.runs or comparison.KEPT / f"curvature_{options.task}.json"
    yield from comparison.measure(TASKS[options.task](), path, range(options.seeds), options.command)


draw = comparison.draw
