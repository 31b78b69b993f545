"""Methods that take statistics of layers beside SGD, AdamW, Muon and SOAP: losses at the best rates, by task.

`digits` is the CNN of `experiments.train_images` on scikit-learn's digits, 10 epochs; `gpt_head` the 808k-parameter GPT
of `experiments.train_gpt`, 300 steps, with an output layer of its own, for K-FAC's ways with that. A method's rate is
the one of its grid with the lowest final held-out loss on the first seed; it then goes on with the other seeds. The
runs are kept in a file and never made twice.
"""

import argparse
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from benchmarks import pictures
from benchmarks.results import Column, result, spread, table
from benchmarks.training import tables
from experiments import gpt_config, images, images_config, text, train_gpt, train_images
from experiments.compare_report import entries
from experiments.comparison import Runs, Task


class Shown(NamedTuple):
    """What is told of a task."""

    title: str
    losses: tuple[str, ...]  # columns
    pair: tuple[str, str]  # compared seed by seed
    labels: Mapping[str, str] = MappingProxyType({})  # that differ from the GPT's


def digits() -> tuple[Task, Shown]:
    base = images_config.Config(epochs=10)
    rates = {
        "sgd": (0.03, 0.1, 0.3),
        "adamw": (3e-3, 9e-3, 2e-2),
        "muon": (3e-3, 1e-2, 3e-2),
        "soap": (1e-3, 3e-3, 9e-3),
        "kfac_soap": (1e-3, 3e-3, 9e-3),
        "kfac": (3e-3, 1e-2, 3e-2),
        "ekfac": (3e-3, 1e-2, 3e-2),
        "frog": (1e-3, 3e-3, 9e-3),
        "kfrog": (1e-4, 3e-4, 1e-3),
    }
    task = Task(base, images.load_images(base.data), train_images.train, "test_loss", rates)
    losses, labels = ("train_loss", "test_loss", "test_accuracy"), {"kfac": "KFAC", "ekfac": "EKFAC", "sgd": "SGD"}
    return task, Shown("CNN on scikit-learn's digits", losses, ("kfac_soap", "soap"), labels)


def gpt_head() -> tuple[Task, Shown]:
    base = gpt_config.Config(steps=300, eval_every=50, eval_batches=10, head="own")
    rates = dict.fromkeys(("kfac", "kfac_true_head", "kfac_empirical_head"), (6e-3, 1e-2)) | {"adamw": (3e-3,)}
    corpus = text.load_corpus(base.data, base.vocab, base.context)
    task = Task(base, corpus, train_gpt.train, "val_loss", rates)
    title = "808k-parameter character GPT with its own head"
    return task, Shown(title, ("train_loss", "val_loss"), ("kfac_true_head", "kfac"))


TASKS = {"digits": digits, "gpt_head": gpt_head}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", choices=list(TASKS), default="digits")
    tables.add_run_options(parser)


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    task, shown = TASKS[options.task]()
    runs = Runs(options.runs or tables.KEPT / f"curvature_{options.task}.json", task)
    runs.make(range(options.seeds))
    yield describe(runs, shown, options)


def describe(runs: Runs, shown: Shown, options: argparse.Namespace) -> dict[str, Any]:
    found, loss = entries(runs, runs.task.rates), runs.task.loss
    for name, label in shown.labels.items():
        if name in found:
            found[name]["label"] = label
    columns = {"label": Column("method"), "rate": Column("rate"), **{key: tables.LOSSES[key] for key in shown.losses}}
    if loss == "test_loss":
        columns["train_loss"] = columns["train_loss"]._replace(format=".4f")
    rows = {name: tables.method_cells(one, shown.losses) for name, one in found.items()}
    differences = [*tables.by_seed(*(found[name] for name in shown.pair), loss).values()]
    lower = f"{sum(δ < 0 for δ in differences)} of {len(differences)}"
    of_pair = {"loss": Column("difference, nats", ".3f", spread=True), "lower": Column("seeds where it is lower")}
    told = tables.LOSSES[loss].title
    return result(
        f"curvature_{options.task}",
        f"{shown.title}: methods with statistics of layers beside others, each at its best rate.",
        f"python -m benchmarks curvature --task {options.task}",
        {
            "methods": table(tables.at_best(None, options.seeds), columns, rows),
            "grid": tables.grid_table(runs, list(found), f"Final {told} by rate, first seed"),
            "difference": table(
                f"Final {told}, the first less the second",
                of_pair,
                {" - ".join(shown.pair): {"loss": spread(differences), "lower": lower}},
            ),
        },
        settings=tables.setting_of(runs),
        seeds=range(options.seeds),
        details={"curves": tables.curves(found), "title": shown.title, "loss": loss},
    )


def draw(found: dict[str, Any]) -> Figure:
    details = found["details"]
    figure = tables.curves_figure(details["curves"], details["loss"], details["title"], len(found["seeds"]))
    if details["loss"] == "test_loss":
        losses = [x for one in details["curves"].values() for curve in one["curves"]["test_loss"] for x in curve]
        axes = figure.axes[0]
        axes.set(yscale="log", ylim=(0.9 * min(losses), 1.1 * max(losses)), ylabel="test loss (nats per image)")
        pictures.plain_ticks(axes)
    return figure
