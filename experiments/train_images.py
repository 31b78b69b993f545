"""Trains a classifier of images with any optimizer of `optimizers.IMAGE_METHODS`.

    python -m experiments.train_images --optimizer muon --out runs/digits
    python -m experiments.train_images --data cifar-10-batches-py --model resnet18 --batch 128 --out runs/cifar

A run that is killed goes on with ``--resume --out FOLDER`` and ends in bitwise the parameters it would have had.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

import fisher_optax as fo
from experiments.image_batches import (
    Batches,
    Inputs,
    Raw,
    Scale,
    crop_and_flip,
    evenly_spaced,
    in_batches,
    scale_of,
    shuffled,
    standardize,
)
from experiments.images import Images, load_images
from experiments.images_config import AUGMENT, MODELS, Config
from experiments.loop import Plan, ending_with_a_message, run_steps
from experiments.models.cnn import CNN
from experiments.models.resnet import ResNet
from experiments.optimizers import IMAGE_METHODS, Method, find_method, gradients, scheduled
from experiments.options import make_parser, require
from experiments.plots import plot_losses_and_accuracies
from experiments.run_folder import Row, RunFolder, read_config_as

Tree = Any  # of arrays
Scalar = Float[Array, ""]
Labels = Int[Array, " batch"]


class State(NamedTuple):
    """Everything a step reads or changes besides the images; a checkpoint is this."""

    params: Tree
    batch_stats: Tree  # the means and variances of the norms, empty for a model without
    opt_state: optax.OptState
    step: Int[Array, ""]
    key: PRNGKeyArray  # of the whole run; each epoch and step folds its own from it


class Program(NamedTuple):
    """What the functions below compile for; another rate, seed or data set of the same shape compiles nothing anew."""

    config: Config
    model: nn.Module
    steps: int
    warmup: int
    augment: bool


def make_program(config: Config, data: Images) -> Program:
    classes, (examples, _, _, channels) = data.classes, data.train.images.shape
    per_epoch = examples // config.batch
    return Program(
        dataclasses.replace(config, data="", seed=0, lr=1.0, eval_every=1),
        CNN(classes) if config.model == "cnn" else ResNet(classes, width=config.width),
        steps=config.epochs * per_epoch,
        warmup=round(config.warmup * per_epoch),
        augment=config.augment == "on" or (config.augment == "auto" and channels == 3),
    )


def method_of(config: Config) -> Method:
    method = find_method(config.optimizer, IMAGE_METHODS)
    if method.statistics and isinstance(method.statistics(), fo.LayerSamples):
        method = method._replace(statistics=functools.partial(fo.LayerSamples, config.samples))
    return method


def make_optimizer(program: Program, peak: Scalar | float) -> optax.GradientTransformationExtraArgs:
    return scheduled(method_of(program.config), program.config, peak, program.warmup, program.steps)


@functools.partial(jax.jit, static_argnums=(0, 1))
def initial_state(program: Program, shape: tuple[int, ...], key: PRNGKeyArray) -> State:
    init_key, run_key = jax.random.split(key)
    variables = program.model.init(init_key, jnp.zeros((1, *shape)))
    opt_state = make_optimizer(program, 1.0).init(variables["params"])
    return State(variables["params"], variables.get("batch_stats", {}), opt_state, jnp.int32(0), run_key)


# A program a step: XLA's convolutions are several times slower inside a loop on CPU.
@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def advance(
    program: Program, state: State, images: Raw, labels: Labels, order: Array, scale: Scale, peak: Scalar
) -> tuple[State, Scalar]:
    """The state a step later, and the loss of its batch."""
    params, batch_stats, opt_state, step, run_key = state
    crop_key, fisher_key = jax.random.split(jax.random.fold_in(jax.random.fold_in(run_key, 1), step))
    first = step % (len(labels) // program.config.batch) * program.config.batch
    chosen = jax.lax.dynamic_slice(order, (first,), (program.config.batch,))
    inputs = standardize(images[chosen], scale)
    if program.augment:
        inputs = crop_and_flip(inputs, crop_key)

    def loss_fn(params: Tree, batch: tuple[Inputs, Labels]) -> tuple[Scalar, Tree]:
        inputs, labels = batch
        variables = {"params": params, "batch_stats": batch_stats}
        logits, updated = program.model.apply(variables, inputs, train=True, mutable=["batch_stats"])
        return fo.losses.softmax_cross_entropy(jnp.asarray(logits), labels), updated.get("batch_stats", {})

    grad_fn = gradients(loss_fn, method_of(program.config))
    (loss, batch_stats), grads, extra = grad_fn(params, opt_state, (inputs, labels[chosen]), fisher_key)
    updates, opt_state = make_optimizer(program, peak).update(grads, opt_state, params, **extra)
    return State(optax.apply_updates(params, updates), batch_stats, opt_state, step + 1, run_key), loss


@functools.partial(jax.jit, static_argnums=0)
def sums(
    model: nn.Module, variables: Tree, scale: Scale, images: Raw, labels: Labels, valid: Bool[Array, " batch"]
) -> tuple[Scalar, Int[Array, ""]]:
    """Of a batch: all losses together, and how many images were recognised."""
    logits = jnp.asarray(model.apply(variables, standardize(images, scale)))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.where(valid, losses, 0).sum(), (valid & (logits.argmax(-1) == labels)).sum()


def evaluate(program: Program, state: State, scale: Scale, batches: Batches) -> tuple[float, float]:
    """Mean loss and share of images recognised, without augmentation."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    losses, hits = zip(*(sums(program.model, variables, scale, *b) for b in zip(*batches, strict=True)), strict=True)
    count = batches.valid.sum()
    return float(sum(map(float, losses)) / count), float(sum(map(int, hits)) / count)


def train(
    config: Config,
    data: Images | None = None,
    run: RunFolder | None = None,
    *,
    progress: bool = False,
    on_evaluation: Callable[[Row], object] | None = None,
) -> list[Row]:
    """Trains, and returns an entry an evaluation: at step 0, every ``eval_every`` epochs and at the end.

    Args:
        config: what to train, with what.
        data: the images; by default what ``config.data`` names. Pass them to train many times on them.
        run: where to write; by default nothing is written. One opened with ``resume=True`` goes on from its checkpoint.
        progress: show a progress bar.
        on_evaluation: called with each new entry.

    Returns:
        Entries ``{"step", "epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "seconds",
        "training_seconds", "images"}``: losses in nats per image and shares of images recognised, over all test images
        and over as many training images; wall-clock time with and without compilation and evaluations; images trained
        on so far.

    Raises:
        ValueError, OSError: the configuration or the data is at fault.
        Diverged: the loss is not finite. What ``run`` holds is from before.

    Example:
        >>> rows = train(Config(optimizer="soap", epochs=2))
        >>> rows[-1]["test_accuracy"] > 0.7
        True
    """
    began = time.perf_counter()
    config = config.resolve()
    data = data or load_images(config.data)
    require_fitting(config, data)
    program, per_epoch = make_program(config, data), len(data.train.labels) // config.batch
    scale, peak = scale_of(data.train), jnp.float32(config.lr)
    images, labels = (jnp.asarray(array) for array in data.train)
    parts = {"train": in_batches(evenly_spaced(data.train, len(data.test.labels))), "test": in_batches(data.test)}

    def advance_to(state: State, stop: int) -> tuple[State, Scalar]:
        losses, order = [], None
        for step in range(int(state.step), stop):
            if order is None or step % per_epoch == 0:
                order = shuffled(state.key, jnp.int32(step // per_epoch), len(labels))
            state, loss = advance(program, state, images, labels, order, scale, peak)
            losses.append(loss)
        return state, jnp.stack(losses).mean()

    def measure(state: State) -> Row:
        row: Row = {"epoch": int(state.step) // per_epoch}
        for name, batches in parts.items():
            row[f"{name}_loss"], row[f"{name}_accuracy"] = evaluate(program, state, scale, batches)
        return row

    _, rows = run_steps(
        Plan(program.steps, config.eval_every * per_epoch, "images", config.batch, advice="Try a smaller --lr."),
        initial_state(program, images.shape[1:], jax.random.key(config.seed)),
        advance_to,
        measure,
        lambda row: f"train {row['train_loss']:.3f}, test {row['test_loss']:.3f} and {row['test_accuracy']:.1%}",
        began=began,
        run=run,
        progress=progress,
        on_evaluation=on_evaluation,
    )
    return rows


def require_fitting(config: Config, data: Images) -> None:
    shape, test_shape = (part.images.shape for part in data[1:])
    if shape[1:] != test_shape[1:]:
        raise ValueError(f"{config.data!r} has images of {shape[1:]} to train on and of {test_shape[1:]} to test.")
    require(config, config.batch <= shape[0], "batch", f"at most {shape[0]}, the number of training images")
    if config.model == "cnn" and min(shape[1:3]) < 4:
        raise ValueError(f"--model cnn needs 4 x 4 pixels or more; the images of {config.data!r} are {shape[1:]}.")


def prepare(given: dict[str, Any], out: Path, resume: bool, overwrite: bool) -> tuple[Config, Images, RunFolder]:
    """Everything that can be wrong with a command line, before anything is compiled or deleted."""
    config = dataclasses.replace(read_config_as(Config, out) if resume else Config(), **given).resolve()
    data = load_images(config.data)
    require_fitting(config, data)
    described = {**dataclasses.asdict(config), "images_sha256": data.sha256}
    draw = plot_losses_and_accuracies
    return config, data, RunFolder(out, described, resume=resume, overwrite=overwrite, draw=draw)


def main(arguments: Sequence[str] | None = None) -> None:
    summary, choices = (__doc__ or "").partition("\n")[0], {"model": MODELS, "augment": AUGMENT}
    parser = make_parser(Config, summary, "runs/images", choices)
    given = vars(parser.parse_args(arguments))
    out = Path(given.pop("out"))
    try:
        config, data, run = prepare(given, out, given.pop("resume"), given.pop("overwrite"))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    train_count, test_count = len(data.train.labels), len(data.test.labels)
    print(f"{config.optimizer} on {data.name}: {train_count:,} images to train, {test_count:,} to test; into {out}")
    with ending_with_a_message(out):
        rows = train(config, data, run, progress=True)
    last = rows[-1]
    print(f"test accuracy {last['test_accuracy']:.2%} after {last['seconds']:.0f} s; curve in {run.plot}")


if __name__ == "__main__":
    main()
