"""What the image example is made of: its data, batches, models, and the gradients that an optimizer asks for."""

import doctest
import functools
import gzip
import io
import lzma
import pickle
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_optax as fo
from experiments import image_batches, images, optimizers
from experiments.images import Images, Part
from experiments.models import cnn, resnet

RNG = np.random.default_rng(0)


def random_part(count: int, *shape: int, classes: int = 10) -> Part:
    """Noise, with the label written into the first rows as brightness, so that there is something to learn."""
    labels = np.arange(count, dtype=np.int32) % classes
    pixels = RNG.integers(0, 256, (count, *shape), np.uint8)
    pixels[:, : shape[0] // 2] = (20 * labels)[:, None, None, None]
    return Part(pixels, labels)


TINY = Images("tiny", random_part(40, 8, 8, 1), random_part(15, 8, 8, 1))


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_mnist(folder: Path, data: Images, write: Callable[[Path, bytes], object] = Path.write_bytes) -> None:
    for name, part in (("train", data.train), ("t10k", data.test)):
        write(folder / f"{name}-images-idx3-ubyte", idx(part.images[..., 0]))
        write(folder / f"{name}-labels-idx1-ubyte", idx(part.labels))


def cifar_rows(part: Part) -> np.ndarray:
    return part.images.transpose(0, 3, 1, 2).reshape(len(part.labels), -1)


class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote its strings, in which CIFAR-10's files are."""

    def save_bytes(self, obj: bytes) -> None:
        self.write(pickle.BINSTRING + struct.pack("<i", len(obj)) + obj)
        self.memoize(obj)

    dispatch = {**pickle._Pickler.dispatch, bytes: save_bytes}  # noqa: RUF012


def python2_pickle(value: Any) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(value)
    return file.getvalue().replace(b"numpy._core", b"numpy.core")


def cifar_binary(part: Part) -> bytes:
    return np.concatenate([part.labels[:, None].astype(np.uint8), cifar_rows(part)], axis=1).tobytes()


def cifar_pickle(part: Part) -> bytes:
    entries = {b"batch_label": b"batch 1 of 5", b"labels": part.labels.tolist(), b"data": cifar_rows(part)}
    return python2_pickle({**entries, b"filenames": [b"a.png"] * len(part.labels)})


def write_cifar(folder: Path, batches: list[Part], test: Part, suffix: str = "") -> None:
    for number, part in enumerate(batches, 1):
        (folder / f"data_batch_{number}{suffix}").write_bytes((cifar_binary if suffix else cifar_pickle)(part))
    (folder / f"test_batch{suffix}").write_bytes((cifar_binary if suffix else cifar_pickle)(test))


def assert_same_images(found: Images, wanted: Images) -> None:
    for ours, theirs in zip((*found.train, *found.test), (*wanted.train, *wanted.test), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


# --- the data


@pytest.mark.parametrize(("suffix", "compress"), (("", bytes), (".gz", gzip.compress), (".xz", lzma.compress)))
def test_an_mnist_folder_is_read_as_it_was_written(tmp_path: Path, suffix: str, compress: Any) -> None:
    data = Images("MNIST", random_part(12, 6, 5, 1), random_part(5, 6, 5, 1))
    write_mnist(tmp_path, data, lambda path, content: Path(f"{path}{suffix}").write_bytes(compress(content)))
    assert_same_images(images.load_images(str(tmp_path)), data)


def test_mnists_test_images_alone_are_split(tmp_path: Path) -> None:
    whole = random_part(10, 6, 5, 1)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(whole.images[..., 0]))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(whole.labels))
    parts = (Part(*(array[chosen] for array in whole)) for chosen in (slice(8), slice(8, 10)))
    assert_same_images(images.load_images(str(tmp_path)), Images("", *parts))


@pytest.mark.parametrize("suffix", ("", ".bin"))
def test_a_cifar_folder_is_read_as_it_was_written(tmp_path: Path, suffix: str) -> None:
    first, second, test = (random_part(count, 32, 32, 3) for count in (3, 2, 4))
    write_cifar(tmp_path, [first, second], test, suffix)
    train = Part(*(np.concatenate(arrays) for arrays in zip(first, second, strict=True)))
    found = images.load_images(str(tmp_path))
    assert_same_images(found, Images("CIFAR-10", train, test))
    assert found.classes == 4


def test_a_pickle_may_not_act(tmp_path: Path) -> None:
    class Acts:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "acted",)

    def message(value: Any) -> str:
        write_cifar(tmp_path, [random_part(1, 32, 32, 3)], random_part(1, 32, 32, 3))
        (tmp_path / "data_batch_1").write_bytes(python2_pickle(value))
        with pytest.raises(ValueError, match=r"data_batch_1' is damaged or of another kind") as error:
            images.load_images(str(tmp_path))
        return str(error.value)

    assert "it asks for" in message({b"data": Acts()})
    assert not (tmp_path / "acted").exists()
    assert "an array of 'O8', where only bytes belong" in message({b"data": np.array([Path, 1])[1:]})
    assert "an array of 'f4', where only bytes belong" in message({b"data": np.zeros((1, 3072), np.float32)})
    assert "its 'data' is not" in message({b"data": np.zeros((1, 3071), np.uint8)})
    assert "its 'data' is not" in message([])
    data = {b"data": np.zeros((2, 3072), np.uint8)}
    assert "its 'labels' are not a list" in message(data)
    assert "2 images and 1 labels" in message({**data, b"labels": [1]})
    assert "labels from 3 to 10, not from 0 to 9" in message({**data, b"labels": [3, 10]})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    (
        ("t10k-images-idx3-ubyte", b"\x1f\x8b", "it begins with 0x1f8b, not with 0x00000803"),
        ("t10k-images-idx3-ubyte", idx(np.zeros((15, 8, 8)))[:-1], "959 bytes after the header for 15 x 8 x 8 numbers"),
        ("t10k-labels-idx1-ubyte", idx(np.zeros(14)), "15 images and 14 labels"),
        ("t10k-labels-idx1-ubyte", None, "lacks t10k-labels-idx1-ubyte"),
        (
            "train-images-idx3-ubyte.gz",
            gzip.compress(idx(np.zeros((40, 8, 8))), mtime=0)[:-9],
            "cannot be decompressed",
        ),
        ("test_batch.bin", bytes(3072), "3072 bytes are not a multiple of 3073"),
        ("test_batch.bin", b"", "0 images and 0 labels"),
        ("data_batch_1.bin", bytes([10]) + bytes(3072), "labels from 10 to 10, not from 0 to 9"),
        ("data_batch_1.bin", None, "holds neither MNIST"),
    ),
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if "idx" in name:
        write_mnist(tmp_path, TINY)
        (tmp_path / name.removesuffix(".gz")).unlink()
    else:
        write_cifar(tmp_path, [random_part(2, 32, 32, 3)], random_part(2, 32, 32, 3), ".bin")
        (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, OSError), match=re.escape(message)) as error:
        images.load_images(str(tmp_path))
    assert str(tmp_path) in str(error.value)


def test_the_digits_are_scikit_learns() -> None:
    data = images.load_images("digits")
    assert data.train.images.shape == (1437, 8, 8, 1)
    assert data.test.images.shape == (360, 8, 8, 1)
    assert data.classes == 10
    assert (data.train.images.min(), data.train.images.max()) == (0, 16)


def test_without_scikit_learn_the_digits_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(OSError, match=r"pip install scikit-learn`, or give --data a folder"):
        images.load_images("digits")


# --- batches


def test_scaled_pixels_have_mean_zero_and_variance_one_in_each_channel() -> None:
    part = random_part(50, 6, 5, 3)
    part.images[..., 1] //= 4
    part.images[..., 2] = 7  # of one colour: zero, not infinite
    found = image_batches.standardize(jnp.asarray(part.images), image_batches.scale_of(part))
    np.testing.assert_allclose(found.mean((0, 1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(found.std((0, 1, 2)), [1, 1, 0], rtol=1e-6)


def test_an_epoch_is_each_image_once_in_an_order_of_its_own() -> None:
    orders = [np.asarray(image_batches.shuffled(jax.random.key(0), jnp.int32(epoch), 20)) for epoch in (0, 1, 0)]
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert not np.array_equal(orders[0], orders[1])
    assert np.array_equal(orders[0], orders[2])


def test_augmentation_moves_and_mirrors_whole_images() -> None:
    whole = RNG.normal(size=(200, 6, 5, 2)).astype(np.float32)
    found = np.asarray(jax.jit(image_batches.crop_and_flip)(whole, jax.random.key(0)))
    padded = np.pad(whole, ((0, 0), (4, 4), (4, 4), (0, 0)))
    moves = set()
    for before, after in zip(padded, found, strict=True):
        (move,) = (
            (y, x, step)
            for y in range(9)
            for x in range(9)
            for step in (1, -1)
            if np.array_equal(before[y : y + 6, x : x + 5][:, ::step], after)
        )
        moves.add(move)
    assert {y for y, _, _ in moves} == {x for _, x, _ in moves} == set(range(9))
    assert {step for _, _, step in moves} == {1, -1}


def test_batches_of_an_evaluation_hold_each_image_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_batches, "EVAL_BATCH", 7)
    part = random_part(17, 4, 4, 1)
    batches = image_batches.in_batches(part)
    assert batches.images.shape == (3, 7, 4, 4, 1)
    np.testing.assert_array_equal(batches.images[batches.valid], part.images)
    np.testing.assert_array_equal(batches.labels[batches.valid], part.labels)


# --- models


def test_the_norms_learn_their_statistics_in_training_only() -> None:
    model, x = (
        resnet.ResNet(classes=3, blocks=(1, 1), width=4),
        jnp.asarray(RNG.normal(1, 2, (4, 8, 8, 3)), jnp.float32),
    )
    variables = jax.jit(model.init)(jax.random.key(0), x)
    logits, updated = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))(variables, x)
    assert logits.shape == (4, 3)
    stem = jax.lax.conv_general_dilated(
        x, variables["params"]["stem"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    found = updated["batch_stats"]["norm"]
    np.testing.assert_allclose(found["mean"], 0.1 * stem.mean((0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(found["var"], 0.9 + 0.1 * stem.var((0, 1, 2)), rtol=1e-5)
    alone, together = (jax.jit(model.apply)(variables, y) for y in (x[:1], x))
    np.testing.assert_allclose(alone[0], together[0], rtol=1e-4)  # one image's logits do not depend on the others


def test_an_image_reaches_the_cnns_hidden_layer_at_a_quarter_of_its_size() -> None:
    variables = jax.eval_shape(cnn.CNN(classes=10).init, jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    shapes = {name: layer["kernel"].shape for name, layer in variables["params"].items()}
    assert shapes == {"conv1": (3, 3, 1, 16), "conv2": (3, 3, 16, 32), "hidden": (1568, 128), "head": (128, 10)}
    assert all("bias" in layer for layer in variables["params"].values())


# --- gradients


def linear(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
    inputs, labels = batch
    logits = inputs @ params["kernel"]
    return fo.losses.softmax_cross_entropy(logits, labels), logits


@pytest.mark.parametrize("fisher", ("empirical", "mc"))
@pytest.mark.parametrize("squares", (False, True))
def test_a_rows_statistics_come_with_the_gradients_as_it_asks(fisher: str, squares: bool) -> None:
    batch = jnp.asarray(RNG.normal(size=(6, 3)), jnp.float32), jnp.arange(6) % 2
    params, key, tx = {"kernel": jnp.ones((3, 2))}, jax.random.key(1), fo.ekfac(0.1)
    opt_state, kind = tx.init(params), functools.partial(fo.KroneckerFactors, squares=squares)
    method = optimizers.Method(lambda *_: tx, 0.1, statistics=kind, fisher=fisher, bases=squares and fo.eigenbases)
    (loss, logits), grads, extra = optimizers.gradients(linear, method)(params, opt_state, batch, key)

    plain = jax.value_and_grad(linear, has_aux=True)(params, batch)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), ((loss, logits), grads), plain)
    drawn, bases = key if fisher == "mc" else None, fo.eigenbases(opt_state, params) if squares else None
    gather = fo.value_and_grad(linear, kind(), fisher, has_aux=True)
    _, _, wanted = gather(params, batch, fisher_key=drawn, bases=bases)
    assert list(extra) == ["statistics"]
    jax.tree.map(np.testing.assert_array_equal, extra["statistics"], wanted)


@pytest.mark.parametrize("module", (cnn, resnet, optimizers))
def test_the_docstring_examples_run(module: Any) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
