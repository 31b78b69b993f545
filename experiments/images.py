"""Labelled images: scikit-learn's digits, or a folder in the format of MNIST or of CIFAR-10.

Formats: IDX as described with MNIST (LeCun, Cortes, Burges 1998); CIFAR-10's binary and Python versions (Krizhevsky
2009), which come without a header. Each file may be compressed by gzip or xz.
"""

import gzip
import hashlib
import io
import lzma
import pickle
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8

OPENERS = {"": open, ".gz": gzip.open, ".xz": lzma.open}
CIFAR_SHAPE = (3, 32, 32)  # red, green, blue; then rows of pixels
CIFAR_BYTES = 3 * 32 * 32
CIFAR_CLASSES = 10
CIFAR_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))

Pixels = UInt8[np.ndarray, "images height width channels"]
Labels = Int32[np.ndarray, " images"]


class Part(NamedTuple):
    """Images, and the class of each from 0."""

    images: Pixels
    labels: Labels


class Images(NamedTuple):
    """A data set: to train on, and to test."""

    name: str
    train: Part
    test: Part

    @property
    def classes(self) -> int:
        return 1 + int(max(part.labels.max() for part in (self.train, self.test)))

    @property
    def sha256(self) -> str:
        """Of all pixels and labels, whatever files they came from."""
        digest = hashlib.sha256()
        for array in (*self.train, *self.test):
            digest.update(array.tobytes())
        return digest.hexdigest()


def load_images(source: str) -> Images:
    """Reads a data set.

    Args:
        source: ``"digits"``, or a folder that holds one of

            - MNIST or what has its form: ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` and the same two with
              ``t10k``; with the latter alone, its first four fifths are to train on, the others to test;
            - CIFAR-10's binary version: ``test_batch.bin`` and one to five ``data_batch_*.bin``;
            - CIFAR-10's Python version: ``test_batch`` and one to five ``data_batch_*``, pickles.

            A name may end in ``.gz`` or ``.xz``.

    Raises:
        OSError: a folder or a file is missing, or cannot be read.
        ValueError: a file is not what its name says.
    """
    if source == "digits":
        return load_digits()
    folder = Path(source)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {source!r}. --data takes 'digits', or a folder with MNIST or CIFAR-10.")
    if find(folder, "t10k-images-idx3-ubyte"):
        return load_mnist(folder)
    for suffix, read in ((".bin", read_cifar_binary), ("", read_cifar_pickle)):
        batches = [path for name in CIFAR_BATCHES if (path := find(folder, name + suffix))]
        test = find(folder, f"test_batch{suffix}")
        if batches and test:
            parts = [read(path) for path in batches]
            train = Part(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
            return Images("CIFAR-10", train, read(test))
    raise FileNotFoundError(
        f"{source!r} holds neither MNIST (t10k-images-idx3-ubyte, ...) nor CIFAR-10 (data_batch_1 and test_batch, or "
        f"both with .bin), each perhaps with .gz or .xz. Name the folder that these files lie in by --data."
    )


def load_digits() -> Images:
    """8 x 8 pixels of 17 levels. The last fifth is to test; in part its writers differ from those of the others."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise OSError(
            "the digits come with scikit-learn, which is not installed: `pip install scikit-learn`, or give --data "
            "a folder with MNIST or CIFAR-10."
        ) from None
    bunch: Any = load_digits()
    return split("digits", Part(bunch.images.astype(np.uint8)[..., None], bunch.target.astype(np.int32)))


def split(name: str, whole: Part) -> Images:
    size = len(whole.labels) * 4 // 5
    return Images(name, Part(*(array[:size] for array in whole)), Part(*(array[size:] for array in whole)))


# --- files


def find(folder: Path, name: str) -> Path | None:
    return next((path for suffix in OPENERS if (path := folder / (name + suffix)).is_file()), None)


def read(path: Path) -> bytes:
    try:
        with OPENERS[path.suffix if path.suffix in OPENERS else ""](path, "rb") as file:
            return file.read()
    except (gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError) as error:
        raise damaged(path, f"it cannot be decompressed: {error}") from None


def damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"{str(path)!r} is damaged or of another kind: {what}. Get the file again.")


def checked(path: Path, images: Pixels, labels: Sequence[int] | np.ndarray, classes: int) -> Part:
    numbers = np.asarray(labels)
    if len(images) != len(numbers) or not len(images):
        raise damaged(path, f"{len(images)} images and {len(numbers)} labels")
    if numbers.min() < 0 or numbers.max() >= classes:
        raise damaged(path, f"labels from {numbers.min()} to {numbers.max()}, not from 0 to {classes - 1}")
    return Part(images, numbers.astype(np.int32))


# --- MNIST


def load_mnist(folder: Path) -> Images:
    test = read_mnist(folder, "t10k")
    if find(folder, "train-images-idx3-ubyte") is None:
        return split("MNIST's test images", test)
    return Images("MNIST", read_mnist(folder, "train"), test)


def read_mnist(folder: Path, part: str) -> Part:
    images, labels = (find(folder, name) for name in (f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"))
    if images is None or labels is None:
        raise FileNotFoundError(f"{str(folder)!r} lacks {part}-labels-idx1-ubyte, the labels of its {part} images.")
    return checked(images, read_idx(images, 3)[..., None], read_idx(labels, 1), classes=256)


def read_idx(path: Path, dimensions: int) -> UInt8[np.ndarray, "..."]:
    """Two zero bytes, 8 for bytes, the number of dimensions, each as four bytes from the largest; then the numbers."""
    data, header = read(path), 4 + 4 * dimensions
    if data[:4] != bytes((0, 0, 8, dimensions)) or len(data) < header:
        raise damaged(path, f"it begins with 0x{data[:4].hex()}, not with 0x{bytes((0, 0, 8, dimensions)).hex()}")
    shape = struct.unpack(f">{dimensions}I", data[4:header])
    if len(data) - header != np.prod(shape, dtype=object):
        raise damaged(path, f"{len(data) - header} bytes after the header for {' x '.join(map(str, shape))} numbers")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


# --- CIFAR-10


def read_cifar_binary(path: Path) -> Part:
    data = read(path)
    if len(data) % (1 + CIFAR_BYTES):
        raise damaged(path, f"{len(data)} bytes are not a multiple of {1 + CIFAR_BYTES}, a label and its pixels")
    rows = np.frombuffer(data, np.uint8).reshape(-1, 1 + CIFAR_BYTES)
    return checked(path, colours_last(rows[:, 1:]), rows[:, 0], CIFAR_CLASSES)


def read_cifar_pickle(path: Path) -> Part:
    data = read(path)
    try:
        batch = CifarUnpickler(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:  # whatever a file that is no pickle makes of it
        raise damaged(path, f"it cannot be unpickled: {error}") from None
    entries = {as_text(key): value for key, value in batch.items()} if isinstance(batch, dict) else {}
    pixels, labels = entries.get("data"), entries.get("labels")
    if not (isinstance(pixels, np.ndarray) and pixels.ndim == 2 and pixels.shape[1] == CIFAR_BYTES):
        raise damaged(path, f"its 'data' is not an array of {CIFAR_BYTES} bytes an image")
    if not (isinstance(labels, list) and all(isinstance(label, int) for label in labels)):
        raise damaged(path, "its 'labels' are not a list of integers")
    return checked(path, colours_last(pixels), labels, CIFAR_CLASSES)


def as_text(key: Any) -> str:
    return key.decode("latin1") if isinstance(key, bytes) else str(key)


def colours_last(rows: UInt8[np.ndarray, "images bytes"]) -> Pixels:
    return np.ascontiguousarray(rows.reshape(-1, *CIFAR_SHAPE).transpose(0, 2, 3, 1))


def empty_bytes(*_: Any) -> UInt8[np.ndarray, " 0"]:
    return np.empty(0, np.uint8)


def byte_dtype(code: str | bytes, *_: Any) -> np.dtype[np.uint8]:
    if as_text(code) != "u1":
        raise pickle.UnpicklingError(f"an array of {as_text(code)!r}, where only bytes belong")
    return np.dtype(np.uint8, copy=True)  # the pickle then sets its state


class CifarUnpickler(pickle.Unpickler):
    """Unpickles arrays of bytes among Python's own types. A pickle may name any function to be called; this one finds
    the three names that such an array takes, and nothing of theirs that acts."""

    KNOWN = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): empty_bytes,
        ("numpy._core.multiarray", "_reconstruct"): empty_bytes,
        ("numpy", "ndarray"): "the kind of array, which empty_bytes ignores",
        ("numpy", "dtype"): byte_dtype,
    }

    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) not in self.KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR-10 file needs")
        return self.KNOWN[module, name]
