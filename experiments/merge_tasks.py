"""Merges two models tuned from one on two tasks, and tells what each way of merging keeps of both.

    python -m experiments.merge_tasks
    python -m experiments.merge_tasks --tasks classes --fisher empirical --out runs/merge-classes

A small CNN learns scikit-learn's digits, and is tuned twice: on the images turned by a quarter and on their negatives
(or on either half of the classes). Writes ``report.md`` and ``report.json`` (accuracies on both tasks of the average,
the Fisher-weighted average, task arithmetic with and without Fishers, TIES and DARE) and ``merge.png`` (the same, and
the path of coefficients between both models). On distortions Fishers win; on classes the plain average does, at its
best coefficient. What is interrupted goes on with ``--resume``, seed by seed.
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments.images import Images, load_images
from experiments.loop import ending_with_a_message
from experiments.merge_tasks_parts import STAGES, TASKS, Program, make_tasks, measure, sweeps
from experiments.merge_tasks_report import draw, markdown, payload
from experiments.options import make_parser, option, require
from experiments.results_folder import Results
from experiments.run_folder import read_config_as

PICTURE = "merge.png"


@dataclasses.dataclass(frozen=True)
class Config:
    """What is trained and merged. Each field is a command-line option."""

    data: str = option("digits", "digits (scikit-learn's), or a folder with MNIST or CIFAR-10")
    tasks: str = option("distortions", "what the tasks are")
    seeds: int = option(5, "how many times all is done, from other initial parameters")
    base_epochs: int = option(2, "passes of Adam over the training images, for the base")
    epochs: int = option(5, "... over those of a task")
    fisher: str = option("mc", "labels of the Fishers: drawn from the model, all (slower), or the data's")
    examples: int = option(512, "training images that a Fisher is a mean over, at most")
    density: float = option(0.2, "share of each task vector that TIES keeps")
    drop: float = option(0.5, "share of each task vector that DARE drops")


CHOICES = {"tasks": tuple(TASKS), "fisher": ("mc", "true", "empirical")}


def prepare(config: Config) -> Images:
    """Everything that can be wrong with a configuration, before anything is compiled or deleted."""
    for name in ("seeds", "base_epochs", "epochs", "examples"):
        require(config, getattr(config, name) >= 1, name, "at least 1")
    require(config, 0 < config.density <= 1, "density", "above 0 and at most 1")
    require(config, 0 <= config.drop < 1, "drop", "at least 0 and below 1")
    data = load_images(config.data)
    height, width = data.train.images.shape[1:3]
    if height != width or data.test.images.shape[1:3] != (height, width):
        raise ValueError(f"--data needs square images of one size; those of {config.data!r} are not.")
    return data


def main(arguments: Sequence[str] | None = None) -> None:
    began = time.perf_counter()
    parser = make_parser(Config, (__doc__ or "").partition("\n")[0], "runs/merge-tasks", CHOICES)
    parser.usage = "%(prog)s [--tasks NAME] [--out FOLDER] [option ...], or --help"
    given: dict[str, Any] = vars(parser.parse_args(arguments))
    out, resume, overwrite = Path(given.pop("out")), given.pop("resume"), given.pop("overwrite")
    try:
        config = dataclasses.replace(read_config_as(Config, out) if resume else Config(), **given)
        data = prepare(config)
        described = {**dataclasses.asdict(config), "images_sha256": data.sha256}
        results = Results(out, described, resume=resume, overwrite=overwrite, others=(PICTURE,))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    tasks, program, compiled = make_tasks(data, config.tasks), Program(data.classes), sweeps(config)
    found = []
    with ending_with_a_message(out), tqdm(total=STAGES * config.seeds, unit="stage") as bar:
        for seed in range(config.seeds):

            def say(what: str, seed: int = seed) -> None:
                bar.set_description(f"seed {seed}: {what}")
                bar.update()

            found.append(
                results.numbers(f"seed-{seed}", lambda: measure(program, compiled, tasks, config, seed, say))  # noqa: B023
            )
            bar.update(STAGES * (seed + 1) - bar.n)
    report = payload(config, data.name, found, time.perf_counter() - began)
    results.write(markdown(report), report)
    draw(report, out / PICTURE)
    print(markdown(report))
    print(f"written to {out}: report.md, report.json and {PICTURE}")


if __name__ == "__main__":
    main()
