"""Compares optimizers on one character GPT: loss against steps and against time, best rates, seeds.

    python -m experiments.compare_optimizers
    python -m experiments.compare_optimizers --optimizers adamw,soap --rates 2e-3,4e-3 --seeds 0,1 --out runs/pair
    python -m experiments.compare_optimizers --preset shakespeare-char --dtype bfloat16 --out runs/full

On tiny Shakespeare, which is downloaded once unless ``--data`` names another text. The preset ``cpu`` takes about 15
minutes on two cores; ``shakespeare-char`` is nanoGPT's setting, for a GPU. Writes ``comparison.png``, ``report.md``,
``report.json`` and, after each run, ``runs.json``: what is interrupted goes on with ``--resume``, run by run.
"""

import argparse
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import train_gpt
from experiments.compare_options import PER_METHOD, PRESETS, SMALL, Selection
from experiments.compare_report import entries, markdown, picture, with_seconds
from experiments.comparison import Runs, Task
from experiments.gpt_config import Config
from experiments.loop import ending_with_a_message
from experiments.options import add_options, make_parser
from experiments.results_folder import Results
from experiments.run_folder import read_config_as, versions
from experiments.text import load_corpus

PICTURE, RUNS = "comparison.png", "runs.json"


def parser_of() -> argparse.ArgumentParser:
    choices = {"preset": list(PRESETS)}
    parser = make_parser(Selection, (__doc__ or "").partition("\n")[0], "runs/comparison", choices)
    parser.usage = "%(prog)s [--optimizers NAMES] [--seeds NUMBERS] [--rates NUMBERS] [option ...], or --help"
    add_options(parser, SMALL, choices, without=PER_METHOD)
    return parser


def prepare(given: dict[str, Any], out: Path, resume: bool, overwrite: bool) -> tuple[Selection, Runs, Results]:
    """Everything that can be wrong with a command line, before anything is compiled or deleted."""
    names = Selection.__dataclass_fields__
    chosen = {name: value for name, value in given.items() if name in names}
    settings = {name: value for name, value in given.items() if name not in names}
    preset = PRESETS[settings.get("preset", "cpu")]
    base = dataclasses.replace(read_config_as(Config, out) if resume else preset, **settings)
    selection = dataclasses.replace(read_config_as(Selection, out) if resume else Selection(), **chosen)
    grid = selection.grid(base)
    corpus = load_corpus(base.data, base.vocab, base.context)
    setting = {name: value for name, value in dataclasses.asdict(base).items() if name not in PER_METHOD}
    described = {**dataclasses.asdict(selection), **setting, "text_sha256": corpus.sha256}
    results = Results(out, described, resume=resume, overwrite=overwrite, others=(RUNS, PICTURE))
    train = functools.partial(train_gpt.train, progress=True)
    return selection, Runs(out / RUNS, Task(base, corpus, train, "train_loss", grid)), results


def report(runs: Runs, config: dict[str, Any], results: Results) -> str:
    """Writes what there is to tell so far, and returns it as text."""
    found = entries(runs, runs.methods)
    text = markdown(found, config)
    results.write(text, {"config": config, "versions": versions("flax", "optax", "numpy"), "methods": found})
    title = f"Optimizers on {config['data']}, a character GPT {config['width']} wide; final losses in the legend"
    picture(with_seconds(found), title).savefig(results.path / PICTURE, dpi=150)
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of()
    given = vars(parser.parse_args(arguments))
    out = Path(given.pop("out"))
    try:
        selection, runs, results = prepare(given, out, given.pop("resume"), given.pop("overwrite"))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    config = {**dataclasses.asdict(runs.task.base), **dataclasses.asdict(selection)}
    with ending_with_a_message(out):
        runs.make(selection.seed_numbers(), on_run=lambda runs: report(runs, config, results))
    print(report(runs, config, results))
    print(f"written to {out}: report.md, report.json, {PICTURE} and {RUNS}")


if __name__ == "__main__":
    main()
