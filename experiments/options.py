"""How a dataclass of options becomes a command line, the same for every experiment."""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def option(default: Any, help: str, kind: type | None = None) -> Any:
    """A field with what its command-line option needs; ``kind`` where the default does not tell it."""
    return dataclasses.field(default=default, metadata={"help": help, "type": kind or type(default)})


def require(config: "DataclassInstance", holds: bool, name: str, wanted: str) -> None:
    """A `ValueError` that names the option ``name``, unless ``holds``."""
    if not holds:
        raise ValueError(f"--{name.replace('_', '-')} must be {wanted}, not {getattr(config, name)}")


def add_options(
    parser: argparse.ArgumentParser,
    config: "DataclassInstance | type[DataclassInstance]",
    choices: Mapping[str, Sequence[str]],
    without: Sequence[str] = (),
) -> None:
    """An option for each field of ``config`` but those ``without``; the defaults shown are its own."""
    for field in dataclasses.fields(config):
        if field.name not in without:
            default = getattr(config, field.name)
            parser.add_argument(
                f"--{field.name.replace('_', '-')}",
                type=field.metadata["type"],
                metavar=field.metadata["type"].__name__.upper(),
                choices=choices.get(field.name),
                help=field.metadata["help"] + ("" if default is None else f" (default: {default})"),
            )


def make_parser(
    config: "type[DataclassInstance]", description: str, out: str, choices: Mapping[str, Sequence[str]]
) -> argparse.ArgumentParser:
    """A parser with an option for each field of ``config``; what is not given is absent from its result.

    Args:
        config: a dataclass whose fields are made by `option`.
        description: what the program does.
        out: default folder of a run.
        choices: the values that an option may have, by its field's name.
    """
    usage = "%(prog)s [--optimizer NAME] [--out FOLDER] [option ...], or --help"
    parser = argparse.ArgumentParser(
        description=description, usage=usage, argument_default=argparse.SUPPRESS, allow_abbrev=False
    )
    add_options(parser, config, choices)
    parser.add_argument("--out", default=out, help="folder of the run (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", default=False, help="go on with the run in --out")
    parser.add_argument("--overwrite", action="store_true", default=False, help="delete the run in --out first")
    return parser
