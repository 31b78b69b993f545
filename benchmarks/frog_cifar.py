"""FROG on CIFAR-10: time and epochs that FROG, K-FROG, K-FAC, Muon and SGD need to accuracies on test images.

ResNet-18. The preset `full` is a research note's setting, for a GPU: batches of 512, of which FROG samples 64 images,
and of 128 for SGD, which has a row with the others' batch besides. `cpu` has a fourth of all three, an eighth of the
width, and few epochs; it is meant for a part of CIFAR-10. Every method tries its rates on the first seed and runs at
the best of them, by the final accuracy, on the other seeds. The runs are kept in a file and never made twice. A step's
time is measured apart from them: all methods train in turns, whole periods between refreshes. Minutes are of such steps
alone, without compiling and evaluations.

Source: "FROG: My attempt to create efficient second-order optimizer", 2026
  (fullfix.github.io/notes/2026/01/25/frog-optimizer); its times are of an A100.
"""

import argparse
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import harness, run_tables
from benchmarks.flops import count_matmul_flops
from benchmarks.frog_cifar_report import PLAIN, Shown, Steps, describe, picture
from benchmarks.steps import flops_between_refreshes
from experiments import train_images
from experiments.comparison import Runs, Task
from experiments.image_batches import scale_of, shuffled
from experiments.images import Images, load_images
from experiments.images_config import Config
from experiments.options import option
from experiments.run_folder import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDER = "cifar-10-batches-bin"  # in $FISHER_OPTAX_DATA
RATES = {
    "sgd": (1e-2, 3e-2, 1e-1),
    PLAIN: (3e-2, 1e-1, 3e-1),
    "muon": (3e-3, 1e-2, 3e-2),
    "kfac": (3e-3, 1e-2, 3e-2),
    "kfrog": (3e-4, 1e-3, 3e-3),
    "frog": (3e-3, 1e-2, 3e-2),
}


@dataclasses.dataclass(frozen=True)
class Setting(Config):
    """Of all runs."""

    sgd_batch: int = option(128, "batch of sgd")

    def of(self, method: str) -> "Setting":
        optimizer, batch = "sgd" if method == PLAIN else method, self.sgd_batch if method == "sgd" else self.batch
        return dataclasses.replace(self, optimizer=optimizer, batch=batch)


class Preset(NamedTuple):
    """Defaults of the options."""

    setting: Setting
    targets: tuple[float, ...]  # per cent of the test images
    seeds: int


PRESETS = {
    "cpu": Preset(
        Setting(model="resnet18", width=8, batch=128, sgd_batch=32, samples=16, epochs=4), (35, 40, 45, 50), 2
    ),
    # K-FAC's decompositions of 4608 x 4608 take seconds each.
    "full": Preset(Setting(model="resnet18", batch=512, epochs=30, refresh=100), (88, 90, 92, 94), 3),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=list(PRESETS), default="cpu")
    parser.add_argument("--data", type=Path, help=f"folder of CIFAR-10 (default: {FOLDER} in $FISHER_OPTAX_DATA)")
    everything = ",".join(RATES)
    parser.add_argument("--methods", type=methods, default=everything, help="with commas (default: %(default)s)")
    parser.add_argument("--targets", type=run_tables.numbers, help="accuracies in per cent, with commas")
    for name in ("width", "samples", "batch", "sgd_batch", "epochs"):
        (field,) = (field for field in dataclasses.fields(Setting) if field.name == name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=field.metadata["help"])
    parser.add_argument("--seeds", type=int, help="rates are tried on the first (default, as of these: the preset's)")
    parser.add_argument("--rounds", type=int, default=3, help="of timing, a period of each method in each")
    parser.add_argument("--runs", type=Path, help=f"file of runs to go on with (default: one in {run_tables.KEPT})")


def methods(text: str) -> list[str]:
    """As an option's type."""
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in RATES]:
        raise argparse.ArgumentTypeError(f"unknown method {unknown[0]!r}: choose from {', '.join(RATES)}")
    return names


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    environment, preset = harness.environment(), PRESETS[options.preset]
    data = load_images(str(options.data or folder()))
    given = {f.name: vars(options).get(f.name) for f in dataclasses.fields(Setting)}
    changed = {name: value for name, value in given.items() if value is not None and name != "data"}
    setting = dataclasses.replace(preset.setting, data=data.name, **changed)
    task = Task(setting, data, train, "test_error", {name: RATES[name] for name in options.methods})
    name = "frog_cifar" if options.preset == "cpu" else f"frog_cifar_{options.preset}"
    runs = Runs(options.runs or run_tables.KEPT / f"{name}.json", task)
    seeds = range(options.seeds or preset.seeds)
    runs.make(seeds)
    shown = Shown(
        f"{name}_{environment['platform']}",
        run_tables.command("frog_cifar", argparse.Namespace(**{**vars(options), "data": None}), add_options),
        options.targets or list(preset.targets),
        seeds,
        environment,
        noted=options.preset == "full",
    )
    yield describe(runs, shown, Steps())
    yield describe(runs, shown, measure_steps(setting, data, options.methods, options.rounds))


def folder() -> Path:
    if not (named := os.environ.get("FISHER_OPTAX_DATA")):
        raise FileNotFoundError(f"no --data: name the folder of CIFAR-10, or, as $FISHER_OPTAX_DATA, that of {FOLDER}.")
    return Path(named) / FOLDER


def train(setting: Setting, data: Images) -> list[Row]:
    """Entries of `train_images.train`, and the share of test images that are not recognised."""
    config = dataclasses.replace(setting.of(setting.optimizer), seed=setting.seed, lr=setting.lr)
    return [{**row, "test_error": 1 - row["test_accuracy"]} for row in train_images.train(config, data)]


def measure_steps(setting: Setting, data: Images, names: Sequence[str], rounds: int) -> Steps:
    """Each method's, and those of `PLAIN` in any case."""
    configs = {name: setting.of(name).resolve() for name in dict.fromkeys([*names, PLAIN])}
    images, labels = (jnp.asarray(array) for array in data.train)
    runs, flops = {}, {}
    for name, config in configs.items():
        runs[name], flops[name] = trainer(config, data, images, labels)
        jax.block_until_ready(runs[name](None))
    seconds = harness.interleaved(runs, rounds, lambda _: (), "timing, round")
    return Steps({name: [1e3 * s / setting.refresh for s in times] for name, times in seconds.items()}, flops)


def trainer(config: Config, data: Images, images: Any, labels: Any) -> tuple[Callable[[Any], Any], float]:
    """A function that trains on for one period between refreshes, and the flops of a step's products."""
    program, scale, peak = train_images.make_program(config, data), scale_of(data.train), jnp.float32(config.lr)
    state = train_images.initial_state(program, images.shape[1:], jax.random.key(config.seed))
    order = shuffled(state.key, jnp.int32(0), len(labels))
    advance = functools.partial(train_images.advance, program)

    def train(_: Any) -> Any:
        nonlocal state
        loss = None
        for _ in range(config.refresh):
            state, loss = advance(state, images, labels, order, scale, peak)
        return loss

    count = count_matmul_flops(advance, state, images, labels, order, scale, peak)
    between = flops_between_refreshes(count)
    return train, between + (count.most - between) / config.refresh


def draw(found: dict[str, Any]) -> "Figure | None":
    return picture(found)
