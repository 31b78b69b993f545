"""A GPT that `train_gpt.py` has trained, from its folder."""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from experiments.gpt_config import Config, make_model
from experiments.models.gpt import GPT
from experiments.run_folder import as_if_computed, read_config
from experiments.text import Corpus, load_corpus

Params = Any  # a tree of arrays


class Trained(NamedTuple):
    """A GPT from a folder of `train_gpt.py`."""

    config: Config
    model: GPT
    params: Params
    step: int


def read_settings(run: Path) -> tuple[Config, dict[str, Any]]:
    """Of a folder of `train_gpt.py`.

    Raises:
        FileNotFoundError, ValueError: it is none.
    """
    advice = f"Train one: python -m experiments.train_gpt --optimizer soap --out {run}"
    if not (run / "config.json").exists():
        raise FileNotFoundError(f"no run in {str(run)!r}. {advice}")
    saved = read_config(run)
    if not {"vocab", "context", "text_sha256"} <= saved.keys():
        raise ValueError(f"{str(run)!r} holds no run of train_gpt.py. {advice}")
    names = Config.__dataclass_fields__
    return Config(**{name: value for name, value in saved.items() if name in names}), saved


def load_trained(run: Path, config: Config, symbols: int) -> Trained:
    """The newest checkpoint, computed with in float32.

    Raises:
        FileNotFoundError: there is none yet.
    """
    folder = run / "checkpoints"
    options = ocp.CheckpointManagerOptions(create=False)
    manager = ocp.CheckpointManager(folder.absolute(), options=options) if folder.exists() else None
    if manager is None or (step := manager.latest_step()) is None:
        raise FileNotFoundError(f"the run in {str(run)!r} has no checkpoint yet: train_gpt.py saves one a validation.")
    params = as_if_computed(manager.restore(step, args=ocp.args.StandardRestore())["params"])
    return Trained(config, make_model(config, symbols).clone(dtype=jnp.dtype("float32")), params, step)


def corpus_of(run: Path, config: Config, saved: dict[str, Any]) -> Corpus:
    """The text that the run was trained on, in its symbols.

    Raises:
        ValueError, OSError: it is no longer there, or another one.
    """
    corpus = load_corpus(config.data, config.vocab, config.context, saved.get("characters", ""))
    if corpus.sha256 != saved["text_sha256"]:
        raise ValueError(f"{config.data!r} is no longer the text that the run in {str(run)!r} has its symbols from.")
    return corpus


def load_start(run: Path) -> tuple[Trained, str]:
    """What another run can start from, and the symbols it then reads its text in.

    Raises:
        OSError, ValueError: there is no such run, no checkpoint of it, or its text is gone and with it the symbols.
    """
    config, saved = read_settings(run)
    characters = saved.get("characters") or corpus_of(run, config, saved).characters
    return load_trained(run, config, len(characters)), characters


def digest(*arrays: Any) -> str:
    return hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in arrays)).hexdigest()
