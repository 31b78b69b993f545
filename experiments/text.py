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
    unknown: int = 0  # characters that have no symbol of their own, in the whole text

    def decode(self, tokens: Int32[np.ndarray, " time"]) -> str:
        return "".join(self.characters[token] for token in tokens)


def load_corpus(source: str, vocabulary: int, context: int, characters: str = "") -> Corpus:
    """Reads, encodes and splits a text.

    Args:
        source: ``"stdlib"``, ``"shakespeare"``, a text file, or a folder. A folder with ``tinyshakespeare.txt`` in it
            stands for that file, any other for all its .txt, .md, .rst and .py files in the order of their names.
        vocabulary: so many characters, the most frequent, get a symbol of their own; the others, if any, share one.
        context: length of the windows to be drawn; each part of the text must hold one and the character after it.
        characters: the symbols of another `Corpus`, to read the text in these instead of ``vocabulary`` of its own.

    Raises:
        OSError: a file is missing, cannot be read or cannot be downloaded.
        ValueError: a file is not UTF-8 or not the one of the known checksum, or the text is too short.
    """
    text = read_text(source)
    known = " of the given symbols" if characters else ""
    characters = characters or symbols_of(text, vocabulary)
    tokens, unknown = tokens_of(text, characters)
    needed = 10 * (context + 1)
    if len(tokens) < needed:
        raise ValueError(
            f"the text of {source!r} has {len(tokens)} characters{known}, but its last tenth must hold a window of "
            f"{context} and the next one, so {needed} are needed. Give a longer text with --data, or a smaller "
            f"--context."
        )
    split = len(tokens) * 9 // 10
    return Corpus(characters, tokens[:split], tokens[split:], hashlib.sha256(text.encode()).hexdigest(), unknown)


def symbols_of(text: str, vocabulary: int) -> str:
    """Its most frequent characters in the order of their code points, and `UNKNOWN` last for the others, if any."""
    code_points, count = np.unique(np.frombuffer(text.encode("utf-32-le"), np.uint32), return_counts=True)
    kept = np.sort(code_points[np.argsort(-count, kind="stable")[:vocabulary]])
    return "".join(map(chr, kept)) + UNKNOWN * (len(kept) < len(code_points))


def tokens_of(text: str, characters: str) -> tuple[Int32[np.ndarray, " time"], int]:
    """A text in these symbols, and how many of its characters have none of their own: they become the one that rare
    ones share or, where there is no such, are dropped.
    """
    points, own = (np.frombuffer(x.encode("utf-32-le"), np.uint32) for x in (text, characters.removesuffix(UNKNOWN)))
    place = np.minimum(np.searchsorted(own, points), len(own) - 1)  # they are in the order of their code points
    known = own[place] == points
    tokens = np.where(known, place, len(own)).astype(np.int32)
    return tokens if len(own) < len(characters) else tokens[known], int((~known).sum())


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
