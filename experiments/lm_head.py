"""Looks at the Fisher of a GPT trained by train_gpt.py: what each token is worth, on which text, by whose labels.

    python -m experiments.train_gpt --optimizer soap --out runs/gpt
    python -m experiments.lm_head --run runs/gpt --out runs/lm-head

Writes ``report.md`` and ``report.json``; ``importance.png`` (each token's row of the embedding, with intervals),
``shift.png`` (on two texts), ``labels.png`` (with the text's labels and with the model's), ``spectrum.png``,
``density.png`` and ``blocks.png`` (of all parameters). What is interrupted goes on with ``--resume``, bit for bit.
"""

import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from experiments.lm_head_folder import Results
from experiments.lm_head_parts import measure
from experiments.lm_head_plots import draw
from experiments.lm_head_report import find, markdown, payload, summary
from experiments.lm_head_text import Text, load_texts, shown
from experiments.loop import ending_with_a_message
from experiments.options import make_parser, option, require
from experiments.run_folder import read_config_as
from experiments.trained_gpt import Trained, corpus_of, digest, load_trained, read_settings

UNITS = ("sequence", "token")


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured. Each field is a command-line option."""

    run: str = option("runs/gpt", "folder of a run of train_gpt.py")
    text: str = option(None, "a text as for --data there; by default the run's own validation text", str)
    other: str = option(None, "the text to compare with; by default the Python manual, as help() shows it", str)
    sequences: int = option(256, "windows of either text, which do not overlap")
    context: int = option(None, "characters a window; by default the run's, which it may not pass", int)
    unit: str = option("sequence", "what is squared: the gradient of a sequence, or of each token (slower)")
    samples: int = option(4, "labels drawn from the model for each character")
    level: float = option(0.95, "of the intervals")
    rate: float = option(0.05, "of false discoveries among the tokens called different")
    spectrum_sequences: int = option(8, "windows that the spectra are of")
    eigenvalues: int = option(20, "how many of the largest")
    probes: int = option(8, "random vectors for the density")
    seed: int = option(0, "of the labels drawn and of the random vectors")


class Prepared(NamedTuple):
    """A command line that nothing is wrong with."""

    config: Config
    trained: Trained
    texts: list[Text]
    names: list[str]  # of tokens
    results: Results


def check(config: Config, context: int) -> None:
    require(config, config.unit in UNITS, "unit", " or ".join(UNITS))
    for name, least in (("sequences", 2), ("samples", 1), ("spectrum_sequences", 1), ("eigenvalues", 1), ("probes", 2)):
        require(config, getattr(config, name) >= least, name, f"at least {least}")
    require(config, 1 <= config.context <= context, "context", f"between 1 and the run's, {context}")
    require(config, config.spectrum_sequences <= config.sequences, "spectrum_sequences", "at most --sequences")
    for name in ("level", "rate"):
        require(config, 0 < getattr(config, name) < 1, name, "between 0 and 1")
    require(config, 0 <= config.seed < 2**31, "seed", "at least 0 and less than 2^31")


def prepare(given: dict[str, Any], out: Path, resume: bool, overwrite: bool) -> Prepared:
    """Everything that can be wrong with a command line, before anything is compiled or deleted."""
    config = dataclasses.replace(read_config_as(Config, out) if resume else Config(), **given)
    run = Path(config.run)
    settings, saved = read_settings(run)
    if settings.head != "tied":
        raise ValueError(
            f"the run in {config.run!r} has --head {settings.head}; wanted one whose head is its embedding, tied."
        )
    config = dataclasses.replace(config, context=settings.context if config.context is None else config.context)
    check(config, settings.context)
    corpus = corpus_of(run, settings, saved)
    texts = load_texts(corpus, settings.data, (config.text, config.other), (config.sequences, config.context))
    trained = load_trained(run, settings, len(corpus.characters))
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(trained.params))
    require(config, config.eigenvalues <= parameters, "eigenvalues", f"at most {parameters}, the number of parameters")
    described = {
        **dataclasses.asdict(config),
        "parameters_sha256": digest(*jax.tree.leaves(trained.params)),
        "windows_sha256": digest(*(text.windows for text in texts)),
    }
    results = Results(out, described, resume=resume, overwrite=overwrite)
    return Prepared(config, trained, texts, [shown(character) for character in corpus.characters], results)


def main(arguments: Sequence[str] | None = None) -> None:
    began = time.perf_counter()
    parser = make_parser(Config, (__doc__ or "").partition("\n")[0], "runs/lm-head", {})
    parser.usage = "%(prog)s [--run FOLDER] [--out FOLDER] [option ...], or --help"
    given = vars(parser.parse_args(arguments))
    out = Path(given.pop("out"))
    try:
        config, trained, texts, names, results = prepare(given, out, given.pop("resume"), given.pop("overwrite"))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    with ending_with_a_message(out):
        found = find(config, trained, texts, names, measure(trained, texts, config, results))
        data = payload(found, time.perf_counter() - began)
        draw(found, out)
    results.write(markdown(data), data)
    print(summary(data))
    print(f"written to {out}: report.md, report.json and six pictures")


if __name__ == "__main__":
    main()
