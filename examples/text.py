"""Character-level text: where it comes from, its vocabulary, its split.

The default text is the source of the Python standard library, which every machine that runs this has.
"""

import hashlib
import http.client
import os
import sysconfig
import urllib.request
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

STDLIB_CHARACTERS = 4_000_000  # a little less than there is: the same amount of text for every Python version
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
UNKNOWN = "\N{REPLACEMENT CHARACTER}"

SHAKESPEARE_FILE = "tinyshakespeare.txt"
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


class Corpus(NamedTuple):
    """An encoded text: ``characters[token]`` is what a token stands for."""

    characters: str
    train: Int32[np.ndarray, " train"]  # the first 90% of the text
    validation: Int32[np.ndarray, " validation"]  # the last 10%
    sha256: str  # of the text in UTF-8

    def decode(self, tokens: Int32[np.ndarray, " time"]) -> str:
        return "".join(self.characters[token] for token in tokens)


def load_corpus(source: str, vocabulary: int, context: int) -> Corpus:
    """Reads, encodes and splits a text.

    Args:
        source: ``"stdlib"``, ``"shakespeare"``, a text file, or a folder. A folder with ``tinyshakespeare.txt`` in it
            stands for that file, any other for all its .txt, .md, .rst and .py files in the order of their names.
        vocabulary: so many characters, the most frequent, get a symbol of their own; the others, if any, share one.
        context: length of the windows to be drawn; each part of the text must hold one and the character after it.

    Raises:
        OSError: a file is missing, cannot be read or cannot be downloaded.
        ValueError: a file is not UTF-8 or not the one of the known checksum, or the text is too short.
    """
    text = read_text(source)
    needed = 10 * (context + 1)
    if len(text) < needed:
        raise ValueError(
            f"the text of {source!r} has {len(text)} characters, but its last tenth must hold a window of {context} "
            f"and the next one, so {needed} are needed. Give a longer text with --data, or a smaller --context."
        )
    characters, tokens = encode(text, vocabulary)
    split = len(tokens) * 9 // 10
    return Corpus(characters, tokens[:split], tokens[split:], hashlib.sha256(text.encode()).hexdigest())


def encode(text: str, vocabulary: int) -> tuple[str, Int32[np.ndarray, " time"]]:
    """The symbols, in the order of their code points with `UNKNOWN` last, and the text in them."""
    code_points, position, count = np.unique(
        np.frombuffer(text.encode("utf-32-le"), np.uint32), return_inverse=True, return_counts=True
    )
    kept = np.sort(np.argsort(-count, kind="stable")[:vocabulary])
    token_of = np.full(len(code_points), len(kept), np.int32)
    token_of[kept] = np.arange(len(kept))
    characters = "".join(chr(point) for point in code_points[kept])
    return characters + UNKNOWN * (len(kept) < len(code_points)), token_of[position]


def read_text(source: str) -> str:
    if source == "stdlib":
        return read_folder(Path(sysconfig.get_path("stdlib")), "*.py")[:STDLIB_CHARACTERS]
    if source == "shakespeare":
        return find_shakespeare()
    path = Path(source)
    if (path / SHAKESPEARE_FILE).exists():
        return read_shakespeare(path / SHAKESPEARE_FILE)
    if path.is_dir():
        return read_folder(path, "**/*")
    if not path.exists():
        raise FileNotFoundError(f"no text at {source!r}. --data takes a file, a folder, 'stdlib' or 'shakespeare'.")
    return decode_utf8(path)


def read_folder(folder: Path, pattern: str) -> str:
    files = sorted(file for file in folder.glob(pattern) if file.suffix in TEXT_SUFFIXES and file.is_file())
    if not files:
        raise FileNotFoundError(
            f"no {', '.join(TEXT_SUFFIXES)} file in {str(folder)!r}. Give --data another folder, or a file."
        )
    return "".join(map(decode_utf8, files))


def decode_utf8(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{str(path)!r} is not UTF-8 text: byte {error.start} is 0x{data[error.start]:02x}. Convert the file, "
            f"or give another with --data."
        ) from None


def find_shakespeare() -> str:
    """Tiny Shakespeare from ``$FISHER_OPTAX_DATA`` or the user's cache, else downloaded into the first of the two."""
    named = os.environ.get("FISHER_OPTAX_DATA")
    folders = [*([Path(named)] if named else []), Path.home() / ".cache" / "fisher_optax"]
    for path in (folder / SHAKESPEARE_FILE for folder in folders):
        if path.exists():
            return read_shakespeare(path)
    path = folders[0] / SHAKESPEARE_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")  # renamed when whole: a kill leaves no half file behind
    try:
        download(SHAKESPEARE_URL, partial, folders)
        text = read_shakespeare(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return text


def download(url: str, path: Path, looked_in: list[Path]) -> None:
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            data = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise OSError(
            f"{SHAKESPEARE_FILE} is not in {' or '.join(map(str, looked_in))}, and {url} could not be downloaded "
            f"({getattr(error, 'reason', error)}). Download it elsewhere and name the file with --data, or its folder "
            f"with $FISHER_OPTAX_DATA."
        ) from None
    path.write_bytes(data)


def read_shakespeare(path: Path) -> str:
    data = path.read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != SHAKESPEARE_SHA256:
        raise ValueError(
            f"{str(path)!r} is not the known text: its SHA-256 starts with {sha256[:8]}, not {SHAKESPEARE_SHA256[:8]}. "
            f"Delete it to download it again, or name the file itself with --data to train on it as it is."
        )
    return data.decode()
