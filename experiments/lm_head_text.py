"""The texts that `lm_head.py` compares, in the symbols of a trained GPT, and how it names these."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int32

from experiments.text import UNKNOWN, Corpus, read_text, tokens_of

SHOWN = {" ": "␣", "\n": "\\n", "\t": "\\t", "\r": "\\r", "\f": "\\f", UNKNOWN: "(rare)"}
LAST_SHOWN = 0x52F  # Cyrillic: up to here the fonts of pictures have signs


class Text(NamedTuple):
    """Evenly spaced windows of a text, none over another, so that each is a draw of its own."""

    name: str
    windows: Int32[np.ndarray, "sequences context+1"]
    unknown: int  # characters that have no symbol of their own, in the whole text

    @property
    def labels(self) -> Int32[np.ndarray, "sequences context"]:
        """What is predicted."""
        return self.windows[:, 1:]


def manual() -> str:
    """The Python language reference, as ``help("if")`` shows it: prose that every Python has.

    Raises:
        OSError: this one has not.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise OSError("this Python has no pydoc_data.topics, the text of --other: name another.") from None
    return "\n".join(topics.values())


def evenly_spaced(
    option: str, tokens: Int[np.ndarray, " time"], sequences: int, context: int
) -> Int32[np.ndarray, "sequences context+1"]:
    """Windows of ``context + 1``.

    Raises:
        ValueError: the text is too short for that many; ``option`` is what the message calls it.
    """
    length = context + 1
    if len(tokens) < sequences * length:
        raise ValueError(
            f"the text of {option} has {len(tokens):,} characters, and {sequences} windows of {length} that do not "
            f"overlap need {sequences * length:,}. Give a longer text, or fewer --sequences."
        )
    first = np.linspace(0, len(tokens) - length, sequences).astype(np.int64)
    return np.asarray(tokens, np.int32)[first[:, None] + np.arange(length)]


def load_texts(corpus: Corpus, data: str, given: tuple[str | None, str | None], sizes: tuple[int, int]) -> list[Text]:
    """The two texts.

    Args:
        corpus, data: of the run, and the name of its text.
        given: what --text and --other name, as for `read_text`; None for the run's validation text and the `manual`.
        sizes: sequences and context.
    """
    found = []
    for option, source, name in zip(
        ("--text", "--other"), given, (f"validation text ({data})", "Python manual"), strict=True
    ):
        if source is None and option == "--text":
            tokens, unknown = corpus.validation, 0
            if corpus.characters.endswith(UNKNOWN):
                unknown = int((tokens == len(corpus.characters) - 1).sum())
        else:
            try:
                content = manual() if source is None else read_text(source)
            except (ValueError, OSError) as error:  # which names the option of train_gpt.py
                raise type(error)(str(error).replace("--data", option)) from None
            tokens, unknown = tokens_of(content, corpus.characters)
        found.append(Text(source or name, evenly_spaced(option, tokens, *sizes), unknown))
    return found


def shown(character: str) -> str:
    """A token in a picture or a table."""
    if character in SHOWN:
        return SHOWN[character]
    return character if character.isprintable() and ord(character) <= LAST_SHOWN else f"U+{ord(character):04X}"


def code(name: str) -> str:
    """A token in Markdown."""
    return f"`` {name} ``" if "`" in name else f"`{name}`"
