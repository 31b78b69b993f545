"""Prunes a GPT that train_gpt.py has trained by several methods, and compares what they leave of it.

    python -m experiments.train_gpt --optimizer soap --out runs/gpt
    python -m experiments.prune_gpt --run runs/gpt --out runs/pruned

Without ``--run`` it trains one first, in the folder ``gpt`` of ``--out``. Each method is calibrated on several draws of
windows of the training text, with the inputs that layers have in the model as given and in the one pruned so far, with
OWL's share for each block, and with shares of whole matrices rather than of each output; it is judged by its perplexity
on the validation text. Writes a table, ``report.md``, ``report.json`` and ``perplexity.png``. On two cores all this
takes some ten minutes; what is interrupted goes on with ``--resume``.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int
from tqdm import tqdm

import fisher_optax as fo
from experiments import train_gpt
from experiments.loop import ending_with_a_message
from experiments.models.gpt import GPT
from experiments.options import make_parser, option, require
from experiments.prune_gpt_report import PICTURE, VARIANTS, draw, markdown, payload, summary
from experiments.results_folder import Results
from experiments.run_folder import read_config_as
from experiments.text import Corpus
from experiments.trained_gpt import Trained, corpus_of, digest, load_trained, read_settings
from fisher_optax.compression.matrix.masks import Pattern, as_sparsity, check_pattern

METHODS = ("magnitude", "wanda", "sparsegpt", "obs")
BATCH = 16  # sequences


@dataclasses.dataclass(frozen=True)
class Config:
    """What is compared. Each field is a command-line option."""

    run: str = option(None, "folder of a run of train_gpt.py; by default one is trained in OUT/gpt", str)
    methods: str = option(",".join(METHODS), "which, with commas between them")
    sparsities: str = option("0.5,0.6,0.7,0.8,2:4,4:8", "shares of weights to remove, or N:M to keep N of M inputs")
    draws: int = option(3, "of calibration data")
    sequences: int = option(128, "windows in a draw, each as long as the model's context")
    validation: int = option(320, "windows of the validation text")
    damping: float = option(0.01, "of sparsegpt and obs, over the mean of H's diagonal")
    spread: float = option(0.08, "how far OWL takes a layer's sparsity from the mean")
    steps: int = option(1000, "of the training that stands in for --run")
    seed: int = option(0, "of the first draw")


class Setting(NamedTuple):
    """One row of the comparison, of one draw."""

    method: str
    sparsity: str
    variant: str  # one of `VARIANTS`
    draw: int

    @property
    def name(self) -> str:
        return f"{self.method}-{self.sparsity.replace(':', 'of')}-{self.variant}-{self.draw}"


@dataclasses.dataclass(frozen=True)
class Logits:
    """What is pruned; equal for equal models, so that each layer's program is compiled once."""

    model: GPT

    def __call__(self, params: Any, tokens: Int[Array, "batch time"]) -> Array:
        return jnp.asarray(self.model.apply({"params": params}, tokens))


def settings_of(config: Config) -> Iterator[Setting]:
    """All that differ: magnitude needs no data, so it has one draw; OWL shares out numbers, not patterns; SparseGPT and
    OBS go output by output.
    """
    for variant, sparsity, method in itertools.product(VARIANTS, split(config.sparsities), split(config.methods)):
        by_score = method in ("magnitude", "wanda")
        blind = method == "magnitude" and variant != "owl"
        if (variant in ("owl", "matrix") and ":" in sparsity) or (variant == "matrix" and not by_score):
            continue
        if variant == "pruned" and blind:
            continue
        for draw_number in range(1 if blind else config.draws):
            yield Setting(method, sparsity, variant, draw_number)


def split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def check(config: Config) -> None:
    known = set(split(config.methods)) <= set(METHODS) and split(config.methods)
    require(config, bool(known), "methods", f"some of {', '.join(METHODS)}")
    require(config, bool(split(config.sparsities)), "sparsities", "one at least")
    for name in ("draws", "sequences", "validation", "steps"):
        require(config, getattr(config, name) >= 1, name, "at least 1")
    require(config, 0 <= config.damping < math.inf, "damping", "zero or a positive number")
    require(config, 0 <= config.seed < 2**31, "seed", "at least 0 and less than 2^31")
    require(config, 0 <= config.spread < 1, "spread", "at least 0 and below 1")
    for sparsity in split(config.sparsities):
        share = as_number(sparsity)
        as_sparsity(share)
        if not isinstance(share, str):
            fits = share - config.spread >= 0 and share + config.spread < 1
            require(config, fits, "spread", f"so that {sparsity} stays in [0, 1) both ways")


def as_number(sparsity: str) -> float | str:
    try:
        return float(sparsity)
    except ValueError:
        return sparsity


def train(config: Config, run: Path) -> None:
    """The GPT that stands in for ``--run``; one that is there already is only looked at."""
    base = train_gpt.Config(steps=config.steps)
    corpus = train_gpt.load_corpus(base.data, base.vocab, base.context)
    described = {**dataclasses.asdict(base.resolve()), "text_sha256": corpus.sha256}
    folder = train_gpt.RunFolder(run, described, resume=(run / "config.json").exists())
    print(f"training a GPT in {run}")
    train_gpt.train(base, corpus, folder, progress=True)
    folder.checkpoints.close()


def load(run: Path) -> tuple[Trained, Corpus]:
    settings, saved = read_settings(run)
    corpus = corpus_of(run, settings, saved)
    return load_trained(run, settings, len(corpus.characters)), corpus


def calibration(text: np.ndarray, context: int, config: Config, number: int) -> list[Array]:
    """Windows from anywhere in the training text, in batches."""
    rng = np.random.default_rng((config.seed, number))
    first = rng.integers(0, len(text) - context, (config.sequences, 1))
    windows = text[first + np.arange(context)]
    return [jnp.asarray(windows[i : i + BATCH]) for i in range(0, len(windows), BATCH)]


def perplexity(trained: Trained, params: Any, windows: Array) -> float:
    return math.exp(float(train_gpt.evaluate(trained.model, params, windows)))


def measure(trained: Trained, corpus: Corpus, config: Config, results: Results) -> dict[str, Any]:
    """Everything, or what ``results`` has not yet."""
    apply_fn, context = Logits(trained.model), trained.config.context
    batch = math.gcd(config.validation, 16)
    count = dataclasses.replace(trained.config, eval_batches=config.validation // batch, batch=batch)
    windows = train_gpt.evenly_spaced_windows(corpus.validation, count)
    data = [calibration(corpus.train, context, config, number) for number in range(config.draws)]

    def shares(sparsity: float, number: int) -> dict[str, float]:
        name = f"owl-{sparsity}-{number}"
        block = lambda path: path.partition("/")[0]  # noqa: E731
        return results.numbers(name, lambda: fo.compression.owl(
            apply_fn, trained.params, data[number], sparsity, spread=config.spread, group=block, progress=False
        ))  # fmt: skip

    def one(setting: Setting) -> dict[str, Any]:
        share: Any = as_number(setting.sparsity)
        share = shares(share, setting.draw) if setting.variant == "owl" else share
        options: dict[str, Any] = {"damping": config.damping}
        if setting.method in ("magnitude", "wanda"):
            options = {"scope": "matrix" if setting.variant == "matrix" else "output"}
        began = time.perf_counter()
        pruned, _, report = fo.compression.prune(
            apply_fn, trained.params, data[setting.draw], setting.method, share,
            sequential=setting.variant == "pruned", progress=False, **options,
        )  # fmt: skip
        seconds = time.perf_counter() - began
        value = perplexity(trained, pruned, windows)
        layers = {x.name: {"sparsity": x.sparsity, "error": x.error, "damping": x.damping} for x in report.layers}
        return {
            "perplexity": value, "error": report.error, "achieved": report.sparsity, "seconds": seconds,
            "layers": layers,
        }  # fmt: skip

    dense = results.numbers("dense", lambda: {"perplexity": perplexity(trained, trained.params, windows)})
    rows, every = [], list(settings_of(config))
    with tqdm(every, unit="model") as bar:
        for setting in bar:
            bar.set_description_str(setting.name)
            rows.append({**setting._asdict(), **results.numbers(setting.name, lambda s=setting: one(s))})
    return {"dense": dense["perplexity"], "rows": rows}


def prepare(given: dict[str, Any], out: Path, resume: bool, overwrite: bool) -> tuple[Config, Results]:
    """Everything that can be wrong with a command line, before anything is compiled or deleted."""
    config = dataclasses.replace(read_config_as(Config, out) if resume else Config(), **given)
    check(config)
    described, width = dataclasses.asdict(config), train_gpt.Config().width
    if config.run:
        trained, _ = load(Path(config.run))
        described["parameters_sha256"], width = digest(*jax.tree.leaves(trained.params)), trained.config.width
    for share in (as_sparsity(as_number(sparsity)) for sparsity in split(config.sparsities)):
        if isinstance(share, Pattern):
            check_pattern(share, width)
    return config, Results(out, described, resume=resume, overwrite=overwrite, others=(PICTURE, "gpt"))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(Config, (__doc__ or "").partition("\n")[0], "runs/pruned", {})
    parser.usage = "%(prog)s [--run FOLDER] [--out FOLDER] [option ...], or --help"
    given = vars(parser.parse_args(arguments))
    out = Path(given.pop("out"))
    try:
        config, results = prepare(given, out, given.pop("resume"), given.pop("overwrite"))
        run = Path(config.run) if config.run else out / "gpt"
        with ending_with_a_message(out):
            if not config.run:
                train(config, run)
            trained, corpus = load(run)
    except (ValueError, TypeError, OSError) as error:
        parser.error(str(error))
    with ending_with_a_message(out):
        data = payload(measure(trained, corpus, config, results), config, trained.step)
    draw(data, out / PICTURE)
    results.write(markdown(data), data)
    print(summary(data))
    print(f"written to {out}: report.md, report.json, {PICTURE}")


if __name__ == "__main__":
    main()
