"""Methods that take statistics of layers beside SGD, AdamW, Muon and SOAP: losses at the best rates, by task.

`digits` is the CNN of `experiments.train_images` on scikit-learn's digits, 10 epochs; `gpt_head` the 808k-parameter GPT
of `experiments.train_gpt`, 300 steps, with an output layer of its own, for K-FAC's ways with that. A method's rate is
the one of its grid with the lowest final held-out loss on the first seed; it then goes on with the other seeds. The
runs are kept in a file and never made twice.
"""

import argparse
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from benchmarks import harness, run_tables
from benchmarks.results import Column, result, spread, table
from experiments import gpt_config, images, images_config, text, train_gpt, train_images
from experiments.compare_report import Entry, draw_curves, entries
from experiments.comparison import Runs, Task

GPT_TITLE = "808k-parameter character GPT with its own head"


class Shown(NamedTuple):
    """What is told of a task."""

    title: str
    losses: tuple[str, ...]  # columns
    pair: tuple[str, str]  # compared seed by seed


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
    shown = Shown("CNN on scikit-learn's digits", ("train_loss", "test_loss", "test_accuracy"), ("kfac_soap", "soap"))
    return task, shown


def gpt_head() -> tuple[Task, Shown]:
    base = gpt_config.Config(steps=300, eval_every=50, eval_batches=10, head="own")
    rates = dict.fromkeys(("kfac", "kfac_true_head", "kfac_empirical_head"), (6e-3, 1e-2)) | {"adamw": (3e-3,)}
    corpus = text.load_corpus(base.data, base.vocab, base.context)
    task = Task(base, corpus, train_gpt.train, "val_loss", rates)
    return task, Shown(GPT_TITLE, ("train_loss", "val_loss"), ("kfac_true_head", "kfac"))


TASKS = {"digits": digits, "gpt_head": gpt_head}
IMAGE_LABELS = {"kfac": "KFAC", "ekfac": "EKFAC", "sgd": "SGD"}  # damped inverses, where the GPT's have a root


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", choices=[*TASKS, "all"], default="all")
    run_tables.add_run_options(parser, seeds=3)


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    if options.runs and options.task == "all":
        raise ValueError("--runs is the file of one task: name it by --task.")
    for name in TASKS if options.task == "all" else [options.task]:
        environment, (task, shown) = harness.environment(), TASKS[name]()
        runs = Runs(options.runs or run_tables.KEPT / f"curvature_{name}.json", task)
        runs.make(range(options.seeds))
        yield describe(name, runs, shown, environment, range(options.seeds))


def describe(name: str, runs: Runs, shown: Shown, environment: Mapping[str, Any], seeds: range) -> dict[str, Any]:
    found = entries(runs, runs.task.rates)
    for method, one in found.items():
        one["label"] = IMAGE_LABELS.get(method, one["label"]) if name == "digits" else one["label"]
    columns = {"label": Column("method"), "rate": Column("rate")}
    columns |= {key: run_tables.LOSSES[key] for key in shown.losses}
    if name == "digits":
        columns["train_loss"] = columns["train_loss"]._replace(format=".4f")
    rows = {
        method: {"label": one["label"], "rate": one["rate"], **run_tables.loss_cells(one, shown.losses)}
        for method, one in found.items()
    }
    held_out = run_tables.LOSSES[runs.task.loss].title
    tables = {
        "methods": table(f"Each method at its best rate, {len(seeds)} seeds", columns, rows),
        "grid": run_tables.grid_table(runs, list(found), f"Final {held_out} by rate, first seed"),
        "difference": difference(found, shown.pair, runs.task.loss),
    }
    return result(
        f"curvature_{name}",
        f"{shown.title}: methods with statistics of layers beside others, each at its best rate.",
        f"python -m benchmarks curvature --task {name}",
        tables,
        environment=environment,
        settings=run_tables.setting_of(runs),
        seeds=seeds,
        details={"curves": run_tables.curves(found), "title": shown.title, "loss": runs.task.loss},
    )


def difference(found: Mapping[str, Entry], pair: tuple[str, str], loss: str) -> dict[str, Any]:
    """How much higher the first of the pair ends, seed by seed."""
    ends = [dict(zip(found[name]["seeds"], found[name][loss], strict=True)) for name in pair]
    by_seed = [ends[0][seed] - ends[1][seed] for seed in sorted(ends[0].keys() & ends[1].keys())]
    columns = {"loss": Column("difference, nats", ".3f", spread=True), "lower": Column("seeds where it is lower")}
    lower = f"{sum(δ < 0 for δ in by_seed)} of {len(by_seed)}"
    return table(
        f"Final {run_tables.LOSSES[loss].title}, the first less the second",
        columns,
        {" - ".join(pair): {"loss": spread(by_seed), "lower": lower}},
    )


def draw(found: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    axes, details = figure.subplots(), found["details"]
    draw_curves(axes, details["curves"], details["loss"])
    if details["loss"] == "test_loss":
        held_out = [curve for one in details["curves"].values() for curve in one["curves"]["test_loss"]]
        losses = list(itertools.chain.from_iterable(held_out))
        axes.set(yscale="log", ylim=(0.9 * min(losses), 1.1 * max(losses)), ylabel="test loss (nats per image)")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="step")
    figure.suptitle(f"{details['title']}: medians and ranges of {len(found['seeds'])} seeds")
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    return figure
