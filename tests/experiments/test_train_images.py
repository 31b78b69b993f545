"""The image example from command line to files: it learns, goes on bitwise, and says what is wrong."""

import doctest
import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import matplotlib.image
import numpy as np
import pytest
from flax import linen as nn

from experiments import image_batches, train_images
from experiments.images import Images, load_images
from experiments.images_config import Config
from experiments.models.cnn import CNN
from experiments.models.resnet import ResNet
from experiments.optimizers import IMAGE_METHODS
from tests.experiments.experiment_runs import (
    ENVIRONMENT,
    assert_same_run,
    flags,
    interrupt,
    last_checkpoint,
    metrics,
    refusal,
)
from tests.experiments.test_image_parts import TINY, random_part, write_cifar, write_mnist

SCRIPT = train_images.__name__
fail = functools.partial(refusal, train_images.main)


class SmallCNN(nn.Module):
    """A convolution and a head: one matrix of each kind that a method tells apart, and little to compile."""

    classes: int

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        del train
        x = nn.relu(nn.Conv(4, (3, 3), strides=4, name="conv")(images))
        return nn.Dense(self.classes, name="head")(x.reshape(len(x), -1))


@pytest.fixture(autouse=True)
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_images, "CNN", SmallCNN)
    monkeypatch.setattr(train_images, "ResNet", functools.partial(ResNet, blocks=(1,)))


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    folder = tmp_path / "mnist"
    folder.mkdir()
    write_mnist(folder, TINY)
    return folder


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    folder = tmp_path / "cifar"
    folder.mkdir()
    write_cifar(folder, [random_part(6, 32, 32, 3), random_part(6, 32, 32, 3)], random_part(5, 32, 32, 3))
    return folder


def test_the_script_learns_the_digits(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", SCRIPT, *flags(optimizer="sgd", epochs=3, out=out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    rows = metrics(out)
    assert [(row["epoch"], row["step"], row["images"]) for row in rows] == [(e, 22 * e, 1408 * e) for e in range(4)]
    assert rows[0]["test_loss"] == pytest.approx(np.log(10), abs=1)  # of a uniform guess
    assert rows[-1]["test_accuracy"] > 0.85
    assert rows[-1]["train_accuracy"] > 0.9
    assert done.stdout.splitlines()[0] == f"sgd on digits: 1,437 images to train, 360 to test; into {out}"
    assert f"test accuracy {rows[-1]['test_accuracy']:.2%} after" in done.stdout.splitlines()[-1]
    assert "66/66" in done.stderr
    assert "images/s" in done.stderr
    config = json.loads((out / "config.json").read_text())
    assert (config["lr"], config["weight_decay"]) == (0.03, 5e-4)
    picture = matplotlib.image.imread(out / "loss.png")
    assert picture.shape[:2] == (675, 1650)
    assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 50  # two panels of curves, grid, text


def test_an_interrupted_run_goes_on_bitwise_as_if_it_had_not_been(
    tmp_path: Path, cifar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Augmented, with running statistics, and with an optimizer that holds bases."""
    arguments = flags(data=cifar, model="resnet18", width=4, optimizer="soap", batch=4, epochs=3)
    train_images.main([*arguments, f"--out={tmp_path / 'whole'}"])
    steps = [row["step"] for row in metrics(tmp_path / "whole")]

    interrupt(train_images.main, [*arguments, f"--out={tmp_path / 'parts'}"], steps[2], monkeypatch)
    assert last_checkpoint(tmp_path / "parts")[0] == steps[1]
    train_images.main(["--resume", f"--out={tmp_path / 'parts'}"])

    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    step, arrays = last_checkpoint(tmp_path / "parts")
    assert step == steps[-1]
    assert any("batch_stats" in name for name in arrays)


@pytest.mark.parametrize("optimizer", IMAGE_METHODS)
def test_every_method_takes_a_step(optimizer: str) -> None:
    config = Config(optimizer=optimizer, epochs=2, batch=40, warmup=0, eval_every=2)  # SOAP's first step only looks
    before, after = train_images.train(config, TINY)
    assert (before["step"], after["step"]) == (0, 2)
    assert after["train_loss"] != before["train_loss"]


def test_an_evaluation_is_the_mean_over_all_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_batches, "EVAL_BATCH", 4)  # the last batch of 15 images is not full
    program = train_images.make_program(Config(batch=8).resolve(), TINY)
    state, scale = train_images.initial_state(program, (8, 8, 1), jax.random.key(0)), image_batches.scale_of(TINY.train)
    found = train_images.evaluate(program, state, scale, image_batches.in_batches(TINY.test))
    inputs = image_batches.standardize(TINY.test.images, scale)
    logits = np.asarray(program.model.apply({"params": state.params}, inputs), np.float64)
    chosen = np.take_along_axis(logits, TINY.test.labels[:, None], 1)[:, 0]
    np.testing.assert_allclose(found[0], (np.log(np.exp(logits).sum(1)) - chosen).mean(), rtol=1e-5)
    assert found[1] == (logits.argmax(1) == TINY.test.labels).mean()


@pytest.mark.parametrize(("augment", "channels", "expected"), (("auto", 1, False), ("auto", 3, True), ("on", 1, True)))
def test_only_colour_images_are_augmented_by_default(augment: str, channels: int, expected: bool) -> None:
    data = Images("", random_part(10, 8, 8, channels), random_part(10, 8, 8, channels))
    assert train_images.make_program(Config(augment=augment, batch=5).resolve(), data).augment == expected


def test_many_rates_and_seeds_compile_the_step_once() -> None:
    compiled_before = train_images.advance._cache_size()
    losses = set()
    for seed, lr in ((0, 1e-3), (0, 3e-3), (1, 3e-3)):
        config = Config(optimizer="sgd", epochs=2, batch=13, seed=seed, lr=lr)  # the only test with this batch
        losses.add(train_images.train(config, TINY)[-1]["test_loss"])
    assert len(losses) == 3
    assert train_images.advance._cache_size() == compiled_before + 1


def test_sgds_decay_is_part_of_its_gradient() -> None:
    settings = Config(optimizer="sgd", weight_decay=0.5).resolve()
    tx = IMAGE_METHODS["sgd"].build(lambda count: 0.1, settings)
    params = {"kernel": np.full((2, 2), 4.0, np.float32), "bias": np.full(2, 4.0, np.float32)}
    grads = jax.tree.map(np.ones_like, params)
    updates, state = tx.update(grads, tx.init(params), params)
    updates, _ = tx.update(grads, state, params)
    # g + wd w = 3; Nesterov's momentum after two equal gradients: g + 0.9 (g + 0.9 g) = 2.71 g
    np.testing.assert_allclose(updates["kernel"], -0.1 * 2.71 * 3, rtol=1e-6)
    np.testing.assert_allclose(updates["bias"], -0.1 * 2.71, rtol=1e-6)


def test_a_diverging_run_stops_with_a_message(tmp_path: Path, mnist: Path) -> None:
    with pytest.raises(SystemExit, match=r"^stopped: the loss is (nan|inf) .* Try a smaller --lr\.$"):
        train_images.main(flags(data=mnist, optimizer="sgd", batch=8, epochs=4, lr=1e30, out=tmp_path / "run"))
    assert all(np.isfinite(row["test_loss"]) for row in metrics(tmp_path / "run"))


def test_the_docstring_experiment_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_images, "CNN", CNN)
    result = doctest.testmod(train_images)
    assert result.attempted > 0
    assert result.failed == 0


# --- what can be wrong with a command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        ({"optimizer": "adam"}, f"unknown optimizer 'adam': choose from {', '.join(IMAGE_METHODS)}"),
        ({"model": "vgg"}, "argument --model: invalid choice: 'vgg'"),
        ({"augment": "yes"}, "argument --augment: invalid choice: 'yes'"),
        ({"epochs": 0}, "--epochs must be at least 1, not 0"),
        ({"eval_every": -5}, "--eval-every must be at least 1, not -5"),
        ({"epochs": 2, "warmup": 2}, "--warmup must be at least 0 and less than --epochs 2, not 2.0"),
        ({"lr": "nan"}, "--lr must be a positive number, not nan"),
        ({"optimizer": "kfac", "damping": 0}, "--damping must be a positive number, not 0.0"),
        ({"optimizer": "soap", "damping": 0.1}, "--damping must be left out: soap has none, not 0.1"),
        ({"weight_decay": -1}, "--weight-decay must be zero or a positive number, not -1.0"),
        ({"seed": -1}, "--seed must be at least 0 and less than 2^31, not -1"),
        ({"batch": 1438}, "--batch must be at most 1437, the number of training images, not 1438"),
        ({"data": "/nowhere"}, "no folder '/nowhere'. --data takes 'digits', or a folder"),
        ({"data": Path(__file__).parent}, "holds neither MNIST (t10k-images-idx3-ubyte, ...) nor CIFAR-10"),
    ),
    ids=lambda value: value if isinstance(value, str) else " ".join(flags(**value)),
)
def test_a_bad_option_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: dict[str, Any], message: str
) -> None:
    assert message in fail(capsys, *flags(**arguments, out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    (
        (Images("", random_part(20, 3, 5, 1), random_part(5, 3, 5, 1)), "--model cnn needs 4 x 4 pixels or more"),
        (Images("", random_part(20, 8, 8, 1), random_part(5, 8, 7, 1)), "(8, 8, 1) to train on and of (8, 7, 1)"),
    ),
    ids=("small", "unequal"),
)
def test_images_that_do_not_fit_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], data: Images, message: str
) -> None:
    write_mnist(tmp_path, data)
    assert message in fail(capsys, *flags(data=tmp_path, batch=4, out=tmp_path / "run"))


def test_a_run_is_not_mixed_with_another(tmp_path: Path, mnist: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    arguments = flags(data=mnist, optimizer="sgd", batch=8, epochs=4, out=out)
    train_images.main(arguments)
    before = metrics(out)
    assert "already holds a run" in fail(capsys, *arguments)
    assert "optimizer is 'sgd' there and 'adamw' here" in refusal(
        train_images.main, capsys, "--resume", f"--out={out}", "--optimizer=adamw"
    )
    data = load_images(str(mnist))
    write_mnist(mnist, Images("", data.test, data.train))
    assert "images_sha256 is" in fail(capsys, "--resume", f"--out={out}")
    assert metrics(out) == before
    train_images.main([*arguments, "--overwrite", "--epochs=1"])
    assert metrics(out) != before
