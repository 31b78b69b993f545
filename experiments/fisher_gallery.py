"""Draws the Fisher matrix of a small trained CNN beside what K-FAC, Shampoo and their relatives make of it.

    python -m experiments.fisher_gallery
    python -m experiments.fisher_gallery --data FOLDER --examples 1024 --out runs/gallery-mnist

Writes ``gallery.png`` (log10 |F| six times, on one scale), ``gallery.md`` and ``gallery.json`` (the errors of all
methods, each against the Fisher that it is made from: the true one, whose labels come from the model, and the empirical
one, with the data's labels).
"""

import argparse
import dataclasses
import functools
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float
from tqdm import tqdm

import fisher_optax as fo
from experiments.image_batches import evenly_spaced, scale_of, shuffled, standardize
from experiments.images import Images, load_images
from experiments.loop import Diverged, require_finite
from experiments.options import option, require
from experiments.run_folder import versions
from fisher_optax.fisher.operators.approximations import approximate, dense
from fisher_optax.fisher.plots import matrices_plot
from fisher_optax.fisher.spectra.comparison import Against, Comparison, compare

BATCH, RATE, AT_ONCE = 64, 3e-3, 16
SHOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "exact blocks": ("block_diagonal", {}),
    "diagonal": ("diagonal", {}),
    "by outputs (FROG)": ("rowwise", {}),
    "K-FAC": ("kfac", {}),
    "EKFAC": ("ekfac", {}),
    "Shampoo": ("shampoo", {}),
    "Shampoo, trace-scaled": ("shampoo", {"trace_scaled": True}),
    "SOAP": ("soap", {}),
    "DyKAF": ("dykaf", {}),
    "KL": ("kl", {}),
    "nearest Kronecker": ("nearest", {}),
}
PANELS = ("true", "K-FAC", "Shampoo", "empirical", "EKFAC", "SOAP")
LAYERS = ("conv1", "conv2", "head")


@dataclasses.dataclass(frozen=True)
class Config:
    """What is drawn. Each field is a command-line option."""

    data: str = option("digits", "digits (scikit-learn's), or a folder with MNIST or CIFAR-10")
    epochs: int = option(10, "passes of Adam over the training images")
    examples: int = option(512, "training images that the Fishers are means over")
    seed: int = option(0, "of the initial parameters and the order of the images")


class SmallCNN(nn.Module):
    """Two convolutions and a head: 3,818 parameters for ten classes, of gray images of 8 x 8 or of 28 x 28 pixels."""

    classes: int

    @nn.compact
    def __call__(self, images: Float[Array, "batch height width channels"]) -> Float[Array, "batch classes"]:
        # Pooled to 4 x 4, or a little more.
        window = (images.shape[1] // 8, images.shape[2] // 8)
        x = nn.max_pool(nn.relu(nn.Conv(8, (3, 3), name="conv1")(images)), window, window)
        x = nn.max_pool(nn.relu(nn.Conv(16, (3, 3), name="conv2")(x)), (2, 2), (2, 2))
        return nn.Dense(self.classes, name="head")(x.reshape(len(x), -1))


class Trained(NamedTuple):
    """A model after training, and the examples that its Fishers are of."""

    data: str  # the name of the images, wherever they lie
    loss: Any  # of parameters, images and labels
    params: Any
    images: Array
    labels: Array
    train_loss: float  # of these examples
    train_accuracy: float
    test_accuracy: float


def train(config: Config, data: Images) -> Trained:
    model, tx, scale = SmallCNN(data.classes), optax.adam(RATE), scale_of(data.train)
    images, labels = standardize(jnp.asarray(data.train.images), scale), jnp.asarray(data.train.labels)
    key = jax.random.key(config.seed)
    params = jax.jit(model.init)(key, images[:1])["params"]
    state: Any = tx.init(params)
    logits = jax.jit(lambda params, images: model.apply({"params": params}, images))

    def loss(params: Any, images: Any, labels: Any) -> Any:
        return fo.losses.softmax_cross_entropy(jnp.asarray(model.apply({"params": params}, images)), labels)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, chosen: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(params, images[chosen], labels[chosen])
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    batch = min(BATCH, len(labels))
    with tqdm(total=config.epochs * (len(labels) // batch), unit="step", desc="training") as bar:
        value = jnp.nan
        for epoch in range(config.epochs):
            order = shuffled(key, jnp.int32(epoch), len(labels))
            for first in range(0, len(labels) - batch + 1, batch):
                params, state, value = step(params, state, order[first : first + batch])
                bar.update()
            bar.set_postfix_str(f"loss {require_finite(value, f'after epoch {epoch + 1}', 'Look at the data.'):.3f}")

    accuracy = lambda images, labels: float((logits(params, images).argmax(-1) == labels).mean())  # noqa: E731
    few = evenly_spaced(data.train, config.examples)
    x, y = standardize(jnp.asarray(few.images), scale), jnp.asarray(few.labels)
    tests = standardize(jnp.asarray(data.test.images), scale), jnp.asarray(data.test.labels)
    return Trained(data.name, loss, params, x, y, float(jax.jit(loss)(params, x, y)), accuracy(x, y), accuracy(*tests))


def measure(trained: Trained) -> tuple[dict[str, Any], dict[str, dict[str, Comparison]]]:
    """The matrices of the picture, and the errors of all methods, by Fisher and method."""
    given = (trained.loss, trained.params, trained.images, trained.labels)
    matrices: dict[str, Any] = {}
    errors: dict[str, dict[str, Comparison]] = {"true": {}, "empirical": {}}
    with tqdm(total=len(errors) * (1 + len(SHOWN)), unit="matrix") as bar:
        for fisher in errors:
            bar.set_description(f"{fisher} Fisher")
            F = matrices[fisher] = np.asarray(dense(*given, fisher=fisher, batch_size=AT_ONCE))
            errors_of = Against(F)
            bar.update()
            for name, (method, options) in SHOWN.items():
                bar.set_description(f"{name} of the {fisher} Fisher")
                found = approximate(method, *given, fisher=fisher, batch_size=AT_ONCE, **options).dense()
                errors[fisher][name] = errors_of(found)
                if fisher == "true" and name in PANELS:
                    matrices[name] = np.asarray(found)
                bar.update()
    errors["true"]["empirical Fisher"] = compare(matrices["empirical"], matrices["true"])
    return {name: matrices[name] for name in PANELS}, errors


def ordering(params: Any) -> tuple[np.ndarray, dict[str, int]]:
    """The places of all parameters, layer by layer, each as its matrix with the bias in the last row; and the sizes."""
    flat, unravel = ravel_pytree(params)
    at = unravel(jnp.arange(len(flat), dtype=flat.dtype))
    parts = [np.concatenate([np.ravel(at[layer][leaf]) for leaf in ("kernel", "bias")]) for layer in LAYERS]
    return np.concatenate(parts).astype(int), {layer: len(part) for layer, part in zip(LAYERS, parts, strict=True)}


def as_markdown(config: Config, trained: Trained, errors: dict[str, dict[str, Comparison]]) -> str:
    near, count = errors["true"]["empirical Fisher"], sum(x.size for x in jax.tree.leaves(trained.params))
    lines = [
        f"{count:,} parameters after {config.epochs} epochs on {trained.data}. Of {len(trained.labels)} training "
        f"images {trained.train_accuracy:.1%} are recognised, at a loss of {trained.train_loss:.4f} nats, and "
        f"{trained.test_accuracy:.1%} of the test images. The empirical Fisher is {near.relative_error:.3g} of the "
        f"true one's norm away from it, at a cosine of {near.cosine:.3f}.",
    ]
    for fisher, rows in errors.items():
        head = f"of the {fisher} Fisher", "relative error", "cosine", "spectral distance", "KL, nats"
        lines += ["", "| " + " | ".join(head) + " |", "|---|" + "---|" * 4]
        lines += [f"| {name} | " + " | ".join(f"{value:.3g}" for value in row) + " |" for name, row in rows.items()]
    return "\n".join(lines) + "\n"


def write(out: Path, config: Config, trained: Trained, matrices: Any, errors: dict[str, dict[str, Comparison]]) -> None:
    numbers = {name: value for name, value in trained._asdict().items() if isinstance(value, float)}
    # JSON has no NaN.
    measured = {
        fisher: {
            name: {k: v if math.isfinite(v) else None for k, v in row._asdict().items()} for name, row in rows.items()
        }
        for fisher, rows in errors.items()
    }
    settings = {**dataclasses.asdict(config), "data": trained.data}
    payload = {
        "config": settings,
        "versions": versions("flax", "optax", "numpy", "scipy"),
        "model": numbers,
        "errors": measured,
    }
    (out / "gallery.json").write_text(json.dumps(payload, indent=2) + "\n", encoding="utf-8")
    (out / "gallery.md").write_text(as_markdown(config, trained, errors), encoding="utf-8")
    order, sizes = ordering(trained.params)
    title = f"log |F| of a CNN, {len(order):,} parameters, {trained.data}; approximations are of the true Fisher"
    matrices_plot(matrices, order=order, boundaries=sizes, title=title, path=out / "gallery.png")


def prepare(config: Config, out: Path) -> Images:
    """Everything that can be wrong with a command line, before anything is compiled."""
    for name in ("epochs", "examples"):
        require(config, getattr(config, name) >= 1, name, "at least 1")
    require(config, 0 <= config.seed < 2**31, "seed", "at least 0 and less than 2^31")
    data = load_images(config.data)
    count, height, width, _ = data.train.images.shape
    require(config, config.examples <= count, "examples", f"at most {count}, the number of training images")
    if min(height, width) < 8 or data.test.images.shape[1:3] != (height, width):
        raise ValueError(f"--data needs images of one size, 8 x 8 pixels or more; those of {config.data!r} are not.")
    out.mkdir(parents=True, exist_ok=True)
    return data


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    for field in dataclasses.fields(Config):
        help, kind = f"{field.metadata['help']} (default: {field.default})", field.metadata["type"]
        parser.add_argument(
            f"--{field.name}", default=field.default, type=kind, metavar=kind.__name__.upper(), help=help
        )
    parser.add_argument("--out", default="runs/fisher-gallery", type=Path, help="folder (default: %(default)s)")
    given = vars(parser.parse_args(arguments))
    out = given.pop("out")
    config = Config(**given)
    try:
        data = prepare(config, out)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    try:
        trained = train(config, data)
        matrices, errors = measure(trained)
    except Diverged as error:
        sys.exit(f"stopped: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped")
    write(out, config, trained, matrices, errors)
    print(as_markdown(config, trained, errors))
    print(f"written to {out}: gallery.png, gallery.md, gallery.json")


if __name__ == "__main__":
    main()
