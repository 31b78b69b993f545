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
from experiments import curvature_tasks


def compared(task: str) -> Comparison:
    if task == "digits":
        title, pair = "CNN on scikit-learn's digits", ("kfac_soap", "soap")
        losses = ("train_loss", "test_loss", "test_accuracy")
        labels, of_loss = {"kfac": "KFAC", "ekfac": "EKFAC", "sgd": "SGD"}, curvature_tasks.digits()
    else:
        title, pair = "808k-parameter character GPT with its own head", ("kfac_true_head", "kfac")
        losses = ("train_loss", "val_loss")
        labels, of_loss = {}, curvature_tasks.gpt_head()
    return Comparison(
        f"curvature_{task}",
        f"{title}: methods with statistics of layers beside others, each at its best rate.",
        title,
        of_loss,
        losses,
        tables=lambda runs, found, times: {"difference": comparison.difference(found, *pair, of_loss.loss)},
        labels=labels,
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", choices=["digits", "gpt_head"], default="digits")
    comparison.add_run_options(parser)


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    path = options.runs or comparison.KEPT / f"curvature_{options.task}.json"
    yield from comparison.measure(compared(options.task), path, range(options.seeds), options.command)


draw = comparison.draw
